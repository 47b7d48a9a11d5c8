"""Annotations as masks: each format against an independent reader, or against masks drawn by hand."""

import base64
import dataclasses
import io
import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import TINY, flags, make_discs
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

import unet_ray
from unet_ray.cli import main
from unet_ray.config import DataConfig, UserError
from unet_ray.data import imaging, mask_files, pages
from unet_ray.data.annotations import coco, drawing, json_items, sources
from unet_ray.data.annotations.drawing import brush_values, draw, region
from unet_ray.data.headers import ImageError
from unet_ray.data.pairs import find_pairs
from unet_ray.data.run_lengths import coco_runs, row_runs

HEIGHT, WIDTH = 40, 56
SIZE = (HEIGHT, WIDTH)
SQUARE, INNER = [5.0, 5, 30, 5, 30, 30, 5, 30], [10.0, 10, 20, 10, 20, 20, 10, 20]
SHAPES = {
    "plain": [[3.2, 4.1, 30.7, 6.9, 22.2, 35.5]],
    "two parts": [[2, 2, 12, 3, 8, 14], [30.5, 20, 50, 22, 40, 38.5]],
    "parts that overlap": [[2, 2, 30, 3, 8, 34], [10, 10, 50, 12, 20, 38]],
    "self-touching": [[5, 5, 40, 35, 5, 35, 40, 5]],
    "partly outside": [[-20, -5, 70, 10, 20, 60]],
    "outside": [[100, 100, 120, 100, 110, 130]],
    "of two points": [[3, 3, 9, 9]],
    "thin": [[1, 20, 55, 20.4, 1, 20.8]],
}
"""Polygons [x, y, …] of a shape."""


