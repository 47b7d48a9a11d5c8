"""Draws the shapes of an annotated image as a mask of class ids.

The location of a drawn mask is `FILE#drawn:…`, before the options of a bucket; the rest is the shapes themselves, or
their places in a large file. So a pair of an image and a drawn mask is like any other.

Polygons are drawn as pycocotools draws them (`COCO.annToMask`), of every format but labelme, which is drawn as its own
`shape_to_mask` does, with Pillow: the outline's pixels belong to the shape there.

Other tools differ at the outline, by a pixel. Of seven polygons of 100 x 80 pixels (stars, crossing, thin, partly
outside): datumaro's masks of CVAT are ours, but for 12 pixels of one, since it rounds coordinates to float32;
supervision draws YOLO's with OpenCV, whose outlines belong to the shape (a square of 40 x 30 has 1,271 pixels there,
1,200 here); skimage.draw.polygon, with which Mask R-CNN's examples draw VIA's, takes the pixels whose centres lie
inside, and some of the outline's.
"""

from __future__ import annotations

import base64
import io
import json
import math
import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from unet_ray.data import parquet_images, storage
from unet_ray.data.headers import ImageError, check_pixels

DRAWN = re.compile(r"(.+?)#drawn:([A-Za-z0-9_=-]+)", re.DOTALL)
MOST_BYTES = 2**28
"""Of the unpacked shapes of one image."""
FARTHEST = 4
"""Coordinates may lie outside their image by so many times its longer side."""
LINE_WIDTH, POINT_RADIUS = 10, 5
"""labelme's defaults, in pixels."""
ELLIPSE_POINTS = 100
BRUSH_RUNS = (3, 4, 8, 16)
"""Bits of the lengths of runs in a Label Studio brush that we write."""


@dataclass(frozen=True, slots=True)
class Shape:
    """One annotated object."""

    label: str
    kind: str
    """One of `DRAW`; or `at`, a COCO annotation that is read when it is drawn."""
    data: Any
    """What the kind needs; plain JSON."""


@dataclass(frozen=True, slots=True)
class Annotated:
    """The shapes of one image."""

    name: str
    """The image's name or path, as the annotations have it."""
    size_hw: tuple[int, int] | None
    """(height, width) that the annotations say; None: that of the image."""
    shapes: list[Shape]


def drawn(file: str, annotated: Annotated, ids: dict[str, int], image: str, *, by_area: bool) -> str:
    """Returns the location of the mask of an image. `ids`: class id of each label; others are not drawn. `by_area`: the
    smaller of two shapes wins, else the later one."""
    shapes = [(ids[shape.label], shape.kind, shape.data) for shape in annotated.shapes if shape.label in ids]
    spec = {"image": image, "size": annotated.size_hw, "area": by_area, "shapes": shapes}
    return _location(file, spec)


def stored(file: str, row: int, column: str) -> str:
    """Returns the location of a mask of class ids that is stored in a cell of a Parquet file."""
    return _location(file, {"image": f"row {row}", "cell": [file, row, column]})


def _location(file: str, spec: dict[str, Any]) -> str:
    packed = base64.urlsafe_b64encode(zlib.compress(json.dumps(spec, separators=(",", ":")).encode())).decode()
    base, options = storage.split_options(file)
    return f"{base}#drawn:{packed}{options}"


def split_drawn(location: str) -> tuple[str, str] | None:
    """Returns the annotations' file and the packed shapes of a drawn mask's location; None for any other location."""
    if "#drawn:" not in location:
        return None
    base, options = storage.split_options(location)
    found = DRAWN.fullmatch(base)
    return None if found is None else (found[1] + options, found[2])


def draw_png(file: str, packed: str, max_pixels: int, size_of: Callable[[str], tuple[int, int]]) -> bytes:
    """Draws the packed shapes of an image: class ids, as a gray PNG. Raises ImageError, OSError.

    `file`: the annotations, in which shapes may lie that are not packed. `size_of`: returns (height, width) of an image
    at a location, which some annotations don't say.
    """
    spec = _unpacked(packed)
    if "cell" in spec:
        return parquet_images.read_cell(*spec["cell"])
    height, width = spec["size"] or size_of(spec["image"])
    if min(height, width) < 1:
        raise ImageError(f"the annotations say that the image has {width}x{height} pixels")
    check_pixels(height * width, max_pixels)
    stream = io.BytesIO()
    mask = draw(_with_those_in_the_file(spec["shapes"], file), (height, width), by_area=spec["area"])
    Image.fromarray(mask).save(stream, "PNG", compress_level=1)
    return stream.getvalue()


