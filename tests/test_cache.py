"""Rows from the cache equal rows from the files, and are not decoded again."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, make_discs

from unet_ray.config import DataConfig, UserError
from unet_ray.data import cache
from unet_ray.data.pairs import find_pairs
from unet_ray.data.rows import Decoder, MemoryRows, StreamedRows
from unet_ray.settings import load_train_config

SETTINGS = [*TINY, ("data.mask_values", [0, 255]), ("data.image_size", 24)]


def decoder_of(*settings: tuple[str, object]) -> Decoder:
    return Decoder.of(load_train_config(settings=[*SETTINGS, *settings]))


def here(write: cache.Write, files: list[cache.Pairs]):
    """Writes the files in this thread and counts their pairs."""
    for pairs in files:
        here.pairs += len(pairs)
        write(pairs)
        yield


@pytest.fixture(autouse=True)
def _count_anew():
    here.pairs = 0


@pytest.mark.parametrize("border", [0, 10])
def test_rows_of_the_cache_are_the_rows_of_the_files(tmp_path, discs, border, monkeypatch):
    monkeypatch.setattr(cache, "FILE_BYTES", 5 * 24 * 24 * 4)  # files of 5
    pairs, decoder = (
        find_pairs(DataConfig(images=str(discs[0]), masks=str(discs[1]))),
        decoder_of(("train.border_weight", border)),
    )
    cached = cache.filled(pairs, decoder, str(tmp_path / "cache"), here)
    assert here.pairs == len(cached.places) == 12
    assert len(list((tmp_path / "cache").rglob("*.parquet"))) == 3
    monkeypatch.setattr(Decoder, "row", None)  # whatever is decoded from now on is an error
    plan = [np.array([5, 0]), np.array([11, 3, 3])]
    plain = MemoryRows.__new__(MemoryRows)
    monkeypatch.undo()
    plain.__init__(pairs, decoder)
    monkeypatch.setattr(Decoder, "row", None)
    for rows in (MemoryRows(pairs, cached), StreamedRows(pairs, cached)):
        for found, expected in zip(rows.batches(plan), plain.batches(plan), strict=True):
            assert found.keys() == expected.keys()
            for name, values in expected.items():
                assert np.array_equal(found[name], values), name


def test_only_new_pairs_are_decoded(tmp_path, discs):
    images, masks = discs
    folder = str(tmp_path / "cache")

    def places(decoder: Decoder | None = None) -> dict[str, cache.Place]:
        here.pairs = 0
        return cache.filled(
            find_pairs(DataConfig(images=str(images), masks=str(masks))), decoder or decoder_of(), folder, here
        ).places

    first = places()
    assert places() == first
    assert here.pairs == 0
    # A touched or copied file is known by its content; a changed one is another row.
    image, other = sorted(images.iterdir())[:2]
    image.touch()
    assert places() == first
    assert here.pairs == 1
    other.write_bytes(image.read_bytes())
    changed = places()
    assert here.pairs == 1
    assert {path for path in first if changed[path] != first[path]} == {str(other)}
    moved = tmp_path / "moved"
    shutil.copytree(images, moved)
    images = moved
    assert sorted(places().values()) == sorted(changed.values())
    places(decoder_of(("data.image_size", 32)))
    assert here.pairs == 12


def test_a_damaged_or_deleted_cache_file_is_decoded_again(tmp_path, discs, monkeypatch):
    monkeypatch.setattr(cache, "FILE_BYTES", 6 * 24 * 24 * 4)  # two files
    pairs, folder = find_pairs(DataConfig(images=str(discs[0]), masks=str(discs[1]))), tmp_path / "cache"
    cached = cache.filled(pairs, decoder_of(), str(folder), here)
    expected = [decoder_of()(pair.image, pair.mask) for pair in pairs]
    one, two = sorted(folder.rglob("*.parquet"))
    one.unlink()
    two.write_bytes(two.read_bytes()[:100])
    for decoder in (cached, cache.filled(pairs, decoder_of(), str(folder), here)):
        for pair, row in zip(pairs, expected, strict=True):
            found = decoder(pair.image, pair.mask)
            assert all(np.array_equal(found[name], row[name]) for name in row)
    assert here.pairs == 24


def test_a_bad_image_is_named_and_the_rest_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "FILE_BYTES", 1)
    images, masks = make_discs(tmp_path / "discs", 5)
    bad = sorted(Path(images).iterdir())[3]
    bad.write_bytes(b"not an image")
    pairs = find_pairs(DataConfig(images=str(images), masks=str(masks)))
    with pytest.raises(UserError, match=bad.name):
        cache.filled(pairs, decoder_of(), str(tmp_path / "cache"), here)
    assert len(list((tmp_path / "cache").rglob("*.parquet"))) == 3