def photos(folder: Path, names=("a.jpg", "b.jpg")) -> None:
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 255, (HEIGHT, WIDTH, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(path)


def masks_of(images: Path, annotations: Path, **settings) -> dict[str, np.ndarray]:
    """Image key -> class ids."""
    data = DataConfig(images=str(images), masks=str(annotations), **settings)
    return {pair.key: imaging.stored_values(mask_files.read(pair.mask)) for pair in find_pairs(data)}


# --- COCO ---


def coco_file(path: Path, segmentations: dict[str, list]) -> None:
    """`segmentations`: image -> [(category id, segmentation, iscrowd)]."""
    images, annotations = [], []
    for number, (name, each) in enumerate(segmentations.items(), 7):
        images.append({"id": number, "file_name": name, "height": HEIGHT, "width": WIDTH})
        for category, segmentation, crowd in each:
            annotation = {"id": len(annotations) + 1, "image_id": number, "category_id": category, "iscrowd": crowd}
            annotations.append({**annotation, "segmentation": segmentation, "area": 1.0, "bbox": [0, 0, 1, 1]})
    categories = [{"id": 3, "name": "tree"}, {"id": 1, "name": "car"}]
    # The annotations come first, as some tools write them.
    path.write_text(json.dumps({"annotations": annotations, "images": images, "categories": categories}))


def uncompressed(mask: np.ndarray) -> dict:
    flat = mask.flatten(order="F").astype(int)
    counts, value = [], 0
    for pixel in flat.tolist():
        if pixel != value:
            value = pixel
            counts.append(1)
        elif counts:
            counts[-1] += 1
        else:
            counts = [1]
    if flat[0]:
        counts = [0, *counts]
    return {"size": [*mask.shape], "counts": counts}


@pytest.mark.parametrize("name", SHAPES)
def test_coco_polygons_are_drawn_as_pycocotools_draws_them(tmp_path, name):
    photos(tmp_path / "images")
    coco_file(tmp_path / "c.json", {"a.jpg": [(1, SHAPES[name], 0)], "b.jpg": []})
    found = masks_of(tmp_path / "images", tmp_path / "c.json")
    reference = COCO(tmp_path / "c.json")
    [annotation] = reference.anns.values()
    if name != "of two points":  # pycocotools reads four numbers as a box
        assert (found["a"] == reference.annToMask(annotation)).all()
    assert not found["b"].any()


def test_run_lengths_compressed_or_not_and_crowds_are_those_of_pycocotools(tmp_path):
    blob = np.random.default_rng(0).random(SIZE) > 0.7
    blob[0, 0] = True
    packed = coco_mask.encode(np.asfortranarray(blob.astype(np.uint8)))
    compressed = {"size": [HEIGHT, WIDTH], "counts": packed["counts"].decode()}
    photos(tmp_path / "images", ["a.jpg", "b.jpg", "c.jpg"])
    coco_file(
        tmp_path / "c.json",
        {"a.jpg": [(1, compressed, 0)], "b.jpg": [(1, uncompressed(blob), 1)], "c.jpg": [(1, uncompressed(~blob), 1)]},
    )
    found = masks_of(tmp_path / "images", tmp_path / "c.json")
    reference = COCO(tmp_path / "c.json")
    for key, annotation in zip("abc", reference.anns.values(), strict=True):
        assert (found[key] == reference.annToMask(annotation)).all()
    assert (found["a"] == blob).all() and (found["c"] == ~blob).all()


def test_classes_are_picked_and_ordered_by_name_and_the_later_shape_wins_or_the_smaller(tmp_path):
    photos(tmp_path / "images")
    coco_file(tmp_path / "c.json", {"a.jpg": [(3, [INNER], 0), (1, [SQUARE], 0)], "b.jpg": []})
    both = masks_of(tmp_path / "images", tmp_path / "c.json", classes=("background", "tree", "car"))["a"]
    assert set(np.unique(both)) == {0, 2}  # the car was drawn over the tree
    by_area = masks_of(
        tmp_path / "images", tmp_path / "c.json", classes=("background", "tree", "car"), overlap_order="area"
    )["a"]
    assert by_area[15, 15] == 1 and by_area[7, 7] == 2
    one = masks_of(tmp_path / "images", tmp_path / "c.json", classes=("background", "tree"))["a"]
    assert one[15, 15] == 1 and one[7, 7] == 0
    with pytest.raises(UserError, match=r"no class 'bus': there are car, tree"):
        masks_of(tmp_path / "images", tmp_path / "c.json", classes=("background", "bus"))
    with pytest.raises(UserError, match="--classes car,tree"):
        masks_of(tmp_path / "images", tmp_path / "c.json", classes=("car", "tree"))


def test_images_in_folders_are_found_by_the_end_of_their_paths(tmp_path):
    photos(tmp_path / "set", ["train/a.jpg", "val/a.jpg", "train/b.jpg"])
    coco_file(tmp_path / "set/train/_annotations.coco.json", {"a.jpg": [(1, [SQUARE], 0)], "b.jpg": []})
    coco_file(tmp_path / "set/val/_annotations.coco.json", {"a.jpg": [(1, [INNER], 0)]})
    found = masks_of(tmp_path / "set", tmp_path / "set")
    assert set(found) == {"train/a", "train/b", "val/a"}
    assert (found["train/a"] > 0).sum() > (found["val/a"] > 0).sum() > 0


def test_an_image_that_is_annotated_in_two_ways_is_an_error_and_the_same_twice_is_none(tmp_path):
    photos(tmp_path / "set")
    coco_file(tmp_path / "set/one.json", {"a.jpg": [(1, [SQUARE], 0)]})
    coco_file(tmp_path / "set/two.json", {"a.jpg": [(1, [SQUARE], 0)]})
    assert set(masks_of(tmp_path / "set", tmp_path / "set")) == {"a"}
    coco_file(tmp_path / "set/two.json", {"a.jpg": [(1, [INNER], 0)]})
    with pytest.raises(UserError, match=r"two\.json: a\.jpg is annotated twice"):
        masks_of(tmp_path / "set", tmp_path / "set")


# --- the other tools ---


def labelme_file(path: Path, shapes: list[dict], **more) -> None:
    whole = {
        "version": "5.4.1",
        "flags": {},
        "shapes": shapes,
        "imagePath": f"..\\x\\{path.stem}.jpg",
        "imageData": None,
    }
    path.write_text(json.dumps({**whole, "imageHeight": HEIGHT, "imageWidth": WIDTH, **more}))


def by_labelme(kind: str, points: list) -> np.ndarray:
    """What labelme's own `shape_to_mask` draws, with its defaults, written anew."""
    canvas = Image.fromarray(np.zeros(SIZE, np.uint8))
    pen = ImageDraw.Draw(canvas)
    corners = [tuple(point) for point in points]
    if kind == "circle":
        radius = math.hypot(corners[0][0] - corners[1][0], corners[0][1] - corners[1][1])
        x, y = corners[0]
        pen.ellipse([x - radius, y - radius, x + radius, y + radius], outline=1, fill=1)
    elif kind == "rectangle":
        pen.rectangle(corners, outline=1, fill=1)
    elif kind == "linestrip":
        pen.line(corners, fill=1, width=10)
    elif kind == "point":
        x, y = corners[0]
        pen.ellipse([x - 5, y - 5, x + 5, y + 5], outline=1, fill=1)
    else:
        pen.polygon(corners, outline=1, fill=1)
    return np.array(canvas, bool)


LABELME = {
    "polygon": [[3.2, 4.1], [30.7, 6.9], [22.2, 35.5]],
    "rectangle": [[5, 6], [30, 20]],
    "circle": [[20, 20], [20, 9]],
    "linestrip": [[5, 5], [30, 10], [50, 35]],
    "point": [[12, 30]],
}


@pytest.mark.parametrize("kind", LABELME)
def test_labelme_shapes_are_drawn_as_labelme_draws_them(tmp_path, kind):
    photos(tmp_path)
    labelme_file(tmp_path / "a.json", [{"label": "x", "points": LABELME[kind], "shape_type": kind}])
    found = masks_of(tmp_path, tmp_path)
    assert set(found) == {"a"}  # b has no file, so it is not labelled
    assert (found["a"] == by_labelme(kind, LABELME[kind])).all()


def test_a_mask_of_labelme_lies_at_its_place_and_is_cut_at_the_edge(tmp_path):
    photos(tmp_path)
    small = np.random.default_rng(0).random((10, 12)) > 0.5
    stream = io.BytesIO()
    Image.fromarray(small.astype(np.uint8) * 255).save(stream, "PNG")
    shape = {"label": "x", "shape_type": "mask", "mask": base64.b64encode(stream.getvalue()).decode()}
    labelme_file(tmp_path / "a.json", [{**shape, "points": [[50, 35], [62, 45]]}])
    whole = np.zeros(SIZE, bool)
    whole[35:40, 50:56] = small[:5, :6]
    assert (masks_of(tmp_path, tmp_path)["a"] == whole).all()


def test_a_labelme_rectangle_may_be_drawn_from_any_corner(tmp_path):
    photos(tmp_path)
    labelme_file(tmp_path / "a.json", [{"label": "x", "points": [[30, 6], [5, 20]], "shape_type": "rectangle"}])
    assert (masks_of(tmp_path, tmp_path)["a"] == by_labelme("rectangle", [[5, 6], [30, 20]])).all()


def test_yolo_polygons_are_shares_of_the_image_and_an_empty_file_is_an_image_without_objects(tmp_path):
    photos(tmp_path / "images/train", ["a.jpg", "b.jpg", "c.jpg"])
    labels = tmp_path / "labels/train"
    labels.mkdir(parents=True)
    (tmp_path / "data.yaml").write_text("names: [tree, car]\n")
    polygon = [0.1, 0.1, 0.9, 0.2, 0.4, 0.95]
    (labels / "a.txt").write_text("1 " + " ".join(map(str, polygon)) + "\n")
    (labels / "b.txt").write_text("")
    pixels = [value * (WIDTH, HEIGHT)[place % 2] for place, value in enumerate(polygon)]
    wanted = coco_mask.decode(coco_mask.frPyObjects([pixels], HEIGHT, WIDTH))[..., 0]
    for images in (tmp_path, tmp_path / "images"):
        found = masks_of(images, tmp_path / "labels", classes=("background", "tree", "car"))
        assert sorted(key[-1] for key in found) == ["a", "b"]
        assert all((mask == (2 * wanted if key.endswith("a") else 0)).all() for key, mask in found.items())
    (labels / "a.txt").write_text("1 0.5 0.5 0.2 0.2\n" + "0 " + " ".join(map(str, polygon)))
    with pytest.raises(UserError, match=r"a\.txt, line 1: a box, and no polygon"):
        masks_of(tmp_path, tmp_path / "labels")


def cvat(path: Path, shapes: str) -> None:
    path.write_text(
        "<?xml version='1.0'?><annotations><version>1.1</version><meta><task><labels><label><name>car</name></label>"
        "<label><name>tree</name></label></labels></task></meta>"
        f"<image id='0' name='a.jpg' width='{WIDTH}' height='{HEIGHT}'>{shapes}</image></annotations>"
    )


def test_cvat_polygons_boxes_ellipses_and_masks(tmp_path):
    photos(tmp_path / "images")
    cvat(
        tmp_path / "c.xml",
        "<polygon label='car' points='3.2,4.1;30.7,6.9;22.2,35.5' z_order='2'/>"
        "<box label='tree' xtl='1' ytl='1' xbr='50' ybr='30' z_order='0'/>"
        "<mask label='tree' rle='3, 2, 3, 1' left='50' top='37' width='3' height='3' z_order='1'/>"
        "<points label='car' points='1,1'/>",
    )
    found = masks_of(tmp_path / "images", tmp_path / "c.xml", classes=("background", "car", "tree"))["a"]
    car = coco_mask.decode(coco_mask.frPyObjects(SHAPES["plain"], HEIGHT, WIDTH))[..., 0] > 0
    box = coco_mask.decode(coco_mask.frPyObjects([[1, 1, 50, 1, 50, 30, 1, 30]], HEIGHT, WIDTH))[..., 0] > 0
    wanted = np.where(car, 1, np.where(box, 2, 0))
    wanted[38, 50:52] = 2
    wanted[39, 52] = 2
    assert (found == wanted).all()
    cvat(tmp_path / "c.xml", "<ellipse label='car' cx='25' cy='20' rx='12' ry='6' rotation='30'/>")
    area = (masks_of(tmp_path / "images", tmp_path / "c.xml")["a"] > 0).sum()
    assert area == pytest.approx(math.pi * 12 * 6, rel=0.03)


def test_via_regions(tmp_path):
    photos(tmp_path / "images")
    corners = {"name": "polygon", "all_points_x": [3, 30, 22], "all_points_y": [4, 6, 35]}
    regions = [
        {"shape_attributes": corners, "region_attributes": {"kind": "car"}},
        {"shape_attributes": {"name": "rect", "x": 40, "y": 2, "width": 10, "height": 8}, "region_attributes": {}},
    ]
    entries = {"a.jpg123": {"filename": "a.jpg", "size": 123, "regions": regions, "file_attributes": {}}}
    for whole in ({"_via_settings": {}, "_via_img_metadata": entries}, entries):
        (tmp_path / "via.json").write_text(json.dumps(whole))
        found = masks_of(tmp_path / "images", tmp_path / "via.json")
        wanted = coco_mask.decode(coco_mask.frPyObjects([[3, 4, 30, 6, 22, 35]], HEIGHT, WIDTH))[..., 0]
        wanted[2:10, 40:50] = 1
        assert set(found) == {"a"} and (found["a"] == wanted).all()


def packed_brush(values: np.ndarray, word: int = 8) -> list[int]:
    """Packs values as Label Studio's brush does: runs and literals, of random run sizes."""
    sizes, generator = [3, 4, 8, 16], random.Random(0)
    bits = f"{len(values):032b}{word - 1:05b}" + "".join(f"{size - 1:04b}" for size in sizes)
    place = 0
    while place < len(values):
        choice = generator.randrange(4)
        longest = min(2 ** sizes[choice], len(values) - place)
        same = 1
        while same < longest and values[place + same] == values[place]:
            same += 1
        if same > 1:
            bits += f"1{choice:02b}{same - 1:0{sizes[choice]}b}{values[place]:0{word}b}"
            place += same
        else:
            length = min(longest, 5)
            bits += f"0{choice:02b}{length - 1:0{sizes[choice]}b}"
            bits += "".join(f"{value:0{word}b}" for value in values[place : place + length])
            place += length
    bits += "0" * (-len(bits) % 8)
    return [int(bits[start : start + 8], 2) for start in range(0, len(bits), 8)]


def label_studio(path: Path, results: list[dict], image: str = "/data/upload/3/0a1b2c3d-a.jpg") -> None:
    results = [{"original_width": WIDTH, "original_height": HEIGHT, "image_rotation": 0, **each} for each in results]
    annotations = [{"was_cancelled": True, "result": []}, {"was_cancelled": False, "result": results}]
    path.write_text(json.dumps([{"id": 1, "annotations": annotations, "data": {"image": image}}]))


@pytest.mark.parametrize(
    "image",
    ["/data/upload/3/0a1b2c3d-a.jpg", "/data/local-files/?d=photos/a.jpg", "s3://bucket/photos/a.jpg", "a.jpg"],
)
def test_label_studio_polygons_are_in_percent_and_names_are_those_of_the_images(tmp_path, image):
    photos(tmp_path / "images")
    points = [[10, 10], [90, 20], [40, 95]]
    result = {"type": "polygonlabels", "value": {"points": points, "polygonlabels": ["car"], "closed": True}}
    label_studio(tmp_path / "ls.json", [result], image)
    pixels = [value * (WIDTH, HEIGHT)[place] / 100 for point in points for place, value in enumerate(point)]
    wanted = coco_mask.decode(coco_mask.frPyObjects([pixels], HEIGHT, WIDTH))[..., 0]
    assert (masks_of(tmp_path / "images", tmp_path / "ls.json")["a"] == wanted).all()


def test_a_label_studio_brush_is_unpacked(tmp_path):
    photos(tmp_path / "images")
    blob = np.zeros(SIZE, np.uint8)
    blob[5:30, 8:40] = np.random.default_rng(0).integers(0, 2, (25, 32)) * 255
    values = np.repeat(blob.reshape(-1), 4)
    assert (brush_values(packed_brush(values), values.size) == values).all()
    label_studio(
        tmp_path / "ls.json",
        [{"type": "brushlabels", "value": {"format": "rle", "rle": packed_brush(values), "brushlabels": ["car"]}}],
    )
    assert (masks_of(tmp_path / "images", tmp_path / "ls.json")["a"] == (blob > 0)).all()


def test_kaggles_run_lengths_go_down_the_columns_and_carvanas_along_the_rows(tmp_path, caplog):
    photos(tmp_path / "images")
    blob = np.random.default_rng(0).random(SIZE) > 0.6
    down = row_runs(np.ascontiguousarray(blob.T))
    (tmp_path / "steel.csv").write_text(f"ImageId,EncodedPixels\na.jpg,{down}\nb.jpg,\n")
    found = masks_of(tmp_path / "images", tmp_path / "steel.csv")
    assert (found["a"] == blob).all() and not found["b"].any()
    (tmp_path / "carvana.csv").write_text(f"img,rle_mask\na.jpg,{row_runs(blob)}\n")
    assert (masks_of(tmp_path / "images", tmp_path / "carvana.csv")["a"] == blob).all()
    assert (masks_of(tmp_path / "images", tmp_path / "steel.csv", rle_order="rows")["a"] != blob).any()
    data = DataConfig(images=str(tmp_path / "images"), masks=str(tmp_path / "steel.csv"))
    find_pairs(data, say=True)
    assert "run lengths go along the columns (--rle-order says otherwise)" in caplog.text


def test_several_rows_and_classes_of_a_table(tmp_path):
    photos(tmp_path / "images")
    (tmp_path / "t.csv").write_text("ImageId,ClassId,EncodedPixels\na.jpg,2,1 5\na.jpg,4,41 3\nb.jpg,2,9 9\n")
    found = masks_of(tmp_path / "images", tmp_path / "t.csv", classes=("background", "2", "4"))
    assert found["a"][:5, 0].tolist() == [1] * 5 and found["a"][:3, 1].tolist() == [2] * 3
    (tmp_path / "u.csv").write_text("Image_Label,EncodedPixels\na.jpg_Fish,1 5\na.jpg_Sugar,\nb.jpg_Fish,\n")
    found = masks_of(tmp_path / "images", tmp_path / "u.csv", classes=("background", "Fish"))
    assert found["a"][:5, 0].tolist() == [1] * 5 and not found["b"].any()


# --- our own outputs ---


@pytest.fixture(scope="module")
def predicted(tmp_path_factory) -> tuple[Path, Path, Path]:
    """Images, a run, and its prediction in all formats."""
    folder = tmp_path_factory.mktemp("predicted")
    images, masks = make_discs(folder / "d", 12)
    unet_ray.train(images, masks, folder / "run", settings={**dict(TINY), "train.epochs": 30}, local=True)
    unet_ray.predict(folder / "run", images, folder / "out", formats="png,coco,rle,kaggle,parquet", local=True)
    return images, folder / "run", folder / "out"


@pytest.mark.parametrize("output", ["coco.json", "rle.parquet", "submission.csv", "masks.parquet"])
def test_what_predict_writes_is_read_as_masks(predicted, output):
    images, run, out = predicted
    found = masks_of(images, out / output)
    stored = {path.stem: np.asarray(Image.open(path)).astype(np.uint8) for path in (out / "masks").iterdir()}
    assert any(mask.any() for mask in stored.values())
    for key, mask in stored.items():
        if key in found or mask.any():  # rle.parquet has no row of an empty mask
            assert (found[key] == mask).all()
    assert unet_ray.evaluate(run, images, out / output, local=True).dice.mean == 1


# --- the whole way, and what goes wrong ---


def test_a_training_on_annotations_writes_their_classes_into_the_model_and_is_scored(tmp_path):
    photos(tmp_path / "images", [f"{n}.png" for n in range(8)])
    shapes = {f"{n}.png": [(1, [SQUARE], 0), (3, [[35, 2, 50, 3, 40, 30]], 0)] for n in range(8)}
    coco_file(tmp_path / "c.json", shapes)
    run = tmp_path / "run"
    arguments = ["train", "--images", tmp_path / "images", "--masks", tmp_path / "c.json", "--out", run, "--local"]
    ran = CliRunner().invoke(main, [*map(str, arguments), "--classes", "tree,car", "--no-report", *flags(TINY)])
    assert ran.exit_code == 0, ran.output
    card = json.loads((run / "model/model.json").read_text())
    assert (card["classes"], card["mask_values"]) == (["background", "tree", "car"], [0, 1, 2])
    scores = unet_ray.evaluate(run, tmp_path / "images", tmp_path / "c.json", local=True)
    assert scores.images == 8 and set(scores.per_class) == {"background", "tree", "car"}
    wrong = CliRunner().invoke(
        main, [*map(str, arguments[:-2]), str(tmp_path / "w"), "--local", *flags([*TINY, ("model.num_classes", 3)])]
    )
    assert wrong.exit_code == 2 and "pick classes with --classes car,tree" in wrong.output


def test_a_drawn_mask_is_drawn_without_its_file_and_named_in_messages(tmp_path):
    photos(tmp_path / "images")
    coco_file(tmp_path / "c.json", {"a.jpg": [(1, [SQUARE], 0)]})
    [pair] = find_pairs(DataConfig(images=str(tmp_path / "images"), masks=str(tmp_path / "c.json")))
    (tmp_path / "c.json").unlink()
    assert imaging.stored_values(mask_files.read(pair.mask)).any()
    assert mask_files.shown(pair.mask) == f"{tmp_path}/c.json (a.jpg)"
    assert pages.file_of(pair.mask) == f"{tmp_path}/c.json"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("c.json", '{"images": [{"id": 1, "file_name": "a.jpg"', "COCO.s JSON that can.t be read"),
        ("c.json", '{"shapes": [{"label": "x"', "labelme.s JSON that can.t be read"),
        ("c.xml", "<annotations><version>1.1</version><image name='a.jpg'", "CVAT.s XML that can.t be read"),
        ("c.xml", "<!DOCTYPE b [<!ENTITY x 'y'>]><annotations><version>1.1</version></annotations>", "DOCTYPE"),
        ("c.csv", "name,EncodedPixels\na.jpg,1 2\n", "no column of images"),
        ("c.json", '{"shapes": [' + "[" * 100_000, "labelme.s JSON that can.t be read"),
        ("c.json", '{"images": [], "annotations": [' + "[" * 100_000, "nested too deeply"),
    ],
)
def test_a_file_that_cant_be_read_is_one_line(tmp_path, name, text, message):
    photos(tmp_path / "images")
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        masks_of(tmp_path / "images", tmp_path / name)


