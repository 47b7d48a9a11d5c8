"""Prediction and evaluation give one row per input, and the same files and scores through Ray as in one process."""

import csv
import dataclasses
import errno
import io
import json
import os
import threading
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import TINY, make_bad, make_discs, make_model, make_photos, until
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from unet_ray import registry
from unet_ray.config import EvaluateConfig, PredictConfig, UserError
from unet_ray.data import storage
from unet_ray.evaluation.evaluate import evaluate
from unet_ray.inference import chunk_size, segmenter
from unet_ray.inference.formats import OutputFormat
from unet_ray.inference.ledger import SideTable
from unet_ray.inference.predict import predict
from unet_ray.models.device import run_network
from unet_ray.ray_backend import data_context, inference
from unet_ray.ray_backend.data_context import configure
from unet_ray.ray_backend.inference import pool_of_replicas, run_on_cluster
from unet_ray.ray_backend.session import LOCAL, Runtime
from unet_ray.settings import load_train_config
from unet_ray.training.run import train

FORMATS = tuple(name for name in registry.FORMATS if name != "geotiff")  # fails photographs, see test_geotiff.py


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model_of_three(tmp_path_factory) -> Path:
    settings = [("model.num_classes", 3), ("data.mask_values", [0, 1, 2]), ("data.classes", ["sky", "tree", "car"])]
    return make_model(tmp_path_factory.mktemp("three"), *settings)


def run(model: Path, folder, out: Path, *, runtime: Runtime = LOCAL, **options):
    inputs = (folder,) if isinstance(folder, (str, Path)) else folder
    settings = {"precision": "fp32", **options}
    config = PredictConfig(model=str(model), inputs=tuple(map(str, inputs)), out=str(out), **settings)
    return predict(config, runtime=runtime)


def contents(out: Path) -> dict[str, bytes]:
    """Reads the files that must be the same in every run. Manifest and summary hold times, so they may differ."""
    return {
        str(p.relative_to(out)): p.read_bytes()
        for p in out.rglob("*")
        if p.is_file() and p.name not in ("summary.json", "lock.json") and p.parent.name != "manifest.parquet"
    }


def manifest(out: Path) -> list[dict]:
    rows = pq.read_table(out / "manifest.parquet").to_pylist()
    return [{k: v for k, v in row.items() if k != "milliseconds"} for row in rows]


# --- one row for every input ---


def test_ten_kinds_of_bad_files_become_ten_rows_with_a_reason_and_harm_nothing_else(model, tmp_path):
    folder = make_photos(tmp_path / "images", 90)
    reasons = make_bad(folder / "bad")
    odd = [
        "a b.jpg",
        'it\'s "q".jpg',
        "new\nline.jpg",
        "häus 車.jpg",
        os.fsdecode(b"latin\xff1.jpg"),
        "x" * 200 + ".png",
    ]
    for name in odd:
        Image.new("RGB", (12, 9), (9, 200, 30)).save(folder / name)
    (folder / "loop").symlink_to(folder, target_is_directory=True)
    (folder / ".hidden.jpg").touch()
    summary = run(model, folder, tmp_path / "out")
    assert (summary.images, summary.ok, summary.failed) == (106, 96, 10)
    rows = {row["path"]: row for row in manifest(tmp_path / "out")}
    assert len(rows) == 106
    for path, reason in reasons.items():
        row = rows.pop(str(path))
        assert row["status"] == "failed" and reason in row["error"], row
        assert row["output"] == "" and row["pixels"] is None
    assert {row["status"] for row in rows.values()} == {"ok"}
    assert sum(summary.failures.values()) == 10
    masks = {p for p in (tmp_path / "out/masks").rglob("*") if p.is_file()}
    assert len(masks) == 96
    for name in odd:
        mask = tmp_path / "out/masks" / (os.path.splitext(name)[0] + ".png")  # noqa: PTH122
        assert mask in masks
        with Image.open(mask) as image:
            assert image.size == (12, 9)


