"""Lists the inputs in a thread, and hands out rounds of work: the images that are known by then."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, wait

from unet_ray.data import buckets
from unet_ray.data.inputs import ImageFile
from unet_ray.inference.ledger import SHARD_ROWS
from unet_ray.inference.parts import Proposals
from unet_ray.inference.survey import Survey

ROUND_SHARDS, ROUND_SECONDS = 64, 60.0
"""So many shards, of 4,096 images each, are a round while others are still listed, if the listing or the last round
began so long ago. Each round starts the replicas of the model anew, which takes up to half a minute: 800,000 names took
two cores 132 seconds in rounds, and 80 in one. If the network is slower than the listing, each round has more images
than the one before: a hundred million images are some five rounds."""
MANY = 10_000_000
"""So many images a prediction of more than a round is taken to have."""
LOOK_SECONDS = 0.1
STOP_SECONDS = 2.0
"""How long a listing that is to stop may take to notice it. A bucket that does not answer may take minutes: its request
is left behind."""


def expected(known: int) -> int:
    """Returns for how many images it is decided what pays, such as compiling. For more than a round it is the same
    number, since it depends on chance how many are known."""
    return known if known < ROUND_SHARDS * SHARD_ROWS else MANY


def rounds(
    survey: Survey,
    images: Iterable[ImageFile],
    outputs_of: Proposals,
    *,
    at_once: bool,
    on_listed: Callable[[], None] = lambda: None,
) -> Generator[list[int], None, None]:
    """Lists `images` into the ledger of `survey`. Yields shards that can be worked on, each of them once; the last
    time, when all images are listed (`survey.complete`), the rest of them.

    `at_once`: yields shards as soon as they are worth a round; else all together. `on_listed` is called now and then
    while there is no round. Close the generator, to stop the listing. Raises what the listing raises.
    """
    stopped = threading.Event()

    def until_stopped() -> Iterator[ImageFile]:
        for image in images:
            if stopped.is_set():
                return
            yield image

    given, begun = 0, time.monotonic()
    thread, listing = _in_thread(lambda: survey.add_all(until_stopped(), outputs_of))
    try:
        thread.start()
        while not wait([listing], LOOK_SECONDS).done:
            on_listed()
            if at_once and time.monotonic() - begun >= ROUND_SECONDS and len(survey.ready) >= given + ROUND_SHARDS:
                new = survey.ready[given:]
                given, begun = given + len(new), time.monotonic()
                yield new
    finally:
        stopped.set()
        if thread.ident is not None:
            thread.join(STOP_SECONDS)
    listing.result()
    survey.close()
    on_listed()
    yield survey.ready[given:]


def _in_thread(function: Callable[[], None]) -> tuple[threading.Thread, Future[None]]:
    """Returns a thread that calls a function and does not keep the process alive, and where its end will be known."""
    result: Future[None] = Future()

    def call() -> None:
        try:
            function()
        except BaseException as error:
            result.set_exception(error)  # the caller raises it
        else:
            result.set_result(None)

    return threading.Thread(target=call, name=buckets.THREAD, daemon=True), result