@pytest.mark.parametrize(
    ("kind", "data", "message"),
    [
        ("polygons", [[0, 0, 1e9, 0, 5, 5]], "far outside"),
        ("polygons", [[0, 0, math.nan, 0, 5, 5]], "far outside"),
        ("polygons", [[0, 0, 5, 0, 5]], "odd number"),
        ("rle", {"size": [9, 9], "counts": "52"}, "9x9 pixels for an image of 56x40"),
        ("rle", {"size": [HEIGHT, WIDTH], "counts": [5, 5]}, "don't add up"),
        ("runs", ["columns", "1 99999"], "beyond the image"),
        ("runs", ["columns", "1 2 3"], "odd number"),
        ("runs", ["columns", "a b"], "can't be drawn"),
        ("box_runs", [0, 0, 10**6, 10**6, [5]], "don't add up to their box"),
        ("brush", [1, 2, 3], "brush that ends early"),
        ("labelme", ["circle", [[1, 1]]], "can't be drawn"),
        ("picture", [0, 0, "no png"], "can't be drawn"),
    ],
)
def test_a_shape_that_cant_be_drawn_says_why(kind, data, message):
    with pytest.raises(ImageError, match=message):
        region(kind, data, SIZE)


def test_holes_are_left_out():
    mask = draw([(1, "minus", [[SQUARE], [INNER]])], SIZE)
    outer, inner = (draw([(1, "polygons", [polygon])], SIZE) for polygon in (SQUARE, INNER))
    assert (mask == (outer & ~inner & 1)).all() and mask[15, 15] == 0 and mask[7, 7] == 1