def test_a_folder_that_cannot_be_listed_is_a_row(model, tmp_path, monkeypatch):
    folder = make_photos(tmp_path / "images", 3)
    scandir = os.scandir

    def refused(path):
        if str(path).endswith("sub 1"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    summary = run(model, folder, tmp_path / "out")
    assert (summary.images, summary.failed) == (3, 1)
    assert summary.failures == {"a folder that cannot be listed": 1}


def test_an_image_that_vanishes_or_changes_between_listing_and_reading_is_a_row(model, tmp_path):
    names = tmp_path / "list.txt"
    Image.new("RGB", (12, 9)).save(tmp_path / "here.png")
    names.write_text(f"here.png\n\n{tmp_path}/gone.png\n")
    summary = run(model, names, tmp_path / "out")
    assert (summary.images, summary.ok, summary.failed) == (2, 1, 1)
    assert "No such file" in next(iter(summary.failures))


def test_the_files_of_an_image_that_can_no_longer_be_read_are_removed(model, tmp_path):
    folder = make_photos(tmp_path / "images", 3)
    run(model, folder, tmp_path / "out", formats=("png", "prob", "overlay"))
    (folder / "sub 0/0000.jpg").write_bytes(b"no longer")
    summary = run(model, folder, tmp_path / "out", formats=("png", "prob", "overlay"))
    assert (summary.ok, summary.failed, summary.already_done) == (2, 1, 2)
    for kind in ("masks", "probabilities", "overlays"):
        assert {p.stem for p in (tmp_path / "out" / kind).rglob("*.*")} == {"0001", "0002"}


def test_failed_images_are_tried_again_when_asked_and_then_succeed(model, tmp_path):
    folder = make_photos(tmp_path / "images", 4)
    target = folder / "sub 0/late.jpg"
    target.symlink_to(tmp_path / "late.jpg")
    assert run(model, folder, tmp_path / "out").failed == 1
    Image.new("RGB", (12, 9)).save(tmp_path / "late.jpg")
    os.utime(tmp_path / "late.jpg", ns=(0, 0))
    # The file has changed, which alone is a reason to try again.
    assert run(model, folder, tmp_path / "out").failed == 0
    (folder / "page.jpg").write_text("not yet")
    assert run(model, folder, tmp_path / "out").failed == 1
    again = run(model, folder, tmp_path / "out")
    assert (again.already_done, again.failed) == (6, 1)
    assert run(model, folder, tmp_path / "out", retry_failed=True).already_done == 5


def test_other_settings_for_the_same_output_are_refused_and_overwrite_starts_over(model, model_of_three, tmp_path):
    folder = make_photos(tmp_path / "images", 3)
    run(model, folder, tmp_path / "out")
    (tmp_path / "out/notes.txt").write_text("mine")
    for options in ({"tile": 32}, {"name": "{stem}_mask.png"}, {"formats": ("parquet",)}, {"cleanup": "holes"}):
        with pytest.raises(UserError, match=f"other {next(iter(options))}.*choose another --out, or --overwrite"):
            run(model, folder, tmp_path / "out", **options)
    with pytest.raises(UserError, match="other weights_sha256"):
        run(model_of_three, folder, tmp_path / "out")
    summary = run(model, folder, tmp_path / "out", overwrite=True, name="{stem}_mask.png")
    assert (summary.ok, summary.already_done) == (3, 0)
    assert sorted(p.name for p in (tmp_path / "out/masks").rglob("*.*")) == [f"000{n}_mask.png" for n in range(3)]
    assert (tmp_path / "out/notes.txt").read_text() == "mine"
    with pytest.raises(UserError, match="holds other files, no prediction"):
        run(model, folder, folder, overwrite=True)


def test_a_mistyped_input_does_not_stand_in_the_way_of_the_right_one(model, tmp_path):
    folder = make_photos(tmp_path / "images", 3)
    (tmp_path / "empty").mkdir()
    for wrong in ((folder, tmp_path / "imagse"), tmp_path / "empty", folder / "*.bmp"):
        with pytest.raises(UserError, match=r"no such folder|no image in it"):
            run(model, wrong, tmp_path / "out")
    assert run(model, folder, tmp_path / "out").ok == 3
    # A mistyped input does not harm an earlier prediction either.
    with pytest.raises(UserError, match="other inputs"):
        run(model, tmp_path / "imagse", tmp_path / "out")
    assert run(model, folder, tmp_path / "out").already_done == 3


def test_a_full_disk_is_one_line_and_costs_nothing_that_is_done(model, tmp_path, monkeypatch, small_chunks):
    folder = make_photos(tmp_path / "images", 40)
    write, room = storage.write_bytes, [25]

    def full(location, data, **options):
        room[0] -= 1
        if room[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device", location)
        write(location, data, **options)

    monkeypatch.setattr(storage, "write_bytes", full)
    with pytest.raises(UserError, match=r"No space left on device\. What is done is kept"):
        run(model, folder, tmp_path / "out")
    monkeypatch.undo()
    summary = run(model, folder, tmp_path / "out")
    assert summary.ok == 40 and summary.already_done >= 16


# --- inputs ---


def test_several_inputs_folders_globs_lists_and_files_are_told_apart(model, tmp_path):
    first, second = make_photos(tmp_path / "a/photos", 6), make_photos(tmp_path / "b/photos", 6, seed=1)
    summary = run(model, (first, f"{second}/*/*.png", first / "sub 0/0000.jpg"), tmp_path / "out")
    assert summary.ok == 9  # the one file is in the first folder, too
    masks = sorted(str(p.relative_to(tmp_path / "out/masks")) for p in (tmp_path / "out/masks").rglob("*.png"))
    assert masks == sorted(
        [f"photos/sub {n % 3}/000{n}.png" for n in range(6)] + [f"photos-2/sub {n % 3}/000{n}.png" for n in (1, 3, 5)]
    )


@pytest.mark.parametrize("kind", ["bytes", "struct"])
def test_images_inside_parquet_files_are_read_by_row(model, tmp_path, kind):
    folder = make_photos(tmp_path / "images", 30)
    files = sorted(folder.rglob("*.*"))
    data = [path.read_bytes() for path in files]
    column = data if kind == "bytes" else [{"bytes": d, "path": None} for d in data]
    table = pa.table({"label": range(30), "image": column, "file_name": [f"{p.parent.name}/{p.name}" for p in files]})
    (tmp_path / "set.parquet").mkdir()
    pq.write_table(table.slice(0, 20), tmp_path / "set.parquet/one.parquet", row_group_size=7)
    pq.write_table(table.slice(20), tmp_path / "set.parquet/two.parquet")
    run(model, folder, tmp_path / "files")
    summary = run(model, tmp_path / "set.parquet", tmp_path / "rows")
    assert (summary.ok, summary.failed) == (30, 0)
    rows = manifest(tmp_path / "rows")
    assert rows[21]["path"] == f"{tmp_path}/set.parquet/two.parquet#1"
    expected = {p.name: p.read_bytes() for p in (tmp_path / "files/masks").rglob("*.png")}
    assert {p.name: p.read_bytes() for p in (tmp_path / "rows/masks").rglob("*.png")} == expected


def test_a_parquet_column_of_paths_is_a_list(model, tmp_path):
    folder = make_photos(tmp_path / "images", 5)
    paths = [str(p) for p in sorted(folder.rglob("*.*"))]
    pq.write_table(pa.table({"path": paths, "other": range(5)}), tmp_path / "paths.parquet")
    assert run(model, tmp_path / "paths.parquet", tmp_path / "out").ok == 5
    pq.write_table(pa.table({"other": range(5)}), tmp_path / "none.parquet")
    with pytest.raises(UserError, match=r"no column with paths .* nor encoded images"):
        run(model, tmp_path / "none.parquet", tmp_path / "out2")


@pytest.mark.parametrize("format", ["npy", "tif"])
def test_many_channels_of_16_bits_are_trained_on_and_segmented(tmp_path, format):
    import tifffile

    generator = np.random.default_rng(0)
    images, masks = make_discs(tmp_path / "discs", 12)
    for path in sorted(images.iterdir()):
        mask = np.asarray(Image.open(masks / path.name)) > 0
        values = generator.integers(900, 1100, (32, 32, 5)).astype(np.uint16)
        values[mask, 3] += 700  # one channel shows the mask, in the lower of its two bytes
        if format == "npy":
            np.save(images / f"{path.stem}.npy", values)
        else:
            tifffile.imwrite(images / f"{path.stem}.tif", values.transpose(2, 0, 1), metadata={"axes": "CYX"})
        path.unlink()
    settings = [
        ("data.images", str(images)),
        ("data.masks", str(masks)),
        *TINY,
        ("model.in_channels", 5),
        ("data.value_range", [900, 2000]),
        ("train.epochs", 25),
    ]
    result = train(load_train_config(settings=settings), str(tmp_path / "run"), runtime=LOCAL)
    assert result.best["val_dice"] > 0.8
    Image.new("RGB", (32, 32)).save(images / "colour.png")
    summary = run(tmp_path / "run", images, tmp_path / "out")
    assert (summary.ok, summary.failures) == (12, {"3 channel(s), the model takes 5": 1})


# --- outputs ---


def test_other_programs_read_every_output_of_one_class_and_find_the_same_mask(model, tmp_path):
    folder = make_photos(tmp_path / "images", 20)
    (folder / "bad.jpg").touch()
    out = tmp_path / "out"
    summary = run(model, folder, out, formats=FORMATS)
    assert (summary.ok, summary.failed) == (20, 1)
    manifests, stored = (f"read_parquet('{out}/{name}/*.parquet')" for name in ("manifest.parquet", "masks.parquet"))
    query = f"select path, output, m.pixels, mask from {manifests} m join {stored} using (path)"
    rows = duckdb.sql(query).fetchall()
    assert len(rows) == 20
    masks = {}
    for path, output, pixels, png in rows:
        mask = np.asarray(Image.open(out / output)).astype(np.uint8)
        assert (np.asarray(Image.open(io.BytesIO(png))) == mask).all()
        assert pixels == [int((mask == 0).sum()), int(mask.sum())]
        masks[path] = mask
    runs = pd.read_parquet(out / "rle.parquet")
    for row in runs.itertuples():
        decoded = coco_mask.decode({"size": [row.height, row.width], "counts": row.counts})
        assert (decoded == masks[row.path]).all() and row.area == decoded.sum()
    assert set(runs["path"]) == {path for path, mask in masks.items() if mask.any()}
    with (out / "submission.csv").open() as file:
        submitted = {row["img"]: row["rle_mask"] for row in csv.DictReader(file)}
    for path, mask in masks.items():
        numbers = list(map(int, submitted[Path(path).name].split()))
        flat = np.zeros(mask.size, np.uint8)
        for start, length in zip(numbers[::2], numbers[1::2], strict=True):
            flat[start - 1 : start - 1 + length] = 1
        assert (flat.reshape(mask.shape) == mask).all()
    coco = COCO(out / "coco.json")
    assert len(coco.imgs) == 20 and coco.cats[1]["name"] == "foreground"
    for annotation in coco.anns.values():
        image = coco.imgs[annotation["image_id"]]
        mask = masks[f"{folder}/{image['file_name']}"]
        assert (coco.annToMask(annotation) == mask).all()
        assert annotation["bbox"] == coco_mask.toBbox(annotation["segmentation"]).tolist()
    for path, mask in masks.items():
        relative = Path(path).relative_to(folder).with_suffix(".png")
        probability = np.asarray(Image.open(out / "probabilities" / relative))
        assert ((probability > 127) == mask.astype(bool))[np.abs(probability.astype(int) - 127) > 1].all()
        with Image.open(out / "overlays" / relative.with_suffix(".jpg")) as picture:
            assert picture.size == mask.shape[::-1]


def test_several_classes_give_a_palette_and_run_lengths_and_a_map_for_each(model_of_three, tmp_path):
    folder, out = make_photos(tmp_path / "images", 6), tmp_path / "out"
    run(model_of_three, folder, out, formats=("png", "coco", "rle", "prob"))
    coco = COCO(out / "coco.json")
    assert [category["name"] for category in coco.cats.values()] == ["sky", "tree", "car"]
    for image in coco.imgs.values():
        with Image.open(out / "masks" / Path(image["file_name"]).with_suffix(".png")) as stored:
            assert stored.mode == "P"
            ids = np.asarray(stored)
        drawn = np.full_like(ids, 99)
        for annotation in coco.imgToAnns[image["id"]]:
            drawn[coco.annToMask(annotation) == 1] = annotation["category_id"]
        assert (drawn == ids).all()
        stem = out / "probabilities" / Path(image["file_name"]).with_suffix("")
        maps = np.stack([np.asarray(Image.open(f"{stem}.{k}.png")) for k in range(3)]).astype(int)
        assert np.abs(maps.sum(axis=0) - 255).max() <= 2
    with pytest.raises(UserError, match="--format kaggle is for one class"):
        run(model_of_three, folder, tmp_path / "no", formats=("kaggle",))


@pytest.mark.parametrize("options", [{}, {"tile": 32}])
def test_the_time_of_a_row_is_that_of_all_its_stages(model, tmp_path, options):
    summary = run(model, make_photos(tmp_path / "images", 30), tmp_path / "out", cleanup="holes", **options)
    stages = [summary.stages[name] for name in ("decode", "model", "postprocess", "write")]
    assert all(seconds > 0 for seconds in stages)
    rows = pq.read_table(tmp_path / "out/manifest.parquet")["milliseconds"].to_pylist()
    assert sum(rows) / 1e3 == pytest.approx(sum(stages), abs=0.003)  # the summary has whole milliseconds


class Areas(OutputFormat):
    """Writes a file for each image, a table, and one file for all, as a format that a newcomer adds."""

    owned_names = ("areas", "areas.csv")
    table = SideTable(
        ".work/areas", pa.schema([("area", pa.int64())]), lambda results: results.select(["path", "area"])
    )

    def write(self, result):
        result.write_file(*self.files(result.output), str(result.pixels[1]).encode())
        return {"area": result.pixels[1]}

    def files(self, output):
        return [f"areas/{output.removesuffix('.png')}.txt"]

    def write_final(self, ledger):
        rows = [row for table in ledger.side_rows(self.table) for row in table.to_pylist()]
        Path(ledger.out, "areas.csv").write_text("".join(f"{row['area']}\n" for row in rows))


def test_a_format_is_added_by_its_class_and_its_name_alone(model, tmp_path, monkeypatch):
    monkeypatch.setitem(registry.FORMATS, "areas", f"{__name__}:Areas")
    folder, out = make_photos(tmp_path / "images", 4), tmp_path / "out"
    run(model, folder, out, formats=("png", "areas"))
    areas = [row["pixels"][1] for row in manifest(out)]
    assert (out / "areas.csv").read_text().split() == [str(area) for area in areas]
    assert sorted(int(path.read_text()) for path in (out / "areas").rglob("*.txt")) == sorted(areas)
    (folder / "sub 0/0000.jpg").write_bytes(b"no longer")
    run(model, folder, out, formats=("png", "areas"))
    assert len(list((out / "areas").rglob("*.txt"))) == 3
    run(model, folder, out, formats=("png",), overwrite=True)
    assert not (out / "areas").exists() and not (out / "areas.csv").exists()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("{relpath}/{stem}_OUT.png", ["sub 0/0000_OUT.png", "sub 1/0001_OUT.png"]),
        ("{stem}", ["0000.png", "0001.png"]),
        ("all/{name}.png", ["all/0000.jpg.png", "all/0001.png.png"]),
        ("{ext}/{stem}.png", ["jpg/0000.png", "png/0001.png"]),
    ],
)
def test_masks_are_named_as_asked(model, tmp_path, name, expected):
    run(model, make_photos(tmp_path / "images", 2), tmp_path / "out", name=name)
    masks = tmp_path / "out/masks"
    assert sorted(str(p.relative_to(masks)) for p in masks.rglob("*.png")) == expected


