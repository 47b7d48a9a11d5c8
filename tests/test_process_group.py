"""Which network the processes of a training use."""

import os
from types import SimpleNamespace

import psutil
import ray.util

from unet_ray.ray_backend.process_group import choose_interface


def test_gloo_takes_the_interface_of_rays_address(monkeypatch):
    addresses = {"lo": "127.0.0.1", "eth0": "10.88.0.2"}
    found = {name: [SimpleNamespace(address=address)] for name, address in addresses.items()}
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: found)
    for address, preset, expected in (
        ("10.88.0.2", None, "eth0"),
        ("10.88.0.2", "ib0", "ib0"),  # set by the user
        ("127.0.0.3", None, None),  # of no interface: left alone
    ):
        monkeypatch.setattr(ray.util, "get_node_ip_address", lambda address=address: address)
        monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
        if preset:
            monkeypatch.setenv("GLOO_SOCKET_IFNAME", preset)
        choose_interface()
        assert os.environ.get("GLOO_SOCKET_IFNAME") == expected
