"""jobs/benchmark.py on small images: which lines it prints, and that their figures agree."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TINY, flags, make_discs, make_model

BENCHMARK = Path(__file__).resolve().parents[1] / "jobs" / "benchmark.py"


def test_it_decodes_predicts_and_trains_in_every_way_there_is(tmp_path):
    images, masks = make_discs(tmp_path / "discs", 3)
    model = make_model(tmp_path / "model")
    command = [sys.executable, str(BENCHMARK), "--images", str(images), "--masks", str(masks), "--model", str(model)]
    sections = [part for name in ("decode", "model", "masks", "train") for part in ("--section", name)]
    sections += ["--rounds", "1", "--device", "cpu", "--price", "spot=0.36"]
    sections += flags([*TINY, ("train.batch_size", 2)])
    ran = subprocess.run(
        [*command, *sections, "--json", str(tmp_path / "lines.json")],
        # Compiling takes a minute here and proves nothing more: test_backends.py and the tests of training do it.
        env={**os.environ, "TORCHDYNAMO_DISABLE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    lines = json.loads((tmp_path / "lines.json").read_text())
    found = {
        section: [line for line in lines if line["section"] == section] for section in ("decode", "model", "train")
    }
    assert found["decode"][0]["name"] == "Pillow, whole"
    assert {"plain fp32", "torch", "compiled"} <= {line["name"] for line in found["model"]}
    assert [line["name"] for line in found["train"]] == ["plain fp32", "unet_ray", "unet_ray, compiled"]
    [own_size] = [line for line in lines if line["name"] == "own size"]
    assert own_size["note"] == "equal: True"
    [price] = [line for line in lines if line["section"] == "price"]
    a_step = found["train"][1]["seconds"]
    assert price["seconds"] == pytest.approx(a_step / 2)  # a batch of two
    assert f"{a_step / 2 * 1e6 / 3600 * 0.36:,.2f} at 0.36 an hour" in price["note"]
    for section in found.values():
        first = section[0]["seconds"]
        for line in section:
            assert line["ratio"] == pytest.approx(first / line["seconds"])
            assert line["name"] in ran.stdout


def test_a_missing_folder_is_one_line(tmp_path):
    command = [sys.executable, str(BENCHMARK), "--images", str(tmp_path / "none")]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    assert ran.stderr.strip().splitlines()[-1] == f"Error: {tmp_path}/none: no such folder or file"