@pytest.mark.parametrize("name", ["mask.png", "{relpath}/x.png", "../{stem}.png", "{stem", "{0}", "{other}{stem}"])
def test_names_that_cannot_work_are_refused(name):
    with pytest.raises(UserError, match="--name"):
        PredictConfig(model="m", inputs=("i",), out="o", name=name)


@pytest.mark.parametrize("score", [np.nan, np.inf])
@pytest.mark.parametrize("tile", [0, 32])
def test_scores_that_are_not_finite_fail_their_row_and_make_no_mask(model, tmp_path, monkeypatch, tile, score):
    folder = make_photos(tmp_path / "images", 4)
    Image.new("RGB", (40, 40), (255, 0, 255)).save(folder / "odd.png")

    def odd(network, image, *settings):
        logits = run_network(network, image, *settings)
        logits[(image[..., 1].sum(dim=(1, 2)) == 0), 0, 3, 5] = score
        return logits

    monkeypatch.setattr(segmenter, "run_network", odd)
    summary = run(model, folder, tmp_path / "out", tile=tile, backend="torch", device="cpu")
    assert (summary.ok, summary.failed) == (4, 1)
    assert summary.failures == {"the network's scores are not finite: try --precision fp32, or train again": 1}
    assert not (tmp_path / "out/masks/odd.png").exists()


