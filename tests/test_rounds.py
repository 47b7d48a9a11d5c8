"""Work begins while the inputs are listed: each shard is in one round, and the result is that of a whole listing."""

import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from conftest import make_model
from PIL import Image

from unet_ray.config import PredictConfig, UserError
from unet_ray.data import buckets
from unet_ray.data.inputs import ImageFile
from unet_ray.inference import predict as predict_module
from unet_ray.inference import rounds as rounds_module
from unet_ray.inference import survey as survey_module
from unet_ray.inference.choose_arithmetic import choose
from unet_ray.inference.chunk_size import RowCost
from unet_ray.inference.ledger import Ledger
from unet_ray.inference.predict import predict
from unet_ray.inference.rounds import rounds
from unet_ray.inference.survey import Survey
from unet_ray.ray_backend import autoscaling, nodes
from unet_ray.ray_backend.inference import pool_of_replicas
from unet_ray.ray_backend.session import LOCAL, Runtime

SHARD, ROUND = 4, 2


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    """Shards of four images; two of them are a round."""
    monkeypatch.setattr(survey_module, "SHARD_ROWS", SHARD)
    monkeypatch.setattr(rounds_module, "ROUND_SHARDS", ROUND)
    monkeypatch.setattr(rounds_module, "ROUND_SECONDS", 0.0)
    monkeypatch.setattr(rounds_module, "SHARD_ROWS", SHARD)


def image(number: int, *, size: int = 1) -> ImageFile:
    return ImageFile(f"{number:03d}", f"/in/{number:03d}.png", f"{number:03d}.png", size, 7)


def outputs_of(image: ImageFile):
    yield f"{image.key}.png"


def listed(folder: Path, images, **options):
    return rounds(Survey(Ledger(str(folder), ()), RowCost(1000, 1.0)), images, outputs_of, at_once=True, **options)


def halting(count: int, after: int, go_on: threading.Event):
    """Yields images, and waits after some of them until it may go on."""
    for number in range(count):
        if number == after:
            assert go_on.wait(20)
        yield image(number)


def test_what_is_listed_is_worked_on_and_each_shard_is_in_one_round(tmp_path):
    go_on = threading.Event()
    waits = []
    found = listed(tmp_path, halting(19, 9, go_on), on_listed=lambda: waits.append(1))
    assert next(found) == [0, 1]
    assert waits
    go_on.set()
    later = [*found]
    assert [shard for shards in later for shard in shards] == [2, 3, 4]
    assert all(len(shards) >= ROUND for shards in later[:-1])


def test_shards_of_earlier_runs_are_ready_when_nothing_in_them_has_changed(tmp_path):
    assert [*listed(tmp_path, map(image, range(22)))][-1][-1] == 5
    go_on = threading.Event()

    def images():
        yield from (image(number, size=2 if number == 5 else 1) for number in range(20) if number != 9)
        yield from [image(0), image(1)]  # again
        yield from map(image, range(22, 34))
        assert go_on.wait(20)

    ready = []
    found = listed(tmp_path, images())
    while len(ready) < 5:
        ready += next(found)
    assert sorted(ready) == [0, 3, 4, 6, 7], "not the changed, nor those with images that are gone or not listed yet"
    go_on.set()
    assert sorted(shard for shards in found for shard in shards) == [1, 2, 5, 8]
    sizes = Ledger(str(tmp_path), ()).inputs(1, ["size"])["size"].to_pylist()
    assert sizes == [1, 2, 1, 1]


def test_all_is_listed_first_if_it_must_be(tmp_path):
    survey = Survey(Ledger(str(tmp_path), ()), RowCost(1000, 1.0))
    assert [*rounds(survey, map(image, range(30)), outputs_of, at_once=False)] == [[*range(8)]]
    assert survey.complete and survey.count == 30


def test_a_listing_that_is_quick_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(rounds_module, "ROUND_SECONDS", 60.0)
    go_on = threading.Event()
    threading.Timer(0.5, go_on.set).start()
    assert [*listed(tmp_path, halting(30, 20, go_on))] == [[*range(8)]]


def test_a_round_that_is_left_stops_the_listing_at_a_whole_shard(tmp_path):
    go_on = threading.Event()
    found = listed(tmp_path, halting(10**6, 9, go_on))
    next(found)
    threading.Timer(0.2, go_on.set).start()
    found.close()
    assert not buckets.left_a_request_behind()
    rows = [len(Ledger(str(tmp_path), ()).inputs(shard, ["path"])) for shard in Ledger(str(tmp_path), ()).shards()]
    assert set(rows) == {SHARD} and len(rows) < 100


def test_what_goes_wrong_with_the_listing_is_raised(tmp_path):
    def images():
        yield from map(image, range(9))
        raise UserError("no such bucket")

    found = listed(tmp_path, images())
    with pytest.raises(UserError, match="no such bucket"):
        for _ in range(3):
            next(found)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for number in range(40):
        Image.fromarray(generator.integers(0, 256, (24, 32, 3), np.uint8)).save(folder / f"{number:03d}.png")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