def test_a_folder_of_images_and_a_table_of_paths_are_no_annotations(tmp_path):
    photos(tmp_path / "images")
    (tmp_path / "list.csv").write_text("path\nimages/a.jpg\n")
    assert sources.recognised(str(tmp_path / "images")) is None
    assert sources.recognised(str(tmp_path / "list.csv")) is None
    assert sources.recognised(str(tmp_path / "nothing.json")) is None


def test_the_location_of_a_drawn_mask_in_a_bucket_keeps_its_options():
    annotated = drawing.Annotated("a.jpg", SIZE, [drawing.Shape("x", "polygons", [SQUARE])])
    location = drawing.drawn("s3://b/c.json?endpoint_override=h", annotated, {"x": 1}, "s3://b/a.jpg", by_area=False)
    assert location.endswith("?endpoint_override=h")
    file, packed = drawing.split_drawn(location)
    assert file == "s3://b/c.json?endpoint_override=h"
    assert Image.open(io.BytesIO(drawing.draw_png(file, packed, 10**6, lambda _: SIZE))).size == (WIDTH, HEIGHT)


def test_the_run_lengths_of_rle_parquet_are_pycocotools(tmp_path):
    blob = np.random.default_rng(3).random(SIZE) > 0.5
    assert (region("rle", {"size": [*SIZE], "counts": coco_runs(blob)}, SIZE) == blob).all()


