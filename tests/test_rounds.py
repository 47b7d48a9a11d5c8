"""Work begins while the inputs are listed: each shard is in one round, and the result is that of a whole listing."""

import threading
from pathlib import Path

import numpy as np
import pytest
from conftest import make_model
from PIL import Image

from unet_ray.config import PredictConfig, UserError
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
from unet_ray.ray_backend.session import LOCAL, Runtime

SHARD, ROUND = 4, 2


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    """Shards of four images; two of them are a round."""
    monkeypatch.setattr(survey_module, "SHARD_ROWS", SHARD)
    monkeypatch.setattr(rounds_module, "ROUND_SHARDS", ROUND)


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
    counts = []
    found = listed(tmp_path, halting(19, 9, go_on), on_listed=counts.append)
    assert next(found) == [0, 1]
    go_on.set()
    later = [*found]
    assert [shard for shards in later for shard in shards] == [2, 3, 4]
    assert all(len(shards) >= ROUND for shards in later[:-1])
    assert counts and counts == sorted(counts) and counts[-1] <= 9, "until the first round"


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


def test_a_round_that_is_left_stops_the_listing_at_a_whole_shard(tmp_path):
    go_on = threading.Event()
    found = listed(tmp_path, halting(10**6, 9, go_on))
    next(found)
    threading.Timer(0.2, go_on.set).start()
    found.close()
    assert not any(thread.name == "listing" for thread in threading.enumerate())
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


def prediction(model: Path, photos: Path, out: Path, runtime: Runtime, waiting_for: int = 0, stop_at: int = 0):
    """Predicts; the listing waits in its middle until so many masks are there, and the run is stopped at so many."""
    config = PredictConfig(model=str(model), inputs=(str(photos),), out=str(out), precision="fp32", device="cpu")
    some_done = threading.Event()

    def images():
        for number, found in enumerate(files_of(photos)):
            if number == 20 and waiting_for:
                assert some_done.wait(100), "nothing is done while the listing waits"
            yield found

    def on_progress(done: int, _failed: int, _all: int) -> None:
        if _all and done >= waiting_for:
            some_done.set()
        if stop_at and _all and done >= stop_at:
            raise KeyboardInterrupt

    return predict(config, images=images(), runtime=runtime, on_progress=on_progress)


def test_masks_are_written_while_the_listing_goes_on_and_are_those_of_a_whole_listing(
    model, photos, tmp_path, monkeypatch
):
    choices = []
    monkeypatch.setattr(predict_module, "choose", lambda work: choices.append(work) or choose(work))
    begun = prediction(model, photos, tmp_path / "begun", LOCAL, waiting_for=8)
    assert len(choices) == 1, "each round goes on with the arithmetic of the first"
    assert (begun.images, begun.ok, begun.already_done, begun.gone) == (40, 40, 0, 0)
    with pytest.raises(KeyboardInterrupt):
        prediction(model, photos, tmp_path / "stopped", LOCAL, waiting_for=8, stop_at=12)
    gone_on = prediction(model, photos, tmp_path / "stopped", LOCAL)
    assert gone_on.ok == 40 and 12 <= gone_on.already_done < 40
    monkeypatch.setattr(rounds_module, "ROUND_SHARDS", 10**6)
    prediction(model, photos, tmp_path / "whole", LOCAL)
    whole = contents(tmp_path / "whole")
    assert len(whole) == 40 and whole == contents(tmp_path / "begun") == contents(tmp_path / "stopped")


def test_rounds_through_ray_end_with_the_same_masks(model, photos, tmp_path, ray_cluster):
    done = prediction(model, photos, tmp_path / "ray", Runtime(), waiting_for=8)
    assert (done.images, done.ok) == (40, 40)
    prediction(model, photos, tmp_path / "local", LOCAL)
    assert contents(tmp_path / "ray") == contents(tmp_path / "local")