def _with_those_in_the_file(shapes: list[Any], file: str) -> list[tuple[int, str, Any]]:
    """Reads the shapes of the kind `at`, whose data is (first byte, bytes) of a COCO annotation. Raises ImageError."""
    if not any(kind == "at" for _, kind, _ in shapes):
        return [tuple(shape) for shape in shapes]
    found: list[tuple[int, str, Any]] = []
    with storage.reading(file) as stream:
        for class_id, _, (place, length) in shapes:
            stream.seek(place)
            try:
                shape = of_coco(json.loads(stream.read(length)))
            except (ValueError, AttributeError, KeyError):
                shape = None
            if shape is None:
                raise ImageError("the annotations have changed since they were paired with the images: start again")
            found.append((class_id, *shape))
    return found


def of_coco(annotation: dict[str, Any]) -> tuple[str, Any] | None:
    """Returns kind and data of a COCO annotation; None if it is a box alone."""
    segmentation = annotation.get("segmentation")
    if isinstance(segmentation, dict):
        counts = segmentation.get("counts")
        return ("rle", {"size": segmentation["size"], "counts": counts}) if counts else None
    if isinstance(segmentation, list) and segmentation:
        return "polygons", segmentation if isinstance(segmentation[0], list) else [segmentation]
    return None


def name_of(packed: str) -> str:
    """Returns the name of the image that packed shapes are for."""
    return str(_unpacked(packed)["image"]).rpartition("/")[2]


def _unpacked(packed: str) -> dict[str, Any]:
    return json.loads(zlib.decompressobj().decompress(base64.urlsafe_b64decode(packed), MOST_BYTES))


def draw(shapes: Sequence[tuple[int, str, Any]], size_hw: tuple[int, int], *, by_area: bool = False) -> np.ndarray:
    """Returns class ids, uint8 [H,W], of (class id, kind, data). Raises ImageError for a shape that can't be drawn."""
    mask = np.zeros(size_hw, np.uint8)
    regions: Iterable[tuple[int, np.ndarray]]
    regions = ((class_id, region(kind, data, size_hw)) for class_id, kind, data in shapes)
    if by_area:
        regions = sorted(regions, key=lambda each: -int(each[1].sum()))
    for class_id, where in regions:
        mask[where] = class_id
    return mask


def region(kind: str, data: Any, size_hw: tuple[int, int]) -> np.ndarray:
    """Returns the pixels of a shape, bool [H,W]. Raises ImageError."""
    try:
        return DRAW[kind](data, size_hw)
    except ImageError:
        raise
    except Exception as error:  # pycocotools raises plain ones
        raise ImageError(f"a shape can't be drawn: {str(error)[:100]}") from None


# --- the kinds of shapes ---


def _polygons(data: list[list[float]], size_hw: tuple[int, int]) -> np.ndarray:
    """`data`: polygons [x, y, x, y, …] in pixels; the shape is their union."""
    from pycocotools import mask as coco

    polygons = [polygon for polygon in data if len(polygon) > 4]  # of fewer than three points nothing is drawn
    _check_coordinates([each for polygon in polygons for each in polygon], size_hw)
    if any(len(polygon) % 2 for polygon in polygons):
        raise ImageError("a polygon with an odd number of coordinates")
    if not polygons:
        return np.zeros(size_hw, bool)
    return coco.decode(coco.merge(coco.frPyObjects(polygons, *size_hw))).astype(bool)


def _shares(data: list[float], size_hw: tuple[int, int]) -> np.ndarray:
    """`data`: a polygon [x, y, …] in shares of the image's width and height, of YOLO."""
    scale = [size_hw[1], size_hw[0]]
    return _polygons([[value * scale[place % 2] for place, value in enumerate(data)]], size_hw)


def _minus(data: list[list[list[float]]], size_hw: tuple[int, int]) -> np.ndarray:
    """`data`: [polygons, holes]; see `_polygons`."""
    outside, holes = data
    return _polygons(outside, size_hw) & ~_polygons(holes, size_hw)


