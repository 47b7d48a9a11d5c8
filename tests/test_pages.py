"""Files that hold several images, channels of more than 8 bits, and files whose names say nothing."""

import io
import logging
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import tifffile
from conftest import disc, make_model
from PIL import Image

from unet_ray import doctor
from unet_ray.config import DataConfig, PredictConfig, UserError
from unet_ray.data import headers, imaging, pages
from unet_ray.data.imaging import ImageError, decode_image, stored_values
from unet_ray.data.inputs import find_images, iter_images
from unet_ray.data.pairs import find_pairs
from unet_ray.inference.predict import predict
from unet_ray.ray_backend.session import LOCAL

SIDE = 24


def stack(path: Path, count: int = 3, **options) -> np.ndarray:
    """Writes a TIFF of pages that differ. Returns them."""
    values = np.stack([disc(SIDE, (6 + 4 * n, 12), 5) * np.uint8(200 + n) for n in range(count)])
    path.parent.mkdir(parents=True, exist_ok=True)
    tifffile.imwrite(path, values, photometric="minisblack", **options)
    return values


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


def run(model: Path, inputs: Path, out: Path, **options):
    return predict(
        PredictConfig(model=str(model), inputs=(str(inputs),), out=str(out), precision="fp32", **options), runtime=LOCAL
    )


@pytest.mark.parametrize("options", [{}, {"bigtiff": True}, {"byteorder": ">"}, {"compression": "zlib"}])
def test_each_page_of_a_tiff_is_an_image_with_its_own_pixels(tmp_path, options):
    values = stack(tmp_path / "set/volume.tif", **options)
    found = find_images(str(tmp_path / "set"))
    assert [image.key for image in found] == ["volume/0000", "volume/0001", "volume/0002"]
    for image, page in zip(found, values, strict=True):
        data = imaging.read_file(image.path)
        assert np.array_equal(decode_image(data, 1, None)[0][..., 0], page)
        assert np.array_equal(stored_values(data), page)


def test_pages_of_sixteen_bits_and_of_several_channels_keep_their_values(tmp_path):
    generator = np.random.default_rng(0)
    for shape in ((2, SIDE, SIDE), (2, SIDE, SIDE, 3), (2, SIDE, SIDE, 4)):
        values = generator.integers(0, 5000, shape).astype(np.uint16)
        kind = "rgb" if len(shape) == 4 else "minisblack"
        tifffile.imwrite(tmp_path / "v.tif", values, photometric=kind)
        for image, page in zip(find_images(str(tmp_path)), values, strict=True):
            channels = 1 if len(shape) == 3 else shape[-1]
            got, _ = decode_image(imaging.read_file(image.path), channels, None, value_range=(0, 5100))
            assert np.abs(got.astype(float) - (page.reshape(got.shape) / 20)).max() <= 0.5


def test_smaller_copies_inside_a_tiff_are_no_pages(tmp_path):
    with tifffile.TiffWriter(tmp_path / "tiled.tif") as writer:
        writer.write(np.zeros((64, 64), np.uint8), subifds=0)
        writer.write(np.zeros((32, 32), np.uint8), subfiletype=1)
    [image] = find_images(str(tmp_path))
    assert image.key == "tiled" and decode_image(imaging.read_file(image.path), 1, None)[1] == (64, 64)


def test_one_page_alone_is_never_read_instead_of_all(tmp_path):
    stack(tmp_path / "v.tif")
    with pytest.raises(ImageError, match="a TIFF of 3 pages: in a folder on a disk each page is an image"):
        decode_image((tmp_path / "v.tif").read_bytes(), 1, None)
    with pytest.raises(ImageError, match="a TIFF of 3 pages"):
        stored_values((tmp_path / "v.tif").read_bytes())
    with pytest.raises(ImageError, match=r"it has 3 page\(s\), and no number 7"):
        imaging.read_file(str(tmp_path / "v.tif#7"))


def test_pages_of_different_sizes_are_an_error_that_names_the_file(tmp_path, model):
    with tifffile.TiffWriter(tmp_path / "in.tif") as writer:
        for side in (20, 30):
            writer.write(np.zeros((side, side), np.uint8))
    [image] = find_images(str(tmp_path))
    with pytest.raises(ImageError, match=r"a TIFF of 2 pages of different sizes \(20x20 and 30x30\): save each"):
        decode_image(imaging.read_file(image.path), 1, None)
    summary = run(model, tmp_path / "in.tif", tmp_path / "out")
    assert summary.failed == 1 and "pages of different sizes" in next(iter(summary.failures))


def test_many_channels_as_pages_stay_channels(tmp_path):
    values = np.random.default_rng(1).integers(0, 255, (6, SIDE, SIDE)).astype(np.uint8)
    tifffile.imwrite(tmp_path / "six.tif", values, photometric="minisblack")
    array, _ = decode_image((tmp_path / "six.tif").read_bytes(), 6, None)
    assert np.array_equal(np.moveaxis(array, -1, 0), values)


def test_a_volume_and_its_labels_pair_page_by_page(tmp_path):
    stack(tmp_path / "train-volume.tif")
    labels = stack(tmp_path / "train-labels.tif")
    pairs = find_pairs(DataConfig(images=str(tmp_path / "train-volume.tif"), masks=str(tmp_path / "train-labels.tif")))
    assert [pair.key for pair in pairs] == ["0000", "0001", "0002"]
    assert np.array_equal(stored_values(imaging.read_file(pairs[1].mask)), labels[1])
    report = doctor.examine(str(tmp_path / "train-volume.tif"), str(tmp_path / "train-labels.tif"), timing=False)
    assert report.pairs == 3 and report.suggestion is not None


