"""The driver of a training on other machines reads the run directory."""

import json

from unet_ray.training.follower import Follower
from unet_ray.training.progress import EpochProgress, progress_writer, read_progress


def test_each_epoch_is_reported_once_and_progress_only_of_the_epoch_that_runs(tmp_path):
    epochs, steps = [], []
    follower = Follower(str(tmp_path), lambda line: epochs.append(line["epoch"]), lambda p: steps.append(p.epoch))

    def wrote(*, lines, progress=None):
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"epoch": n + 1}) + "\n" for n in range(lines)))
        if progress is not None:
            with progress_writer(str(tmp_path)) as write:
                write(EpochProgress(progress, 1, 10, 0.5, 20.0))
            assert read_progress(str(tmp_path)) == EpochProgress(progress, 1, 10, 0.5, 20.0)
        follower.look()

    wrote(lines=0)
    assert (epochs, steps) == ([], [])
    wrote(lines=0, progress=1)
    wrote(lines=0)  # the same progress
    assert (epochs, steps) == ([], [1])
    wrote(lines=2)
    wrote(lines=2, progress=2)  # progress of an epoch that is already reported
    wrote(lines=3, progress=4)
    assert (epochs, steps) == ([1, 2, 3], [1, 4])
