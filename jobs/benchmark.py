"""Speed, measured side by side in one run and in turns, so that what is compared meets the same machine and noise.

    python jobs/benchmark.py --images FOLDER [--masks FOLDER] [--model RUN] [--milesial CHECKOUT] [--json FILE]

Each section is a table: seconds are medians over the rounds, ratios are to the section's first line.

    decode    one photograph to the model's size, on one core
    model     the network alone, one image at a time
    predict   a folder to PNG masks, after the start: `--local`, through Ray, and milesial/Pytorch-UNet's own code
    train     an optimizer step beside a plain fp32 loop
    epochs    an epoch `--local` and through Ray
    overhead  the way of the data without a network: beside as many bare processes as there are cores
    memory    peak resident memory, and images a second, of a short and a long folder
    start     `--help`, one image from a cold start, and the first mask through Ray by part
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import io
import itertools
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import click
import numpy as np
import psutil
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from unet_ray.config import Cleanup, MaskOptions, PredictConfig, TrainConfig, UserError
from unet_ray.data import imaging, masks, rows
from unet_ray.data.chunks import Chunk, Stage
from unet_ray.data.inputs import iter_images
from unet_ray.data.pairs import Pair, find_pairs
from unet_ray.inference import backends
from unet_ray.inference.ledger import Ledger
from unet_ray.inference.pipeline import Pipeline
from unet_ray.inference.predict import predict
from unet_ray.inference.reader import Reader
from unet_ray.inference.segmenter import Segmentation
from unet_ray.inference.stages import AtOwnSize, Chunks, Decode, Preprocess, Segment, run_here
from unet_ray.inference.write import Write
from unet_ray.models import build, checkpoint, compiling
from unet_ray.models.checkpoint import ModelCard
from unet_ray.models.device import bf16_is_fast, keep_freed_memory, run_network
from unet_ray.ray_backend.data_context import configure
from unet_ray.ray_backend.inference import run_on_cluster
from unet_ray.ray_backend.session import Runtime, ray_session
from unet_ray.settings import load_train_config
from unet_ray.training.loop import prepare
from unet_ray.training.results import read_metrics
from unet_ray.training.run import train
from unet_ray.training.sampler import batch_plan

ROOT = str(Path(__file__).resolve().parents[1])
BASE_64 = (("model.base_channels", 64), ("model.depth", 4), ("model.norm", "batch"), ("data.image_size", 512))
"""U-Net as most people run it: 31 million parameters, 385 GFLOP an image."""


@dataclass(frozen=True, slots=True)
class Line:
    """One thing that was measured."""

    section: str
    name: str
    seconds: float | None = None
    """Median of the rounds, for one image (`train`, `epochs`: for one step, one epoch)."""
    ratio: float | None = None
    """How many times as fast as the first of its section, or of its part of it."""
    note: str = ""
    """What else was seen, in words and figures."""


@dataclass(frozen=True, slots=True)
class Job:
    """What is measured on."""

    images: list[str]
    pairs: list[Pair]
    model: str
    card: ModelCard
    device: Literal["cpu", "cuda"]
    rounds: int
    milesial: Path | None
    folder: Path
    """For outputs; removed in the end."""
    config: TrainConfig
    """Of the training step, with the folders of the pairs."""

    def listed(self, count: int) -> str:
        """A list of the first images, for `predict`."""
        location = self.folder / f"first {count}.txt"
        location.write_text("".join(f"{path}\n" for path in self.images[:count]))
        return str(location)

    def decoded(self, count: int) -> list[np.ndarray]:
        """The first images at the model's size."""
        size = self.card.image_size
        return [imaging.decode_image(Path(path).read_bytes(), 3, size)[0] for path in self.images[:count]]

    def their_scale(self, image: Image.Image) -> float:
        """With which milesial's network sees as many pixels as ours; theirs keeps the sides' ratio."""
        height, width = self.card.image_size
        return (height * width / (image.width * image.height)) ** 0.5

    @property
    def quantized(self) -> str | None:
        """Stem of the network in int8, if it is used here."""
        return Pipeline.of(self.model, MaskOptions()).quantized if self.device == "cpu" else None


