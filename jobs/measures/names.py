"""Measures a prediction of many names: killed once, gone on, and every name recorded once.

The ledger, the driver and Ray Data are the real ones; the network sleeps, and nothing is read (see `scale`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil

from measures import plots
from measures.common import ROOT, Job, Line
from measures.scale import hand_out
from unet_ray.inference.digests import digests_of
from unet_ray.inference.ledger import Ledger
from unet_ray.ray_backend.data_context import configure
from unet_ray.ray_backend.session import ray_session

REPLICAS = 1000
KILLED_AFTER = 0.4
"""Share of the names after which the command is killed."""
EVERY_SECONDS = 5.0


class Sample(NamedTuple):
    """What the command says of itself, every `EVERY_SECONDS`."""

    time: float
    """Of the clock, in seconds."""
    listed: int
    """Names listed by this run."""
    done: int
    """Names recorded as done, by this run and the one before."""
    cpu: float
    """Seconds of CPU that the command's process has used."""
    memory: int
    """Its resident memory in bytes."""


def names_section(job: Job) -> Iterator[Line]:
    out = job.folder / "names"
    command = [sys.executable, "-m", "measures.names", str(out), job.model, str(job.names)]
    first = _watched(command, stop_at=int(KILLED_AFTER * job.names))
    ledger = Ledger(str(out), ())
    kept = sum(state.done for state in ledger.states(ledger.shards()))
    second = _watched(command)
    yield _line("until it is killed", first, 0)
    yield _line("gone on", second, kept)
    twice, missing = _checked(out, job.names)
    lost = max(0, first[-1].done - kept)
    note = f"{job.names:,} names: {twice} twice, {missing} missing; the kill took back {lost:,} that were reported"
    yield Line("names", "the manifest", note=note)
    if job.plots:
        plots.names(job.plots / "names.png", first, second)


def _watched(command: list[str], stop_at: int | None = None) -> list[Sample]:
    """Runs the command to its end, or kills it once `stop_at` names are done. Returns its samples."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([f"{ROOT}/jobs", ROOT])}
    samples = []
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if not line.startswith("["):
                continue
            samples.append(Sample(*json.loads(line)))
            if stop_at is not None and samples[-1].done >= stop_at:
                workers = psutil.Process(process.pid).children(recursive=True)
                for victim in (psutil.Process(process.pid), *workers):
                    victim.kill()
                psutil.wait_procs(workers, timeout=30)
                return samples
    if process.returncode:
        raise RuntimeError(f"the command ended with {process.returncode}")
    return samples


def _line(name: str, samples: list[Sample], before: int) -> Line:
    """Returns the line of a run, from its first name listed to its end. `before`: names that were done already."""
    begin, end = samples[0], samples[-1]
    images = end.done - before
    seconds = (end.time - begin.time) / images
    worked = next(sample for sample in samples if sample.done > before)
    listing = max(samples, key=lambda sample: sample.listed)
    note = (
        f"{1 / seconds:,.0f} images/s, driver {(end.cpu - begin.cpu) / images * 1000:.3f} s of CPU a thousand images, "
        f"at most {max(sample.memory for sample in samples) / 2**20:,.0f} MB; first done after "
        f"{worked.time - begin.time:,.0f} s, all listed after {listing.time - begin.time:,.0f} s"
    )
    return Line("names", name, seconds, None, note)


def _checked(out: Path, names: int) -> tuple[int, int]:
    """Returns how many names the manifest holds twice, and how many it lacks or does not call done."""
    digests, done = [], 0
    for table in Ledger(str(out), ()).manifest(["path", "status"]):
        digests.append(np.array(digests_of([path.encode() for path in table["path"].to_pylist()])))
        done += sum(status == "ok" for status in table["status"].to_pylist())
    all_digests = np.concatenate(digests)
    different = len(np.unique(all_digests, axis=0))
    return len(all_digests) - different, names - min(done, different)


def _command(out: str, model: str, names: str) -> None:
    """What is watched and killed: lists the names and hands them out; prints samples."""
    process = psutil.Process()
    last = 0.0

    def tell(done: int, _failed: int, images: int) -> None:
        nonlocal last
        if time.time() - last >= EVERY_SECONDS or done == int(names):
            last = time.time()
            cpu, memory = sum(process.cpu_times()[:2]), process.memory_info().rss
            print(json.dumps(Sample(last, images or done, done if images else 0, cpu, memory)), flush=True)

    Path(out).mkdir(exist_ok=True)
    with ray_session():
        configure()
        hand_out(out, model, int(names), REPLICAS, tell, while_listing=True)


if __name__ == "__main__":
    _command(*sys.argv[1:])
