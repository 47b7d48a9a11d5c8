"""Videos as inputs: every frame once, whatever the order in which they are read; what is no video, or needs PyAV."""

import base64
import io
import json
import os
import struct
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import environment, make_model
from PIL import Image

from unet_ray.cli import main
from unet_ray.data import pages, video
from unet_ray.data.imaging import ImageError
from unet_ray.data.inputs import find_images, iter_images

av = pytest.importorskip("av")
SIZE = 64
BITS = 8


def picture(number: int) -> np.ndarray:
    """A picture that says its number: a bright or dark square for each bit."""
    bits = [number >> bit & 1 for bit in range(BITS)]
    return np.repeat(np.kron(np.array(bits).reshape(2, 4), np.full((SIZE // 2, SIZE // 4), 200))[..., None] + 20, 3, 2)


def number_in(image: np.ndarray) -> int:
    blocks = image[..., 1].reshape(2, SIZE // 2, 4, SIZE // 4).mean(axis=(1, 3)).reshape(-1)
    return int(sum(1 << bit for bit in range(BITS) if blocks[bit] > 120))


def make_video(path: Path, count: int, codec: str, *, container: dict[str, str] | None = None, **options: str) -> Path:
    with av.open(str(path), "w", options=container) as file:
        stream = file.add_stream(codec, rate=25, options=options)
        stream.width = stream.height = SIZE
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for number in range(count):
            frame = av.VideoFrame.from_ndarray(picture(number).astype(np.uint8), format="rgb24")
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return path


KINDS = {
    "key frames far apart.mp4": ("libx264", {"g": "200", "bf": "3", "x264-params": "scenecut=0"}),
    "open groups.mkv": ("libx264", {"g": "12", "bf": "2", "x264-params": "open-gop=1:scenecut=0"}),
    "old.avi": ("mpeg4", {"g": "12", "bf": "2"}),
    "no times.avi": ("libx264", {"g": "12", "bf": "3"}),
    "still pictures.avi": ("mjpeg", {}),
    "web.webm": ("libvpx", {"g": "30"}),
    "broadcast.mpg": ("mpeg2video", {"g": "12", "bf": "2"}),
}


@pytest.mark.parametrize("name", KINDS)
def test_each_frame_is_read_whatever_the_order(name, tmp_path):
    codec, options = KINDS[name]
    path = make_video(tmp_path / name, 150, codec, **options)
    assert video.count(str(path)) == 150
    generator = np.random.default_rng(0)
    for numbers in (range(150), generator.permutation(150), [0, 149, 148, 0, 70, 71, 72, 10]):
        found = [number_in(video.read_frame(str(path), int(number), 10**6)) for number in numbers]
        assert found == [*map(int, numbers)]


def test_predict_takes_the_frames_and_stops_at_nothing(tmp_path):
    folder = tmp_path / "clips"
    folder.mkdir()
    make_video(folder / "a clip.mp4", 30, "libx264", g="10")
    (folder / "broken.mp4").write_bytes((folder / "a clip.mp4").read_bytes()[:900])
    Image.fromarray(picture(3).astype(np.uint8)).save(folder / "photo.png")
    model = make_model(tmp_path / "model")
    command = ["predict", str(model), str(folder), "--out", str(tmp_path / "OUT"), "--local", "--json"]
    result = CliRunner().invoke(main, command)
    summary = json.loads(result.stdout)
    assert result.exit_code == 1 and (summary["ok"], summary["failed"]) == (31, 1)
    masks = sorted(
        path.relative_to(tmp_path / "OUT/masks").as_posix() for path in (tmp_path / "OUT/masks").rglob("*.png")
    )
    assert masks == [*(f"a clip/{number:06d}.png" for number in range(30)), "photo.png"]
    frame = Image.fromarray(video.read_frame(str(folder / "a clip.mp4"), 17, 10**6))
    frame.save(tmp_path / "frame.png")
    assert (
        CliRunner()
        .invoke(main, ["predict", str(model), str(tmp_path / "frame.png"), "--out", str(tmp_path / "ONE"), "--local"])
        .exit_code
        == 0
    )
    assert (tmp_path / "ONE/masks/frame.png").read_bytes() == (tmp_path / "OUT/masks/a clip/000017.png").read_bytes()


def test_one_video_or_two_named_one_by_one(tmp_path):
    first, second = (make_video(tmp_path / name, 12, "libx264") for name in ("a.mp4", "b.mp4"))
    assert [image.name for image in iter_images(str(first), frames=True)][:2] == ["a/000000.mp4", "a/000001.mp4"]
    model = make_model(tmp_path / "model")
    command = ["predict", str(model), str(first), str(second), "--out", str(tmp_path / "OUT"), "--local"]
    assert CliRunner().invoke(main, command).exit_code == 0
    assert len([*(tmp_path / "OUT/masks/a").iterdir(), *(tmp_path / "OUT/masks/b").iterdir()]) == 24


def test_training_and_machines_without_pyav_take_none(tmp_path, monkeypatch):
    make_video(tmp_path / "a.mp4", 5, "libx264")
    Image.fromarray(picture(3).astype(np.uint8)).save(tmp_path / "photo.png")
    assert [image.name for image in find_images(str(tmp_path))] == ["photo.png"]
    monkeypatch.setattr(video, "is_installed", lambda: False)
    assert [image.name for image in iter_images(str(tmp_path), frames=True)] == ["photo.png"]
    with pytest.raises(ImageError, match="pip install 'unet_ray"):
        pages.read_file(str(tmp_path / "a.mp4"), 10**6)


@pytest.mark.parametrize(
    ("matrix", "turn"),
    [
        ((-1, 0, 0, 1), lambda image: image[:, ::-1]),
        ((1, 0, 0, -1), lambda image: image[::-1]),
        ((-1, 0, 0, -1), lambda image: image[::-1, ::-1]),
        ((0, 1, -1, 0), lambda image: np.rot90(image, -1)),
        ((0, -1, 1, 0), np.rot90),
        ((0, 1, 1, 0), lambda image: image.swapaxes(0, 1)),
    ],
)
def test_a_frame_is_turned_and_mirrored_as_its_video_says(tmp_path, matrix, turn):
    path = make_video(tmp_path / "a.mp4", 3, "libx264")
    plain = video.read_frame(str(path), 1, 10**6)
    data = bytearray(path.read_bytes())
    place = data.index(b"tkhd") + 44
    a, b, c, d = (value << 16 for value in matrix)
    data[place : place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    (tmp_path / "turned.mp4").write_bytes(data)
    assert np.array_equal(video.read_frame(str(tmp_path / "turned.mp4"), 1, 10**6), turn(plain))


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi", "a.webm"])
@pytest.mark.parametrize("kept", [0.03, 0.5])
def test_what_a_cut_off_video_lacks_are_rows_that_fail(tmp_path, name, kept):
    codec = {"mp4": "libx264", "mkv": "libx264", "avi": "mpeg4", "webm": "libvpx"}[
        name[-3:] if name[-4] == "." else "webm"
    ]
    options = {"movflags": "faststart"} if name == "a.mp4" else {}
    path = make_video(tmp_path / name, 120, codec, container=options, g="10")
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data))])
    images = list(iter_images(str(path), frames=True))
    right, errors = 0, []
    for number, image in enumerate(images):
        try:
            pages.read_file(image.path, 10**6)
            right += number_in(video.read_frame(str(path), number, 10**6)) == number
        except ImageError as error:
            errors.append(str(error))
    assert images and errors, "something is missing, and is said"
    assert right + len(errors) == len(images)


def test_frames_at_the_same_time_are_all_there(tmp_path):
    path = tmp_path / "same.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=Fraction(3000))  # Matroska keeps milliseconds
        stream.width = stream.height = SIZE
        stream.pix_fmt = "yuvj420p"
        for number in range(40):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture(number).astype(np.uint8), format="rgb24")))
        container.mux(stream.encode(None))
    assert video.count(str(path)) == 40
    assert [number_in(video.read_frame(str(path), number, 10**6)) for number in (30, 31, 2, 39)] == [30, 31, 2, 39]


