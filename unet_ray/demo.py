"""Makes the demo's data from a seed: scenes with a car, in Kaggle's Carvana layout.

The scenes are hard enough to need learning: car, ground, walls and clutter share their colours, shadows are darker than
many cars, windows show the background's colours, and everything is textured.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

WIDTH, HEIGHT = 480, 320
VIEWS = 5
TRAIN_CARS, UNSEEN_CARS = 10, 2
_SMOOTH = 2
"""Scenes are drawn this many times larger and then reduced, for soft edges like those of a lens."""

Points = list[tuple[float, float]]
"""Corners of a polygon, (x, y) in pixels."""


@dataclass(frozen=True, slots=True)
class _Car:
    """The shapes of a car."""

    body: Points
    cabin: Points
    windows: list[Points]
    wheels: list[tuple[float, float]]
    """(centre's x, radius) of each."""


def make_scenes(folder: Path, seed: int = 7) -> None:
    """Writes train/ and train_masks/ (10 cars, 5 views each) and unseen/ and unseen_masks/ (2 other cars): JPEG
    480x320, GIF masks with palette indices 0 and 1, named <car>_<view>.jpg and <car>_<view>_mask.gif."""
    generator = np.random.default_rng(seed)
    for car in range(TRAIN_CARS + UNSEEN_CARS):
        name = "train" if car < TRAIN_CARS else "unseen"
        images, masks = folder / name, folder / f"{name}_masks"
        images.mkdir(parents=True, exist_ok=True)
        masks.mkdir(parents=True, exist_ok=True)
        car_id = f"{generator.integers(16**12):012x}"
        paint = _paint(generator)
        for view in range(1, VIEWS + 1):
            image, mask = _scene(generator, paint)
            image.save(images / f"{car_id}_{view:02d}.jpg", quality=90)
            mask.save(masks / f"{car_id}_{view:02d}_mask.gif")


def _scene(generator: np.random.Generator, paint: np.ndarray) -> tuple[Image.Image, Image.Image]:
    """Draws one scene: RGB image and palette mask of WIDTH x HEIGHT. The order of the random draws fixes the demo."""
    width, height = WIDTH * _SMOOTH, HEIGHT * _SMOOTH
    horizon = int(height * generator.uniform(0.35, 0.55))
    # Ground and wall often take a colour near the paint: no threshold on colour finds the car.
    base = [
        np.clip(paint + generator.normal(0, 35, 3) if generator.random() < 0.6 else _paint(generator), 0, 255)
        for _ in range(2)
    ]
    image = Image.new("RGB", (width, height), _colour(base[0]))
    ImageDraw.Draw(image).rectangle([0, horizon, width, height], fill=_colour(base[1]))
    _draw_clutter(generator, image, horizon, paint)

    length = width * generator.uniform(0.4, 0.7)
    left = generator.uniform(0.05, 0.95) * (width - length)
    ground = generator.uniform(horizon + 0.35 * (height - horizon), height * 0.95)
    car = _car(generator, left, ground, length)
    _draw_shadow(generator, image, left, ground, length)
    mask = _draw_car(generator, image, car, ground, paint, window_base=base[0])
    sill = ground - 0.13 * length
    ends = [(left, sill), (left + length, sill)]
    ImageDraw.Draw(image).line(ends, fill=_colour(paint * 0.7), width=3 * _SMOOTH)

    size = (WIDTH, HEIGHT)
    ground_truth = np.asarray(mask.resize(size, Image.Resampling.BOX)) > 127
    pixels = _lit(generator, np.asarray(image.resize(size, Image.Resampling.LANCZOS), np.float32))
    palette = Image.fromarray(ground_truth.astype(np.uint8))
    palette.putpalette([0, 0, 0, 255, 255, 255])
    return Image.fromarray(pixels), palette


def _draw_clutter(generator: np.random.Generator, image: Image.Image, horizon: int, paint: np.ndarray) -> None:
    """Draws walls, doors, boxes and posts, half of them in colours near the paint."""
    draw, (width, height) = ImageDraw.Draw(image), image.size
    for _ in range(generator.integers(8, 16)):
        x, w, h = (int(generator.integers(*span)) for span in ((0, width), (10, width // 4), (20, height // 2)))
        foot = horizon + int(generator.uniform(-0.15, 0.35) * (height - horizon))
        colour = _colour(paint + generator.normal(0, 30, 3) if generator.random() < 0.5 else _paint(generator))
        if generator.random() < 0.3:
            draw.ellipse([x, foot - h, x + w, foot], fill=colour)
        else:
            draw.rectangle([x, foot - h, x + w, foot], fill=colour)


def _draw_shadow(generator: np.random.Generator, image: Image.Image, left: float, ground: float, length: float) -> None:
    """Draws the car's blurred shadow on the ground."""
    shadow = Image.new("L", image.size, 0)
    slant = generator.uniform(-0.25, 0.25) * length
    ImageDraw.Draw(shadow).polygon(
        [
            (left, ground),
            (left + length, ground),
            (left + length + slant, ground + 0.12 * length),
            (left + slant, ground + 0.12 * length),
        ],
        fill=int(generator.uniform(110, 200)),
    )
    image.paste((8, 8, 12), mask=shadow.filter(ImageFilter.GaussianBlur(6 * _SMOOTH)))


def _draw_car(
    generator: np.random.Generator,
    image: Image.Image,
    car: _Car,
    ground: float,
    paint: np.ndarray,
    *,
    window_base: np.ndarray,
) -> Image.Image:
    """Draws the car. Returns its mask, 0 and 255, of the image's size."""
    draw = ImageDraw.Draw(image)
    mask = Image.new("L", image.size, 0)
    mask_draw = ImageDraw.Draw(mask)
    for shape in (car.cabin, car.body):
        draw.polygon(shape, fill=_colour(paint + generator.normal(0, 8, 3)))
        mask_draw.polygon(shape, fill=255)
    for window in car.windows:
        draw.polygon(window, fill=_colour(window_base * 0.5 + generator.uniform(10, 90)))
    for centre, radius in car.wheels:
        box = [centre - radius, ground - 2 * radius, centre + radius, ground]
        draw.ellipse(box, fill=(22, 22, 24))
        mask_draw.ellipse(box, fill=255)
        hub = radius * 0.55
        draw.ellipse(
            [centre - hub, ground - radius - hub, centre + hub, ground - radius + hub],
            fill=_colour(np.full(3, generator.uniform(90, 200))),
        )
    return mask


def _car(generator: np.random.Generator, left: float, ground: float, length: float) -> _Car:
    """Makes the shapes of a car that stands on `ground`, facing either way."""
    height = length * generator.uniform(0.3, 0.42)
    radius = length * generator.uniform(0.075, 0.095)
    waist, roof, floor = ground - 0.55 * height, ground - height, ground - 0.6 * radius
    front, back = generator.uniform(0.15, 0.32), generator.uniform(0.02, 0.2)

    def x(share: float) -> float:
        return left + share * length

    nose = waist + generator.uniform(0.0, 0.12) * height
    body = [(x(0), floor), (x(0), nose), (x(front), waist), (x(1 - back), waist), (x(1), nose), (x(1), floor)]
    cabin_front, cabin_back = front + generator.uniform(0.08, 0.16), 1 - back - generator.uniform(0.02, 0.12)
    cabin = [(x(front), waist + 2), (x(cabin_front), roof), (x(cabin_back), roof), (x(1 - back), waist + 2)]
    inset, middle = 0.18 * (waist - roof), (cabin_front + cabin_back) / 2
    lower, upper = waist - inset, roof + inset
    windows = [
        [
            (x(front + 0.05), lower),
            (x(cabin_front + 0.01), upper),
            (x(middle - 0.01), upper),
            (x(middle - 0.01), lower),
        ],
        [
            (x(middle + 0.01), lower),
            (x(middle + 0.01), upper),
            (x(cabin_back - 0.01), upper),
            (x(1 - back - 0.04), lower),
        ],
    ]
    wheels = [(x(0.2), radius), (x(0.8), radius)]
    if generator.random() < 0.5:  # facing the other way; the wheels are symmetric
        body, cabin = _mirrored(body, left + length / 2), _mirrored(cabin, left + length / 2)
        windows = [_mirrored(window, left + length / 2) for window in windows]
    return _Car(body, cabin, windows, wheels)


def _mirrored(shape: Points, middle_x: float) -> Points:
    return [(2 * middle_x - x, y) for x, y in shape]


def _lit(generator: np.random.Generator, pixels: np.ndarray) -> np.ndarray:
    """Adds uneven light, texture and noise to float32 pixels [H,W,3]; returns uint8."""
    left_light, right_light = generator.uniform(0.8, 1.2, 2).tolist()
    light = _noise(generator, 4, 0.25) + np.linspace(left_light, right_light, WIDTH)[None, :, None]
    lit = pixels * light + 255 * _noise(generator, 40, 0.06) + generator.normal(0, 6, (HEIGHT, WIDTH, 1))
    return np.clip(lit, 0, 255).astype(np.uint8)


def _noise(generator: np.random.Generator, cells: int, strength: float) -> np.ndarray:
    """Makes smooth noise, float32 [H,W,1], of about `cells` bumps across with standard deviation about `strength`."""
    coarse = generator.normal(0, strength, (max(2, cells * HEIGHT // WIDTH), cells)).astype(np.float32)
    return np.asarray(Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC))[..., None]


def _paint(generator: np.random.Generator) -> np.ndarray:
    """Draws a muted colour, RGB."""
    return generator.uniform(20, 235, 3) * 0.35 + generator.uniform(20, 235) * 0.65


def _colour(values: np.ndarray) -> tuple[int, int, int]:
    red, green, blue = np.clip(values, 0, 255).astype(int).tolist()
    return red, green, blue
