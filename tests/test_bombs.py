"""Small files that claim gigabytes, or hours of work, are refused by their headers, as images and as masks."""

import io
import json
import resource
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import make_model, make_photos
from PIL import Image

from unet_ray.config import PredictConfig
from unet_ray.data import headers, imaging, storage
from unet_ray.data.imaging import ImageError
from unet_ray.inference.predict import predict
from unet_ray.ray_backend.session import LOCAL


def png(width: int, height: int, *chunks: tuple[bytes, bytes], pixels: bytes = b"") -> bytes:
    """Returns a PNG with this header and further chunks; `pixels`: what its compressed data unpack to."""
    start = (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    data = b"\x89PNG\r\n\x1a\n"
    for kind, body in (start, *chunks, (b"IDAT", zlib.compress(pixels, 9)), (b"IEND", b"")):
        data += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return data


def npy(shape: tuple[int, ...], dtype: str = "|u1") -> bytes:
    header = repr({"descr": dtype, "fortran_order": False, "shape": shape}).encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\0" + struct.pack("<H", len(header)) + header + bytes(1000)


def progressive(scans: int) -> bytes:
    """Returns a progressive JPEG whose last scan is repeated."""
    stream = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8)
    Image.fromarray(noise).save(stream, "JPEG", progressive=True)
    data = stream.getvalue()
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * (scans - data.count(b"\xff\xda") + 1) + b"\xff\xd9"


def deflated_tiff(side: int, unpacked: int) -> bytes:
    """Returns a TIFF of seven channels; the strip of the first unpacks to this many bytes."""
    tifffile = pytest.importorskip("tifffile")
    stream = io.BytesIO()
    values = np.zeros((7, side, side), np.uint8)
    tifffile.imwrite(stream, values, photometric="minisblack", compression="zlib", planarconfig="separate")
    data = stream.getvalue()
    strip = zlib.compress(bytes(side * side))
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        page = file.pages[0]
        entry = {tag.name: tag for tag in page.tags}
        bomb, at = zlib.compress(bytes(unpacked), 9), len(data)
        for name, value in (("StripOffsets", at), ("StripByteCounts", len(bomb))):
            tag = entry[name]
            data = data[: tag.valueoffset] + struct.pack("<I", value) + data[tag.valueoffset + 4 :]
    assert strip
    return data + bomb


def endless_tiff() -> bytes:
    """Returns a TIFF whose only page is followed by itself."""
    return b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", 0) + struct.pack("<I", 8)


def gif(width: int, height: int) -> bytes:
    stream = io.BytesIO()
    Image.new("P", (8, 8)).save(stream, "GIF")
    data = bytearray(stream.getvalue())
    data[6:10] = struct.pack("<HH", width, height)
    return bytes(data)


MEGABYTES_64 = zlib.compress(bytes(64 * 2**20), 9)
BOMBS: dict[str, Callable[[], bytes]] = {
    "PNG of a billion pixels": lambda: png(40_000, 30_000, pixels=bytes(1000)),
    "PNG with a text of 64 MB": lambda: png(8, 8, (b"zTXt", b"a\0\0" + MEGABYTES_64), pixels=bytes(72)),
    "PNG with an international text": lambda: png(8, 8, (b"iTXt", b"a\0\1\0\0\0" + MEGABYTES_64), pixels=bytes(72)),
    "GIF of four billion pixels": lambda: gif(65_535, 65_535),
    "NPY of a terabyte": lambda: npy((1000, 1000, 1_000_000)),
    "NPY that claims more than it has": lambda: npy((10_000, 10_000)),
    "NPY of a billion pixels": lambda: npy((40_000, 30_000)),
    "JPEG of a thousand scans": lambda: progressive(1000),
    "PostScript": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
}
OF_SEVEN = {
    "NPY of a terabyte": lambda: npy((1_000_000, 1_000_000, 7)),
    "TIFF whose pages never end": endless_tiff,
    "TIFF whose strip unpacks to a gigabyte": lambda: deflated_tiff(64, 2**28),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_as_image_and_as_mask(name):
    data = BOMBS[name]()
    assert len(data) < 2_000_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for decode in (lambda: imaging.decode_image(data, 3, (32, 32)), lambda: imaging.stored_values(data)):
        with pytest.raises(ImageError):
            decode()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000, "kilobytes"


@pytest.mark.parametrize("name", OF_SEVEN)
def test_a_bomb_of_many_channels_is_refused(name):
    pytest.importorskip("tifffile")
    data = OF_SEVEN[name]()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ImageError):
        imaging.decode_image(data, 7, (32, 32))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000, "kilobytes"


