"""A host's process that imports and calls this package keeps its handlers, limits, loggers, threads and numbers."""

import json
import os
import subprocess
import sys
from pathlib import Path

from conftest import TINY, environment, make_discs

HOST = """
import ctypes, json, logging, multiprocessing, os, random, signal, sys, warnings
import numpy as np
import torch
from PIL import Image

folder, settings, through_ray = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3] == "ray"

try:
    import openvino  # its import chooses multiprocessing's start method
except ImportError: ...
BY_LIBRARIES = ("TORCHINDUCTOR_CACHE_DIR", "CRC32C_SW_MODE")

class Handler(logging.Handler):
    def emit(self, record): ...

def on_term(number, frame): ...

def memory_is_returned():
    # glibc maps a block of 64 MiB and gives it back at once, unless malloc's settings were changed.
    before = rss()
    block = ctypes.create_string_buffer(64 * 2**20)
    ctypes.memset(block, 1, len(block))
    del block
    return rss() - before < 16 * 2**20

def rss():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

def state():
    loggers = ["", "unet_ray", "ray", "ray.data", "ray.train", "torch.utils.cpp_extension", "PIL", "mine"]
    return {
        "pillow": [Image.MAX_IMAGE_PIXELS],
        # Without those that libraries add for their own warnings and messages when they are imported.
        "filters": [repr(f) for f in warnings.filters if f[2].__module__ == "builtins" and f[1] is None],
        "signals": [repr(signal.getsignal(s)) for s in (signal.SIGTERM, signal.SIGINT)],
        "loggers": [[n, l.level, [repr(h) for h in l.handlers], l.propagate, l.disabled]
                    for n in loggers for l in [logging.getLogger(n)]],
        "environment": {n: v for n, v in os.environ.items() if n not in BY_LIBRARIES},
        "threads": torch.get_num_threads(),
        "numbers": [torch.rand(1).item(), random.random(), float(np.random.rand())],
        "torch": [torch.get_default_dtype().__str__(), torch.is_grad_enabled(), torch.backends.cudnn.benchmark],
        "folder": os.getcwd(),
        "start method": multiprocessing.get_start_method(allow_none=True),
        "telemetry": "openvino_telemetry" in sys.modules,
        "memory": memory_is_returned(),
    }

def compare(what, before):
    after = seeded_state()
    for found in (before, after):
        found.update(found.pop("environment", {}))
    pairs = {name: (before.get(name), after.get(name)) for name in {**before, **after}}
    changed = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
    assert not changed, (what, changed)

def seeded_state():
    # The next numbers of each generator: equal if nobody has drawn or seeded.
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    found = state()
    torch.set_rng_state(states[0]); random.setstate(states[1]); np.random.set_state(states[2])
    return found

signal.signal(signal.SIGTERM, on_term)
Image.MAX_IMAGE_PIXELS = 12345
logging.getLogger("mine").addHandler(Handler())
logging.getLogger("ray.data").setLevel(logging.DEBUG)
logging.getLogger("ray").addHandler(Handler())
torch.set_num_threads(3)
torch.manual_seed(7); random.seed(7); np.random.seed(7)
before = seeded_state()

import unet_ray
from unet_ray import Segmenter, UserError, evaluate, predict, train
compare("import", before)
if not through_ray:
    train(folder + "/images", folder + "/masks", folder + "/run", settings=settings, local=True)
    compare("train", before)
    segmenter = Segmenter(folder + "/run", device="cpu")
    compare("Segmenter", before)
    segmenter(folder + "/images/a_000.png")
    compare("a call of Segmenter", before)
    predict(folder + "/run", folder + "/images", folder + "/out", local=True, device="cpu")
    compare("predict", before)
    evaluate(folder + "/run", local=True, device="cpu")
    compare("evaluate", before)
    try:
        segmenter(Image.new("RGB", (400, 300)).save(folder + "/large.png") or folder + "/large.png")
    except UserError as error:
        assert "MAX_IMAGE_PIXELS" in str(error), error
    else:
        raise AssertionError("the host's own limit holds")
else:
    import ray
    before = seeded_state()
    predict(folder + "/run", folder + "/images", folder + "/out through ray", device="cpu")
    compare("predict through Ray", before)
"""


def host(folder: Path, where: str) -> None:
    settings = dict([*TINY, ("train.epochs", 1)])
    variables = {name: value for name, value in environment().items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", HOST, str(folder), json.dumps(settings), where],
        env=variables,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_host_keeps_what_is_its_own(tmp_path):
    make_discs(tmp_path, 8)
    host(tmp_path, "here")
    host(tmp_path, "ray")


def test_a_commands_process_is_our_own():
    code = (
        "from unet_ray import own_process\nfrom unet_ray.cli import main\nimport signal\n"
        "try: main(['recipes'])\nexcept SystemExit: pass\n"
        "from unet_ray.data import imaging\nfrom PIL import Image\n"
        "assert own_process.is_own() and Image.MAX_IMAGE_PIXELS is None\n"
        "assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=dict(os.environ), capture_output=True)
