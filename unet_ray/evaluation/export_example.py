"""Writes the lines of Python that use an exported network without unet_ray."""

from __future__ import annotations

from unet_ray.models.checkpoint import ModelCard

TORCH = "network(torch.from_numpy(image[None])).detach().numpy()"
OPEN = {
    "onnx": (
        "import onnxruntime",
        'session = onnxruntime.InferenceSession("{file}")',
        'session.run(None, {"image": image[None]})[0]',
    ),
    "torchscript": ("import torch", 'network = torch.jit.load("{file}")', TORCH),
    "torch-export": ("import torch", 'network = torch.export.load("{file}").module()', TORCH),
    "openvino": ("import openvino", 'network = openvino.compile_model("{file}", "CPU")', "network([image[None]])[0]"),
}
"""Form -> import, the line that opens the file, and the expression that runs it."""


def example(file: str, form: str, card: ModelCard, *, decide: bool, threshold: float) -> str:
    """Returns about ten lines of Python that segment `photo.jpg` into `mask.png`, with the file's own program, NumPy
    and Pillow.

    Images of other than one or three channels are read from `photo.npy`, at the network's size.
    """
    height, width = card.image_size
    module, opened, run = OPEN[form]
    channels, classes = card.model.in_channels, card.model.num_classes
    picture = channels in (1, 3)
    lines = [module, "import numpy as np", "from PIL import Image", ""]
    if picture:
        mode, gray = ("L", "[..., None]") if channels == 1 else ("RGB", "")
        lines += [
            f'picture = Image.open("photo.jpg").convert("{mode}")',
            f"image = np.array(picture.resize(({width}, {height}), Image.Resampling.BILINEAR)){gray}",
        ]
    else:
        lines.append(f'image = np.load("photo.npy")  # uint8 [{height}, {width}, {channels}]')
    lines += [opened.format(file=file), f"output = {run}"]
    own_size = ".resize(picture.size, Image.Resampling.{})" if picture else ""
    if decide:
        lines.append(f"mask = np.asarray(Image.fromarray(output[0]){own_size.format('NEAREST')})")
    else:
        lines.append(f"maps = [np.asarray(Image.fromarray(each){own_size.format('BILINEAR')}) for each in output[0]]")
        lines.append(f"mask = (maps[0] > {threshold:g})" if classes == 1 else "mask = np.argmax(maps, axis=0)")
    bright = "255 * " if classes == 1 else ""
    lines.append(f'Image.fromarray(({bright}mask).astype(np.uint8)).save("mask.png")')
    return "\n".join(lines)
