"""How training processes on several machines find one another."""

from __future__ import annotations

import os
from typing import Any

import psutil
import ray
from ray.train.torch import TorchConfig

from unet_ray.models.device import check_gpu


def choose_interface() -> None:
    """Has gloo talk by the network that Ray knows this node by.

    By itself it takes the address that the machine's own name stands for, which on Debian and Ubuntu is 127.0.1.1:
    other machines then wait for it until they give up. NCCL leaves that network out.
    """
    address = ray.util.get_node_ip_address()
    for name, addresses in psutil.net_if_addrs().items():
        if any(found.address == address for found in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def _prepare() -> None:
    if ray.get_runtime_context().get_accelerator_ids()["GPU"]:
        check_gpu()
    choose_interface()


class _Backend(TorchConfig().backend_cls):  # type: ignore[misc]
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute(_prepare)
        super().on_start(worker_group, backend_config)


class OnRaysNetwork(TorchConfig):
    """Ray's process group, after `choose_interface` on every worker."""

    @property
    def backend_cls(self) -> type[_Backend]:
        return _Backend
