"""Shared by all tests: small data sets made on the spot, one Ray for all, the real data where it is."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

# One mode for all Rays of the tests: the job client would otherwise not send the token that a local Ray asks for.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")

REAL_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def disc(size: int, centre: tuple[float, float], radius: float) -> np.ndarray:
    """Class ids, uint8 [size,size]: 1 inside the disc."""
    y, x = np.mgrid[:size, :size]
    return ((y - centre[0]) ** 2 + (x - centre[1]) ** 2 <= radius**2).astype(np.uint8)


def make_discs(folder: Path, count: int, *, size: int = 32, seed: int = 0, mask_value: int = 255) -> tuple[Path, Path]:
    """images/ (RGB PNG: a disc on noise) and masks/ (0 and `mask_value`), named a_000, b_001, c_002, a_003, …"""
    generator = np.random.default_rng(seed)
    images, masks = folder / "images", folder / "masks"
    images.mkdir(parents=True)
    masks.mkdir()
    for number in range(count):
        mask = disc(
            size, tuple(generator.uniform(size * 0.3, size * 0.7, 2)), generator.uniform(size * 0.15, size * 0.3)
        )
        pixels = generator.integers(0, 90, (size, size, 3)) + mask[..., None] * generator.integers(60, 150, 3)
        name = f"{'abc'[number % 3]}_{number:03d}.png"
        Image.fromarray(pixels.astype(np.uint8)).save(images / name)
        Image.fromarray(mask * np.uint8(mask_value)).save(masks / name)
    return images, masks


@pytest.fixture
def discs(tmp_path: Path) -> tuple[Path, Path]:
    """12 pairs of 32x32 pixels."""
    return make_discs(tmp_path / "discs", 12)


TINY = [
    ("model.base_channels", 4),
    ("model.depth", 2),
    ("data.image_size", 32),
    ("train.epochs", 2),
    ("train.batch_size", 4),
    ("train.precision", "fp32"),
    ("train.learning_rate", 1e-2),
]
"""Settings of a network that trains in a second."""


RUN_FILES = [
    "config.yaml",
    "last/state.safetensors",
    "metrics.jsonl",
    "model/model.json",
    "model/model.safetensors",
    "split.csv",
]
"""What a run directory holds, but for TensorBoard's files."""


@pytest.fixture(scope="session")
def ray_cluster():
    """One Ray with 4 CPUs for all tests that need one (started where the first of them runs, ended at the end)."""
    import tempfile

    import ray

    with tempfile.TemporaryDirectory(prefix="ur-", ignore_cleanup_errors=True) as temporary:
        ray.init(
            address="local",
            num_cpus=4,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            object_store_memory=500 * 2**20,
            _temp_dir=temporary,
            _node_ip_address="127.0.0.1",
        )
        yield ray
        ray.shutdown()


@pytest.fixture
def real_data() -> Path:
    if not REAL_DATA.is_dir():
        pytest.skip(f"the real images are not here: {REAL_DATA.name} beside the checkout's shared folder")
    return REAL_DATA


@pytest.fixture(autouse=True)
def _no_foreign_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests never join a Ray that happens to run on this machine."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
