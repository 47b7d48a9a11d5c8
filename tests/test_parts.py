"""`predict --part I/N`: parts that run at the same time give what one run gives."""

import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import environment, make_model, make_photos, recorded
from PIL import Image

from unet_ray.config import PredictConfig, UserError
from unet_ray.data.inputs import iter_images
from unet_ray.data.output_lock import output_lock
from unet_ray.inference import output_folder
from unet_ray.inference import predict as prediction
from unet_ray.inference.arithmetic import Arithmetic
from unet_ray.inference.naming import Naming
from unet_ray.inference.parts import WHOLE, Part
from unet_ray.inference.predict import predict
from unet_ray.ray_backend.session import LOCAL

FORMATS = ("png", "coco", "kaggle", "parquet")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """60 images; one is broken, and for some the names of the masks collide."""
    folder = make_photos(tmp_path_factory.mktemp("photos"), 55)
    for name in ("a.jpg", "a.png", "a.png.jpg", "a.png.png"):
        Image.new("RGB", (9, 7), (200, 20, 30)).save(folder / name)
    (folder / "broken.jpg").write_text("no image")
    return folder


def run(model: Path, photos: Path, out: Path, part: str | None = None, **options):
    settings = {"formats": FORMATS, "precision": "fp32", **options}
    return predict(
        PredictConfig(model=str(model), inputs=(str(photos),), out=str(out), part=part, **settings), runtime=LOCAL
    )


def rows(out: Path) -> dict[str, dict]:
    found = pq.read_table(out / "manifest.parquet").to_pylist()
    by_path = {row["path"]: {k: v for k, v in row.items() if k != "milliseconds"} for row in found}
    assert len(by_path) == len(found), "an image has two rows"
    return by_path


def masks(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in (out / "masks").rglob("*.png")}


def without_collisions(found: dict, key) -> dict:
    """Leaves out the images whose masks' names collide: which of them takes which name depends on the parts."""
    return {name: value for name, value in found.items() if not Path(key(name)).name.startswith("a")}


@pytest.fixture(scope="module")
def whole(model, photos, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    run(model, photos, out)
    return out


def check_equal(out: Path, whole: Path) -> None:
    found, expected = rows(out), rows(whole)
    assert found.keys() == expected.keys()
    assert without_collisions(found, str) == without_collisions(expected, str)
    assert without_collisions(masks(out), str) == without_collisions(masks(whole), str)
    outputs = [row["output"] for row in found.values() if row["output"]]
    assert len(outputs) == len(set(outputs)) == len(masks(out)) == 59
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["images"], summary["ok"], summary["failed"], summary["gone"]) == (60, 59, 1, 0)
    files = {image["file_name"] for image in json.loads((out / "coco.json").read_text())["images"]}
    assert files == {str(Path(path).relative_to(path_of_photos(found))) for path, row in found.items() if row["output"]}
    assert len((out / "submission.csv").read_text().splitlines()) == 60  # a line for each mask, and the names


def path_of_photos(found: dict) -> Path:
    return next(Path(path).parent for path in found if path.endswith("broken.jpg"))


def test_parts_one_after_the_other_give_what_one_run_gives(model, photos, whole, tmp_path):
    out = tmp_path / "out"
    first = run(model, photos, out, "2/3")
    assert first.parts_missing == ("1/3", "3/3") and 5 < first.images < 40
    assert not (out / "summary.json").exists() and not (out / "coco.json").exists()
    second = run(model, photos, out, "3/3")
    assert second.parts_missing == ("1/3",)
    last = run(model, photos, out, "1/3")
    assert (last.images, last.parts_missing, last.ok) == (60, (), 59)
    assert last.already_done == first.images + second.images
    check_equal(out, whole)


def test_more_parts_than_images(model, photos, tmp_path):
    few, out = tmp_path / "few", tmp_path / "out"
    make_photos(few, 2)
    summaries = [run(model, few, out, f"{number}/5") for number in range(1, 6)]
    assert [s.images for s in summaries][:-1].count(0) >= 2
    assert summaries[-1].images == 2 and len(rows(out)) == 2


