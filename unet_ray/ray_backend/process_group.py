"""Lets training processes on several machines find each other."""

from __future__ import annotations

import os
from typing import Any

import psutil
import ray
from ray.train.torch import TorchConfig

from unet_ray.models.device import check_gpu


def choose_interface() -> None:
    """Makes gloo use the network interface of this node's address in Ray, unless GLOO_SOCKET_IFNAME is set.

    By default gloo takes the address that the machine's own name resolves to. On Debian and Ubuntu that is 127.0.1.1,
    where other machines cannot reach it. NCCL avoids that network by itself.
    """
    address = ray.util.get_node_ip_address()
    for name, addresses in psutil.net_if_addrs().items():
        if any(found.address == address for found in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def _prepare() -> None:
    """Prepares a worker before the process group exists. Raises UserError if torch cannot use the GPU."""
    if ray.get_runtime_context().get_accelerator_ids()["GPU"]:
        check_gpu()
    choose_interface()


class _Backend(TorchConfig().backend_cls):  # type: ignore[misc]
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute(_prepare)
        super().on_start(worker_group, backend_config)


class OnRaysNetwork(TorchConfig):
    """Sets up Ray's process group, after `_prepare` on every worker."""

    @property
    def backend_cls(self) -> type[_Backend]:
        return _Backend