def test_what_labelme_calls_ignore_is_left_out(tmp_path):
    photos(tmp_path / "set", [f"{n}.png" for n in range(6)])
    for number in range(6):
        shapes = [
            {"label": "car", "points": [[5, 5], [30, 30]], "shape_type": "rectangle"},
            {"label": "__ignore__", "points": [[20, 20], [50, 38]], "shape_type": "rectangle"},
        ]
        labelme_file(tmp_path / f"set/{number}.json", shapes)
    assert set(np.unique(masks_of(tmp_path / "set", tmp_path / "set")["0"])) == {0, 1, 255}
    assert sources.class_names(sources.recognised(str(tmp_path / "set"))) == (["car"], False)
    run = tmp_path / "run"
    unet_ray.train(tmp_path / "set", tmp_path / "set", run, settings=dict(TINY), local=True)
    valid = HEIGHT * WIDTH - 31 * 19
    scores = unet_ray.evaluate(run, tmp_path / "set", tmp_path / "set", local=True)
    assert set(scores.each.pixels.tolist()) == {valid}


def test_turned_rectangles_are_turned_about_the_point_that_their_tool_takes(tmp_path):
    photos(tmp_path / "images")
    value = {"x": 50, "y": 25, "width": 25, "height": 10, "rotation": 90, "rectanglelabels": ["car"]}
    label_studio(tmp_path / "ls.json", [{"type": "rectanglelabels", "value": value}])
    found = masks_of(tmp_path / "images", tmp_path / "ls.json")["a"]
    wanted = np.zeros(SIZE, np.uint8)
    wanted[10:24, 24:28] = 1  # 14 wide and 4 high, turned clockwise about its corner at (28, 10)
    assert (found == wanted).all()
    cvat(tmp_path / "c.xml", "<box label='car' xtl='10' ytl='10' xbr='30' ybr='14' rotation='90'/>")
    wanted = np.zeros(SIZE, np.uint8)
    wanted[2:22, 18:22] = 1  # about its centre, (20, 12)
    assert (masks_of(tmp_path / "images", tmp_path / "c.xml")["a"] == wanted).all()
    label_studio(tmp_path / "ls.json", [{"type": "rectanglelabels", "value": value, "image_rotation": 90}])
    with pytest.raises(UserError, match="turned in Label Studio"):
        masks_of(tmp_path / "images", tmp_path / "ls.json")


