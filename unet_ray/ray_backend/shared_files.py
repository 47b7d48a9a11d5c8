"""Checks that all nodes see the same files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial

from unet_ray.config import UserError
from unet_ray.data import storage
from unet_ray.ray_backend import nodes


def check_shared(places: Mapping[str, str]) -> None:
    """Raises UserError unless every node sees the files that this node sees.

    `places`: name of a file in the message -> its path or URI. A bucket is assumed to be visible everywhere.
    """
    seen_here = {
        name: location
        for name, location in places.items()
        if not storage.is_uri(location) and os.path.exists(location)  # noqa: PTH110
    }
    if not seen_here:
        return
    for node, missing in nodes.answers(partial(_missing, [*seen_here.values()])):
        for name, location in seen_here.items():
            if location in missing:
                raise UserError(
                    f"{name}: the node {node} does not see {location}: use a folder that all nodes share (NFS, say), "
                    "or a bucket (s3://, gs://)"
                )


def _missing(locations: list[str]) -> list[str]:
    return [location for location in locations if not os.path.exists(location)]  # noqa: PTH110 - names may be no UTF-8
