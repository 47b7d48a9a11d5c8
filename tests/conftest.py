"""Shared by all tests: small data sets made on the spot, one Ray, one cluster, and the real data where it is."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

# One mode for all Rays of the tests: without it the job client does not send the token that a local Ray asks for.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
# For the bucket of test_buckets.py. Set here, because Ray's workers inherit the environment that Ray was started in.
os.environ |= {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_EC2_METADATA_DISABLED": "true"}
if "PYTEST_XDIST_WORKER" in os.environ:
    # One torch thread a process, set before torch is imported: two processes of two threads on two cores wait for each
    # other. The commands that tests start inherit it.
    os.environ["OMP_NUM_THREADS"] = "1"
# OpenVINO that a test imports itself would report each use to its maker, from processes that it forks. Beside the
# threads of Ray and of open videos these hang, with copies of the pipes of the commands that tests start: a test waited
# for such a pipe for good.
sys.modules.setdefault("openvino_telemetry", None)

ROOT = Path(__file__).resolve().parents[1]
REAL_DATA = ROOT.parent / "shared" / "data"


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keeps all tests of the one Ray in one process of pytest-xdist, and all tests of the one cluster."""
    for item in items:
        for fixture in {"ray_cluster", "machines"}.intersection(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.xdist_group(fixture))


def loaded_after(code: str) -> set[str]:
    """Returns the modules that a fresh interpreter has loaded after `code`."""
    script = f"import sys\n{code}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    return set(done.stdout.split())


def disc(size: int, centre: tuple[float, float], radius: float) -> np.ndarray:
    """Returns class ids, uint8 [size,size]: 1 inside the disc, 0 outside."""
    y, x = np.mgrid[:size, :size]
    return ((y - centre[0]) ** 2 + (x - centre[1]) ** 2 <= radius**2).astype(np.uint8)


def make_discs(folder: Path, count: int, *, size: int = 32, seed: int = 0, mask_value: int = 255) -> tuple[Path, Path]:
    """images/ (RGB PNG: a disc on noise) and masks/ (0 and `mask_value`), named a_000, b_001, c_002, a_003, …"""
    generator = np.random.default_rng(seed)
    images, masks = folder / "images", folder / "masks"
    images.mkdir(parents=True)
    masks.mkdir()
    for number in range(count):
        mask = disc(
            size, tuple(generator.uniform(size * 0.3, size * 0.7, 2)), generator.uniform(size * 0.15, size * 0.3)
        )
        pixels = generator.integers(0, 90, (size, size, 3)) + mask[..., None] * generator.integers(60, 150, 3)
        name = f"{'abc'[number % 3]}_{number:03d}.png"
        Image.fromarray(pixels.astype(np.uint8)).save(images / name)
        Image.fromarray(mask * np.uint8(mask_value)).save(masks / name)
    return images, masks


@pytest.fixture
def discs(tmp_path: Path) -> tuple[Path, Path]:
    """12 pairs of 32x32 pixels."""
    return make_discs(tmp_path / "discs", 12)


TINY = [
    ("model.base_channels", 4),
    ("model.depth", 2),
    ("data.image_size", 32),
    ("train.epochs", 2),
    ("train.batch_size", 4),
    ("train.precision", "fp32"),
    ("train.learning_rate", 1e-2),
]
"""Settings of a network that trains in a second."""


SLOW = [
    *TINY,
    ("model.base_channels", 8),
    ("data.image_size", 128),
    # No batch norm, and small steps: what several workers compute then stays within rounding of what one does.
    ("model.norm", "none"),
    ("train.learning_rate", 2e-4),
    ("train.epochs", 24),
    ("data.val_fraction", 0.33),
]
"""Settings of a training that a test can interrupt: its epochs take some tenths of a second."""


def flags(settings: Iterable[tuple[str, object]]) -> list[str]:
    """Returns the settings as a command's arguments."""
    return [argument for name, value in settings for argument in ("--set", f"{name}={value}")]


RUN_FILES = [
    "config.yaml",
    "last/state.safetensors",
    "metrics.jsonl",
    "model/looks.json",
    "model/model.json",
    "model/model.safetensors",
    "split.csv",
]
"""Files of a run directory, without TensorBoard's."""


