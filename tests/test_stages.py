"""Decoding reads each damaged file or gives a reason, and nothing worse happens."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unet_ray.config import MAX_PIXELS
from unet_ray.data.chunks import objects
from unet_ray.inference.reader import Reader
from unet_ray.inference.stages import DecodeImages

FORMATS = {"JPEG": {}, "PNG": {}, "GIF": {}, "TIFF": {"compression": "tiff_lzw"}, "WEBP": {}, "BMP": {}}


def mutated(count: int, pictures: list[Image.Image], seed: int = 0):
    """Yields encoded pictures with bytes that are flipped, cut, doubled or spliced from one another."""
    generator = np.random.default_rng(seed)
    originals = []
    for picture in pictures:
        for format, options in FORMATS.items():
            stream = io.BytesIO()
            picture.save(stream, format, **options)
            originals.append(stream.getvalue())
    for number in range(count):
        data = bytearray(originals[number % len(originals)])
        kind = generator.integers(4)
        if kind == 0:
            for place in generator.integers(0, len(data), generator.integers(1, 40)):
                data[place] = generator.integers(256)
        elif kind == 1:
            data = data[: generator.integers(len(data))]
        elif kind == 2:
            start, stop = sorted(generator.integers(0, len(data), 2))
            data[start:start] = data[start:stop]
        else:
            other = originals[generator.integers(len(originals))]
            place = generator.integers(len(data))
            data = data[:place] + other[generator.integers(len(other)) :]
        yield bytes(data)


def decode(folder: Path, files) -> tuple[int, int]:
    """Writes files to `folder` and decodes them. Returns how many were (read, refused)."""
    paths = []
    for number, data in enumerate(files):
        paths.append(str(folder / f"{number}.jpg").encode())
        (folder / f"{number}.jpg").write_bytes(data)
    chunk = DecodeImages(Reader(3, None, MAX_PIXELS, None), (16, 16))({"path": objects(paths)})
    errors = chunk["error"].tolist()
    assert len(errors) == len(paths) == len(chunk["image"])
    for row, error in enumerate(errors):
        assert (chunk["height"][row] == 0) == bool(error)
        assert "\n" not in error
    return errors.count(""), len(paths) - errors.count("")


def test_damaged_files_of_all_formats_are_read_or_have_a_reason(tmp_path, capfd):
    pictures = [Image.fromarray(np.random.default_rng(n).integers(0, 255, (20 + n, 30, 3), np.uint8)) for n in range(3)]
    read, failed = decode(tmp_path, mutated(600, pictures))
    assert read > 50 and failed > 200
    assert capfd.readouterr().err == ""  # C libraries print, too


@pytest.mark.parametrize(
    "array", [np.zeros((3, 3), complex), np.zeros(3), np.zeros((0, 4, 3), np.uint8), np.array([{}], dtype=object)]
)
def test_arrays_that_are_no_images_have_a_reason(tmp_path, array):
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=True)
    assert decode(tmp_path, [stream.getvalue()]) == (0, 1)
