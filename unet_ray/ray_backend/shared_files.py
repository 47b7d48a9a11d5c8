"""Checks that all nodes see the same files."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from unet_ray.config import UserError
from unet_ray.data import storage
from unet_ray.ray_backend import nodes

log = logging.getLogger("unet_ray")

ANSWER_SECONDS = 120.0


def check_shared(places: Mapping[str, str]) -> None:
    """Raises UserError unless every node sees the files that this node sees.

    `places`: name of a file in the message -> its path or URI. A bucket is assumed to be visible everywhere.
    """
    others = [node for node in nodes.able_to_work() if node["NodeID"] != ray.get_runtime_context().get_node_id()]
    seen_here = {
        name: location
        for name, location in places.items()
        if not storage.is_uri(location) and os.path.exists(location)  # noqa: PTH110
    }
    if not others or not seen_here:
        return
    for node, missing in _missing_on(others, [*seen_here.values()]):
        for name, location in seen_here.items():
            if location in missing:
                raise UserError(
                    f"{name}: the node {node} does not see {location}: use a folder that all nodes share (NFS, say), "
                    "or a bucket (s3://, gs://)"
                )


@ray.remote(num_cpus=0, max_retries=0)
def _missing_here(locations: list[str]) -> list[str]:
    return [location for location in locations if not os.path.exists(location)]  # noqa: PTH110 - names may be no UTF-8


def _missing_on(others: list[dict[str, Any]], locations: list[str]) -> list[tuple[str, list[str]]]:
    """Returns (address, files that it does not see) of each node that answers."""
    answers = [
        _missing_here.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
            locations
        )
        for node in others
    ]
    found = []
    for node, answer in zip(others, answers, strict=True):
        try:
            found.append((node["NodeManagerAddress"], ray.get(answer, timeout=ANSWER_SECONDS)))
        except (ray.exceptions.RayError, TimeoutError) as error:  # a lost node is handled elsewhere
            log.info("%s did not say what it sees: %s", node["NodeManagerAddress"], error)
    return found