def in_turns(steps: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each, one after the other in every round; a round before, which warms up, does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            if number:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def table(section: str, seconds: Mapping[str, float], notes: Mapping[str, str] | None = None) -> list[Line]:
    first = next(iter(seconds.values()))
    return [Line(section, name, value, first / value, (notes or {}).get(name, "")) for name, value in seconds.items()]


def dice(one: np.ndarray, other: np.ndarray) -> float:
    """Of the foreground (every class but 0) of two masks."""
    total = int((one > 0).sum()) + int((other > 0).sum())
    return 1.0 if not total else 2 * int(((one > 0) & (one == other)).sum()) / total


def on_one_thread(function: Callable[[], object]) -> Callable[[], object]:
    def run() -> object:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return function()
        finally:
            torch.set_num_threads(threads)

    return run


class Apart:
    """What is measured in a process of its own: peers as they come, because glibc keeps what is freed in ours, which
    would make them faster too; our own training, because its memory is then that of one network.

    `peer` is called there with `given`, once, and what it returns is then called with what this is called with.
    """

    def __init__(self, peer: Callable[..., Callable[..., Any]], *given: Any) -> None:
        self.peer, self.given = peer, given
        self.process = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))

    def __enter__(self) -> Apart:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.shutdown()

    def __call__(self, *arguments: Any) -> Any:
        return self.process.submit(_asked, self.peer, self.given, arguments).result()


_PEER: list[Callable[..., Any]] = []


def _asked(peer: Callable[..., Callable[..., Any]], given: Sequence[Any], arguments: Sequence[Any]) -> Any:
    if not _PEER:
        _PEER.append(peer(*given))
    return _PEER[0](*arguments)


# decode


def by_pillow(data: bytes, size_hw: tuple[int, int]) -> np.ndarray:
    """As tutorials do: the whole photograph, then its small copy."""
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB").resize(size_hw[::-1], Image.Resampling.BILINEAR))


def by_simplejpeg(data: bytes, size_hw: tuple[int, int]) -> np.ndarray:
    import simplejpeg

    height, width = size_hw
    array = simplejpeg.decode_jpeg(data, "RGB", min_height=height, min_width=width)
    return np.asarray(Image.fromarray(array).resize((width, height), Image.Resampling.BILINEAR))


def by_torchvision(data: bytes, size_hw: tuple[int, int]) -> np.ndarray:
    from torchvision.io import decode_jpeg
    from torchvision.transforms.functional import resize

    image = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    return resize(image, list(size_hw), antialias=True).permute(1, 2, 0).numpy()


def decode_section(job: Job) -> Iterator[Line]:
    paths = [pair.image for pair in job.pairs[:16]] or job.images[:16]
    data = [Path(path).read_bytes() for path in paths]
    size = job.card.image_size
    decoders: dict[str, Callable[[bytes], np.ndarray]] = {
        "Pillow, whole": lambda d: by_pillow(d, size),
        "unet_ray": lambda d: imaging.decode_image(d, 3, size)[0],
    }
    jpeg = all(each.startswith(b"\xff\xd8") for each in data)
    if jpeg:
        decoders["torchvision"] = lambda d: by_torchvision(d, size)
    if jpeg and importlib.util.find_spec("simplejpeg"):
        decoders["simplejpeg"] = lambda d: by_simplejpeg(d, size)
    steps = {name: on_one_thread(lambda f=f: [f(d) for d in data]) for name, f in decoders.items()}  # type: ignore[misc]
    seconds = {name: value / len(data) for name, value in in_turns(steps, max(5, job.rounds)).items()}
    network, _ = backends.load(job.model, how(job, "fp32"))
    both = [[_mask(network, decoders[name](each), job) for each in data] for name in ("Pillow, whole", "unet_ray")]
    note = f"Dice {np.mean(list(map(dice, *both))):.5f} between the masks predicted from these and from Pillow's"
    if job.pairs:
        truth = [imaging.decode_mask(Path(pair.mask).read_bytes(), job.config.data, size)[0] for pair in job.pairs[:16]]
        known = [np.mean(list(map(dice, masks_of, truth))) for masks_of in both]
        note += f"; with the true ones {known[1]:.5f} and {known[0]:.5f}"
    yield from table("decode", seconds, {"unet_ray": note})


