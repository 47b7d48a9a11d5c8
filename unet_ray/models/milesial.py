"""Imports networks that were trained with milesial/Pytorch-UNet."""

from __future__ import annotations

import io
import pickle
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from unet_ray.config import AugmentConfig, DataConfig, ModelConfig, TrainConfig, UserError
from unet_ray.data import storage
from unet_ray.models import build
from unet_ray.models import checkpoint as checkpoints
from unet_ray.models.checkpoint import ModelCard

WRAPPED = ("state_dict", "model_state_dict", "model")
"""Keys under which training programs keep a state dict; `state_dict` is Lightning's."""
FIRST = "inc.double_conv.0.weight"
"""The first tensor of milesial's network."""
CONVOLUTIONS = {".0.bias": ".1.running_mean", ".3.bias": ".4.running_mean"}
"""Biases of a double convolution in old checkpoints -> the running mean of the norm that absorbs each."""


def import_milesial(
    checkpoint: str,
    out: str,
    *,
    image_size: int | tuple[int, int],
    mask_values: Sequence[int] | None = None,
    classes: Sequence[str] | None = None,
) -> ModelCard:
    """Writes the model directory `out` from a state dict of milesial/Pytorch-UNet (a .pth file, a path or a URI).

    Logits are the same to rounding if both sides are multiples of 2 ** depth (16). For other sizes milesial pads zeros,
    and unet_ray repeats the edge. Images are resized bilinearly, as everywhere in unet_ray, not bicubically. Widths,
    depth, channels and classes are read from the shapes.

    `image_size`: side of a square, or (height, width), that images are resized to for the network: their own size times
    milesial's `--scale`. `mask_values`: stored value of each class, which only evaluation uses; None: those in the
    checkpoint, otherwise 0 and 255 for one or two classes and the class ids for more. `classes`: their names; None:
    `background`, which mean scores leave out as milesial's do, and `foreground`, or `class 1` and so on.

    Runs no code from the file. Raises UserError if the file does not hold only weights, for another network or one
    trained with `--bilinear`, and if `out` is not empty. `unet-ray import --help` lists the counterparts of milesial's
    commands, nnU-Net's commands and a notebook's cells.

        import_milesial("checkpoint_epoch5.pth", "MODEL", image_size=(640, 960))
    """
    tensors, stored_values = _read(checkpoint)
    model = _architecture(tensors, checkpoint)
    ids = max(2, model.num_classes)
    if mask_values is None:
        mask_values = stored_values or ((0, 255) if ids == 2 else range(ids))
    if classes is None:
        classes = ("background", *(["foreground"] if ids == 2 else [f"class {k}" for k in range(1, ids)]))
    config = TrainConfig(
        model=model,
        data=DataConfig(image_size=image_size, mask_values=tuple(mask_values), classes=tuple(classes)),
        augment=AugmentConfig(hflip=0),  # milesial mirrors no image in training
    )
    with torch.device("meta"):  # takes no memory: the widths in a strange file may be far too large
        expected = build(model).state_dict()
    found = _matched(expected, tensors, model.depth, checkpoint)
    network = build(model)
    network.load_state_dict(found)
    out = storage.absolute(out)
    if storage.names_in(out):
        raise UserError(f"{out} holds other files: choose another --out")
    checkpoints.save_model(out, network, config, {})
    return checkpoints.read_card(out)


def _read(location: str) -> tuple[dict[str, Tensor], tuple[int, ...] | None]:
    """Reads a checkpoint's tensors by name, and its mask values if they are single numbers."""
    location = storage.absolute(location)
    try:
        data = storage.read_bytes(location)
    except OSError as error:
        raise UserError(f"{location}: {error.strerror or error}") from None
    try:
        # weights_only reads tensors, numbers and containers, and refuses the rest: a pickle can run any code.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about content that it then refuses
            state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        what = re.search(r"GLOBAL (\S+)", str(error))
        raise UserError(
            f"{location}: holds more than weights{f' ({what[1]})' if what else ''}, or is no checkpoint; none of its "
            "code was run: save it with torch.save(model.state_dict(), FILE)"
        ) from None
    except Exception as error:  # torch raises many kinds for files that are damaged or something else
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{location}: not a checkpoint that torch can read: {reason[:200]}") from None
    inner = state
    if isinstance(state, Mapping):
        inner = next((state[key] for key in WRAPPED if isinstance(state.get(key), Mapping)), state)
    if not isinstance(inner, Mapping) or not any(isinstance(value, Tensor) for value in inner.values()):
        raise UserError(f"{location}: not a state dict: save it with torch.save(model.state_dict(), FILE)")
    tensors = {str(key): value for key, value in inner.items() if isinstance(value, Tensor)}
    return _without_prefix(tensors, location), _mask_values(inner.get("mask_values"))