def _rle(data: dict[str, Any], size_hw: tuple[int, int]) -> np.ndarray:
    """`data`: COCO's run lengths, `size` [height, width] and `counts`, a list or a compressed text."""
    from pycocotools import mask as coco

    height, width = map(int, data["size"])
    if (height, width) != tuple(size_hw):
        raise ImageError(f"run lengths of {width}x{height} pixels for an image of {size_hw[1]}x{size_hw[0]}")
    counts = data["counts"]
    if isinstance(counts, list):
        if sum(counts) != height * width or min(counts, default=0) < 0:
            raise ImageError("run lengths that don't add up to the image")
        return coco.decode(coco.frPyObjects({"size": [height, width], "counts": counts}, height, width)).astype(bool)
    return coco.decode({"size": [height, width], "counts": str(counts).encode()}).astype(bool)


def _runs(data: list[Any], size_hw: tuple[int, int]) -> np.ndarray:
    """`data`: [order, text]: Kaggle's `start length start length …`, from 1, along `columns` or `rows`."""
    order, text = data
    numbers = np.array(str(text).split(), np.int64)
    flat = np.zeros(size_hw[0] * size_hw[1], bool)
    starts, lengths = numbers[0::2] - 1, numbers[1::2]
    if len(starts) != len(lengths):
        raise ImageError("run lengths of an odd number of values")
    if len(starts) and (min(starts.min(), lengths.min()) < 0 or (starts + lengths).max() > flat.size):
        raise ImageError("run lengths that reach beyond the image")
    for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
        flat[start : start + length] = True
    return flat.reshape(size_hw, order="F" if order == "columns" else "C")


def _labelme(data: list[Any], size_hw: tuple[int, int]) -> np.ndarray:
    """`data`: [type, points], of labelme."""
    kind, points = data
    _check_coordinates([each for point in points for each in point], size_hw)
    canvas = Image.new("L", size_hw[::-1])
    pen = ImageDraw.Draw(canvas)
    corners = [(float(x), float(y)) for x, y in points]
    if kind == "rectangle":
        xs, ys = zip(*corners, strict=True)
        pen.rectangle([min(xs), min(ys), max(xs), max(ys)], fill=1, outline=1)
    elif kind == "circle":
        (x, y), edge = corners
        radius = math.dist((x, y), edge)
        pen.ellipse([x - radius, y - radius, x + radius, y + radius], fill=1, outline=1)
    elif kind in ("line", "linestrip"):
        pen.line(corners, fill=1, width=LINE_WIDTH)
    elif kind in ("point", "points"):
        for x, y in corners:
            pen.ellipse([x - POINT_RADIUS, y - POINT_RADIUS, x + POINT_RADIUS, y + POINT_RADIUS], fill=1, outline=1)
    elif len(corners) > 2:
        pen.polygon(corners, fill=1, outline=1)
    return np.asarray(canvas, bool)


def _picture(data: list[Any], size_hw: tuple[int, int]) -> np.ndarray:
    """`data`: [left, top, PNG in base64], a small mask at its place."""
    left, top = (round(float(each)) for each in data[:2])
    with Image.open(io.BytesIO(base64.b64decode(data[2]))) as image:
        check_pixels(image.width * image.height, 4 * size_hw[0] * size_hw[1])
        small = np.asarray(image.convert("L")) > 0
    return _placed(small, left, top, size_hw)


def _box_runs(data: list[Any], size_hw: tuple[int, int]) -> np.ndarray:
    """`data`: [left, top, width, height, runs], of CVAT: runs of zeros and ones in turn along the rows of a box."""
    left, top, width, height, runs = data
    if width * height > size_hw[0] * size_hw[1] or sum(runs) != width * height or min(runs) < 0:
        raise ImageError("run lengths that don't add up to their box")
    flat = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    return _placed(flat.reshape(height, width), left, top, size_hw)


def _brush(data: list[int], size_hw: tuple[int, int]) -> np.ndarray:
    """`data`: the numbers of a Label Studio brush: RGBA values, of which the last one counts."""
    values = brush_values(data, 4 * size_hw[0] * size_hw[1])
    return values.reshape(*size_hw, 4)[..., 3] > 0