# --- through Ray ---


def test_cpus_that_others_hold_are_left_to_them_or_waited_for(ray_cluster, model, tmp_path, caplog):
    @ray_cluster.remote(num_cpus=2)
    class Other:
        def ready(self):
            return True

    others = [Other.remote() for _ in range(2)]
    ray_cluster.get([other.ready.remote() for other in others])
    waits = "waiting: 4 of 4 CPUs are held by other work"
    make_photos(tmp_path / "images", 5)

    def end_one_of_them() -> None:
        until(lambda: waits in caplog.text)
        ray_cluster.kill(others[0])

    thread = threading.Thread(target=end_one_of_them)
    thread.start()
    assert run(model, tmp_path / "images", tmp_path / "out", runtime=Runtime()).ok == 5
    thread.join()
    ray_cluster.kill(others[1])


def test_a_task_raises_what_its_function_raises(ray_cluster):
    def write(folder: str) -> None:
        if os.getpid() == here:
            raise RuntimeError("it runs in this process")
        raise UserError(f"{folder}: full")

    here, runtime = os.getpid(), Runtime()
    with runtime.started(), pytest.raises(UserError) as raised:
        runtime.in_task(write)("/out")
    assert str(raised.value) == "/out: full"


def test_verbose_reaches_ray_data(ray_cluster, model, tmp_path, monkeypatch):
    folder, given = make_photos(tmp_path / "few", 2), []

    def enough(*_arguments: object, **_options: object) -> None:
        raise UserError("enough")

    monkeypatch.setattr(data_context, "configure", lambda verbose=False: given.append(verbose))
    monkeypatch.setattr(inference, "pool_of_replicas", enough)
    for verbose in (True, False):
        with pytest.raises(UserError, match="enough"):
            run(model, folder, tmp_path / str(verbose), runtime=Runtime(verbose=verbose))
    assert given == [True, False]