@pytest.mark.usefixtures("small_chunks")
def test_parts_at_once_two_of_them_killed_and_given_again(model, photos, whole, tmp_path):
    out = tmp_path / "out"

    def command(part: int) -> subprocess.Popen:
        options = ["--out", out, "--part", f"{part}/3", "--precision", "fp32", "--format", ",".join(FORMATS), "--json"]
        arguments = [sys.executable, "-m", "unet_ray", "predict", model, photos, *options, "--local"]
        return subprocess.Popen([*map(str, arguments)], env=environment(), stdout=subprocess.PIPE, text=True)

    killed = [command(1), command(2)]
    deadline = time.monotonic() + 120
    while not recorded(out):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    for process in killed:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    before = recorded(out)
    summaries = []
    for process in [command(1), command(2), command(3)]:
        threading.Thread(target=lambda process=process: summaries.append(json.loads(process.communicate()[0]))).start()
    while len(summaries) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert any(not summary["parts_missing"] for summary in summaries)
    check_equal(out, whole)
    assert before and all(path.stat().st_mtime_ns == written for path, written in before.items()), "done twice"
    assert (out / "report.html").is_file()


def test_a_new_image_later_is_done_by_its_part(model, tmp_path):
    photos = make_photos(tmp_path / "photos", 12)
    out = tmp_path / "out"
    for part in ("1/2", "2/2"):
        run(model, photos, out, part)
    Image.new("RGB", (9, 7), (200, 20, 30)).save(photos / "new.jpg")
    summaries = [run(model, photos, out, part) for part in ("1/2", "2/2")]
    assert summaries[-1].images == 13 and len(rows(out)) == 13
    assert "masks/new.png" in masks(out)


def test_what_does_not_go_together_is_refused(model, photos, tmp_path):
    out = tmp_path / "out"
    run(model, photos, out, "1/3")
    for part in ("1/2", None):
        with pytest.raises(UserError, match=r"holds another run \(other parts\): choose another --out"):
            run(model, photos, out, part)
    with pytest.raises(UserError, match="it would remove the other parts"):
        run(model, photos, out, "2/3", overwrite=True)
    for text in ("0/3", "4/3", "2", "a/b", "1/0", "-1/3"):
        with pytest.raises(UserError, match="such as 1/3, 2/3 and 3/3"):
            run(model, photos, out, text)
    with output_lock(str(out), ".work/lock-2.json"), pytest.raises(UserError, match=r"another run .* is writing"):
        run(model, photos, out, overwrite=True)
    with output_lock(str(out), ".work/lock.json"), pytest.raises(UserError, match=r"another run .* is writing"):
        run(model, photos, out, "2/3")
    assert run(model, photos, out, overwrite=True).images == 60


def test_wrong_inputs_of_a_part_do_not_refuse_the_right_ones(model, photos, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UserError, match="no such folder"):
        run(model, tmp_path / "mistyped", out, "1/2")
    assert run(model, photos, out, "1/2").parts_missing == ("2/2",)
    with pytest.raises(UserError, match="other inputs"):
        run(model, tmp_path / "mistyped", out, "2/2")
    assert run(model, photos, out, "2/2").images == 60


def test_parts_go_on_with_the_arithmetic_that_the_first_one_chose(model, photos, tmp_path, monkeypatch):
    out = tmp_path / "out"
    run(model, photos, out, "2/2")
    [used] = output_folder.arithmetics(str(out))
    with pytest.raises(UserError, match="begun with"):
        run(model, photos, out, "1/2", backend="openvino" if used.backend == "torch" else "torch")
    other = Arithmetic("cpu", used.backend, "bf16")
    monkeypatch.setattr(prediction, "choose", lambda _work: other)
    run(model, photos, out, "1/2")
    assert output_folder.arithmetics(str(out)) == [used]


def test_two_parts_that_choose_at_once_agree_on_the_choice_of_the_lower(model, photos, tmp_path, monkeypatch):
    out = tmp_path / "out"
    torch, openvino = Arithmetic("cpu", "torch", "fp32"), Arithmetic("cpu", "openvino", "fp32")

    def choose_late(_work) -> Arithmetic:
        """The other part records its choice after this one has looked whether there is one."""
        output_folder.record_arithmetics(str(out), [torch], Part(1, 2))
        return openvino

    monkeypatch.setattr(prediction, "choose", choose_late)
    run(model, photos, out, "2/2", precision="auto")
    assert {a.backend for a in output_folder.arithmetics(str(out))} == {"torch"}


def test_every_image_and_every_path_of_a_mask_is_of_exactly_one_part(photos):
    images = list(iter_images(str(photos)))
    naming = Naming("{stem}.png")  # without folders, so that many collide
    shares = [Part(number, 4).share(images, naming) for number in range(1, 5)]
    owned = [image.path for mine, _ in shares for image in mine]
    assert sorted(owned) == sorted(image.path for image in images)
    for part, (_, proposals) in zip(range(1, 5), shares, strict=True):
        series = proposals(images[0])
        assert all(Part(part, 4).has_mask(next(series)) for _ in range(5))
    assert WHOLE.share(images, naming) == (images, naming)
