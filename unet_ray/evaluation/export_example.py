"""Writes the lines of Python that use an exported network without unet_ray."""

from __future__ import annotations

from unet_ray.evaluation.export_forms import FORMS
from unet_ray.models.checkpoint import ModelCard


def example(file: str, form: str, card: ModelCard, *, decide: bool, threshold: float) -> str:
    """Returns about ten lines of Python that segment `photo.jpg` into `mask.png`, with the file's own program, NumPy
    and Pillow.

    Images of other than one or three channels are read from `photo.npy`, at the network's size.
    """
    height, width = card.image_size
    known = FORMS[form]
    channels, classes = card.model.in_channels, card.model.num_classes
    picture = channels in (1, 3)
    lines = [f"import {known.module}", "import numpy as np", "from PIL import Image", ""]
    if picture:
        mode, gray = ("L", "[..., None]") if channels == 1 else ("RGB", "")
        lines += [
            f'picture = Image.open("photo.jpg").convert("{mode}")',
            f"image = np.array(picture.resize(({width}, {height}), Image.Resampling.BILINEAR)){gray}",
        ]
    else:
        lines.append(f'image = np.load("photo.npy")  # uint8 [{height}, {width}, {channels}]')
    lines += [known.opened.format(file=file), f"output = {known.run}"]
    own_size = ".resize(picture.size, Image.Resampling.{})" if picture else ""
    if decide:
        lines.append(f"mask = np.asarray(Image.fromarray(output[0]){own_size.format('NEAREST')})")
    else:
        lines.append(f"maps = [np.asarray(Image.fromarray(each){own_size.format('BILINEAR')}) for each in output[0]]")
        lines.append(f"mask = (maps[0] > {threshold:g})" if classes == 1 else "mask = np.argmax(maps, axis=0)")
    bright = "255 * " if classes == 1 else ""
    lines.append(f'Image.fromarray(({bright}mask).astype(np.uint8)).save("mask.png")')
    return "\n".join(lines)
