"""Gives a network's encoder its first weights from a file, for machines that can't download any."""

from __future__ import annotations

import dataclasses

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from unet_ray.config import ModelConfig, UserError, first_line
from unet_ray.data import storage
from unet_ray.models import SegmentationModel, build

SHOWN = 3
COUNTER = "num_batches_tracked"
"""Of a batch norm; older files lack it, and nothing needs it."""


def read(location: str) -> dict[str, Tensor]:
    """Reads the tensors of a .safetensors file. Raises UserError."""
    try:
        return safetensors.torch.load(storage.read_bytes(location))
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(
            f"train.encoder_weights {location}: {first_line(error)}: a .safetensors file is needed; in Python "
            "safetensors.torch.save_file(model.state_dict(), 'FILE.safetensors') makes one"
        ) from None


def check(config: ModelConfig, location: str) -> None:
    """Raises UserError, as `load` does, unless these weights fit a network of these settings."""
    with torch.random.fork_rng([]):
        load(build(dataclasses.replace(config, pretrained=False)), location)


def load(network: SegmentationModel, location: str) -> None:
    """Loads the weights of a file into `network.encoder`. Raises UserError if there is no encoder, or if the file lacks
    one of its weights or has another shape of it; what the file has beyond them, such as a classifier, is left out."""
    encoder = getattr(network, "encoder", None)
    if not isinstance(encoder, nn.Module):
        raise UserError(f"train.encoder_weights: model.name={network.config.name} has no encoder of its own")
    given = {name.removeprefix("network.").removeprefix("encoder."): value for name, value in read(location).items()}
    wanted = {name: value for name, value in encoder.state_dict().items() if not name.endswith(COUNTER)}
    missing = [name for name, tensor in wanted.items() if name not in given or given[name].shape != tensor.shape]
    if missing:
        shown = ", ".join(missing[:SHOWN]) + (f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else "")
        raise UserError(
            f"train.encoder_weights {location}: it lacks {shown} of {network.config.encoder}, or has another shape of "
            "them: they must be of the same encoder, model.in_channels and model.patch"
        )
    encoder.load_state_dict({name: given[name] for name in wanted}, strict=False)
