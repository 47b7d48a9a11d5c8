"""Masks as polygons for labelme and Label Studio: drawn again, they give the mask back."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from conftest import REAL_DATA, disc, make_model
from PIL import Image
from test_annotations import masks_of, photos

import unet_ray
from unet_ray.data.annotations.drawing import brush_values, packed_brush, region
from unet_ray.data.polygons import LEAST_IOU, _distances, outlined, simplified

KINDS = ("labelme", "polygons")


def iou(one: np.ndarray, other: np.ndarray) -> float:
    return float((one & other).sum() / max(1, (one | other).sum()))


def drawn(rings, size_hw, kind) -> np.ndarray:
    mask = np.zeros(size_hw, np.uint8)
    for ring in rings:
        data = ["polygon", ring.points.tolist()] if kind == "labelme" else [ring.points.reshape(-1).tolist()]
        mask[region(kind, data, size_hw)] = ring.class_id
    return mask


def rings_in_rings() -> np.ndarray:
    """A disc with a hole, in which another class lies with a hole, in which there is a dot of the first."""
    mask = np.zeros((120, 140), np.uint8)
    for radius, class_id in ((55, 1), (45, 0), (35, 2), (20, 0), (9, 1)):
        mask[disc(120, (60, 60), radius)[:, :].astype(bool).nonzero()] = class_id
    mask[0:10, 130:140] = 2  # in a corner
    return mask


def thin() -> np.ndarray:
    mask = np.zeros((60, 80), np.uint8)
    mask[10, 5:70] = mask[5:50, 20] = mask[30:32, 40:75] = 1
    mask[50, 50] = mask[51, 51] = 1  # connected by a corner
    return mask


MASKS = {
    "rings in rings": rings_in_rings,
    "thin lines": thin,
    "all": lambda: np.ones((20, 30), np.uint8),
    "one pixel": lambda: np.pad(np.ones((1, 1), np.uint8), 8),
    "a board": lambda: np.kron(np.indices((6, 7)).sum(axis=0) % 2, np.ones((9, 9))).astype(np.uint8),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MASKS)
def test_outlines_give_the_mask_back(name, kind):
    mask = MASKS[name]()
    rings, bad = outlined(mask, kind)
    again = drawn(rings, mask.shape, kind)
    assert name == "one pixel" or not bad  # of a pixel there is no polygon between pixels' centres
    for class_id in set(np.unique(mask).tolist()) - {0, *bad}:
        assert iou(again == class_id, mask == class_id) >= LEAST_IOU


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_mask_has_no_outline_and_noise_is_never_wrong(kind):
    assert outlined(np.zeros((9, 9), np.uint8), kind) == ([], [])
    noise = (np.random.default_rng(0).random((40, 50)) > 0.5).astype(np.uint8)
    rings, bad = outlined(noise, kind)
    assert bad == [1] or iou(drawn(rings, noise.shape, kind) == 1, noise == 1) >= LEAST_IOU


def test_simplified_outlines_have_few_points_and_stay_within_the_tolerance():
    angles = np.linspace(0, 2 * np.pi, 400, endpoint=False)
    circle = np.stack([100 * np.cos(angles), 100 * np.sin(angles)], axis=1)
    few = simplified(circle, 1.0)
    assert 8 < len(few) < 40
    closed = np.vstack([few, few[:1]])
    nearest = np.min([_distances(circle, *closed[k : k + 2]) for k in range(len(few))], axis=0)
    assert nearest.max() <= 1.0
    assert simplified(circle, 0) is circle


@pytest.mark.parametrize(("name", "folder"), [("carvana", "train_masks"), ("dsb2018", "masks"), ("camvid", "masks")])
@pytest.mark.parametrize("kind", KINDS)
def test_real_masks_are_given_back(real_data, name, folder, kind):
    for path in sorted((REAL_DATA / name / folder).iterdir())[:4]:
        with Image.open(path) as image:
            mask = np.asarray(image)
        mask = (mask > 127).astype(np.uint8) if name == "dsb2018" else mask
        rings, bad = outlined(mask, kind)
        again = drawn(rings, mask.shape, kind)
        assert not bad
        assert all(iou(again == k, mask == k) >= LEAST_IOU for k in np.unique(mask) if k)


def test_a_brush_is_packed_as_it_is_unpacked():
    for shape in ((1, 1), (30, 41), (300, 400)):
        inside = np.random.default_rng(0).random(shape) > 0.9
        inside[: shape[0] // 2] = True
        values = brush_values(packed_brush(inside), 4 * inside.size)
        assert (values.reshape(-1, 4) == 255 * inside.reshape(-1, 1)).all()


@pytest.fixture(params=[1, 3], ids=["one class", "three classes"])
def predicted(request, tmp_path) -> tuple[Path, Path, list[str]]:
    """Images and the prediction of a network that was not trained: masks of all forms."""
    names = ["background", "car", "tree"]
    settings = [("model.num_classes", 3), ("data.mask_values", [0, 1, 2]), ("data.classes", names)]
    model = make_model(tmp_path / "model", *(settings if request.param == 3 else []))
    photos(tmp_path / "images", ["a/x.jpg", "b/y 1.jpg", "z.png"])
    options = {"formats": "png,labelme,labelstudio", "local": True}
    unet_ray.predict(model, tmp_path / "images", tmp_path / "out", **options)
    return tmp_path / "images", tmp_path / "out", names if request.param == 3 else []


@pytest.mark.parametrize("output", ["labelme", "label_studio.json"])
def test_what_predict_writes_for_tools_is_its_mask_when_it_is_read(predicted, output):
    images, out, names = predicted
    found = masks_of(images, out / output, classes=tuple(names))
    assert set(found) == {"a/x", "b/y 1", "z"}
    for key, mask in found.items():
        stored = np.asarray(Image.open(out / f"masks/{key}.png")).astype(np.uint8)
        for class_id in set(np.unique(stored).tolist()) - {0}:
            assert iou(mask == class_id, stored == class_id) >= LEAST_IOU - 1e-9


def test_labelme_finds_the_image_and_label_studio_its_address(predicted):
    _, out, _ = predicted
    for path in sorted((out / "labelme").rglob("*.json")):
        file = json.loads(path.read_text())
        assert Path(os.path.normpath(path.parent / file["imagePath"])).exists()
        assert (file["imageHeight"], file["imageWidth"]) == Image.open(path.parent / file["imagePath"]).size[::-1]
    tasks = json.loads((out / "label_studio.json").read_text())
    addresses = [task["data"]["image"] for task in tasks]
    assert sorted(addresses) == [f"/data/local-files/?d={name}" for name in ("a/x.jpg", "b/y%201.jpg", "z.png")]
    assert all(task["predictions"][0]["result"] for task in tasks)