def brush_values(data: Sequence[int], count: int) -> np.ndarray:
    """Unpacks a Label Studio brush (the `rle` of @thi.ng/rle-pack): `count` values of 8 bits. Raises ImageError.

    A stream of bits: 32 bits of number of values, 5 bits of word size - 1, four times 4 bits of run size - 1; then
    runs: 1 bit that tells if one value repeats, 2 bits that choose a run size, the length - 1, and the value or values.
    """
    bits = np.unpackbits(np.asarray(data, np.uint8))
    place = 0

    def take(width: int) -> int:
        nonlocal place
        if place + width > len(bits):
            raise ImageError("a brush that ends early")
        number = 0
        for bit in bits[place : place + width].tolist():
            number = number << 1 | bit
        place += width
        return number

    if (claimed := take(32)) != count:
        raise ImageError(f"a brush of {claimed} values for an image of {count}")
    word = take(5) + 1
    sizes = [take(4) + 1 for _ in range(4)]
    values = np.zeros(count, np.uint8)
    done = 0
    while done < count:
        repeats = take(1)
        length = take(sizes[take(2)]) + 1
        end = min(count, done + length)
        if repeats:
            values[done:end] = take(word)
        else:
            for index in range(done, end):
                values[index] = take(word)
        done = end
    return values


def packed_brush(inside: np.ndarray) -> list[int]:
    """Packs the pixels of a shape, bool [H,W], as a Label Studio brush, see `brush_values`."""
    flat = inside.reshape(-1)
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    starts = np.concatenate([[0], edges])
    lengths = 4 * np.diff(np.concatenate([starts, [flat.size]]))
    bits = [f"{4 * flat.size:032b}", f"{7:05b}", *(f"{size - 1:04b}" for size in BRUSH_RUNS)]
    for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
        value = f"{255 if flat[start] else 0:08b}"
        while length:
            part = min(length, 2 ** BRUSH_RUNS[-1])
            choice = next(place for place, size in enumerate(BRUSH_RUNS) if part <= 2**size)
            bits.append(f"1{choice:02b}{part - 1:0{BRUSH_RUNS[choice]}b}{value}")
            length -= part
    text = "".join(bits)
    return np.packbits(np.frombuffer(text.encode(), np.uint8) - ord("0")).tolist()


def ellipse(x: float, y: float, radius_x: float, radius_y: float, degrees: float = 0.0) -> list[float]:
    """Returns the polygon [x, y, …] of an ellipse."""
    angles = np.linspace(0, 2 * np.pi, ELLIPSE_POINTS, endpoint=False)
    turn = math.radians(degrees)
    along, across = radius_x * np.cos(angles), radius_y * np.sin(angles)
    xs = x + along * math.cos(turn) - across * math.sin(turn)
    ys = y + along * math.sin(turn) + across * math.cos(turn)
    return np.stack([xs, ys], axis=1).reshape(-1).tolist()


def rectangle(
    left: float, top: float, right: float, bottom: float, degrees: float = 0.0, pivot: tuple[float, float] = (0.0, 0.0)
) -> list[float]:
    """Returns the polygon [x, y, …] of a rectangle, turned clockwise about a point of the image."""
    corners = np.array([[left, top], [right, top], [right, bottom], [left, bottom]], np.float64)
    if degrees:
        cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        corners = (corners - pivot) @ np.array([[cosine, sine], [-sine, cosine]]) + pivot
    return corners.reshape(-1).tolist()


def _placed(small: np.ndarray, left: int, top: int, size_hw: tuple[int, int]) -> np.ndarray:
    """Returns bool [H,W] with a small mask at its place; what lies outside is cut off."""
    whole = np.zeros(size_hw, bool)
    rows, columns = (
        slice(max(0, start), max(0, min(length, start + side)))
        for start, side, length in zip((top, left), small.shape, size_hw, strict=True)
    )
    part = small[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
    whole[rows, columns] = part if part.size else False
    return whole


def _check_coordinates(numbers: Sequence[float], size_hw: tuple[int, int]) -> None:
    if not numbers:
        return
    values = np.asarray(numbers, np.float64)
    limit = (1 + FARTHEST) * max(size_hw)
    if not np.isfinite(values).all() or np.abs(values).max() > limit:
        raise ImageError(f"a shape far outside its image of {size_hw[1]}x{size_hw[0]} pixels")


DRAW: dict[str, Callable[[Any, tuple[int, int]], np.ndarray]] = {
    "polygons": _polygons,
    "shares": _shares,
    "minus": _minus,
    "rle": _rle,
    "runs": _runs,
    "labelme": _labelme,
    "picture": _picture,
    "box_runs": _box_runs,
    "brush": _brush,
}
"""Kind of a shape -> function (data, (height, width)) -> bool [H,W]."""
