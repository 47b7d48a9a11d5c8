"""The stages of prediction and evaluation in this process; `ray_backend.inference` runs the same ones on Ray."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch

from unet_ray.data.chunks import Chunk, Stage


def run_here(
    numbers: Sequence[int], preprocess: Callable[[int], Chunk], model: Callable[[], Stage], postprocess: Stage
) -> Iterator[Chunk]:
    """Runs the stages: the model on this thread, preprocessing one chunk ahead and postprocessing one behind on others.

    Yields what `postprocess` returns, in the order of `numbers`; nothing for a chunk with no rows.
    """
    segment = model()
    threads = torch.get_num_threads()
    # One thread each: more would take turns with the network's on the same cores. The setting is each thread's own, and
    # the default of later ones.
    one_thread = partial(ThreadPoolExecutor, 1, initializer=torch.set_num_threads, initargs=(1,))
    with one_thread() as preprocessing, one_thread() as postprocessing:
        upcoming = [preprocessing.submit(preprocess, number) for number in numbers[:1]]
        finishing = None
        try:
            for place in range(len(numbers)):
                decoded = upcoming.pop().result()
                upcoming = [preprocessing.submit(preprocess, number) for number in numbers[place + 1 : place + 2]]
                if not len(decoded["path"]):
                    continue
                segmented = segment(decoded)
                if finishing is not None:
                    yield finishing.result()
                finishing = postprocessing.submit(postprocess, segmented)
            if finishing is not None:
                yield finishing.result()
        finally:
            preprocessing.shutdown(wait=False, cancel_futures=True)
            torch.set_num_threads(threads)