def how(job: Job, precision: str = "auto", backend: str = "auto") -> backends.RuntimeOptions:
    return backends.RuntimeOptions(torch.device(job.device), precision, backend)


@torch.inference_mode()
def _mask(network: backends.Network, image: np.ndarray, job: Job, size_hw: tuple[int, int] | None = None) -> np.ndarray:
    tensor = torch.from_numpy(image.copy())[None].to(job.device)
    logits = run_network(network, tensor, job.card.model, job.card.data)[0].cpu().numpy()
    return imaging.to_own_size(logits, size_hw or job.card.image_size, job.card.threshold)


# model


def plain_network(job: Job) -> Callable[[np.ndarray], np.ndarray]:
    """The same weights in fp32, as a tutorial runs them: nothing folded, no memory format, no autocast; to a mask."""
    network = checkpoint.load_model(job.model)[0].eval().to(job.device)
    return lambda image: _mask(lambda tensor: network(tensor.contiguous()), image, job)


def networks(job: Job) -> Iterator[tuple[str, backends.Network]]:
    """The network in each of our ways that is there."""
    yield "torch", backends.load(job.model, how(job, backend="torch"))[0]
    yield "compiled", backends.load(job.model, how(job, backend="compiled"))[0]
    if job.device == "cpu" and importlib.util.find_spec("openvino"):
        yield "OpenVINO fp32", backends.load(job.model, how(job, "fp32", "openvino"))[0]
        if bf16_is_fast(torch.device("cpu")):
            yield "OpenVINO bf16", backends.load(job.model, how(job, "bf16", "openvino"))[0]
        if job.quantized is not None:
            yield "OpenVINO int8", backends.load(job.model, how(job, "int8", "openvino"), job.quantized)[0]


def model_section(job: Job) -> Iterator[Line]:
    keep_freed_memory(of_any_size=True)
    decoded = job.decoded(16)
    ours = {name: partial(_mask, network, job=job) for name, network in networks(job)}
    upcoming = itertools.cycle(decoded)
    with Apart(plain_network, job) as plain:
        ways: dict[str, Callable[[np.ndarray], np.ndarray]] = {"plain fp32": plain, **ours}
        steps = {name: lambda way=way: way(next(upcoming)) for name, way in ways.items()}
        seconds = in_turns(steps, job.rounds)
        expected = [plain(image) for image in decoded[:8]]
    flops = compiling.floating_point_operations(job.card.model, job.card.image_size)
    notes = {}
    for name, value in seconds.items():
        notes[name] = f"{flops / value / 1e12:.3f} TFLOPS"
        if name in ours:
            agree = np.mean([dice(ours[name](image), mask) for image, mask in zip(decoded, expected, strict=False)])
            notes[name] += f"; Dice with plain fp32's masks {agree:.5f}"
    yield from table("model", seconds, notes)


# predict


class Milesial:
    """milesial/Pytorch-UNet's predict.py, its own code in its own checkout, weights random: image in, PNG out."""

    def __init__(self, checkout: Path, job: Job) -> None:
        sys.path.insert(0, str(checkout))
        self.code = importlib.import_module("predict")
        self.job, self.out = job, job.folder / "milesial"
        self.out.mkdir()
        self.network = importlib.import_module("unet").UNet(n_channels=3, n_classes=2)

    def __call__(self, path: str) -> None:
        image = Image.open(path)
        mask = self.code.predict_img(self.network, image, torch.device("cpu"), self.job.their_scale(image))
        self.code.mask_to_image(mask, [0, 1]).save(self.out / f"{Path(path).stem}_OUT.png")


Reports = list[tuple[float, int]]
"""When, and how many images were done by then."""


def reported(run: Callable[[Callable[[int, int, int], None]], object]) -> Reports:
    """What a prediction tells from the first images that are done on."""
    told: Reports = []
    run(lambda done, _failed, images: told.append((time.perf_counter(), done)) if images and done else None)
    return told


