"""Says how images look, in a few numbers: images unlike those of a training are noticed before their masks are trusted.

Each number is of an image as the model reads it, resized to `SIDE`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from unet_ray.config import MAX_PIXELS, ValueRange
from unet_ray.data import imaging
from unet_ray.data.imaging import ImageError, Source

SAMPLE = 16
"""The most images that are looked at."""
MOST_BYTES = 64 * 2**20
"""It looks at fewer if their files are larger than this together: decoding those takes long."""
SIDE = 64
FAR = 2.0
"""Images are unlike others if the means of a number differ by more than this many of its standard deviations; by more
where they are fewer than `SAMPLE`, since the mean of a few is less certain."""
SMALLEST = 0.02
"""Least standard deviation of a number, as a share of white: images of one microscope differ by less, and by chance."""
HIGHER = {"brightness": "brighter", "contrast": "of more contrast", "sharpness": "sharper"}
LOWER = {"brightness": "darker", "contrast": "of less contrast", "sharpness": "less sharp"}

Looks = Mapping[str, tuple[float, float]]
"""Name of a number -> its mean and standard deviation over images, as shares of white."""


def numbers_of_images(
    images: Iterable[Source | str], channels: int, value_range: ValueRange, max_pixels: int = MAX_PIXELS
) -> list[dict[str, float]]:
    """Returns the numbers of each image that can be read. `images`: encoded, or the reason why one can't be read."""
    found, read = [], 0
    for data in images:
        try:
            if not isinstance(data, str):
                size = (SIDE, SIDE)
                image, _ = imaging.decode_image(data, channels, size, value_range=value_range, max_pixels=max_pixels)
                found.append(numbers_of(image))
        except ImageError:
            continue  # its row fails, with the reason
        read += len(data) if isinstance(data, bytes) else 0
        if read > MOST_BYTES:
            break
    return found


def summary(numbers: Sequence[Mapping[str, float]]) -> Looks:
    """Returns mean and standard deviation of each number over images; nothing for no images."""
    names = numbers[0] if numbers else ()
    values = {name: [each[name] for each in numbers] for name in names}
    return {name: (round(float(np.mean(v)), 4), round(float(np.std(v)), 4)) for name, v in values.items()}


def numbers_of(image_HWC: np.ndarray) -> dict[str, float]:
    """Returns the numbers of one image, uint8 at `SIDE`, as shares of white."""
    image = image_HWC.astype(np.float32) / 255
    gray = image.mean(axis=2)
    steps = np.abs(np.diff(gray, axis=0)).mean() + np.abs(np.diff(gray, axis=1)).mean()
    numbers = {"brightness": gray.mean(), "contrast": gray.std(), "sharpness": steps}
    if image.shape[2] == 3:
        colours = image.mean(axis=(0, 1)) - gray.mean()
        numbers |= {f"share of {name}": colours[number] for number, name in enumerate(("red", "green", "blue"))}
    return {name: float(value) for name, value in numbers.items()}


def differences(trained_on: Looks, new: Sequence[Mapping[str, float]]) -> list[str]:
    """Returns in what new images differ from those of a training, such as `darker (0.21 of white, not 0.45 ± 0.05)`;
    nothing if they look alike. `new`: the numbers of each."""
    found = []
    for name, (now, _) in summary(new).items():
        if name not in trained_on:
            continue
        mean, sd = trained_on[name]
        distance = (now - mean) / max(sd, SMALLEST)
        if abs(distance) > FAR * max(1.0, (SAMPLE / len(new)) ** 0.5):
            word = (HIGHER if distance > 0 else LOWER).get(name, f"another {name}")
            found.append((-abs(distance), f"{word} ({now:.2f} of white, not {mean:.2f} ± {sd:.2f})"))
    return [text for _, text in sorted(found)]
