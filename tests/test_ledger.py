"""The ledger does each image once, even if runs are stopped and images are added, changed or tried again."""

import os
import pickle
import time
from itertools import count

import numpy as np
import pyarrow.parquet as pq
import pytest

from unet_ray.data import storage
from unet_ray.data.inputs import ImageFile
from unet_ray.inference import ledger as ledger_module
from unet_ray.inference.chunk_size import RowCost, chunk_rows
from unet_ray.inference.digests import DigestMap, digests_of
from unet_ray.inference.formats.kaggle import KaggleSubmission
from unet_ray.inference.ledger import SHARD_ROWS, Ledger, Loader
from unet_ray.inference.survey import Survey


def images(numbers, *, size=1, suffix=".jpg"):
    return [ImageFile(f"{n:05d}", f"/in/{n:05d}{suffix}", f"{n:05d}{suffix}", size, 7) for n in numbers]


def outputs_of(image):
    yield f"{image.key}.png"
    yield f"{image.name}.png"
    for number in count(2):
        yield f"{image.key}-{number}.png"


def open_ledger(folder, **options) -> Ledger:
    return Ledger(str(folder), (KaggleSubmission.table,), **options)


def survey(folder, found) -> int:
    survey = Survey(open_ledger(folder), RowCost(1000, 1.0))
    survey.add_all(iter(found), outputs_of)
    survey.close()
    return survey.count


def todo(ledger: Ledger) -> list[int]:
    return [number for state in ledger.states(ledger.shards()) for number in state.todo]


def do(ledger: Ledger, number: int, failed=()) -> int:
    """Records made-up results for the remaining rows of a chunk. Returns the number of rows."""
    chunk = ledger.load(number)
    rows = len(chunk["path"])
    bad = np.isin(chunk["path"], [os.fsencode(p) for p in failed])
    results = {
        "path": [p.decode() for p in chunk["path"]],
        "name": [p.decode() for p in chunk["name"]],
        "status": np.where(bad, "failed", "ok"),
        "error": np.where(bad, "broken", ""),
        "height": [2] * rows,
        "width": [3] * rows,
        "output": [p.decode() for p in chunk["output"]],
        "pixels": [[5, 1]] * rows,
        "confidence": [0.5] * rows,
        "uncertainty": [0.1] * rows,
        "milliseconds": [1.0] * rows,
        "size": chunk["size"],
        "mtime_ns": chunk["mtime_ns"],
        "checksum": ["c0ffee"] * rows,
        "runs": [f"{size} 1" for size in chunk["size"]],
    }
    if rows:
        ledger.record(number, chunk["row"], results)
    return rows


def do_all(ledger: Ledger, **options) -> int:
    """Records all remaining rows and merges all shards. Returns the number of rows."""
    done = sum(do(ledger, number, **options) for number in todo(ledger))
    for shard, state in zip(ledger.shards(), ledger.states(ledger.shards()), strict=True):
        if not state.merged:
            ledger.merge_shard(shard)
    return done