def steady(told: Reports, begin: float = 0, end: float = 1) -> float:
    """Seconds an image between the first and the last that were reported done, or between two shares of these."""
    (_, first), (_, last) = told[0], told[-1]
    bounds = [first + share * (last - first) for share in (begin, end)]
    begun, ended = (next(report for report in told if report[1] >= bound) for bound in bounds)
    return (ended[0] - begun[0]) / max(1, ended[1] - begun[1])


def predict_section(job: Job) -> Iterator[Line]:
    outs = itertools.count()

    def ours(local: bool, on_progress: Any) -> None:
        out = str(job.folder / f"out{next(outs)}")
        config = PredictConfig(model=job.model, inputs=(job.listed(96),), out=out, device=job.device)
        predict(config, runtime=Runtime(local=local), on_progress=on_progress)

    network, _ = backends.load(job.model, how(job), job.quantized)
    decoded = job.decoded(8)
    milesial = None if job.milesial is None else Apart(Milesial, job.milesial, job)
    seconds: dict[str, list[float]] = {}
    with ray_session(), milesial or nullcontext():
        if milesial is not None:
            milesial(job.images[0])  # starts
        for _ in range(job.rounds):
            if milesial is not None:
                started = time.perf_counter()
                for path in job.images[:3]:
                    milesial(path)
                seconds.setdefault("milesial's predict.py", []).append((time.perf_counter() - started) / 3)
            for image in decoded[:2]:
                _mask(network, image, job)
            started = time.perf_counter()
            for image in decoded:
                _mask(network, image, job)
            seconds.setdefault("model alone", []).append((time.perf_counter() - started) / len(decoded))
            seconds.setdefault("--local", []).append(steady(reported(partial(ours, True))))
            seconds.setdefault("through Ray", []).append(steady(reported(partial(ours, False))))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    alone = medians["model alone"]
    notes = {name: f"{alone / medians[name]:.3f} of the model's own rate" for name in ("--local", "through Ray")}
    yield from table("predict", medians, notes)


# train


class PlainPairs(Dataset):
    """Images and masks as tutorials read them: Pillow, resized, float32 [C,H,W]."""

    def __init__(self, pairs: list[Pair], size_hw: tuple[int, int]) -> None:
        self.pairs, self.size_hw = pairs, size_hw

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        pair = self.pairs[index]
        picture = by_pillow(Path(pair.image).read_bytes(), self.size_hw)
        with Image.open(pair.mask) as image:
            mask = np.asarray(image.resize(self.size_hw[::-1], Image.Resampling.NEAREST)) > 0
        # From 0 to 255: the network divides.
        return torch.from_numpy(picture.copy()).permute(2, 0, 1).float(), torch.from_numpy(mask).float()[None]


def plain_steps(config: TrainConfig, pairs: list[Pair], device: str) -> Callable[[], float]:
    """Training steps of a plain PyTorch loop with the same network: fp32, no memory format, AdamW as it comes."""
    network = build(config.model).train().to(device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.train.learning_rate)
    criterion = torch.nn.BCEWithLogitsLoss()
    loader = DataLoader(PlainPairs(pairs, config.data.size_hw), config.train.batch_size, shuffle=True, drop_last=True)
    batches = itertools.chain.from_iterable(itertools.repeat(loader))

    def step() -> float:
        image, mask = next(batches)
        optimizer.zero_grad()
        loss = criterion(network(image.to(device)), mask.to(device))
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def our_steps(config: TrainConfig, pairs: list[Pair], device: str, compiled: bool) -> Callable[[], float]:
    """Training steps as `unet-ray train --local` takes them; `compiled` as in long trainings."""
    keep_freed_memory(of_any_size=True)
    prepared = prepare(config, torch.device(device))
    prepared.model.train()
    if compiled:
        prepared.forward = compiling.Compiled(prepared.model)
    held = rows.MemoryRows(pairs, rows.Decoder.of(config))

    def steps() -> Iterator[float]:
        for epoch in itertools.count(1):
            plan = batch_plan(len(held), config.train.batch_size, seed=config.train.seed, epoch=epoch)
            batches = rows.prefetched(held.batches([part.indices for step in plan for part in step]))
            for step in plan:
                yield float(prepared.step(((next(batches), part) for part in step), len(step), epoch))

    return partial(next, steps())


