"""Measures decoding one photograph to the model's size, on one core."""

from __future__ import annotations

import importlib
import importlib.util
import io
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from measures.common import Job, Line, dice, in_turns, mask_of, network_of, table
from unet_ray.data import imaging


def on_one_thread(function: Callable[[], object]) -> Callable[[], object]:
    """Returns the function, run with one torch thread."""

    def run() -> object:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return function()
        finally:
            torch.set_num_threads(threads)

    return run


def by_pillow(data: bytes, size_hw: tuple[int, int]) -> np.ndarray:
    """Decodes as tutorials do: the whole photograph, then a small copy of it."""
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB").resize(size_hw[::-1], Image.Resampling.BILINEAR))


def by_simplejpeg(data: bytes, size_hw: tuple[int, int]) -> np.ndarray:
    import simplejpeg

    height, width = size_hw
    array = simplejpeg.decode_jpeg(data, "RGB", min_height=height, min_width=width)
    return np.asarray(Image.fromarray(array).resize((width, height), Image.Resampling.BILINEAR))


def by_torchvision(data: bytes, size_hw: tuple[int, int]) -> np.ndarray:
    from torchvision.io import decode_jpeg
    from torchvision.transforms.functional import resize

    image = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    return resize(image, list(size_hw), antialias=True).permute(1, 2, 0).numpy()


def decode_section(job: Job) -> Iterator[Line]:
    paths = [pair.image for pair in job.pairs[:16]] or job.images[:16]
    data = [Path(path).read_bytes() for path in paths]
    size = job.card.image_size
    decoders: dict[str, Callable[[bytes], np.ndarray]] = {
        "Pillow, whole": lambda d: by_pillow(d, size),
        "unet_ray": lambda d: imaging.decode_image(d, 3, size)[0],
    }
    jpeg = all(each.startswith(b"\xff\xd8") for each in data)
    if jpeg:
        decoders["torchvision"] = lambda d: by_torchvision(d, size)
    if jpeg and importlib.util.find_spec("simplejpeg"):
        decoders["simplejpeg"] = lambda d: by_simplejpeg(d, size)
    steps = {name: on_one_thread(lambda f=f: [f(d) for d in data]) for name, f in decoders.items()}  # type: ignore[misc]
    seconds = {name: value / len(data) for name, value in in_turns(steps, max(5, job.rounds)).items()}
    network = network_of(job, "fp32")
    both = [[mask_of(network, decoders[name](each), job) for each in data] for name in ("Pillow, whole", "unet_ray")]
    note = f"Dice {np.mean(list(map(dice, *both))):.5f} between the masks predicted from these and from Pillow's"
    if job.pairs:
        ground_truth = [
            imaging.decode_mask(Path(pair.mask).read_bytes(), job.config.data, size)[0] for pair in job.pairs[:16]
        ]
        known = [np.mean(list(map(dice, masks_of, ground_truth))) for masks_of in both]
        note += f"; with the true masks {known[1]:.5f} and {known[0]:.5f}"
    yield from table("decode", seconds, {"unet_ray": note})