@pytest.fixture
def pools(monkeypatch):
    """The pools of replicas on which predictions have run."""
    used = []

    def noted(*stages, pool, each):
        used.append(pool)
        return run_on_cluster(*stages, pool=pool, each=each)

    monkeypatch.setattr(inference, "run_on_cluster", noted)
    return used


@pytest.mark.parametrize("each_core", [False, True])
def test_ray_and_one_process_write_the_same_files(
    ray_cluster, model, tmp_path, small_chunks, monkeypatch, pools, each_core
):
    monkeypatch.setattr(inference, "CHUNKS_PER_CORE", 1 if each_core else 10**6)
    # Ray gets several chunks as one block, as with many replicas.
    monkeypatch.setattr(chunk_size, "MANY_REPLICAS", 1)
    monkeypatch.setattr(chunk_size, "BLOCKS_PER_REPLICA", 1)
    monkeypatch.setattr(chunk_size, "MAX_CHUNKS", 4)
    folder = make_photos(tmp_path / "images", 40)
    make_bad(folder / "bad")
    summaries = {}
    for name, runtime in (("here", LOCAL), ("ray", Runtime())):
        summaries[name] = run(model, folder, tmp_path / name, runtime=runtime, formats=FORMATS)
    for summary in summaries.values():
        assert (summary.images, summary.ok, summary.failed) == (50, 40, 10)
    assert contents(tmp_path / "here") == contents(tmp_path / "ray")
    assert manifest(tmp_path / "here") == manifest(tmp_path / "ray")
    assert [pool.on_each_core for pool in pools] == [each_core]
    # Failed images are tried again, and one chunk has new work; the other rows stay.
    Image.new("RGB", (9, 9)).save(folder / "zz.png")
    for name, runtime in (("here", LOCAL), ("ray", Runtime())):
        again = run(model, folder, tmp_path / name, runtime=runtime, formats=FORMATS, retry_failed=True)
        assert (again.images, again.ok, again.already_done) == (51, 41, 40)
    assert contents(tmp_path / "here") == contents(tmp_path / "ray")


