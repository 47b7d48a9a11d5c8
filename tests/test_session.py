"""Where Ray can't start, or can't be reached, the command ends within seconds with one line that says what to type."""

import contextlib
import logging
import os
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from conftest import environment, make_discs, make_model

from unet_ray.config import UserError
from unet_ray.ray_backend import address, internals, session


@pytest.mark.parametrize(
    ("given", "remedy"),
    [
        ("ray://head:10001", "ray job submit --address http://head:8265 -- unet-ray …"),
        ("http://head:8265", "this is no address of a cluster's head, such as head:6379"),
        ("https://head:8265/", "ray job submit --address http://head:8265/ -- unet-ray …"),
        ("head", "such as head:6379"),
        ("head:", "such as head:6379"),
        ("127.0.0.1:99999999", "nothing answers at 127.0.0.1:99999999"),
        ("no-such-host.invalid:6379", "nothing answers at no-such-host.invalid:6379"),
    ],
)
def test_an_address_that_no_ray_can_have_is_refused_with_the_right_one(given, remedy):
    with pytest.raises(UserError) as error:
        address.check_address(given)
    assert remedy in str(error.value) and "\n" not in str(error.value)


def test_a_port_that_is_closed_or_not_rays_is_refused(monkeypatch):
    monkeypatch.setattr(address, "ANSWER_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(UserError, match=rf"RAY_ADDRESS=127.0.0.1:{port}: no Ray answers there \(no answer within"):
            address.check_address(f"127.0.0.1:{port}")
    with pytest.raises(UserError, match=r"nothing answers at .* \(Connection refused\).* or unset RAY_ADDRESS"):
        address.check_address(f"127.0.0.1:{port}")


def test_auto_without_a_ray_is_refused(monkeypatch):
    monkeypatch.setattr(internals, "running_here", lambda: None)
    with pytest.raises(UserError, match="RAY_ADDRESS=auto: no Ray runs on this machine"):
        address.check_address("auto")


def test_auto_looks_for_a_ray_of_this_machine(monkeypatch):
    from ray._private import services

    def not_found(_address: str) -> str:
        raise ConnectionError("Could not find any running Ray instance")

    monkeypatch.setattr(services, "canonicalize_bootstrap_address", not_found)
    assert internals.running_here() is None
    monkeypatch.setattr(services, "canonicalize_bootstrap_address", lambda _address: "127.0.0.9:6379")
    assert internals.running_here() == "127.0.0.9:6379"


def test_a_refused_token_is_named_as_such():
    error = address.refused("head:6379", RuntimeError("Unauthenticated: invalid auth token\nstack"))
    assert "refuses this machine's token" in str(error) and "ray get-auth-token" in str(error)
    assert "no Ray answers there (Version mismatch)" in str(
        address.refused("head:6379", RuntimeError("Version mismatch"))
    )


def test_a_long_temporary_folder_gets_a_short_one_instead(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / ("long " * 9)))
    assert len(session._short_parent()) < 12
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(UserError, match="is too long for Ray's sockets: set TMPDIR to a shorter folder"):
        session._short_parent()


def test_too_little_memory_is_said_before_ray_starts(monkeypatch):
    monkeypatch.setattr(internals, "memory_of_machine", lambda: 2 * 2**30)
    with pytest.raises(UserError, match=r"this machine has 2\.0 GiB of memory, and Ray needs 3: use --local"):
        session._check_memory()


def test_what_ray_raises_while_it_starts_is_one_line(monkeypatch):
    import ray

    def init(**_options):
        raise ValueError("The node has no disk\nand more")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)  # of the Ray that other tests share
    monkeypatch.setattr(session, "_used_in", None)
    with (
        pytest.raises(UserError, match=r"can't be started on this machine \(The node has no disk\): use --local"),
        session._connected({}, True, session._not_started),
    ):
        raise AssertionError("it is not connected")


def test_what_a_thread_says_while_ray_starts_is_said_afterwards(monkeypatch, capfd):
    import ray

    def init(**_options):
        os.write(2, b"C++ says something\n")
        thread = threading.Thread(target=session.log.warning, args=("photos/OUT is left out",))
        thread.start()
        thread.join()

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)  # of the Ray that other tests share
    monkeypatch.setattr(session, "_used_in", None)
    monkeypatch.setattr(session, "stop_like_ctrl_c", lambda: None)  # of this process
    handler = logging.StreamHandler(open(2, "w", buffering=1, closefd=False))  # noqa: SIM115 - stays open
    session.log.addHandler(handler)
    try:
        with session._connected({}, False, session._not_started):
            assert capfd.readouterr().err == "photos/OUT is left out\n"
    finally:
        session.log.removeHandler(handler)


def test_a_fork_of_a_process_that_has_used_ray_is_refused(monkeypatch):
    monkeypatch.setattr(session, "_used_in", os.getpid() + 1)
    refused = pytest.raises(UserError, match="this process was forked from one that has used Ray")
    with refused, session._provided(verbose=False):
        raise AssertionError("it is connected")


@contextlib.contextmanager
def accepting_server():
    """Accepts connections and never answers, as a port of another service may."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=lambda: [server.accept() for _ in range(9)], daemon=True).start()
        yield server.getsockname()[1]


@pytest.mark.cluster
def test_a_command_with_another_services_port_ends_within_its_time(tmp_path):
    make_discs(tmp_path, 6)
    make_model(tmp_path / "model")
    command = [sys.executable, "-m", "unet_ray", "predict", "model", "images", "--out", "out"]
    with accepting_server() as port:
        ran = subprocess.run(
            command,
            cwd=tmp_path,
            env=environment(RAY_ADDRESS=f"127.0.0.1:{port}"),
            capture_output=True,
            text=True,
            timeout=address.ANSWER_SECONDS + 90,
        )
    assert ran.returncode == 2 and "Traceback" not in ran.stderr, ran.stderr
    assert ran.stderr.splitlines()[-1].startswith(f"Error: RAY_ADDRESS=127.0.0.1:{port}: no Ray answers there")


@pytest.mark.cluster
def test_it_starts_with_a_long_tmpdir_and_a_home_that_cannot_be_written(tmp_path):
    make_discs(tmp_path, 6)
    make_model(tmp_path / "model")
    long = tmp_path / ("a folder whose name is long " * 3)
    long.mkdir()
    variables = environment(TMPDIR=str(long), HOME="/proc/no-home")
    del variables["RAY_AUTH_MODE"]  # of the tests: this Ray has its own token
    before = set(Path("/tmp").glob(f"{session.OWN_PREFIX}*"))
    ran = subprocess.run(
        [sys.executable, "-m", "unet_ray", "predict", "model", "images", "--out", "out"],
        cwd=tmp_path,
        env=variables,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert ran.returncode == 0, ran.stderr
    assert set(Path("/tmp").glob(f"{session.OWN_PREFIX}*")) <= before and not list(long.glob("unet-ray-*"))
