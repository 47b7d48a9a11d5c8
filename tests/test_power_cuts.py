"""After a power cut, nothing that was called done is missing or short, and going on ends with the same bytes.

A test can't cut the power, so it simulates a disk that forgets: `Disk` watches every fsync, and at chosen moments of a
run it copies what a disk would still have. That is what was synced, and of all else a random part: renamed files
without their data or with half of them, folders without their newest files, deleted files that are back.
"""

import io
import json
import os
import random
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import TINY, make_discs, make_model, make_photos

from unet_ray.config import DataConfig, PredictConfig
from unet_ray.data import cache, storage
from unet_ray.data.pairs import find_pairs
from unet_ray.data.rows import Decoder
from unet_ray.inference.ledger import Ledger
from unet_ray.inference.predict import predict
from unet_ray.models import checkpoint
from unet_ray.ray_backend.session import LOCAL
from unet_ray.settings import load_train_config
from unet_ray.training.run import train

TIMES = ("seconds", "train_seconds", "wait_seconds", "images_per_second")


class Disk:
    """Knows what a disk below `root` has stored."""

    def __init__(self, root: Path, cuts: Path) -> None:
        self.root, self.cuts = root, cuts
        self.data: dict[int, bytes] = {}
        """Inode -> contents at its last fsync."""
        self.names: dict[int, dict[str, int]] = {root.stat().st_ino: {}}
        """Inode of a folder -> its entries at its last fsync."""
        self.folders: dict[int, int] = {}
        """Inode of each known folder -> descriptor, kept open so that nothing else gets this number."""
        self.keep = cuts / "inodes"
        self.keep.mkdir(parents=True)
        self.lock = threading.RLock()
        self.events, self.moments = 0, set[int]()
        self.made: list[Path] = []

    @contextmanager
    def watched(self, moments: set[int], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        """Counts every fsync, rename, deletion and new folder; at these moments it copies what the disk would have."""
        self.moments, self.events = moments, 0
        with monkeypatch.context() as patch:
            for name in ("fsync", "replace", "rename", "unlink", "rmdir", "mkdir"):
                patch.setattr(os, name, self._counted(getattr(os, name), syncs=name == "fsync"))
            yield
        for descriptor in self.folders.values():
            os.close(descriptor)

    def _counted(self, function: Callable, *, syncs: bool) -> Callable:
        def call(*arguments, **options):
            with self.lock:
                if self.root.as_posix() in str(arguments[0]) or syncs:
                    self._event()
                result = function(*arguments, **options)
                if syncs:
                    self._stored(arguments[0])
            return result

        return call

    def _event(self) -> None:
        self.events += 1
        if self.events in self.moments:
            target = self.cuts / str(len(self.made))
            self._copy(self.root, target, random.Random(self.events))
            self.made.append(target)

    def _stored(self, descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if not path.is_relative_to(self.root):
            return
        inode = os.fstat(descriptor).st_ino
        if path.is_dir():
            self.names[inode] = {entry.name: entry.inode() for entry in os.scandir(path)}
            for entry in os.scandir(path):
                if entry.is_dir() and entry.inode() not in self.folders:
                    self.folders[entry.inode()] = os.open(entry.path, os.O_RDONLY)
        else:
            self.data[inode] = path.read_bytes()
            if not (self.keep / str(inode)).exists():
                os.link(path, self.keep / str(inode))  # so that no other file gets this number

    def _copy(self, folder: Path, target: Path, draw: random.Random) -> None:
        """Copies what is left of a folder after a cut."""
        target.mkdir()
        now = {entry.name: entry for entry in os.scandir(folder)} if folder.is_dir() else {}
        stored = self.names.get(folder.stat().st_ino, {}) if folder.is_dir() else {}
        for name in sorted({*now, *stored}):
            is_newest = name in now and now[name].inode() == stored.get(name)
            take_newest = is_newest or draw.random() < 0.5
            if take_newest and name in now and now[name].is_dir():
                self._copy(folder / name, target / name, draw)
            elif take_newest and name in now:
                (target / name).write_bytes(self._left_of(now[name], draw))
            elif name in stored:
                self._copy_stored(stored[name], target / name)

    def _copy_stored(self, inode: int, target: Path) -> None:
        """Copies a file or folder as it was stored last, though it was deleted or replaced since."""
        if inode in self.folders:
            target.mkdir()
            for name, entry in self.names.get(inode, {}).items():
                self._copy_stored(entry, target / name)
        elif inode in self.data:
            target.write_bytes(self.data[inode])

    def _left_of(self, entry: os.DirEntry, draw: random.Random) -> bytes:
        if entry.inode() in self.data:
            return self.data[entry.inode()]
        data = Path(entry.path).read_bytes()
        return data[: int(len(data) * draw.choice([0, 0.5, 1]))]


def cuts_of(run: Callable[[Path], object], folder: Path, count: int, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Runs twice: to count the moments, then to cut at `count` of them. Returns what each cut has left."""
    counting, made = folder / "counting", folder / "run"
    counting.mkdir(parents=True)
    made.mkdir()
    first = Disk(counting, folder / "no cuts")
    with first.watched(set(), monkeypatch):
        run(counting / "out")
    moments = set(random.Random(0).sample(range(1, first.events), min(count, first.events - 1)))
    disk = Disk(made, folder / "cuts")
    with disk.watched(moments, monkeypatch):
        run(made / "out")
    return [cut / "out" for cut in disk.made]


def files(out: Path) -> dict[str, bytes]:
    """Reads the files that must be the same in every run."""
    leave_out = ("summary.json", "lock.json", ".lock")
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in out.rglob("*")
        if path.is_file()
        and not path.name.endswith(".tmp")
        and path.name not in leave_out
        and path.parent.name != "manifest.parquet"
    }


# --- predict ---


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


FORMATS = {"png": ("png",), "all": ("png", "parquet", "rle", "coco", "prob")}


@pytest.mark.parametrize(("formats", "cuts"), [("png", 16), ("all", 10)])
def test_a_prediction(model, tmp_path, monkeypatch, formats, cuts):
    photos = make_photos(tmp_path / "photos", 40)
    (photos / "broken.jpg").write_bytes(b"not a picture")

    def run(out: Path):
        names = FORMATS[formats]
        config = PredictConfig(
            model=str(model), inputs=(str(photos),), out=str(out), formats=names, device="cpu", backend="torch"
        )
        return predict(config, runtime=LOCAL)

    run(tmp_path / "unbroken")
    expected = files(tmp_path / "unbroken")
    called_done = 0
    for cut in cuts_of(run, tmp_path, cuts, monkeypatch):
        rows = rows_called_done(cut)
        called_done += len(rows)
        for output in rows:
            assert not output or (cut / output).read_bytes() == expected[output], f"{cut}: {output}"
        summary = run(cut)
        assert (summary.ok, summary.failed) == (40, 1) and summary.already_done == len(rows)
        assert files(cut) == expected
    assert called_done, "some cuts came after a record"


def rows_called_done(out: Path) -> list[str]:
    """Returns the path of the mask of each row that counts as done; empty for those that failed."""
    outputs = {}
    for folder in (out / ".work/done", out / "manifest.parquet"):
        for path in folder.rglob("*.parquet"):
            for row in pq.read_table(path, columns=["path", "output"]).to_pylist():
                outputs[row["path"]] = row["output"]
    ledger = Ledger(str(out), ())
    assert sum(state.done for state in ledger.states(ledger.shards())) == len(outputs)
    return list(outputs.values())


def test_a_prediction_that_replaces_another(model, tmp_path, monkeypatch):
    """A cut while --overwrite removes the old one must not bring its masks back as the new one's."""
    photos = make_photos(tmp_path / "photos", 12)
    other = make_model(tmp_path / "other", seed=1)

    def run(out: Path, model: Path = model, **options: bool):
        config = PredictConfig(model=str(model), inputs=(str(photos),), out=str(out), backend="torch", **options)
        return predict(config, runtime=LOCAL)

    def replace(out: Path) -> None:
        run(out, other)
        run(out, overwrite=True)

    run(tmp_path / "unbroken")
    expected = files(tmp_path / "unbroken")
    for cut in cuts_of(replace, tmp_path, 10, monkeypatch):
        settings = cut / "settings.json"
        of_new = settings.exists() and json.loads(settings.read_bytes()) == json.loads(expected["settings.json"])
        run(cut, overwrite=not of_new)
        assert files(cut) == expected, cut


# --- train ---


def test_a_training(tmp_path, monkeypatch):
    images, masks = make_discs(tmp_path / "discs", 8)
    settings = [*TINY, ("data.images", str(images)), ("data.masks", str(masks)), ("train.epochs", 3)]
    config = load_train_config(settings=settings)

    def run(out: Path):
        return train(config, str(out), runtime=LOCAL)

    def result(out: Path) -> tuple[bytes, list[dict]]:
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        weights, _ = checkpoint.load_model(str(out / "model"))
        stream = io.BytesIO()
        for value in weights.state_dict().values():
            np.save(stream, value.numpy())
        return stream.getvalue(), [{k: v for k, v in line.items() if k not in TIMES} for line in lines]

    run(tmp_path / "unbroken")
    expected, resumed = result(tmp_path / "unbroken"), set()
    for cut in cuts_of(run, tmp_path, 12, monkeypatch):
        state = cut / "last/state.safetensors"
        epochs = json.loads(checkpoint.text_entries(state.read_bytes())["state"])["epoch"] if state.exists() else 0
        if epochs:
            assert len((cut / "metrics.jsonl").read_text().splitlines()) >= epochs, cut
            checkpoint.load_model(str(cut / "model"))
        resumed.add(epochs)
        if epochs < 3:
            train(config, str(cut), runtime=LOCAL, resume=True)
        assert result(cut) == expected, cut
    assert len(resumed) > 1, "some cuts came after an epoch"


# --- the cache ---


def test_a_cache(tmp_path, monkeypatch):
    images, masks = make_discs(tmp_path / "discs", 12)
    pairs = find_pairs(DataConfig(images=str(images), masks=str(masks)))
    settings = [*TINY, ("data.mask_values", [0, 255])]
    decoder = Decoder.of(load_train_config(settings=settings))
    monkeypatch.setattr(cache, "FILE_BYTES", 2 * decoder.row_bytes())
    decoded: list[str] = []

    class Counting(Decoder):
        def row(self, image, mask, image_path, mask_path):
            decoded.append(image_path)
            return super().row(image, mask, image_path, mask_path)

    counting = Counting.of(load_train_config(settings=settings))

    def fill(out: Path):
        return cache.filled(pairs, counting, str(out), cache.in_threads(1))

    complete = 0
    for cut in cuts_of(fill, tmp_path, 12, monkeypatch):
        kept = [path for path in cut.rglob("*.parquet") if path.stat().st_size] if cut.exists() else []
        decoded.clear()
        cached = fill(cut)
        complete += len(kept)
        assert len(decoded) <= 12 and len(cached.places) == 12
        decoded.clear()
        for pair in pairs:
            row, expected = cached(pair.image, pair.mask), decoder(pair.image, pair.mask)
            assert all(np.array_equal(row[name], expected[name]) for name in expected), cut
        assert not decoded, "each row was read from the cache"
    assert complete > 12


def test_network_file_systems_that_cannot_sync_are_left_to_themselves(tmp_path, monkeypatch):
    def refuse(number: int) -> Callable[[int], None]:
        def fsync(_descriptor: int) -> None:
            raise OSError(number, os.strerror(number))

        return fsync

    for number in storage.CANNOT_SYNC:
        monkeypatch.setattr(os, "fsync", refuse(number))
        storage.write_bytes(str(tmp_path / "a/b.txt"), b"b", durable=True)
        storage.sync([str(tmp_path / "a/b.txt")])
    for number in (5, 28):  # EIO, ENOSPC: the data may be lost
        monkeypatch.setattr(os, "fsync", refuse(number))
        with pytest.raises(OSError, match=r"error|No space"):
            storage.write_bytes(str(tmp_path / "a/b.txt"), b"b", durable=True)
        with pytest.raises(OSError, match=r"error|No space"):
            storage.sync([str(tmp_path / "a/b.txt")])


def test_a_mask_that_a_killed_run_left_behind_is_gone_once_its_image_fails(model, tmp_path):
    photos, out = make_photos(tmp_path / "photos", 3), tmp_path / "out"
    config = PredictConfig(model=str(model), inputs=(str(photos),), out=str(out), device="cpu", backend="torch")
    predict(config, runtime=LOCAL)
    masks = sorted(path.relative_to(out) for path in (out / "masks").rglob("*.png"))
    for folder in ("manifest.parquet", ".work/done"):  # as before the record
        shutil.rmtree(out / folder, ignore_errors=True)
    for photo in (path for path in photos.rglob("*") if path.is_file()):
        photo.write_bytes(b"\0" * photo.stat().st_size)
    summary = predict(config, runtime=LOCAL)
    assert summary.failed == 3 and masks
    assert not [path for path in (out / "masks").rglob("*") if path.is_file()]
