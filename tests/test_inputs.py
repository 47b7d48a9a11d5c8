"""Finding images."""

from pathlib import Path

import pytest

from unet_ray.config import UserError
from unet_ray.data.inputs import find_images


def touch(folder: Path, *names: str) -> str:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    return str(folder)


def test_a_missing_and_an_empty_folder_are_errors(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        find_images(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="no image in it"):
        find_images(touch(tmp_path / "texts", "readme.txt", ".hidden.jpg"))


def test_a_glob_and_a_single_file_are_inputs_too(tmp_path):
    folder = touch(tmp_path / "f", "a/1.jpg", "a/2.png", "b/3.jpg")
    assert [i.name for i in find_images(f"{folder}/*/*.jpg")] == ["a/1.jpg", "b/3.jpg"]
    assert [i.key for i in find_images(f"{folder}/a/2.png")] == ["2"]


def test_a_folder_may_be_a_uri(tmp_path):
    folder = touch(tmp_path / "with space", "1.jpg")
    assert [i.key for i in find_images("file://" + folder.replace(" ", "%20"))] == ["1"]