@pytest.fixture(scope="session")
def ray_cluster():
    """One Ray with 4 CPUs for all tests that need one. It starts with the first of them and ends with the session."""
    import ray

    with tempfile.TemporaryDirectory(prefix="ur-", ignore_cleanup_errors=True) as temporary:
        ray.init(
            address="local",
            num_cpus=4,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            object_store_memory=500 * 2**20,
            _temp_dir=temporary,
            _node_ip_address="127.0.0.1",
            _system_config={"num_workers_soft_limit": 10},  # as the command does
        )
        yield ray
        ray.shutdown()


BIN = Path(sys.executable).parent


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def environment(**more: str) -> dict[str, str]:
    """Returns the environment of a command: this Python's programs are found first."""
    return {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", **more}


SYSTEM = "--system-config=" + json.dumps(
    {
        "num_workers_soft_limit": 10,  # as the command does
        # A killed node is missed after 5 seconds rather than 20; a slow one is not.
        "health_check_period_ms": 1000,
        "health_check_failure_threshold": 5,
        "health_check_timeout_ms": 10_000,
    }
)


NETWORK = f"127.0.{os.environ.get('PYTEST_XDIST_WORKER', 'gw0').removeprefix('gw')}"


class Machines:
    """A Ray cluster of nodes started one by one, as on one's own machines. They have the addresses 127.0.0.2, 127.0.0.3
    and so on, in another process of pytest-xdist 127.0.1.2: Ray refuses several nodes on one address."""

    def __init__(self, **variables: str) -> None:
        self.temporary = tempfile.TemporaryDirectory(prefix="ur-", ignore_cleanup_errors=True)
        self.variables = {"AUTOSCALER_UPDATE_INTERVAL_S": "1", **variables}
        self.running: list[psutil.Process] = []
        """The head first, if there is one."""
        self.has_head = False
        self.started = 0
        self._choose_address()

    def __enter__(self) -> Machines:
        return self

    def __exit__(self, *_error: object) -> None:
        self.kill_all()
        self.temporary.cleanup()

    def _choose_address(self) -> None:
        """Chooses ports and an address for the next head."""
        self.port, self.dashboard_port = free_port(), free_port()
        self.address = f"{NETWORK}.{2 + self.started}:{self.port}"
        self.dashboard = f"http://127.0.0.1:{self.dashboard_port}"

    def _start(self, *arguments: str, prefix: Sequence[str] = (), **variables: str) -> psutil.Process:
        self.started += 1
        address = f"--node-ip-address={NETWORK}.{1 + self.started}"
        command = [str(BIN / "ray"), "start", "--block", address, "--disable-usage-stats"]
        # A folder for each node, as on machines: each unpacks a job's files there, after deleting those it finds.
        command += [f"--temp-dir={self.temporary.name}/{self.started}"]
        log = Path(self.temporary.name, f"{self.started}.log")
        with log.open("wb") as stream:
            process = subprocess.Popen(
                [*prefix, *command, f"--object-store-memory={200 * 2**20}", *arguments],
                env=environment(**self.variables, **variables),
                stdout=stream,
                stderr=stream,
                start_new_session=True,
            )
        machine = psutil.Process(process.pid)
        self.running.append(machine)
        # One by one: where several start at once on two cores, Ray gives up on some.
        deadline = time.monotonic() + 120
        while "Ray runtime started" not in log.read_text():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-2000:]
            time.sleep(0.1)
        return machine

    def complete(self) -> None:
        """Starts what is missing of a head without CPUs and two nodes of two CPUs; all of it, if the head is gone."""
        if not self.has_head:
            self.kill_all()
            self._choose_address()
            self.head(0)
        while len(self.running) < 3:
            self.node(2)

    def head(self, cpus: int, *arguments: str) -> psutil.Process:
        """Returns once the dashboard answers, which starts last."""
        head = self._start(
            "--head",
            f"--num-cpus={cpus}",
            f"--port={self.port}",
            "--dashboard-host=127.0.0.1",
            f"--dashboard-port={self.dashboard_port}",
            f"--ray-client-server-port={free_port()}",
            f"--dashboard-agent-listen-port={free_port()}",
            SYSTEM,
            *arguments,
        )
        deadline = time.monotonic() + 120
        while subprocess.run(
            [str(BIN / "ray"), "job", "list", "--address", self.dashboard], env=environment(), capture_output=True
        ).returncode:
            assert head.is_running() and time.monotonic() < deadline, "the head did not start"
            time.sleep(1)
        self.has_head = True
        return head

    def node(
        self, cpus: int, *, gpus: int = 0, own_folder: Path | None = None, start_up: Path | None = None
    ) -> psutil.Process:
        """Returns once it has joined. `own_folder`: the node has another disk there (for root). `start_up`: folder of a
        sitecustomize.py that all Python processes of the node run first."""
        mount = 'mount -t tmpfs none "$0" && exec "$@"'
        prefix = ["unshare", "--mount", "sh", "-c", mount, str(own_folder)] if own_folder else []
        resources = [f"--num-cpus={cpus}", *([f"--num-gpus={gpus}"] if gpus else [])]
        variables = {"PYTHONPATH": f"{start_up}{os.pathsep}{ROOT}"} if start_up else {}
        return self._start(f"--address={self.address}", *resources, prefix=prefix, **variables)

    @contextlib.contextmanager
    def joined(self, cpus: int, **options: Any) -> Iterator[psutil.Process]:
        """Adds a node, see `node`, and takes it away afterwards."""
        machine = self.node(cpus, **options)
        try:
            yield machine
        finally:
            self.kill(machine)

    def kill(self, machine: psutil.Process) -> None:
        """Ends it as a power failure does."""
        with contextlib.suppress(psutil.NoSuchProcess):
            everything = [machine, *machine.children(recursive=True)]
            for process in everything:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(everything, timeout=20)
        if machine in self.running:
            self.has_head = self.has_head and machine is not self.running[0]
            self.running.remove(machine)

    def kill_all(self) -> None:
        for machine in reversed(self.running):
            self.kill(machine)

    def working(self, kind: str) -> dict[psutil.Process, list[psutil.Process]]:
        """Returns node -> its processes whose name has `kind` in it. The head and nodes without any are left out."""
        return {machine: found for machine in self.running[1:] if (found := processes_at_work(machine, kind))}

    def hold(self, kind: str) -> None:
        """Lets the processes that `working` finds stand still, as on a machine that swaps: what waits for them can't
        end, however fast the cores are. Only `kill` ends them."""
        for processes in self.working(kind).values():
            for process in processes:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.suspend()

    def command(self, *arguments: object) -> subprocess.Popen[str]:
        """Starts `unet-ray` on this cluster. Its stdout includes stderr."""
        return subprocess.Popen(
            [sys.executable, "-m", "unet_ray", *map(str, arguments)],
            env=environment(RAY_ADDRESS=self.address),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def submit(self, *arguments: object, options: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
        """Runs `ray job submit` in the checkout."""
        submit = [str(BIN / "ray"), "job", "submit", "--address", self.dashboard]
        submit += ["--runtime-env", "jobs/runtime_env.yaml"]
        return subprocess.run(
            [*submit, *options, "--", *map(str, arguments)],
            cwd=ROOT,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )


def processes_at_work(machine: psutil.Process, kind: str) -> list[psutil.Process]:
    """Returns the processes below a machine's raylet whose name has `kind` in it."""
    try:
        return [p for p in machine.children(recursive=True) if kind in "".join(p.cmdline()[:1])]
    except psutil.Error:
        return []


def until(condition: Callable[[], Any], process: subprocess.Popen[str] | None = None, seconds: float = 200) -> Any:
    """Returns what `condition` returns, as soon as that is true. Fails if the process ends before."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert process is None or process.poll() is None, process.communicate()[0][-3000:]
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.05)
    return found


@pytest.fixture(scope="session")
def machines() -> Iterator[Machines]:
    """One cluster of three nodes for all cluster tests: a head without CPUs and two nodes of two CPUs. A test that
    needs them all calls `complete()`, since others kill some."""
    with Machines() as cluster:
        cluster.complete()
        yield cluster


@pytest.fixture
def real_data() -> Path:
    if not REAL_DATA.is_dir():
        pytest.skip(f"the real images are not here: {REAL_DATA.name} beside the checkout's shared folder")
    return REAL_DATA


@pytest.fixture(autouse=True)
def _no_foreign_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests never join a Ray that happens to run on this machine."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Predictions in chunks of 8 images, however fast the network."""
    from unet_ray.inference import chunk_size

    monkeypatch.setattr(chunk_size, "SECONDS", 0.0)


def make_model(folder: Path, *settings: tuple[str, object], seed: int = 0) -> Path:
    """Writes a model directory of a small network with random weights."""
    import torch

    from unet_ray.models import build, checkpoint
    from unet_ray.settings import load_train_config

    names = {name for name, _ in settings}
    defaults = [("data.mask_values", [0, 255]), *TINY]
    config = load_train_config(settings=[*(pair for pair in defaults if pair[0] not in names), *settings])
    torch.manual_seed(seed)
    checkpoint.save_model(str(folder), build(config.model), config, {})
    return folder


def epochs_done(run: Path) -> int:
    """Returns how many epochs a training has finished, according to its last checkpoint."""
    from unet_ray.models import training_state

    state = training_state.read_state(str(run / "last"))
    return state.epoch if state else 0


def recorded(out: Path) -> dict[Path, int]:
    """Returns mask -> modification time, ns, for each mask that a prediction's ledger calls done."""
    import pyarrow.parquet as pq

    found = {}
    for folder in (out / "manifest.parquet", out / ".work/done"):
        # os.walk, since rglob of Python 3.11 fails where a folder goes meanwhile.
        files = [Path(parent, name) for parent, _, names in os.walk(folder) for name in names]
        for shard in (file for file in files if file.suffix == ".parquet" and not file.name.startswith(".")):
            try:
                outputs = pq.read_table(shard, columns=["output"])["output"].to_pylist()
            except FileNotFoundError:  # merged into the manifest meanwhile
                continue
            found |= {out / name: (out / name).stat().st_mtime_ns for name in outputs if name}
    return found


def make_photos(folder: Path, count: int, *, seed: int = 0) -> Path:
    """Writes smooth noise of many sizes, JPEG and PNG by turns, in three subfolders."""
    generator = np.random.default_rng(seed)
    for number in range(count):
        below = folder / f"sub {number % 3}"
        below.mkdir(parents=True, exist_ok=True)
        height, width = (int(side) for side in generator.integers(10, 90, 2))
        small = Image.fromarray(generator.integers(0, 255, (4, 5, 3)).astype(np.uint8))
        small.resize((width, height)).save(below / f"{number:04d}.{'png' if number % 2 else 'jpg'}")
    return folder


def make_bad(folder: Path) -> dict[Path, str]:
    """Writes ten files that are no usable RGB image. Returns file -> what its error must contain."""
    folder.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 255, (64, 64, 3)).astype(np.uint8))
    for kind in ("jpg", "png", "gif", "tif"):
        picture.save(folder / f"cut.{kind}")
        data = (folder / f"cut.{kind}").read_bytes()
        (folder / f"cut.{kind}").write_bytes(data[: len(data) // 3])
    (folder / "empty.jpg").touch()
    (folder / "page.jpg").write_text("<html>404</html>")
    # A few bytes that claim 60,000 x 60,000 pixels.
    header = b"IHDR" + (60_000).to_bytes(4, "big") * 2 + b"\x08\x02\x00\x00\x00"
    chunks = [
        (len(part) - 4).to_bytes(4, "big") + part + zlib.crc32(part).to_bytes(4, "big")
        for part in (header, b"IDAT" + zlib.compress(bytes(999)))
    ]
    (folder / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    (folder / "vanished.jpg").symlink_to(folder / "no such file")
    os.mkfifo(folder / "pipe.jpg")
    np.save(folder / "seven.npy", np.zeros((8, 8, 7), np.uint8))
    return {
        folder / "cut.jpg": "truncated",
        folder / "cut.png": "cannot be decoded",
        folder / "cut.gif": "cannot be decoded",
        folder / "cut.tif": "cannot be decoded",
        folder / "empty.jpg": "the file is empty",
        folder / "page.jpg": "not an image",
        folder / "bomb.png": "3600000000 pixels, more than --max-pixels 200000000",
        folder / "vanished.jpg": "No such file",
        folder / "pipe.jpg": "not a regular file",
        folder / "seven.npy": "7 channel(s), the model takes 3",
    }