def test_tiles_through_ray_are_the_same_as_in_one_process(ray_cluster, model_of_three, tmp_path, pools, monkeypatch):
    monkeypatch.setattr(inference, "CHUNKS_PER_CORE", 0)
    folder = make_photos(tmp_path / "images", 12)
    make_bad(folder / "bad")
    for name, runtime in (("here", LOCAL), ("ray", Runtime())):
        summary = run(
            model_of_three, folder, tmp_path / name, runtime=runtime, tile=32, tta=True, cleanup="area=9+holes"
        )
        assert (summary.ok, summary.failed) == (12, 10)
    assert contents(tmp_path / "here") == contents(tmp_path / "ray")
    assert [pool.on_each_core for pool in pools] == [False], "a large image should have all threads"


def test_ray_and_one_process_give_the_same_scores(ray_cluster, model, tmp_path):
    images, masks = make_discs(tmp_path / "unseen", 30, seed=9)
    (images / "a_000.png").write_bytes(b"broken")
    config = EvaluateConfig(model=str(model), images=str(images), masks=str(masks), precision="fp32")
    here, there = evaluate(config, runtime=LOCAL), evaluate(config)
    assert json.dumps(here.to_json()) == json.dumps(there.to_json())
    assert here.images == 29 and here.failures[0][0].endswith("a_000.png")