def train_section(job: Job) -> Iterator[Line]:
    pairs = job.pairs[: 8 * job.config.train.batch_size]
    given = job.config, pairs, job.device
    with (
        Apart(plain_steps, *given) as plain,
        Apart(our_steps, *given, False) as ours,
        Apart(our_steps, *given, True) as compiled,
    ):
        for step in (ours, compiled):
            step()  # their memory grows for two steps, of which the round that warms up has one
        seconds = in_turns({"plain fp32": plain, "unet_ray": ours, "unet_ray, compiled": compiled}, job.rounds)
    yield from table("train", seconds, {"unet_ray": f"batch {job.config.train.batch_size}"})


def epochs_section(job: Job) -> Iterator[Line]:
    """Whole epochs of a smaller network, so that what is not the network shows. The first of a run is not counted."""
    count = 20
    small = [("model.base_channels", 16), ("model.patch", 2), ("model.depth", 4), ("model.norm", "batch")]
    config = load_train_config(
        settings=[
            *small,
            ("data.images", job.config.data.images),
            ("data.masks", job.config.data.masks),
            ("data.image_size", 512),
            ("data.fraction", min(1.0, 128 / len(job.pairs))),
            ("train.epochs", 1 + count),
            ("train.batch_size", 4),
            ("compute.device", job.device),
        ]
    )
    measured: dict[str, tuple[float, float]] = {}
    for name, local in (("--local", True), ("through Ray", False)):
        out = str(job.folder / name)
        train(config, out, runtime=Runtime(local=local))
        lines = read_metrics(out)[1:]
        seconds = statistics.median(line["train_seconds"] for line in lines)
        waited, trained = (sum(line[key] for line in lines) for key in ("wait_seconds", "train_seconds"))
        measured[name] = (seconds, waited / trained)
    notes = {name: f"waits for data {share:.2%} of the time" for name, (_, share) in measured.items()}
    yield from table("epochs", {name: seconds for name, (seconds, _) in measured.items()}, notes)


# overhead


class NoNetwork:
    """In a BatchSegmenter's place: a disc, whatever the image, which costs next to nothing."""

    def __init__(self, card: ModelCard) -> None:
        self.card = card
        y, x = (np.linspace(-1, 1, side, dtype=np.float16) for side in card.image_size)
        self.disc = (np.float16(0.5) - y[:, None] ** 2 - x**2)[None]

    def __call__(self, image_NHWC: np.ndarray) -> Segmentation:
        count = len(image_NHWC)
        return Segmentation(np.repeat(self.disc[None], count, axis=0), np.ones(count, np.float32))


@dataclass(frozen=True, slots=True)
class _NoModel:
    card: ModelCard

    def __call__(self, **_where: Any) -> Stage:
        return Segment(NoNetwork(self.card))  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Way:
    """The stages that read, decode and write, as `predict` puts them together, over a folder that repeats."""

    card: ModelCard
    out: str
    images: list[str]
    chunk: int = 64
    """As in a folder of 4,096 images or more."""

    def load(self, number: int) -> Chunk:
        start, count = number * self.chunk, self.chunk
        rows_here = range(start, start + count)
        paths = [self.images[row % len(self.images)] for row in rows_here]
        names = [f"{row:07d}" for row in rows_here]
        columns: dict[str, Any] = {
            "path": [os.fsencode(path) for path in paths],
            "name": [name.encode() for name in names],
            "output": [f"{name}.png".encode() for name in names],
            "number": [number] * count,
            "row": list(rows_here),
            "size": [0] * count,
            "mtime_ns": [0] * count,
            "redone": [False] * count,
        }
        return Chunks(columns, self.chunk)(0)

    def stages(self) -> tuple[Preprocess, _NoModel, Stage]:
        reader = Reader.of(self.card, 10**9)
        write = Write(Ledger(self.out, (), False), ("png",), self.card, reader)
        after = AtOwnSize(write, self.card, Cleanup(), False)
        return Preprocess(self.load, Decode(reader, self.card.image_size)), _NoModel(self.card), after

    def bare(self, numbers: Sequence[int]) -> None:
        """All stages one after the other, in this process."""
        keep_freed_memory()
        torch.set_num_threads(1)
        before, model, after = self.stages()
        segment = model()
        for number in numbers:
            after(segment(before(number)))