def test_predict_writes_a_mask_for_each_page_and_each_frame(tmp_path, model):
    stack(tmp_path / "in/volume.tif")
    frames = [Image.fromarray(np.full((SIDE, SIDE), 60 * n, np.uint8)) for n in range(1, 4)]
    frames[0].save(tmp_path / "in/film.gif", save_all=True, append_images=frames[1:])
    assert run(model, tmp_path / "in", tmp_path / "out").ok == 6
    masks = {str(path.relative_to(tmp_path / "out/masks")) for path in (tmp_path / "out").rglob("*.png")}
    assert masks == {f"{name}/{n:04d}.png" for name in ("volume", "film") for n in range(3)}
    paths = pq.read_table(tmp_path / "out/manifest.parquet")["path"].to_pylist()
    assert sorted(paths)[0] == f"{tmp_path}/in/film.gif#0"
    assert run(model, tmp_path / "in", tmp_path / "out").already_done == 6


# --- bands and bits ---


def test_a_fourth_band_that_is_no_transparency_is_read_as_it_is(tmp_path):
    values = np.random.default_rng(2).integers(0, 255, (SIDE, SIDE, 4)).astype(np.uint8)
    for name, extra in (("data", None), ("alpha", ["unassalpha"])):
        tifffile.imwrite(tmp_path / f"{name}.tif", values, photometric="rgb", extrasamples=extra)
        data = (tmp_path / f"{name}.tif").read_bytes()
        assert np.array_equal(decode_image(data, 4, None)[0], values), name
        assert np.array_equal(decode_image(data, 3, None)[0], values[..., :3]), name


def test_doctor_says_the_range_of_sixteen_bits_in_colour(tmp_path):
    for number in range(6):
        values = np.random.default_rng(number).integers(0, 5100, (40, 40, 3)).astype(np.uint16)
        (tmp_path / "i").mkdir(exist_ok=True)
        (tmp_path / "m").mkdir(exist_ok=True)
        tifffile.imwrite(tmp_path / f"i/{number}.tif", values, photometric="rgb")
        Image.fromarray(disc(40, (12, 8 + number), 9) * np.uint8(255)).save(tmp_path / f"m/{number}.png")
    report = doctor.examine(str(tmp_path / "i"), str(tmp_path / "m"), timing=False)
    assert {f.code for f in report.findings if f.level != "note"} == {"dark-16-bit-images"}
    config = report.suggestion.config()
    assert config.data.value_range == (0, 8191) and config.model.in_channels == 3
    assert report.facts["image_modes"] == {"uint16×3": 6}
    assert report.facts["image_bands"] == {"3 bands of 16 bits": 6}
    data = (tmp_path / "i/0.tif").read_bytes()
    array, _ = decode_image(data, 3, None, value_range=(0, 8191))
    stored = tifffile.imread(tmp_path / "i/0.tif")
    assert np.abs(array - stored * (255 / 8191)).max() <= 0.5


# --- names that say nothing ---


def test_images_are_known_by_their_content_where_the_name_says_nothing(tmp_path, model, caplog):
    folder = tmp_path / "in"
    folder.mkdir()
    picture = Image.fromarray(np.random.default_rng(3).integers(0, 255, (SIDE, SIDE, 3)).astype(np.uint8))
    for name, kind in (
        ("plain", "JPEG"),
        ("photo.jfif", "JPEG"),
        ("odd.bin", "PNG"),
        ("wrong.png", "JPEG"),
        ("j.jp2", "JPEG2000"),
        ("p.ppm", "PPM"),
        ("a.avif", "AVIF"),
    ):
        picture.save(folder / name, kind)
    for name in ("notes.txt", "readme", "data.json", ".hidden"):
        (folder / name).write_text("no image")
    caplog.set_level(logging.WARNING)
    summary = run(model, folder, tmp_path / "out")
    assert (summary.ok, summary.failed) == (7, 0)
    assert "3 files are no images, and were passed over: " in caplog.text
    assert "1 .txt" in caplog.text and "1 without an extension" in caplog.text and "--strict" in caplog.text
    strict = run(model, folder, tmp_path / "strict", strict=True)
    assert (strict.ok, strict.failed) == (7, 3)


def test_a_heic_photograph_is_read_or_its_row_names_what_to_install(tmp_path, monkeypatch):
    pillow_heif = pytest.importorskip("pillow_heif")
    picture = Image.fromarray(np.full((SIDE, SIDE, 3), 120, np.uint8))
    stream = io.BytesIO()
    pillow_heif.from_pillow(picture).save(stream, quality=90)
    array, size = decode_image(stream.getvalue(), 3, None)
    assert size == (SIDE, SIDE) and abs(int(array.mean()) - 120) < 5
    monkeypatch.setitem(__import__("sys").modules, "pillow_heif", None)
    with pytest.raises(ImageError, match=r"a HEIC image: pip install 'unet_ray\[heic\]'"):
        decode_image(stream.getvalue(), 3, None)


def test_a_folder_of_other_files_has_no_image(tmp_path):
    (tmp_path / "notes.txt").write_text("P5 is not only the beginning of a picture")
    with pytest.raises(UserError, match="no image in it"):
        list(iter_images(str(tmp_path)))


def test_the_pages_of_a_chain_that_never_ends_are_refused():
    entry = b"II*\0\x08\0\0\0" + b"\0\0" + b"\x08\0\0\0"  # a directory without entries that names itself as the next
    with pytest.raises(ImageError, match="more than 10000 pages"):
        headers.tiff_pages(io.BytesIO(entry))
    with pytest.raises(ImageError, match="truncated"):
        headers.tiff_pages(io.BytesIO(b"II*\0\xff\xff\xff\0"))
    assert pages.file_of("/a/b.tif#3") == "/a/b.tif"
    assert pages.file_of("/a/b.jpg#3") == "/a/b.jpg#3"