def test_a_child_process_reads_with_a_video_that_its_parent_has_open(tmp_path):
    path = str(make_video(tmp_path / "a.mp4", 60, "libx264"))
    assert number_in(video.read_frame(path, 3, 10**6)) == 3
    child = os.fork()
    if child == 0:
        os._exit(0 if number_in(video.read_frame(path, 40, 10**6)) == 40 else 1)
    deadline = time.monotonic() + 30
    while (done := os.waitpid(child, os.WNOHANG))[0] == 0:
        if time.monotonic() > deadline:
            os.kill(child, 9)
            pytest.fail("the child hangs")
        time.sleep(0.05)
    assert done[1] == 0


def test_a_prediction_ends_with_openvino_and_a_video_open(tmp_path):
    """OpenVINO's report to its maker forks a process, which hung with a video open."""
    pytest.importorskip("openvino")
    make_video(tmp_path / "a.mp4", 20, "libx264")
    model = make_model(tmp_path / "model")
    for out in ("first", "kept"):
        words = [sys.executable, "-m", "unet_ray", "predict", model, tmp_path / "a.mp4", "--out", tmp_path / out]
        words += ["--local", "--backend", "openvino", "--precision", "fp32"]
        subprocess.run([*map(str, words)], check=True, env=environment(), timeout=120, capture_output=True)


def test_labelme_gets_the_frame_and_select_sends_to_images(tmp_path):
    make_video(tmp_path / "a.mp4", 3, "libx264")
    model = make_model(tmp_path / "model")
    words = [
        "predict",
        str(model),
        str(tmp_path / "a.mp4"),
        "--format",
        "labelme",
        "--out",
        str(tmp_path / "OUT"),
        "--local",
    ]
    assert CliRunner().invoke(main, words).exit_code == 0
    annotation = json.loads((tmp_path / "OUT/labelme/a/000001.json").read_text())
    with Image.open(io.BytesIO(base64.b64decode(annotation["imageData"]))) as frame:
        assert np.array_equal(frame, video.read_frame(str(tmp_path / "a.mp4"), 1, 10**6))
    words = ["select", str(model), str(tmp_path / "a.mp4"), "--count", "1", "--out", str(tmp_path / "PICKS"), "--local"]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 2 and "make images of them first" in result.output


def test_globs_take_videos(tmp_path):
    make_video(tmp_path / "a.mp4", 5, "libx264")
    assert len(list(iter_images(str(tmp_path / "*.mp4"), frames=True))) == 5


def test_what_is_wrong_with_a_video_is_said(tmp_path):
    path = make_video(tmp_path / "a.mp4", 5, "libx264")
    with pytest.raises(ImageError, match="no number 5"):
        pages.read_file(f"{path}#5", 10**6)
    with pytest.raises(ImageError, match="pixels"):
        pages.read_file(f"{path}#0", 100)
    with pytest.raises(ImageError, match="bucket"):
        pages.read_file("s3://bucket/a.mp4", 10**6)
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(ImageError, match="can't be decoded: Invalid data"):
        pages.read_file(str(tmp_path / "text.mp4"), 10**6)