def overhead_section(job: Job) -> Iterator[Line]:
    cores = os.cpu_count() or 1
    count = 40
    notes = {}
    seconds: dict[str, list[float]] = {}
    context = multiprocessing.get_context("spawn")
    with ray_session(), context.Pool(cores) as pool:
        pool.map(_imported, range(cores))
        configure()
        for turn in range(job.rounds):
            way = Way(job.card, str(job.folder / f"bare{turn}"), job.images)
            started = time.perf_counter()
            pool.map(way.bare, [range(start, count, cores) for start in range(cores)], chunksize=1)
            name = f"{cores} bare processes"
            seconds.setdefault(name, []).append((time.perf_counter() - started) / (count * way.chunk))
            for name, run in (
                ("--local", lambda *parts: run_here(range(count), parts[0], parts[1], parts[2])),
                (
                    "through Ray",
                    lambda *parts: run_on_cluster(range(count), *parts, workers=1, device="cpu", shared={}),
                ),
            ):
                way = Way(job.card, str(job.folder / f"{name}{turn}"), job.images)
                times = [time.perf_counter() for _ in run(*way.stages())]
                # The middle half: neither while processes start nor while the last chunks have the machine alone.
                begun, ended = count // 4, 3 * count // 4
                seconds.setdefault(name, []).append((times[ended] - times[begun]) / ((ended - begun) * way.chunk))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    notes["through Ray"] = f"{count * way.chunk} images of {_size_of(job.images[0])}, one PNG mask each"
    yield from table("overhead", medians, notes)


def _imported(_number: int) -> None:
    time.sleep(0.5)  # long enough that every process of the pool gets one


def _size_of(path: str) -> str:
    with Image.open(path) as image:
        return f"{image.width}x{image.height}"


# memory


class PeakMemory:
    """Peak resident memory (without what is shared) of this process and of its descendants, looked at ten times a
    second."""

    def __init__(self) -> None:
        self.before = _own(psutil.Process())
        self.mine = self.theirs = 0
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self.thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self.done.set()
        self.thread.join()

    def _watch(self) -> None:
        this = psutil.Process()
        while not self.done.wait(0.1):
            self.mine = max(self.mine, _own(this))
            self.theirs = max(self.theirs, sum(map(_own, this.children(recursive=True))))


def _own(process: psutil.Process) -> int:
    try:
        memory = process.memory_info()
    except psutil.Error:  # ended meanwhile
        return 0
    return memory.rss - getattr(memory, "shared", 0)


def memory_section(job: Job) -> Iterator[Line]:
    """Few images before and after many, as machines slow down and recover. The network is one with which ten thousand
    take minutes, yet not tiny: of a few images most would then be decoded while it loads, which is not measured."""
    model = random_model(job.folder / "half", ("model.base_channels", 32), ("data.image_size", 192))
    folder = job.folder / "many"
    folder.mkdir()
    sources = []
    for path in job.images[:64]:
        with Image.open(path) as image:
            target = job.folder / f"{Path(path).stem}.jpg"
            image.convert("RGB").resize((512, 512)).save(target)
            sources.append(target)
    for number in range(10_000):
        os.link(sources[number % len(sources)], folder / f"{number:05d}.jpg")
    seconds: dict[int, list[float]] = {500: [], 10_000: []}
    halves: list[float] = []
    notes: dict[int, str] = {}
    many = dataclasses.replace(job, images=[str(folder / f"{number:05d}.jpg") for number in range(10_000)])
    lists = {count: many.listed(count) for count in seconds}
    for turn in range(job.rounds):
        for number, (count, times) in enumerate(((500, 2), (10_000, 1), (500, 2))):
            with ray_session(), PeakMemory() as peak:
                for again in range(times):
                    out = str(job.folder / f"predicted-{turn}-{number}-{again}")
                    todo = PredictConfig(model=model, inputs=(lists[count],), out=out, device=job.device)
                    told = reported(lambda tell, todo=todo: predict(todo, on_progress=tell))  # type: ignore[misc]
                    seconds[count].append(steady(told))
            if count == 10_000:
                halves.append(steady(told, 0, 0.5) / steady(told, 0.5, 1))
            more = (peak.mine - peak.before) / 2**20
            others = f"all other processes {peak.theirs / 2**20:.0f} MB"
            notes.setdefault(count, f"driver {more:.0f} MB more than before, {others}")
    notes[10_000] += f", the second half at {statistics.median(halves):.2f} times the speed of the first"
    rates = {count: statistics.median(of_each) for count, of_each in seconds.items()}
    for count, rate in rates.items():
        yield Line("memory", f"{count} images", rate, rates[500] / rate, notes[count])