def test_a_tiff_of_many_channels_is_checked_before_it_is_decoded(monkeypatch):
    tifffile = pytest.importorskip("tifffile")
    stream = io.BytesIO()
    tifffile.imwrite(stream, np.zeros((7, 40, 50), np.uint8), photometric="minisblack", compression="zlib")
    data = stream.getvalue()
    assert imaging.decode_image(data, 7, None)[0].shape == (40, 50, 7)

    def decoded(*_arguments: object, **_options: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(tifffile.TiffPageSeries, "asarray", decoded)
    with pytest.raises(ImageError, match="2000 pixels, more than --max-pixels 1999"):
        imaging.decode_image(data, 7, None, max_pixels=1999)
    with pytest.raises(ImageError, match=r"7 channel\(s\), the model takes 5"):
        imaging.decode_image(data, 5, None)


def test_files_that_only_look_like_bombs_are_read():
    for scans in (10, headers.MOST_SCANS):
        assert imaging.decode_image(progressive(scans), 3, None)[0].shape == (64, 64, 3)
    stream = io.BytesIO()
    frames = [Image.new("L", (30, 20), value) for value in range(40)]
    frames[0].save(stream, "TIFF", save_all=True, append_images=frames[1:])
    assert imaging.decode_image(stream.getvalue(), 40, None)[0].shape == (20, 30, 40)
    stream = io.BytesIO()
    Image.fromarray(np.full((20, 30), 40_000, np.uint16)).save(stream, "PNG")
    assert imaging.decode_image(stream.getvalue(), 1, None)[0].max() == 156
    stream = io.BytesIO()
    np.save(stream, np.ones((9, 8, 7), np.float64))
    assert imaging.decode_image(stream.getvalue(), 7, None, value_range=(0, 1))[0].min() == 255


def test_no_byte_beyond_the_limit_is_read(tmp_path, monkeypatch):
    path = tmp_path / "large.jpg"
    path.write_bytes(bytes(5000))
    assert len(headers.read_file(str(path), 1000)) == 5000
    with pytest.raises(ImageError, match="more than 160 bytes, which --max-pixels 10 allows"):
        headers.read_file(str(path), 10)
    # As in a bucket: the stream is asked for no more than the limit and a byte.
    monkeypatch.setattr(storage, "is_uri", lambda _location: True)
    monkeypatch.setattr(storage, "resolve", lambda location: (storage._filesystem(""), location))
    assert len(storage.read_at_most(str(path), 161)) == 161
    assert len(storage.read_at_most(str(path), 10**9)) == 5000


def test_a_folder_with_bombs_has_a_row_for_each(tmp_path):
    photos = make_photos(tmp_path / "photos", 6)
    names = {}
    for number, (name, make) in enumerate(BOMBS.items()):
        names[name] = photos / f"bomb {number}.{'npy' if name.startswith('NPY') else 'png'}"
        names[name].write_bytes(make())
    config = PredictConfig(
        model=str(make_model(tmp_path / "model")),
        inputs=(str(photos),),
        out=str(tmp_path / "out"),
        device="cpu",
        backend="torch",
    )
    summary = predict(config, runtime=LOCAL)
    assert (summary.images, summary.ok, summary.failed) == (6 + len(BOMBS), 6, len(BOMBS))


LIMITED = """
import json, resource, sys
from unet_ray import own_process
from unet_ray.data import imaging
own_process.claim()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[2]),) * 2)
for path in json.loads(sys.argv[1]):
    data = open(path, "rb").read()
    for decode in (lambda: imaging.decode_image(data, 3, (32, 32)), lambda: imaging.stored_values(data)):
        try:
            decode()
        except imaging.ImageError as error:
            assert "memory" not in str(error), (path, error)
        else:
            raise AssertionError(path)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_in_our_own_process_where_pillow_has_no_limit_they_are_refused_too(tmp_path):
    paths = []
    for number, make in enumerate(BOMBS.values()):
        (tmp_path / str(number)).write_bytes(make())
        paths.append(str(tmp_path / str(number)))
    command = [sys.executable, "-c", LIMITED, json.dumps(paths), str(16 * 2**30)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) < 100_000, "kilobytes"