def test_classes_are_those_of_all_files(tmp_path):
    photos(tmp_path / "set", ["train/a.jpg", "val/b.jpg"])
    coco_file(tmp_path / "set/train/c.json", {"a.jpg": [(1, [SQUARE], 0)]})
    other = json.loads((tmp_path / "set/train/c.json").read_text().replace("car", "bus").replace("a.jpg", "b.jpg"))
    (tmp_path / "set/val/c.json").write_text(json.dumps(other))
    assert sources.class_names(sources.recognised(str(tmp_path / "set")))[0] == ["car", "tree", "bus"]
    found = masks_of(tmp_path / "set", tmp_path / "set", classes=("background", "bus", "car"))
    assert (found["train/a"].max(), found["val/b"].max()) == (2, 1)


def test_shapes_under_later_ones_are_counted_and_doctor_shows_the_smaller(tmp_path, caplog):
    photos(tmp_path / "images")
    beside, u = [32.0, 2, 38, 2, 38, 8, 32, 8], [0.0, 0, 4, 0, 4, 30, 36, 30, 36, 0, 40, 0, 40, 34, 0, 34]
    coco_file(
        tmp_path / "c.json", {"a.jpg": [(1, [INNER], 0), (1, [beside], 0), (3, [SQUARE], 0), (3, [u], 0)], "b.jpg": []}
    )
    classes = ("background", "car", "tree")
    hidden = masks_of(tmp_path / "images", tmp_path / "c.json", classes=classes)["a"]
    assert hidden[15, 15] == 2 and hidden[5, 35] == 1
    data = DataConfig(images=str(tmp_path / "images"), masks=str(tmp_path / "c.json"), classes=classes)
    find_pairs(data, say=True)
    assert "1 shapes lie under later ones of another class: --overlap-order area" in caplog.text, "not the one in the u"
    caplog.clear()
    shown = dataclasses.replace(data, overlap_order="area")
    find_pairs(shown, say=True)
    assert "lie under" not in caplog.text
    assert masks_of(tmp_path / "images", tmp_path / "c.json", classes=classes, overlap_order="area")["a"][15, 15] == 1
    result = CliRunner().invoke(main, ["doctor", "--images", data.images, "--masks", data.masks, "--no-timing"])
    assert "[covered-shapes]" in result.output and "--overlap-order area" in result.output.partition("suggested")[2]