# start


def start_section(job: Job) -> Iterator[Line]:
    one = job.folder / "one"
    one.mkdir()
    image = one / Path(job.images[0]).name
    shutil.copy(job.images[0], image)
    command = [sys.executable, "-m", "unet_ray"]
    environment = {**os.environ, "PYTHONPATH": ROOT}
    outs = itertools.count()

    def run(*arguments: str) -> None:
        subprocess.run([*command, *arguments], check=True, capture_output=True, env=environment)

    def ours() -> None:
        run("predict", job.model, str(image), "--out", str(job.folder / f"cold{next(outs)}"), "--local")

    steps: dict[str, Callable[[], object]] = {}
    if job.milesial is not None:
        steps["one image, milesial's predict.py"] = _theirs_cold(job, str(image))
    steps["one image, --local"] = ours
    yield from table("start", in_turns(steps, job.rounds))
    yield from table("start", in_turns({"--help": lambda: run("--help")}, 5))
    out = str(job.folder / "first")
    started = time.perf_counter()
    with ray_session():
        ready = time.perf_counter() - started
        summary = predict(PredictConfig(model=job.model, inputs=(job.listed(8),), out=out, device=job.device))
    parts = {"Ray": ready, "listing": summary.stages["listing"], "to the first masks": summary.stages["starting"]}
    note = ", ".join(f"{name} {value:.1f} s" for name, value in parts.items())
    yield Line("start", "first mask through Ray", sum(parts.values()), None, f"{note}; imports come before")


def _theirs_cold(job: Job, image: str) -> Callable[[], object]:
    """Their command on one image, at as many pixels as ours, with random weights in their own format."""
    assert job.milesial is not None
    weights = job.folder / "milesial.pth"
    code = f"import torch; from unet import UNet; torch.save(UNet(3, 2).state_dict(), {str(weights)!r})"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=job.milesial)
    with Image.open(image) as opened:
        scale = job.their_scale(opened)
    arguments = ["-m", str(weights), "-i", image, "-o", str(job.folder / "theirs.png"), "-s", str(scale)]
    command = [sys.executable, "predict.py", *arguments]
    return lambda: subprocess.run(command, check=True, capture_output=True, cwd=job.milesial)


SECTIONS: dict[str, Callable[[Job], Iterator[Line]]] = {
    "decode": decode_section,
    "model": model_section,
    "predict": predict_section,
    "train": train_section,
    "epochs": epochs_section,
    "overhead": overhead_section,
    "memory": memory_section,
    "start": start_section,
}


def prices(lines: Sequence[Line], an_hour: Mapping[str, float], batch_size: int) -> Iterator[Line]:
    """What a million images cost on a machine like this one: the prices are the user's, the rates were measured."""
    rates = {(line.section, line.name): line.seconds for line in lines if line.seconds}
    step = rates.get(("train", "unet_ray"))
    each = {
        "predicted through Ray": rates.get(("predict", "through Ray")),
        "trained on once": step and step / batch_size,
    }
    for (what, seconds), (machine, amount) in itertools.product(each.items(), an_hour.items()):
        if seconds:
            hours = seconds * 1e6 / 3600
            note = f"a million images: {hours:,.1f} hours of one machine, {hours * amount:,.2f} at {amount:g} an hour"
            yield Line("price", f"{what}, {machine}", seconds, None, note)


def random_model(folder: Path, *settings: tuple[str, Any]) -> str:
    """A model directory of the U-Net that most people run, but for `settings`, with random weights."""
    config = load_train_config(settings=[*BASE_64, ("data.mask_values", [0, 1]), *settings])
    checkpoint.save_model(str(folder), build(config.model), config, {})
    return str(folder)