def wait_until(condition) -> None:
    """Waits until the condition holds. Fails after 20 seconds."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def contents(folder) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.parquet") if p.is_file()}


def manifest(folder) -> list[dict]:
    return pq.read_table(folder / "manifest.parquet").to_pylist()


def test_each_image_is_in_one_chunk_of_one_shard(tmp_path):
    assert survey(tmp_path, images(range(5000))) == 5000
    numbers = todo(open_ledger(tmp_path))
    chunks = [open_ledger(tmp_path).load(number) for number in numbers]
    assert [p for chunk in chunks for p in chunk["path"]] == [f"/in/{n:05d}.jpg".encode() for n in range(5000)]
    assert len(open_ledger(tmp_path).shards()) == 2
    assert [len(chunk["path"]) for chunk in chunks] == [64] * 64 + [14] * 64 + [8]
    assert do_all(open_ledger(tmp_path)) == 5000
    assert [row["path"] for row in manifest(tmp_path)] == [f"/in/{n:05d}.jpg" for n in range(5000)]
    assert not list((tmp_path / ".work/done").iterdir())


def test_a_loader_reads_the_inputs_of_a_shard_once(tmp_path, monkeypatch):
    survey(tmp_path, images(range(5000)))
    ledger, numbers = open_ledger(tmp_path), todo(open_ledger(tmp_path))
    expected = [ledger.load(number) for number in numbers]
    read, read_bytes = [], storage.read_bytes

    def noted(location):
        read.append(location)
        return read_bytes(location)

    monkeypatch.setattr(storage, "read_bytes", noted)
    loader = Loader(ledger)
    for _ in range(2):
        found = [loader(number) for number in numbers]
        for one, other in zip(found, expected, strict=True):
            assert one.keys() == other.keys() and all((one[name] == other[name]).all() for name in one)
        assert sum("/.work/inputs/" in location for location in read) == 2  # shards
        read.clear()
        loader = pickle.loads(pickle.dumps(loader))
    assert loader.last is None, "no worker gets the file from another"


def test_large_rows_make_small_chunks():
    assert [chunk_rows(4096, RowCost(size, 1.0)) for size in (1, 2**20, 2**24, 2**30)] == [64, 64, 4, 1]
    assert [chunk_rows(500, RowCost(1, seconds)) for seconds in (1.0, 0.0125, 0.001)] == [8, 20, 64]


def test_a_stopped_listing_continues_and_ends_with_the_same_files(tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    survey(whole, images(range(9000)))

    def listing():
        yield from images(range(5000))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        survey(stopped, listing())
    assert open_ledger(stopped).shards() == [0]
    assert survey(stopped, images(range(9000))) == 9000
    assert contents(whole) == contents(stopped)


def test_stopped_anywhere_it_ends_with_the_same_files_and_does_nothing_twice(tmp_path):
    survey(tmp_path / "whole", images(range(200)))
    do_all(open_ledger(tmp_path / "whole"))
    done = 0
    for stop in (3, 5, 1):
        survey(tmp_path / "stopped", images(range(200)))
        done += sum(
            do(open_ledger(tmp_path / "stopped"), number) for number in todo(open_ledger(tmp_path / "stopped"))[:stop]
        )
    assert done == 9 * 8
    assert do_all(open_ledger(tmp_path / "stopped")) == 200 - done
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")
    assert do_all(open_ledger(tmp_path / "stopped")) == 0


def test_a_shard_that_was_stopped_between_its_files_is_finished_again(tmp_path, monkeypatch):
    survey(tmp_path, images(range(20)))
    ledger = open_ledger(tmp_path)
    for number in todo(ledger):
        do(ledger, number)
    write = ledger_module.storage.write_bytes

    def stop_before_the_manifest(location, data, **options):
        if ledger_module.MANIFEST in location:
            raise KeyboardInterrupt
        write(location, data, **options)

    monkeypatch.setattr(ledger_module.storage, "write_bytes", stop_before_the_manifest)
    with pytest.raises(KeyboardInterrupt):
        ledger.merge_shard(0)
    monkeypatch.undo()
    assert not todo(ledger) and not next(ledger.states([0])).merged
    ledger.merge_shard(0)
    assert len(manifest(tmp_path)) == 20 and next(ledger.states([0])).merged


def test_new_images_make_new_shards_and_what_is_done_stays(tmp_path):
    survey(tmp_path, images(range(10)))
    do_all(open_ledger(tmp_path))
    before = contents(tmp_path)
    assert survey(tmp_path, images(range(15))) == 15
    assert do_all(open_ledger(tmp_path)) == 5
    assert len(manifest(tmp_path)) == 15
    assert before.items() <= contents(tmp_path).items()
    # Images that are gone keep their rows, because their masks still exist.
    assert survey(tmp_path, images(range(3))) == 3
    assert do_all(open_ledger(tmp_path)) == 0
    assert len(manifest(tmp_path)) == 15


def test_a_changed_image_alone_is_done_again(tmp_path):
    survey(tmp_path, images(range(30)))
    do_all(open_ledger(tmp_path))
    survey(tmp_path, [*images(range(12)), *images([12], size=99), *images(range(13, 30))])
    assert len(todo(open_ledger(tmp_path))) == 1
    assert do_all(open_ledger(tmp_path)) == 1
    rows = manifest(tmp_path)
    assert [row["path"] for row in rows] == [f"/in/{n:05d}.jpg" for n in range(30)]
    assert [row["size"] for row in rows] == [1] * 12 + [99] + [1] * 17
    runs = pq.read_table(tmp_path / ".work/runs").to_pylist()
    assert [row["runs"] for row in runs] == ["1 1"] * 12 + ["99 1"] + ["1 1"] * 17


def test_failed_images_are_tried_again_only_when_asked(tmp_path):
    survey(tmp_path, images(range(30)))
    bad = ["/in/00003.jpg", "/in/00021.jpg"]
    assert do_all(open_ledger(tmp_path), failed=bad) == 30
    assert do_all(open_ledger(tmp_path)) == 0
    state = next(open_ledger(tmp_path).states([0]))
    assert (state.rows, state.done, state.failed) == (30, 30, 2)
    assert do_all(open_ledger(tmp_path, retry_failed=True), failed=bad[1:]) == 2
    assert [row["path"] for row in manifest(tmp_path) if row["status"] == "failed"] == bad[1:]
    assert len(pq.read_table(tmp_path / ".work/runs")) == 29


def test_a_shard_with_a_row_undone_is_never_finished(tmp_path):
    survey(tmp_path, images(range(20)))
    do(open_ledger(tmp_path), todo(open_ledger(tmp_path))[0])
    with pytest.raises(RuntimeError, match="12 rows of part-000000 have no result"):
        open_ledger(tmp_path).merge_shard(0)
    assert not (tmp_path / "manifest.parquet").exists()


def test_an_image_that_is_listed_twice_is_one_and_equal_names_are_told_apart(tmp_path):
    found = [*images(range(5)), *images(range(5)), *images(range(3), suffix=".png"), *images([0], suffix=".tif")]
    assert survey(tmp_path, found) == 9
    outputs = [o for n in todo(open_ledger(tmp_path)) for o in open_ledger(tmp_path).load(n)["output"]]
    assert len(set(outputs)) == 9
    assert outputs[0] == b"00000.png" and outputs[5] == b"00000.png.png" and outputs[8] == b"00000.tif.png"
    # In a later run, too, a name stays with the image that has it.
    survey(tmp_path, images([4], suffix=".bmp"))
    assert open_ledger(tmp_path).load(todo(open_ledger(tmp_path))[-1])["output"][0] == b"00004.bmp.png"


def test_ten_thousand_digests_are_found_again():
    digests, numbers = DigestMap(), np.arange(10_000)
    names = [str(n).encode() for n in numbers]
    for start in range(0, 10_000, 700):
        digests.add(digests_of(names[start : start + 700]), numbers[start : start + 700])
    assert (digests.find(digests_of(names)) == numbers).all()
    assert (digests.find(digests_of([b"no", b"neither"])) == -1).all()
    assert len(digests.runs) < 10


def test_a_chunk_number_tells_its_shard(tmp_path):
    survey(tmp_path, images(range(SHARD_ROWS + 1)))
    assert todo(open_ledger(tmp_path))[-1] == SHARD_ROWS


@pytest.mark.parametrize("whole", [True, False])
def test_a_journal_whose_writer_was_killed_before_it_had_its_name_does_not_count(tmp_path, whole):
    survey(tmp_path, images(range(10)))
    ledger = open_ledger(tmp_path)
    for number in todo(ledger):
        do(ledger, number)
    for journal in (tmp_path / ".work/done/part-000000").iterdir():
        data = journal.read_bytes()
        journal.with_name(f".{journal.stem:0>32}.tmp").write_bytes(data if whole else data[:-9])
        journal.unlink()
    assert do_all(open_ledger(tmp_path)) == 10
    assert len(manifest(tmp_path)) == 10
