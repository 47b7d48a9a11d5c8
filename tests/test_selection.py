"""`unet-ray select`: which images to label next, what it writes, and that corrections stay."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from conftest import TINY, environment, flags, make_discs, make_model
from PIL import Image

from unet_ray.cli import main
from unet_ray.config import PredictConfig, UserError
from unet_ray.ray_backend.session import LOCAL, Runtime
from unet_ray.report.of_selection import of_selection
from unet_ray.selection.choose import CANDIDATES, NOTHING, classes_shown, divided, merged, shown_classes, spread
from unet_ray.selection.select import select

# --- the choice, without a network ---


def test_images_are_named_after_the_rarest_class_that_they_show():
    pixels = np.array([[9, 1, 0], [9, 1, 1], [9, 0, 0], [0, 5, 0], [9, 2, 0]])
    shown = classes_shown(pixels)
    assert shown_classes(shown, shown.sum(axis=0)).tolist() == [1, 2, NOTHING, 1, 1]


def test_seats_follow_the_uncertainty_of_each_group():
    uncertainty = np.array([0.1] * 80 + [0.8] * 10 + [0.0] * 10)
    shows = np.array([1] * 80 + [2] * 10 + [NOTHING] * 10)
    strata = divided(uncertainty, shows, 8)
    assert {stratum.shows: stratum.seats for stratum in strata} == {1: 4, 2: 4}, "a rare class has more than its share"
    assert all(stratum.rows.tolist() == np.flatnonzero(shows == stratum.shows).tolist() for stratum in strata)
    assert sum(stratum.seats for stratum in divided(uncertainty, shows, 1000)) == 100
    nothing = divided(np.zeros(6), np.array([0, 0, 1, 1, 1, 1]), 3)
    assert sum(stratum.seats for stratum in nothing) == 3, "also if the network is sure of all"


def test_of_many_images_the_most_uncertain_and_some_of_all_others_are_compared():
    uncertainty = np.linspace(0, 1, 10_000)
    [stratum] = divided(uncertainty, np.ones(10_000, int), 2)
    rows = set(stratum.rows.tolist())
    assert len(rows) == CANDIDATES and set(range(10_000 - CANDIDATES // 2, 10_000)) <= rows
    assert np.histogram(stratum.rows, 8, (0, 8000))[0].min() > CANDIDATES / 2 / 10
    [many] = divided(uncertainty, np.ones(10_000, int), 9_000)
    assert len(many.rows) == 9_000


def test_of_images_that_cover_alike_the_more_uncertain_come_first():
    uncertainty = np.array([0.1, 0.9, 0.3, 0.8])
    assert spread(uncertainty, np.eye(4, dtype=np.float32), 4) == [1, 3, 2, 0]


def test_what_is_typical_comes_before_what_is_odd():
    generator = np.random.default_rng(0)
    typical = np.array([1, 0, 0]) + 0.05 * generator.normal(size=(20, 3))
    other = np.array([0, 1, 0]) + 0.05 * generator.normal(size=(20, 3))
    odd = np.array([[0, 0, 1]])
    chosen = spread(np.full(41, 0.5), np.concatenate([odd, typical, other]).astype(np.float32), 3)
    assert 0 not in chosen[:2] and {chosen[0] <= 20, chosen[1] <= 20} == {True, False}


def test_lookalikes_do_not_fill_the_list():
    uncertainty = np.array([0.9, 0.89, 0.88, 0.87, 0.5, 0.4])
    directions = np.array([[1, 0, 0]] * 4 + [[0, 1, 0], [0, 0, 1]], np.float32)
    assert spread(uncertainty, directions, 3) == [0, 4, 5]
    assert sorted(spread(uncertainty, directions, 6)) == list(range(6)), "copies come last, but they come"


def test_any_beginning_of_the_list_is_divided_as_the_whole():
    assert merged([[1, 2, 3, 4], [10, 20]]) == [1, 10, 2, 3, 20, 4]


# --- the command ---


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Returns a folder with 12 images (photos), labels of 4 of them, and a RUN trained on these."""
    folder = tmp_path_factory.mktemp("trained")
    images, masks = make_discs(folder / "discs", 40)
    (folder / "labels").mkdir()
    for mask in sorted(masks.iterdir())[:4]:
        shutil.copy(mask, folder / "labels" / mask.name)
    settings = flags([*TINY, ("train.epochs", 20), ("data.val_fraction", 0.25)])
    command = [
        "train",
        "--images",
        str(images),
        "--masks",
        str(folder / "labels"),
        "--out",
        str(folder / "RUN"),
        "--local",
    ]
    assert CliRunner().invoke(main, [*command, "--no-report", *settings]).exit_code == 0
    return folder


