"""Prediction and evaluation through Ray Data: the same files and figures as in one process."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import TINY, make_discs
from PIL import Image

from unet_ray import training
from unet_ray.config import EvaluateConfig, PredictConfig, UserError, load_train_config
from unet_ray.evaluation import evaluate
from unet_ray.prediction import predict
from unet_ray.stages import chunked

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    images, masks = make_discs(folder / "discs", 12)
    settings = [("data.images", str(images)), ("data.masks", str(masks)), *TINY, ("train.epochs", 20)]
    training.train(load_train_config(settings=settings), str(folder / "run"), local=True)
    return folder / "run"


def mixed_folder(folder: Path) -> Path:
    generator = np.random.default_rng(0)
    for number in range(40):
        (folder / f"sub {number % 3}").mkdir(parents=True, exist_ok=True)
        height, width = generator.integers(10, 90, 2)
        pixels = generator.integers(0, 255, (height, width, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"sub {number % 3}" / f"{number}.{'png' if number % 2 else 'jpg'}")
    for path in (folder / "sub 0/0.jpg", folder / "sub 2/11.png"):
        path.write_bytes(path.read_bytes()[:120])
    return folder


def contents(out: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(out)): p.read_bytes()
        for p in out.rglob("*")
        if p.is_file() and p.name != "summary.json" and p.parent.name != "manifest.parquet"
    }


def manifest(out: Path) -> list[dict]:
    rows = pq.read_table(out / "manifest.parquet").to_pylist()
    return [{k: v for k, v in row.items() if k != "milliseconds"} for row in rows]


def test_ray_and_one_process_write_the_same_files(ray_cluster, trained, tmp_path):
    folder, progress = mixed_folder(tmp_path / "images"), []
    summaries = {}
    for name, local in (("here", True), ("ray", False)):
        config = PredictConfig(
            model=str(trained),
            inputs=(str(folder),),
            out=str(tmp_path / name),
            formats=("png", "parquet"),
            precision="fp32",
        )
        summaries[name] = predict(config, local=local, on_progress=lambda *counts: progress.append(counts))
    assert progress[-1] == (40, 2, 40)
    for summary in summaries.values():
        assert (summary.images, summary.ok, summary.failed) == (40, 38, 2)
    assert contents(tmp_path / "here") == contents(tmp_path / "ray")
    rows = manifest(tmp_path / "ray")
    assert rows == manifest(tmp_path / "here")
    assert len({row["path"] for row in rows}) == len(rows) == 40
    assert sum(row["status"] == "failed" for row in rows) == 2
    again = predict(
        PredictConfig(
            model=str(trained),
            inputs=(str(folder),),
            out=str(tmp_path / "ray"),
            formats=("png", "parquet"),
            precision="fp32",
        )
    )
    assert again.already_done == 40


def test_ray_and_one_process_give_the_same_scores(ray_cluster, trained, tmp_path):
    images, masks = make_discs(tmp_path / "unseen", 30, seed=9)
    (images / "a_000.png").write_bytes(b"broken")
    config = EvaluateConfig(model=str(trained), images=str(images), masks=str(masks), precision="fp32")
    here, there = evaluate(config, local=True), evaluate(config)
    assert json.dumps(here.to_json()) == json.dumps(there.to_json())
    assert here.images == 29 and here.failures[0][0].endswith("a_000.png")


def test_workers_that_leave_no_cpu_to_read_are_refused(ray_cluster, trained, tmp_path):
    images, _ = make_discs(tmp_path / "few", 3)
    config = PredictConfig(model=str(trained), inputs=(str(images),), out=str(tmp_path / "out"), workers=4)
    with pytest.raises(UserError, match="leaves none of 4 CPUs to read images: use 3"):
        predict(config)


def test_chunks_depend_on_the_number_of_rows_only_and_hold_each_row_once():
    chunks = chunked({"path": [str(n) for n in range(1003)]}, row_bytes=10)
    assert [path for chunk in chunks for path in chunk["path"]] == [str(n) for n in range(1003)]
    assert [int(chunk["chunk"][0]) for chunk in chunks] == list(range(len(chunks)))
    assert all(len(chunk["path"]) == chunk["rows"][0] for chunk in chunks)
    huge = chunked({"path": ["a"] * 9}, row_bytes=50 * 2**20)
    assert all(len(chunk["path"]) == 1 for chunk in huge)
