"""A host's process stays as it was after our calls; the command's own process is claimed and keeps freed memory."""

import json
import subprocess
import sys

import pytest
from conftest import TINY, environment, make_discs, make_model

HOST = """
import ctypes, json, logging, multiprocessing, os, random, signal, sys, threading, warnings
import numpy as np, torch
from PIL import Image

if sys.argv[1] == "ray":
    import ray.data  # what importing Ray does to a process is Ray's matter
# The host's own choices. None is a default.
Image.MAX_IMAGE_PIXELS = 500  # the images have more than twice as many: Pillow would refuse them
signal.signal(signal.SIGTERM, lambda *_: print("host's own"))
torch.set_num_threads(3)
warnings.simplefilter("once")
logging.getLogger("ray").setLevel(logging.INFO)
logging.getLogger("ray.data").setLevel(logging.INFO)
LOGGERS = [None, "ray", "ray.data", "ray.train", "torch.utils.cpp_extension", "nncf", "unet_ray"]

def freed_memory_returns():
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    block = libc.malloc(100 * 2**20)
    mapped = ctypes.c_size_t.from_address(block - ctypes.sizeof(ctypes.c_size_t)).value & 2 != 0  # glibc's IS_MMAPPED
    libc.free(block)
    return mapped

def state():
    loggers = {str(name): logging.getLogger(name) for name in LOGGERS}
    found = {
        "Pillow's limit": Image.MAX_IMAGE_PIXELS,
        # Libraries add filters for their own warnings when they are imported: of their classes, or with their texts.
        "warnings": [str(f) for f in warnings.filters if f[2].__module__ == "builtins" and f[1] is None],
        "signals": [str(signal.getsignal(s)) for s in (signal.SIGTERM, signal.SIGINT)],
        "threads": torch.get_num_threads(),
        "torch": [str(torch.get_default_dtype()), torch.are_deterministic_algorithms_enabled(),
                  torch.get_float32_matmul_precision(), torch.is_grad_enabled(), torch.is_inference_mode_enabled()],
        # torch names the folder of compiled code, which is its default, as soon as its compiler is imported.
        "environment": {n: v for n, v in os.environ.items() if n != "TORCHINDUCTOR_CACHE_DIR"},
        "folder": os.getcwd(),
        "start method": multiprocessing.get_start_method(allow_none=True),
        "telemetry": "openvino_telemetry" in sys.modules and sys.modules["openvino_telemetry"] is None,
        "loggers": {n: [l.level, l.propagate, l.disabled, [str(h) for h in l.handlers]] for n, l in loggers.items()},
        "hooks": [str(sys.excepthook), str(threading.excepthook), str(sys.stdout), str(sys.stderr)],
        "random": [hash(random.getstate()), hash(np.random.get_state()[1].tobytes()),
                   hash(torch.get_rng_state().numpy().tobytes())],
        "freed memory returns": freed_memory_returns(),
    }
    if sys.argv[1] == "ray":
        context = ray.data.DataContext.get_current()
        found["Ray Data"] = {name: str(value) for name, value in vars(context).items() if "0x" not in str(value)}
    return found

changed = {}

def compare(call, before):
    after = state()
    for name in before:
        if before[name] != after[name]:
            one, two = before[name], after[name]
            if isinstance(one, dict):
                names = [key for key in {**one, **two} if one.get(key) != two.get(key)]
                one, two = ({key: values.get(key) for key in names} for values in (one, two))
            changed[f"{name}, after {call}"] = [one, two]

before = state()
import unet_ray
import unet_ray.api
compare("import", before)
if sys.argv[1] == "ray":
    unet_ray.predict("model", "images", "masks_of_ray", precision="fp32")
    compare("predict through Ray", before)
else:
    segment = unet_ray.Segmenter("model")
    segment(np.zeros((48, 72, 3), np.uint8)).overlay()
    compare("Segmenter", before)
    unet_ray.predict("model", "images", "masks_here", formats="png,overlay", local=True)
    compare("predict", before)
    unet_ray.evaluate("model", "images", "masks", local=True)
    compare("evaluate", before)
    settings = json.loads(sys.argv[2]) | {"compute.cpus_per_worker": 1}
    unet_ray.train("images", "masks", "run", settings=settings, local=True)
    compare("train", before)
print(json.dumps(changed))
"""

OWN = """
import signal, sys
# A shell's background job, which a CI may be, inherits that SIGINT is ignored. Then it stays so.
ctrl_c = signal.getsignal(signal.SIGINT)
from unet_ray import own_process
from unet_ray.cli import main
try:
    main(["recipes"])
except SystemExit as end:
    assert not end.code
print(own_process.is_own(), signal.getsignal(signal.SIGINT) is ctrl_c,
      "stop_like_ctrl_c" in repr(signal.getsignal(signal.SIGTERM)))
"""


def script(source: str, *arguments: str, folder=None) -> str:
    command = [sys.executable, "-c", source, *arguments]
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize("way", ["local", pytest.param("ray", marks=pytest.mark.cluster)])
def test_a_hosts_process_stays_as_it_was(tmp_path, way):
    make_discs(tmp_path, 6)
    make_model(tmp_path / "model")
    assert json.loads(script(HOST, way, json.dumps(dict(TINY)), folder=tmp_path)) == {}


def test_the_commands_process_is_our_own():
    assert script(OWN) == "True True True"
