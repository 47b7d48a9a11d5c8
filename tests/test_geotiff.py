"""--format geotiff: rasterio finds the mask where it finds the image."""

import io

import numpy as np
import pyarrow.parquet as pq
import pytest
import rasterio
import tifffile
from conftest import make_model
from PIL import Image
from rasterio.control import GroundControlPoint
from rasterio.crs import CRS
from rasterio.transform import Affine, from_origin

import unet_ray
from unet_ray.config import UserError

UTM = CRS.from_epsg(32633)
TURNED = Affine(0.4, 0.25, 500_000, 0.25, -0.4, 4_649_776)


def write(path, transform=None, crs=None, *, bands=3, dtype="uint8", size=(600, 80), **options):
    values = np.random.default_rng(0).integers(0, 255, (bands, *size)).astype(dtype)
    profile = {"driver": "GTiff", "height": size[0], "width": size[1], "count": bands, "dtype": dtype, **options}
    place = {name: value for name, value in (("crs", crs), ("transform", transform)) if value is not None}
    with rasterio.open(path, "w", **profile, **place) as file:
        file.write(values)


@pytest.fixture
def model(tmp_path):
    return make_model(tmp_path / "model")


@pytest.fixture
def model_of_three(tmp_path):
    return make_model(tmp_path / "three", ("model.num_classes", 3), ("data.mask_values", [0, 1, 2]))


@pytest.fixture
def area(tmp_path):
    """GeoTIFF in several forms."""
    folder = tmp_path / "area"
    folder.mkdir()
    write(folder / "plain.tif", from_origin(500_000, 4_649_776, 0.25, 0.25), UTM)
    write(folder / "turned.tif", TURNED, UTM)
    write(
        folder / "degrees.tif", from_origin(13.4, 52.5, 1e-5, 1e-5), CRS.from_epsg(4326), compress="deflate", tiled=True
    )
    write(folder / "own.tif", from_origin(0, 0, 2, 2), CRS.from_proj4("+proj=laea +lat_0=52 +lon_0=10 +ellps=GRS80"))
    write(folder / "big.tif", from_origin(7, 9, 1, 1), UTM, BIGTIFF="YES")
    write(folder / "deep.tif", from_origin(7, 9, 1, 1), UTM, dtype="uint16")
    points = [GroundControlPoint(row, col, 13 + col / 100, 52 - row / 100) for row, col in ((0, 0), (0, 79), (599, 0))]
    write(folder / "points.tif", size=(600, 80), gcps=points, crs=CRS.from_epsg(4326))
    return folder


def test_the_mask_lies_where_its_image_lies(model, area, tmp_path):
    out = tmp_path / "out"
    summary = unet_ray.predict(model, area, out, formats="png,geotiff", local=True)
    assert (summary.ok, summary.failed) == (7, 0)
    for image in sorted(area.iterdir()):
        mask = out / "geotiff" / image.name
        with rasterio.open(image) as before, rasterio.open(mask) as after:
            assert (after.crs, after.transform) == (before.crs, before.transform), image.name
            points = [[point.asdict() for point in file.gcps[0]] for file in (before, after)]
            assert (points[0], before.gcps[1]) == (points[1], after.gcps[1]), image.name
            assert after.shape == before.shape and after.dtypes == ("uint8",)
            stored = np.asarray(Image.open(out / "masks" / f"{image.stem}.png")).astype(np.uint8)
            assert (after.read(1) == stored).all()


def test_without_png_the_manifest_names_the_geotiff_and_a_second_run_keeps_it(model, area, tmp_path):
    out = tmp_path / "out"
    for _ in range(2):
        assert unet_ray.predict(model, area, out, formats="geotiff", local=True).ok == 7
    outputs = pq.read_table(out / "manifest.parquet")["output"].to_pylist()
    assert sorted(outputs) == sorted(f"geotiff/{path.name}" for path in area.iterdir())
    assert not (out / "masks").exists()


def test_several_classes_have_a_palette(model_of_three, area, tmp_path):
    unet_ray.predict(model_of_three, area, tmp_path / "out", formats="geotiff", local=True)
    with rasterio.open(tmp_path / "out/geotiff/plain.tif") as file:
        assert file.read(1).max() < 3
        assert len({file.colormap(1)[class_id] for class_id in range(3)}) == 3


def test_an_image_without_a_georeference_fails_and_leaves_nothing(model, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    write(folder / "nowhere.tif")
    Image.new("RGB", (40, 40)).save(folder / "photo.png")
    turned = io.BytesIO()
    tags = [(274, 3, 1, 3, True), (33550, 12, 3, (1.0, 1.0, 0.0), True), (33922, 12, 6, (0.0,) * 6, True)]
    tifffile.imwrite(turned, np.zeros((32, 32, 3), np.uint8), photometric="rgb", extratags=tags)
    (folder / "turned.tif").write_bytes(turned.getvalue())
    summary = unet_ray.predict(model, folder, tmp_path / "out", formats="png,geotiff", local=True)
    assert (summary.ok, summary.failed) == (0, 3)
    errors = {
        row["path"].rpartition("/")[2]: row["error"]
        for row in pq.read_table(tmp_path / "out/manifest.parquet").to_pylist()
    }
    assert "no georeference" in errors["nowhere.tif"] and "no georeference" in errors["photo.png"]
    assert "orientation" in errors["turned.tif"]
    assert not [path for path in (tmp_path / "out").rglob("*") if path.suffix in (".tif", ".png")]


def test_the_name_is_offered(model, area, tmp_path):
    with pytest.raises(UserError, match="did you mean 'geotiff'"):
        unet_ray.predict(model, area, tmp_path / "out", formats="geotif", local=True)