def _without_prefix(tensors: dict[str, Tensor], location: str) -> dict[str, Tensor]:
    """Returns the tensors of the network in a larger module, such as Lightning's `model.` or DataParallel's `module.`,
    under its own names. Raises UserError if there are several such networks."""
    prefixes = [name.removesuffix(FIRST) for name in tensors if name.endswith(FIRST)]
    if len(prefixes) > 1:
        shown = ", ".join(map(repr, prefixes))
        raise UserError(f"{location}: holds {len(prefixes)} networks ({shown}): save one of them alone")
    prefix = prefixes[0] if prefixes else ""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _mask_values(stored: Any) -> tuple[int, ...] | None:
    """Returns the mask values that a checkpoint stores; None if it has none, or has colours, which we don't support."""
    if not isinstance(stored, (list, tuple)):
        return None
    if not all(isinstance(value, (int, float)) and float(value).is_integer() for value in stored):
        return None
    return tuple(int(value) for value in stored)


def _architecture(tensors: Mapping[str, Tensor], location: str) -> ModelConfig:
    """Reads the network's settings from the shapes; `_matched` then checks all tensors. Raises UserError."""

    def shape(name: str) -> tuple[int, ...]:
        if name not in tensors:
            raise UserError(f"{location}: {name} is missing: not a network of milesial/Pytorch-UNet")
        if tensors[name].ndim != 4:
            raise UserError(f"{location}: {name} is {[*tensors[name].shape]}: not a network of milesial/Pytorch-UNet")
        return tuple(tensors[name].shape)

    base, in_channels, *_ = shape(FIRST)
    shape("down1.maxpool_conv.1.double_conv.0.weight")
    if "up1.conv.double_conv.0.weight" in tensors and "up1.up.weight" not in tensors:
        raise UserError(
            f"{location}: no up1.up.weight, so it was trained with --bilinear, a network that unet_ray does not have: "
            "only those with transposed convolutions can be imported"
        )
    levels = range(1, len(tensors))
    return ModelConfig(
        in_channels=in_channels,
        num_classes=shape("outc.conv.weight")[0],
        base_channels=base,
        depth=sum(f"down{level}.maxpool_conv.1.double_conv.0.weight" in tensors for level in levels),
        norm="batch",
        up="transpose",
        pixel_mean=0.0,  # milesial only divides by 255
        pixel_std=1.0,
    )


def _matched(ours: Mapping[str, Tensor], tensors: Mapping[str, Tensor], depth: int, location: str) -> dict[str, Tensor]:
    """Returns the tensors under our names. Raises UserError for the first that is missing, unknown or misshapen."""
    prefixes = {"head.": "outc.conv.", "down.0.": "inc.double_conv."}
    for level in range(1, depth + 1):  # milesial's first step up starts at the deepest level
        prefixes[f"down.{level}."] = f"down{level}.maxpool_conv.1.double_conv."
        prefixes[f"up.{depth - level}.conv."] = f"up{level}.up."
        prefixes[f"join.{depth - level}."] = f"up{level}.conv.double_conv."
    found, rest = {}, dict(tensors)
    for name, tensor in ours.items():
        prefix = next(prefix for prefix in prefixes if name.startswith(prefix))
        theirs = prefixes[prefix] + name.removeprefix(prefix)
        if theirs not in rest:
            raise UserError(
                f"{location}: {theirs} is missing: not a network of milesial/Pytorch-UNet, or not all of it"
            )
        found[name] = rest.pop(theirs)
        if found[name].shape != tensor.shape:
            raise UserError(f"{location}: {theirs} is {[*found[name].shape]}: {[*tensor.shape]} was expected")
        # The norm subtracts the mean, which includes the bias: subtracting the bias from the mean has the same effect.
        bias = next((theirs.removesuffix(mean) + b for b, mean in CONVOLUTIONS.items() if theirs.endswith(mean)), None)
        if bias in rest:
            found[name] = found[name].float() - rest.pop(bias).float()
    for name in rest:
        raise UserError(f"{location}: {name} is unknown: not a network of milesial/Pytorch-UNet")
    return found