def config(folder: Path, out: Path, **options) -> PredictConfig:
    options = {"inputs": (str(folder / "discs/images"),), "formats": ("labelme",), **options}
    return PredictConfig(model=str(folder / "RUN"), out=str(out), **options)


def paths(picks: Path) -> list[str]:
    with picks.open(newline="") as stream:
        return [Path(row["path"]).name for row in csv.DictReader(stream)]


def test_it_writes_picks_annotations_and_a_page(trained, tmp_path):
    out = tmp_path / "PICKS"
    command = [
        "select",
        str(trained / "RUN"),
        str(trained / "discs/images"),
        "--count",
        "6",
        "--out",
        str(out),
        "--local",
    ]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    assert "6 of 36 images chosen" in result.output and "4 images are left out" in result.output
    picked = paths(out / "picks.csv")
    labelled = {path.name for path in (trained / "labels").iterdir()}
    assert len(set(picked)) == 6 and not labelled & set(picked)
    found = {path.stem for path in (out / "annotations/labelme").rglob("*.json")}
    assert found == {Path(name).stem for name in picked}
    page = (out / "report.html").read_text()
    assert page.count("data:image/jpeg") == 18, "image, mask and map of each"
    scores = {
        Path(row["path"]).name: row["uncertainty"] for row in pq.read_table(out / "pool/manifest.parquet").to_pylist()
    }
    assert len(scores) == 40


def test_the_page_has_the_map_of_a_network_with_one_output_for_each_of_two_classes(discs, tmp_path):
    model = make_model(tmp_path / "RUN", ("model.num_classes", 2))
    pool = PredictConfig(model=str(model), inputs=(str(discs[0]),), out=str(tmp_path / "PICKS"), formats=("labelme",))
    select(pool, 2, runtime=LOCAL)
    assert of_selection(str(tmp_path / "PICKS")).count("data:image/jpeg") == 6, "image, mask and map of each"


def test_two_workers_and_one_process_choose_the_same(trained, tmp_path, ray_cluster):
    for name, runtime, workers in (("local", LOCAL, 0), ("two", Runtime(), 2)):
        select(config(trained, tmp_path / name, workers=workers), 7, runtime=runtime)
    assert paths(tmp_path / "local/picks.csv") == paths(tmp_path / "two/picks.csv")


def test_given_again_it_keeps_corrections(trained, tmp_path):
    out = tmp_path / "PICKS"
    first = select(config(trained, out), 3, runtime=LOCAL)
    corrected = next((out / "annotations/labelme").rglob("*.json"))
    corrected.write_text(json.dumps({**json.loads(corrected.read_text()), "flags": {"mine": True}}))
    assert select(config(trained, out), 3, runtime=LOCAL).picks == first.picks
    assert json.loads(corrected.read_text())["flags"] == {"mine": True}
    with pytest.raises(UserError, match="has other picks"):
        select(config(trained, out), 4, runtime=LOCAL)
    assert json.loads(corrected.read_text())["flags"] == {"mine": True}
    assert len(select(config(trained, out, overwrite=True), 4, runtime=LOCAL).picks) == 4
    assert [json.loads(file.read_text())["flags"] for file in (out / "annotations/labelme").rglob("*.json")] == [{}] * 4


