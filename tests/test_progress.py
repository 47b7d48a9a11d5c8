"""What a run shows: one line that is updated on a terminal, lines elsewhere; none longer than the terminal is wide."""

import os
import pty
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

from unet_ray.report import progress
from unet_ray.report.progress import ImagesDisplay, TrainingDisplay, duration, speed
from unet_ray.settings import load_train_config

LINE = {
    "epoch": 1,
    "train_loss": 12.34567,
    "val_loss": 1.5,
    "val_dice": 0.98765,
    "val_iou": 0.97,
    "images_per_second": 1234.56,
    "seconds": 1234.5,
}
WORK = """
import time
from unet_ray.settings import load_train_config
from unet_ray.training.progress import EpochProgress
from unet_ray.report.progress import ImagesDisplay, TrainingDisplay

line = {line}
with TrainingDisplay(load_train_config(settings=[("train.epochs", 3)])) as display:
    display.tell("word " * 30)
    for epoch in (1, 2, 3):
        display.step(EpochProgress(epoch, 40, 98, 0.123456, 1234.5))
        time.sleep(0.5)  # it is drawn four times a second
        display.epoch({{**line, "epoch": epoch}})
with ImagesDisplay("segmented") as display:
    display(70, 0, 0)
    display(0, 0, 2000)
    display(1234, 12, 2000)
    time.sleep(0.5)
    display(2000, 12, 2000)
print("the end")
"""


def test_durations_and_speeds_are_short():
    assert [duration(s) for s in (0.4, 59.4, 61, 3599.6, 7500)] == [
        "0 s",
        "59 s",
        "1 min 1 s",
        "1 h 0 min",
        "2 h 5 min",
    ]
    assert [speed(s) for s in (0.123, 12.34, 1234.5)] == ["0.12 img/s", "12.3 img/s", "1234 img/s"]


def test_without_a_terminal_each_epoch_is_a_line_and_steps_are_a_line_a_minute(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0]))
    display = TrainingDisplay(load_train_config(settings=[("train.epochs", 100)]))
    step = SimpleNamespace(epoch=1, step=40, steps=98, loss=0.5, images_per_second=3.21)
    for now[0] in (10.0, 59.0, 61.0, 70.0):
        display.step(step)
    display.epoch(LINE)
    first, second = capsys.readouterr().out.splitlines()
    assert first == "epoch   1/100  step 40/98  loss 0.5000  3.21 img/s"
    assert second == "epoch   1/100  loss 12.3457 val 1.5000  Dice 0.9877 IoU 0.9700  1235 img/s  1234 s"


def test_without_a_terminal_images_are_a_line_every_ten_seconds(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0]))
    display = ImagesDisplay("segmented")
    display(0, 0, 100)
    for now[0], done in ((105.0, 10), (111.0, 22), (112.0, 50), (150.0, 100)):
        display(done, 1, 100)
    captured = capsys.readouterr()
    assert not captured.out
    assert captured.err.splitlines() == [
        "22/100 images segmented  2.00 img/s  39 s left  1 failed",
        "100/100 images segmented  2.00 img/s  1 failed",
    ]


def shown(columns: int) -> list[str]:
    """Returns the lines that a terminal of so many columns is sent."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(columns), "LINES": "40", "TERM": "xterm"}
    process = subprocess.Popen(
        [sys.executable, "-c", WORK.format(line=LINE)], stdin=theirs, stdout=theirs, stderr=theirs, env=environment
    )
    os.close(theirs)
    received = b""
    try:
        while part := os.read(ours, 65536):
            received += part
    except OSError:  # how Linux says that the other side has closed
        pass
    os.close(ours)
    assert process.wait() == 0, received
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", received.decode())
    return [line.rstrip() for line in re.split(r"[\r\n]+", text)]


@pytest.mark.parametrize("columns", [80, 200])
def test_on_a_terminal_no_line_wraps_and_finished_epochs_stay_visible(columns):
    lines = shown(columns)
    assert max(map(len, lines)) <= columns
    epochs = [line for line in lines if re.match(r"epoch   \d/3  loss", line)]
    assert [line[:11] for line in epochs] == [f"epoch   {epoch}/3" for epoch in (1, 2, 3)]
    assert any(re.match(r"epoch 2/3 .*40/98  loss 0\.1235  1234 img/s", line) for line in lines)
    assert any(re.match(r"1234/2000 images segmented .* 12 failed", line) for line in lines)
    assert lines[-2:] == ["the end", ""] or lines[-1] == "the end"
