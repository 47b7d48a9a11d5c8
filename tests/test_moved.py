"""Inputs that were copied or moved since the earlier run: `predict --same-content` and `--moved OLD=NEW`."""

import os
import re
import shlex
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import make_model, make_photos, recorded
from PIL import Image

from unet_ray.config import PredictConfig, UserError
from unet_ray.data import storage
from unet_ray.inference.predict import predict
from unet_ray.ray_backend.session import LOCAL

pytestmark = pytest.mark.usefixtures("small_chunks")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


def run(model: Path, inputs, out: Path, **options):
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    settings = {"formats": ("png", "rle", "coco", "parquet"), "precision": "fp32", **options}
    return predict(
        PredictConfig(model=str(model), inputs=tuple(map(str, inputs)), out=str(out), **settings), runtime=LOCAL
    )


def manifest(out: Path) -> list[dict]:
    return pq.read_table(out / "manifest.parquet").to_pylist()


def touch(folder: Path) -> None:
    for path in folder.rglob("*.*"):
        os.utime(path, ns=(path.stat().st_mtime_ns + 10**9,) * 2)


# --- --same-content ---


def test_copies_keep_their_masks_with_same_content(model, tmp_path, caplog):
    photos, out = make_photos(tmp_path / "photos", 20), tmp_path / "out"
    (photos / "broken.jpg").write_text("no image")
    run(model, photos, out)
    written = recorded(out)
    touch(photos)
    other = photos / "sub 0/0000.jpg"
    Image.new("RGB", (30, 30), (9, 9, 200)).save(other)
    data = (photos / "sub 1/0001.png").read_bytes()
    (photos / "sub 1/0001.png").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))  # the same size, another content
    summary = run(model, photos, out, same_content=True)
    assert "19 images have other times and the same content: they are kept" in caplog.text
    assert (
        "2 images have changed since the earlier run (1 other sizes, 1 other times): they are done again" in caplog.text
    )
    assert (summary.images, summary.already_done, summary.failed) == (21, 19, 1)
    renewed = {path.name for path, time in recorded(out).items() if time != written[path]}
    assert renewed == {"0000.png", "0001.png"}
    assert run(model, photos, out).already_done == 21, "the new times are recorded"
    assert len(manifest(out)) == 21


def test_without_it_the_command_says_what_is_redone_and_names_the_option(model, tmp_path, caplog):
    photos, out = make_photos(tmp_path / "photos", 5), tmp_path / "out"
    run(model, photos, out)
    touch(photos)
    assert run(model, photos, out).already_done == 0
    expected = (
        "5 images have changed since the earlier run (5 other times): they are done again (--same-content compares"
    )
    assert expected in caplog.text