def test_a_pool_that_has_moved_keeps_its_corrections(trained, tmp_path):
    pool, out = tmp_path / "pool", tmp_path / "PICKS"
    shutil.copytree(trained / "discs/images", pool)
    first = select(config(trained, out, inputs=(str(pool),)), 3, runtime=LOCAL)
    stat = (out / "annotations/labelme" / f"{Path(first.picks[0].path).stem}.json").stat()
    pool.rename(tmp_path / "moved")
    again = config(trained, out, inputs=(str(tmp_path / "moved"),), moved=(f"{pool}={tmp_path / 'moved'}",))
    second = select(again, 3, runtime=LOCAL)
    assert [Path(pick.path).name for pick in second.picks] == [Path(pick.path).name for pick in first.picks]
    now = (out / "annotations/labelme" / f"{Path(first.picks[0].path).stem}.json").stat()
    assert (now.st_mtime_ns, now.st_ino) == (stat.st_mtime_ns, stat.st_ino)


def test_stopped_anywhere_the_same_command_ends_with_the_same_picks(trained, tmp_path):
    whole = select(config(trained, tmp_path / "whole"), 5, runtime=LOCAL)
    out = tmp_path / "out"
    program = f"""
import os, sys
from unet_ray.selection import select as module
after = sys.argv[1]
real = getattr(module, after)
def stopped(*arguments, **options):
    found = real(*arguments, **options)
    os.kill(os.getpid(), {int(signal.SIGKILL)})
setattr(module, after, stopped)
from unet_ray.cli import main
main(sys.argv[2:])
"""
    arguments = [
        "select",
        str(trained / "RUN"),
        str(trained / "discs/images"),
        "--count",
        "5",
        "--out",
        str(out),
        "--local",
    ]
    for after in ("predict", "_chosen", "_write"):
        killed = subprocess.run([sys.executable, "-c", program, after, *arguments], env=environment(), check=False)
        assert killed.returncode == -signal.SIGKILL
    assert select(config(trained, out), 5, runtime=LOCAL).picks == whole.picks


def test_a_pool_of_several_classes_parquet_pages_and_broken_files(tmp_path):
    model = make_model(tmp_path / "model", ("model.num_classes", 3), ("data.mask_values", [0, 1, 2]))
    images, _ = make_discs(tmp_path / "discs", 6)
    (images / "broken.png").write_bytes(b"\x89PNG nothing")
    shutil.copy(images / "a_000.png", images / "copy.png")
    pages = [Image.open(images / name) for name in ("b_001.png", "c_002.png")]
    pages[0].save(images / "stack.tif", save_all=True, append_images=pages[1:])
    out = tmp_path / "PICKS"
    command = ["select", str(model), str(images), "--count", "20", "--out", str(out), "--format", "coco", "--local"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    assert "9 of 9 images chosen" in result.output and "1 images can't be read" in result.output
    coco = json.loads((out / "annotations/coco.json").read_text())
    assert len(coco["images"]) == 9
    assert any("#1" in name for name in paths(out / "picks.csv"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"inputs": ("nowhere",)}, "no such folder"),
        ({"model": "nowhere"}, "nowhere"),
        ({"count": 0}, "--count 0"),
    ],
)
def test_errors_are_one_line_and_leave_nothing(trained, tmp_path, change, words):
    options = {"inputs": (str(trained / "discs/images"),), "model": str(trained / "RUN"), "count": 3, **change}
    command = [
        "select",
        options["model"],
        *options["inputs"],
        "--count",
        str(options["count"]),
        "--out",
        str(tmp_path / "P"),
    ]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 2 and words in result.output and "Traceback" not in result.output
    assert not os.path.lexists(tmp_path / "P")


def test_a_folder_with_other_files_is_refused(trained, tmp_path):
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(UserError, match="holds other files"):
        select(config(trained, tmp_path), 3, runtime=LOCAL)