def test_workers_may_be_as_many_as_there_are_cpus_and_no_more(ray_cluster, model, tmp_path, pools, monkeypatch):
    monkeypatch.setattr(inference, "CHUNKS_PER_CORE", 0)
    folder = make_photos(tmp_path / "few", 12)
    assert run(model, folder, tmp_path / "out", runtime=Runtime(), workers=4).ok == 12
    assert [(pool.replicas, pool.on_each_core) for pool in pools] == [(4, False)]
    with pytest.raises(UserError, match="--workers 5: the cluster has 4 CPUs: use --workers 4 or fewer"):
        run(model, folder, tmp_path / "more", runtime=Runtime(), workers=5)


def test_a_replica_on_each_core_if_there_is_enough_for_all(monkeypatch):
    apart = inference.Pool(1, "cpu", 8, {"CPU": 8.0}, {"num_cpus": 7.0}, 0.24, grows=False)
    for cores, chunks, replicas in ((0, 9, 1), (8, 31, 1), (8, 32, 8), (512, 2048, 512), (513, 10**6, 1)):
        monkeypatch.setattr(inference.nodes, "room", lambda _bundle, cores=cores: cores)
        pool = inference.on_each_core(apart, chunks)
        assert (pool.replicas, pool.on_each_core) == (replicas, replicas > 1)
        assert (pool.threads, pool.least) == (1 if replicas > 1 else 8, {"CPU": 1.0})


@pytest.mark.parametrize(
    ("where", "each_core"), [("preprocess", False), ("model", False), ("postprocess", False), ("postprocess", True)]
)
def test_an_error_of_a_stage_on_the_cluster_is_raised_unchanged(ray_cluster, where, each_core):
    configure()
    pool = dataclasses.replace(pool_of_replicas(1, "cpu"), on_each_core=each_core)

    def preprocess(number):
        if where == "preprocess":
            raise UserError("fix it")
        return {"number": np.array([number])}

    def model(_threads):
        if where == "model":
            raise UserError("fix it")
        return lambda chunk: chunk

    def postprocess(_chunk):
        raise OSError(errno.ENOSPC, "No space left on device", "mask.png")

    expected = pytest.raises(OSError if where == "postprocess" else UserError)
    with expected as raised:
        list(run_on_cluster(range(3), preprocess, model, postprocess, pool=pool))
    assert raised.value.errno == errno.ENOSPC if where == "postprocess" else str(raised.value) == "fix it"