def shown(line: Line) -> str:
    seconds = "" if line.seconds is None else f"{line.seconds:9.4f}"
    rate = "" if not line.seconds else f"{1 / line.seconds:9.2f}"
    ratio = "" if line.ratio is None else f"{line.ratio:7.2f}x"
    return f"{line.section:<9} {line.name:<34} {seconds:>9} {rate:>9} {ratio:>8}  {line.note}".rstrip()


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--images", required=True, metavar="DIR", help="Photographs.")
@click.option(
    "--masks", "masks_folder", metavar="DIR", help="Their masks; without them, `train` and `epochs` are left out."
)
@click.option("--model", metavar="RUN", help="A trained model; without it, U-Net of 64 channels, weights random.")
@click.option(
    "--section", "sections", multiple=True, type=click.Choice([*SECTIONS]), help="Only this; may be repeated."
)
@click.option("--milesial", metavar="DIR", help="A checkout of milesial/Pytorch-UNet to measure beside.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="[default: cuda where there is one]")
@click.option("--recipe", help="Settings of the training step.  [default: U-Net of 64 channels, 512, batch 4]")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="One such setting; may be repeated.")
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(min=1))
@click.option(
    "--price",
    "price_list",
    multiple=True,
    metavar="NAME=AMOUNT",
    help="Of an hour of a machine like this one: also says what a million images cost; may be repeated.",
)
@click.option("--json", "json_file", metavar="FILE", help="Also write the lines there.")
def main(
    images: str,
    masks_folder: str | None,
    model: str | None,
    sections: tuple[str, ...],
    milesial: str | None,
    device: Literal["cpu", "cuda"] | None,
    recipe: str | None,
    settings: tuple[str, ...],
    rounds: int,
    price_list: tuple[str, ...],
    json_file: str | None,
) -> None:
    """Measure how fast this machine decodes, predicts and trains, beside the ways others do it."""
    paths = [image.path for image in iter_images(images)]
    pairs = find_pairs(images, masks_folder) if masks_folder else []
    chosen: list[tuple[str, Any]] = [(name, value) for name, _, value in (text.partition("=") for text in settings)]
    base = [] if recipe else [*BASE_64, ("train.batch_size", 4)]
    config = load_train_config(recipe=recipe, settings=[*base, *chosen])
    if masks_folder:
        values = masks.infer_values([pair.mask for pair in pairs], config.model.num_classes, config.data)
        data = dataclasses.replace(config.data, images=images, masks=masks_folder, mask_values=values)
        config = dataclasses.replace(config, data=data)
    lines: list[Line] = []
    failed = False
    try:
        an_hour = {name: float(amount) for name, _, amount in (text.rpartition("=") for text in price_list)}
    except ValueError:
        raise UserError(f"--price {' '.join(price_list)}: write NAME=AMOUNT, e.g. spot=0.35") from None
    with tempfile.TemporaryDirectory(prefix="unet-ray-benchmark-") as folder:
        location = checkpoint.model_directory(model) if model else random_model(Path(folder, "model"))
        job = Job(
            images=[os.fsdecode(path) for path in paths],
            pairs=pairs,
            model=location,
            card=checkpoint.read_card(location),
            device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
            rounds=rounds,
            milesial=Path(milesial).resolve() if milesial else None,
            folder=Path(folder),
            config=config,
        )
        click.echo(f"{'section':<9} {'':<34} {'seconds':>9} {'a second':>9} {'ratio':>8}")
        for name in sections or SECTIONS:
            if name in ("train", "epochs") and not pairs:
                continue
            try:
                for line in SECTIONS[name](job):
                    click.echo(shown(line))
                    lines.append(line)
            except Exception as error:  # a peer that is not all there must not cost an hour's measurements
                failed = True
                click.echo(f"{name}: {type(error).__name__}: {error}", err=True)
    for line in prices([*lines], an_hour, config.train.batch_size):
        click.echo(shown(line))
        lines.append(line)
    if json_file:
        Path(json_file).write_text(json.dumps([dataclasses.asdict(line) for line in lines], indent=2) + "\n")
    sys.exit(failed)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"Error: {error}") from None