def files_of(folder: Path):
    for path in sorted(folder.iterdir()):
        yield ImageFile(path.stem, str(path), path.name, path.stat().st_size, path.stat().st_mtime_ns)


def contents(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*.png")}


def prediction(
    model: Path,
    photos: Path,
    out: Path,
    runtime: Runtime = LOCAL,
    waiting_for: int = 0,
    stop_at: int = 0,
    in_the_middle=lambda: None,
    **options,
):
    """Predicts; the listing waits in its middle until so many masks are there, and the run is stopped at so many."""
    settings = {"precision": "fp32", "device": "cpu", **options}
    config = PredictConfig(model=str(model), inputs=(str(photos),), out=str(out), **settings)
    some_done = threading.Event()

    def images():
        for number, found in enumerate(files_of(photos)):
            if number == 20 and waiting_for:
                assert some_done.wait(100), "nothing is done while the listing waits"
                in_the_middle()
            yield found

    def on_progress(done: int, _failed: int, total: int) -> None:
        if total and done >= waiting_for:
            some_done.set()
        if stop_at and total and done >= stop_at:
            raise KeyboardInterrupt

    return predict(config, images=images(), runtime=runtime, on_progress=on_progress)


def test_masks_are_written_while_the_listing_goes_on_and_are_those_of_a_whole_listing(
    model, photos, tmp_path, monkeypatch
):
    choices = []
    monkeypatch.setattr(predict_module, "choose", lambda work: choices.append(work) or choose(work))
    begun = prediction(model, photos, tmp_path / "begun", waiting_for=8)
    assert len(choices) == 1, "each round goes on with the arithmetic of the first"
    assert (begun.images, begun.ok, begun.already_done, begun.gone) == (40, 40, 0, 0)
    with pytest.raises(KeyboardInterrupt):
        prediction(model, photos, tmp_path / "stopped", waiting_for=8, stop_at=12)
    gone_on = prediction(model, photos, tmp_path / "stopped")
    assert gone_on.ok == 40 and 12 <= gone_on.already_done < 40
    monkeypatch.setattr(rounds_module, "ROUND_SHARDS", 10**6)
    prediction(model, photos, tmp_path / "whole")
    whole = contents(tmp_path / "whole")
    assert len(whole) == 40 and whole == contents(tmp_path / "begun") == contents(tmp_path / "stopped")


def test_a_run_that_goes_on_keeps_its_arithmetic_also_if_new_images_are_listed_first(model, photos, tmp_path):
    pytest.importorskip("openvino")
    later = tmp_path / "photos"
    later.mkdir()
    for path in sorted(photos.iterdir())[:16]:
        shutil.copy(path, later)
    assert prediction(model, later, tmp_path / "out", backend="torch").arithmetic == ["torch in fp32 on CPUs"]
    for path in sorted(photos.iterdir())[:24]:
        shutil.copy(path, later / f"+{path.name}")
    seen = []
    config = PredictConfig(model=str(model), inputs=(str(later),), out=str(tmp_path / "out"))
    done = predict(config, images=files_of(later), runtime=LOCAL, on_progress=lambda *told: seen.append(told))
    assert (done.ok, done.already_done, done.arithmetic) == (40, 16, ["torch in fp32 on CPUs"])
    counts = [told[0] for told in seen if told[2]]
    assert counts == sorted(counts) and counts[0] == 16, "what is done already is no work of this run"
    assert seen[-1] == (40, 0, 40)


def test_a_model_that_is_replaced_between_two_rounds_is_an_error(photos, tmp_path):
    model, other = make_model(tmp_path / "model"), make_model(tmp_path / "other", seed=1)

    def replace():
        for path in (path for path in other.iterdir() if path.is_file()):
            shutil.copy(path, model)

    with pytest.raises(UserError, match="was replaced while it was in use: put the old one back"):
        prediction(model, photos, tmp_path / "out", waiting_for=8, in_the_middle=replace)
    assert 8 <= len(contents(tmp_path / "out")) < 40


def test_it_does_not_depend_on_the_listings_speed_what_pays():
    assert rounds_module.expected(7) == 7
    assert rounds_module.expected(8) == rounds_module.expected(10**9) == rounds_module.MANY


def test_a_later_round_goes_on_with_the_replicas_that_still_fit(monkeypatch):
    there = [{"NodeID": "a", "Resources": {"CPU": 2.0}}]
    monkeypatch.setattr(nodes, "alive", lambda: there)
    monkeypatch.setattr(nodes, "look", lambda: None)
    monkeypatch.setattr(autoscaling, "may_grow", lambda: False)
    with pytest.raises(UserError, match="--workers 4: the cluster has 2 CPUs"):
        pool_of_replicas(4, "cpu")
    assert pool_of_replicas(4, "cpu", again=True).replicas == 2


def test_rounds_through_ray_end_with_the_same_masks(model, photos, tmp_path, ray_cluster):
    done = prediction(model, photos, tmp_path / "ray", Runtime(), waiting_for=8)
    assert (done.images, done.ok) == (40, 40)
    prediction(model, photos, tmp_path / "local")
    assert contents(tmp_path / "ray") == contents(tmp_path / "local")
