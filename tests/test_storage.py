"""Files are whole or absent; locations are joined and told apart."""

import os
from pathlib import Path

import pytest

from unet_ray.config import UserError
from unet_ray.data import storage


def test_a_written_file_is_whole_and_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / "a" / "b.bin"
    storage.write_bytes(str(path), b"one")
    storage.write_bytes(str(path), b"two", durable=True)
    assert path.read_bytes() == b"two"
    assert [p.name for p in path.parent.iterdir()] == ["b.bin"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    storage.write_bytes(str(path), b"old")

    def no_space(_self, _target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.replace", no_space)
    with pytest.raises(OSError, match="No space"):
        storage.write_bytes(str(path), b"new")
    assert path.read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_is_synced_again_only_after_it_has_changed(tmp_path, monkeypatch):
    synced: list[Path] = []
    fsync = os.fsync

    def noted(descriptor):
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink())
        fsync(descriptor)

    def written(name):
        synced.clear()
        storage.write_bytes(str(tmp_path / name), b"x", durable=True)
        return {path.relative_to(tmp_path).as_posix() for path in synced if path.is_relative_to(tmp_path)}

    monkeypatch.setattr(os, "fsync", noted)
    (tmp_path / "a" / "b").mkdir(parents=True)
    for folder in ("a/b", "a", "."):
        os.utime(tmp_path / folder, (1e9, 1e9))  # they changed long ago
    assert written("a/b/1") >= {"a/b", "a", "."}
    assert written("a/b/2") & {"a/b", "a", "."} == {"a/b"}
    assert written("a/c/1") & {"a/c", "a", "."} == {"a/c", "a"}
    assert written("a/b/3") & {"a/b", "a", "."} == {"a/b", "a"}, "a may have changed again since the last sync"


def test_uris_and_paths_are_joined_and_told_apart():
    assert storage.join("/a/b", "c", "d.png") == "/a/b/c/d.png"
    assert storage.join("s3://bucket/x?region=eu", "c") == "s3://bucket/x/c?region=eu"
    assert storage.is_uri("s3://bucket") and not storage.is_uri("/s3://odd") and not storage.is_uri("C:odd")
    assert storage.absolute("file:///tmp/with%20space") == "/tmp/with space"


def test_missing_files_and_folders_are_reported_as_missing(tmp_path):
    assert storage.info(str(tmp_path / "no")) is None
    assert storage.names_in(str(tmp_path / "no")) == []
    storage.delete_folder(str(tmp_path / "no"))


def test_an_unknown_scheme_is_an_error():
    with pytest.raises(UserError, match="nothing://x"):
        storage.exists("nothing://x/y")
