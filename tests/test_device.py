"""The device that a network runs on: the memory of its arrays."""

import os
import platform
import subprocess
import sys

import pytest

from unet_ray.models.device import ONE_HEAP

FEWEST_FAULTS = """
import resource, sys, threading
import torch
from unet_ray.models.device import keep_freed_memory
from unet_ray.own_process import claim

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def take():
    # The sizes exceed what glibc gives other threads at once, and what it takes from a heap by default.
    took = []
    for turn in range(10):
        before = faults()
        arrays = [torch.empty(size * 2**20, dtype=torch.uint8).fill_(1) for size in (40, 100, 300)]
        del arrays
        took.append(faults() - before)
    print(min(took))

if sys.argv[1] == "kept":
    claim()
    keep_freed_memory(of_any_size=True)
if sys.argv[2] == "thread":
    thread = threading.Thread(target=take)
    thread.start()
    thread.join()
else:
    take()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the heap is glibc's")
@pytest.mark.parametrize(
    "kept, where, environment, again",
    [
        ("never", "main", {}, True),
        ("kept", "main", {}, False),
        ("kept", "thread", {}, True),
        ("kept", "thread", ONE_HEAP, False),
    ],
)
def test_memory_that_was_freed_is_not_taken_from_the_system_again(kept, where, environment, again):
    ran = subprocess.run(
        [sys.executable, "-c", FEWEST_FAULTS, kept, where],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    pages = 440 * 2**20 // os.sysconf("SC_PAGE_SIZE")
    assert (int(ran.stdout) > pages // 2) == again