def test_of_a_large_coco_file_only_places_are_kept_and_the_masks_are_the_same(tmp_path, monkeypatch):
    photos(tmp_path / "images")
    mask = np.zeros(SIZE, np.uint8)
    mask[3:9, 4:20] = 1
    coco_file(
        tmp_path / "c.json", {"a.jpg": [(1, [SQUARE], 0), (3, [INNER], 0)], "b.jpg": [(1, uncompressed(mask), 1)]}
    )
    classes = ("background", "car", "tree")
    small = masks_of(tmp_path / "images", tmp_path / "c.json", classes=classes)
    monkeypatch.setattr(coco, "LARGE", 0)
    large = masks_of(tmp_path / "images", tmp_path / "c.json", classes=classes)
    assert small.keys() == large.keys() and all((small[key] == large[key]).all() for key in small)
    data = DataConfig(images=str(tmp_path / "images"), masks=str(tmp_path / "c.json"), classes=classes)
    [pair, _] = find_pairs(data)
    text = (tmp_path / "c.json").read_text()
    (tmp_path / "c.json").write_text(" " + text)
    with pytest.raises(ImageError, match="have changed since"):
        mask_files.read(pair.mask)


def test_elements_of_an_array_are_found_with_their_places_whatever_the_blocks_are():
    generator = random.Random(0)

    def value(depth: int = 0):
        kind = generator.randrange(6 if depth < 4 else 3)
        if kind < 3:
            return [generator.choice(["", 'a"b', "\\", "[{", "}]", 'x\\"', "é\n", "annotations"]), 0.5, None][kind]
        if kind == 3:
            return [value(depth + 1) for _ in range(generator.randrange(4))]
        return {generator.choice('ab"\\[{'): value(depth + 1) for _ in range(generator.randrange(4))}

    for _ in range(300):
        names = ["info", "images", "annotations", 'x"y']
        generator.shuffle(names)
        lists = {
            name: [{"id": n, "v": value()} for n in range(generator.randrange(5))] for name in ("images", "annotations")
        }
        document = {name: lists.get(name) or value() for name in names} | lists
        text = json.dumps(document, indent=generator.choice([None, 2]), ensure_ascii=generator.random() < 0.5).encode()
        for name in ("images", "annotations", "missing"):
            found = list(json_items.items(io.BytesIO(text), name, generator.choice([1, 2, 7, 50, 10**6])))
            assert [json.loads(each) for _, each in found] == document.get(name, [])
            assert all(text[place : place + len(each)] == each for place, each in found)


def test_a_json_file_that_ends_early_or_is_nested_without_end_is_an_error():
    for text, message in ((b'{"a": [{"b": "x', "ends early"), (b"[" * 20_000, "nested"), (b'{"a": 1', "ends early")):
        with pytest.raises(ValueError, match=message):
            list(json_items.items(io.BytesIO(text), "a"))