def test_same_content_of_a_run_that_was_stopped(model, tmp_path, monkeypatch):
    """The records are journals then, not yet the manifest."""
    photos, out = make_photos(tmp_path / "photos", 20), tmp_path / "out"
    from unet_ray.inference.ledger import Ledger

    record, calls = Ledger.record, []

    def twice(*arguments):
        calls.append(arguments)
        if len(calls) > 2:
            raise KeyboardInterrupt
        record(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(Ledger, "record", twice)
        with pytest.raises(KeyboardInterrupt):
            run(model, photos, out)
    assert not (out / "manifest.parquet").exists() and len(recorded(out)) == 16
    touch(photos)
    summary = run(model, photos, out, same_content=True)
    assert (summary.images, summary.already_done, summary.ok) == (20, 16, 20)


def test_same_content_of_images_inside_parquet(model, tmp_path):
    import pyarrow as pa

    photos, out = make_photos(tmp_path / "photos", 9), tmp_path / "out"
    images = [path.read_bytes() for path in sorted(photos.rglob("*.*"))]
    pq.write_table(pa.table({"image": images}), tmp_path / "all.parquet", row_group_size=4)
    run(model, tmp_path / "all.parquet", out)
    touch(tmp_path)
    assert run(model, tmp_path / "all.parquet", out, same_content=True).already_done == 9


def test_a_manifest_of_version_0_1_has_no_checksums(model, tmp_path):
    photos, out = make_photos(tmp_path / "photos", 6), tmp_path / "out"
    run(model, photos, out)
    [file] = (out / "manifest.parquet").iterdir()
    pq.write_table(pq.read_table(file).drop_columns(["checksum"]), file)
    Image.new("RGB", (8, 8)).save(photos / "sub 0/0000.jpg")
    assert run(model, photos, out, same_content=True).already_done == 5
    assert [bool(row["checksum"]) for row in manifest(out)] == [True] + 5 * [False]
    touch(photos)
    assert run(model, photos, out, same_content=True).already_done == 1


@pytest.mark.parametrize("tile", [0, 32])
def test_the_checksum_is_that_of_the_file(model, tmp_path, tile):
    import hashlib

    photos, out = make_photos(tmp_path / "photos", 4), tmp_path / "out"
    (photos / "broken.jpg").write_text("no image")
    run(model, photos, out, tile=tile)
    for row in manifest(out):
        assert row["checksum"] == hashlib.blake2b(Path(row["path"]).read_bytes(), digest_size=16).hexdigest()


# --- --moved ---


@pytest.mark.parametrize("stopped", [False, True])
def test_a_folder_with_another_name_goes_on(model, tmp_path, monkeypatch, stopped):
    photos, out = make_photos(tmp_path / "day=1 photos", 20), tmp_path / "out"
    run(model, photos, out)
    written = recorded(out)
    new = tmp_path / "a=b" / "photos"
    new.parent.mkdir()
    shutil.move(photos, new)
    with pytest.raises(UserError, match=r"other inputs.*--moved") as refused:
        run(model, new, out)
    option = shlex.split(re.search(r"--moved (.+)$", str(refused.value))[1])[0]
    assert option == f"{photos}={new}"
    Image.new("RGB", (30, 30)).save(new / "new.png")
    if stopped:
        write_bytes, calls = storage.write_bytes, []

        def once(*arguments, **options):
            calls.append(arguments)
            if len(calls) > 3:
                raise KeyboardInterrupt
            write_bytes(*arguments, **options)

        with monkeypatch.context() as patched:
            patched.setattr(storage, "write_bytes", once)
            with pytest.raises(KeyboardInterrupt):
                run(model, new, out, moved=(option,))
    summary = run(model, new, out, moved=(option,))
    assert (summary.images, summary.already_done, summary.gone) == (21, 20, 0)
    assert all(path.stat().st_mtime_ns == time for path, time in written.items() if "masks" in path.parts)
    rows = manifest(out)
    assert {Path(row["path"]).is_file() for row in rows} == {True} and len(rows) == 21
    for table in ("rle.parquet", "masks.parquet"):
        assert {row["path"] for row in pq.read_table(out / table).to_pylist()} <= {row["path"] for row in rows}
    assert run(model, new, out).already_done == 21
    assert run(model, new, out, moved=(option,)).already_done == 21, "given again it has nothing to do"


def test_a_folder_above_several_inputs_and_a_list(model, tmp_path):
    disk, out = tmp_path / "disk", tmp_path / "out"
    make_photos(disk / "a", 4)
    make_photos(disk / "b", 3, seed=1)
    (disk / "list.txt").write_text("b/sub 0/0000.jpg\n\nb/sub 1/0001.png\n")
    run(model, (disk / "a", disk / "list.txt"), out)
    disk.rename(tmp_path / "mounted")
    inputs = (tmp_path / "mounted/a", tmp_path / "mounted/list.txt")
    summary = run(model, inputs, out, moved=(f"{disk}={tmp_path / 'mounted'}",))
    assert (summary.images, summary.already_done) == (6, 6)


def test_moves_that_do_not_fit_are_refused(model, tmp_path):
    photos, out = make_photos(tmp_path / "photos", 3), tmp_path / "out"
    with pytest.raises(UserError, match="holds no earlier prediction"):
        run(model, photos, out, moved=(f"{photos}=/x",))
    run(model, photos, out)
    for text in ("no equals sign", f"{tmp_path}/other=/x", f"{photos}2={tmp_path}/x"):
        with pytest.raises(UserError, match=f"OLD is an input of the earlier run: {photos}"):
            run(model, photos, out, moved=(text,))


def test_a_part_goes_on_with_a_moved_folder(model, tmp_path):
    photos, out = make_photos(tmp_path / "photos", 10), tmp_path / "out"
    first = run(model, photos, out, part="1/2")
    new = photos.rename(tmp_path / "new")
    option = (f"{photos}={new}",)
    assert run(model, new, out, part="2/2", moved=option).parts_missing == ()
    again = run(model, new, out, part="1/2", moved=option)
    assert again.images == 10 and again.already_done == 10 and first.images > 0
    assert {row["path"].split("/")[-3] for row in manifest(out)} == {"new"}
