"""Buckets that fail for a while are asked again; those that refuse, and missing credentials, are one line at once."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.parse

import pytest
from bucket_faults import faults_before
from conftest import environment, make_model, make_photos
from test_buckets import bucket, masks_of, stored, uploaded  # noqa: F401 - a fixture

from unet_ray.config import PredictConfig, UserError
from unet_ray.data import buckets, storage
from unet_ray.data.buckets import OutOfReachError
from unet_ray.data.inputs import find_images
from unet_ray.inference.predict import predict
from unet_ray.ray_backend.session import LOCAL

SLOW = "When reading 'a' in bucket 'b': AWS Error SLOW_DOWN during GetObject operation: Reduce your request rate."


@pytest.mark.parametrize(
    ("text", "passes"),
    [
        (SLOW, True),
        ("AWS Error UNKNOWN (HTTP status 503) during HeadObject operation: No response body.", True),
        ("AWS Error NETWORK_CONNECTION during PutObject operation: curlCode: 56, Failure when receiving data", True),
        ("google::cloud::Status(UNAVAILABLE: Permanent error: connection refused)", True),
        ("AWS Error ACCESS_DENIED during PutObject operation: Access Denied", False),
        ("AWS Error NO_SUCH_BUCKET during ListObjectsV2 operation: The specified bucket does not exist", False),
    ],
)
def test_an_error_that_may_be_over_soon_is_known_by_what_it_says(text, passes):
    assert buckets.is_passing(OSError(text)) is passes
    assert not buckets.is_passing(OSError(5, text))  # a disk's


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    return now


def test_a_bucket_that_fails_is_asked_again_for_two_minutes(clock, caplog):
    fails_until = [60.0]

    @buckets.patient
    def read(location: str) -> str:
        if clock[0] < fails_until[0]:
            raise OSError(SLOW)
        return location

    assert read("s3://b/a") == "s3://b/a" and 60 <= clock[0] < 75
    assert "waiting for s3://b, " in caplog.text and "SLOW_DOWN" in caplog.text
    fails_until[0], begun = 1e9, clock[0]
    with pytest.raises(OutOfReachError, match=r"^s3://b has failed for \d+ s .* give the same command again$"):
        read("s3://KEY:SECRET@b/a?region=x")
    assert 100 < clock[0] - begun <= buckets.PATIENCE_SECONDS
    before = clock[0]
    with buckets.at_once(), pytest.raises(OSError, match="SLOW_DOWN"):
        read("s3://b/a")
    assert clock[0] == before


INTERRUPTED = """
import os, signal, threading, time
from unet_ray.data.buckets import left_a_request_behind, patient
signal.signal(signal.SIGINT, signal.default_int_handler)
threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
begun = time.monotonic()
try:
    patient(lambda _location: time.sleep(30))("s3://b/a")
except KeyboardInterrupt:
    print("stopped", time.monotonic() - begun < 10, left_a_request_behind(), flush=True)
os._exit(0)
"""


def test_ctrl_c_ends_the_wait_for_a_bucket():
    ran = subprocess.run([sys.executable, "-c", INTERRUPTED], env=environment(), capture_output=True, text=True)
    assert ran.stdout.split() == ["stopped", "True", "True"], ran.stderr


@pytest.fixture
def no_credentials(monkeypatch, tmp_path):
    for name in [*buckets.AWS_VARIABLES, "GOOGLE_APPLICATION_CREDENTIALS", "AWS_EC2_METADATA_DISABLED"]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(buckets, "_answers", lambda *_: False)
    return tmp_path


def test_missing_credentials_are_said_with_the_command_that_gets_some(no_credentials):
    with pytest.raises(UserError, match=r"^s3://b: no credentials: run `aws configure`.*: s3://anonymous@b$"):
        find_images("s3://b/photos")
    with pytest.raises(UserError, match=r"^gs://b: no credentials: run `gcloud auth application-default login`"):
        find_images("gs://b/photos")
    buckets.check_credentials("s3://key:secret@b/a")
    buckets.check_credentials("gs://anonymous@b/a")


@pytest.mark.parametrize("source", ["variable", "file", "machine"])
def test_each_source_of_credentials_counts(no_credentials, monkeypatch, source):
    if source == "variable":
        monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", "token")
        monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "key.json")
    elif source == "file":
        for name in (".aws/credentials", ".config/gcloud/application_default_credentials.json"):
            (no_credentials / name).parent.mkdir(parents=True)
            (no_credentials / name).touch()
    else:
        monkeypatch.setattr(buckets, "_answers", lambda *_: True)
    buckets.check_credentials("s3://b/a")
    buckets.check_credentials("gs://b/a")


def test_the_profiles_server_is_used_unless_the_uri_or_the_environment_names_one(no_credentials, monkeypatch):
    (no_credentials / ".aws").mkdir()
    (no_credentials / ".aws/config").write_text("[profile mine]\nendpoint_url = http://127.0.0.1:9000/\n")
    assert buckets.with_endpoint("s3://b") == "s3://b"
    monkeypatch.setenv("AWS_PROFILE", "mine")
    assert buckets.with_endpoint("s3://b?region=x") == "s3://b?region=x&scheme=http&endpoint_override=127.0.0.1:9000"
    assert buckets.with_endpoint("s3://b?endpoint_override=c") == "s3://b?endpoint_override=c"
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    assert buckets.with_endpoint("s3://b") == "s3://b"


@pytest.fixture
def proxy(bucket):  # noqa: F811
    """Yields a proxy before the bucket, and the options of its URIs."""
    _, options = bucket
    host, _, port = urllib.parse.unquote(options.rpartition("=")[2]).rpartition(":")
    with faults_before(host, int(port)) as server:
        address = urllib.parse.quote("{}:{}".format(*server.server_address), safe="")
        yield server, options.rpartition("=")[0] + f"={address}"


def config(model, options: str, out: str) -> PredictConfig:
    inputs = (f"s3://images/few{options}",)
    return PredictConfig(model=str(model), inputs=inputs, out=f"s3://images/{out}{options}", precision="fp32")


def test_faults_at_random_change_no_byte(bucket, proxy, tmp_path):  # noqa: F811
    client, _ = bucket
    server, options = proxy
    uploaded(client, make_photos(tmp_path / "images", 12), "few")
    model = make_model(tmp_path / "model")
    predict(config(model, options, "calm"), runtime=LOCAL)
    generator = random.Random(0)
    server.fault = lambda _method, _path: generator.choices([None, "503", "cut"], [8, 1, 1])[0]
    assert predict(config(model, options, "stormy"), runtime=LOCAL).ok == 12
    server.fault = lambda _method, _path: None
    assert masks_of(stored(client, "stormy/")) == masks_of(stored(client, "calm/")) != {}


def test_a_bucket_that_denies_writing_is_one_line_and_the_command_goes_on(bucket, proxy, tmp_path):  # noqa: F811
    client, _ = bucket
    server, options = proxy
    uploaded(client, make_photos(tmp_path / "images", 12), "few")
    model = make_model(tmp_path / "model")
    server.fault = lambda method, path: "403" if method == "PUT" and "/masks/" in path else None
    with pytest.raises(UserError, match=r"^s3://images/denied/masks/.*: cannot be written: .*ACCESS_DENIED") as error:
        predict(config(model, options, "denied"), runtime=LOCAL)
    assert "\n" not in str(error.value) and "endpoint" not in str(error.value)
    server.fault = lambda _method, _path: None
    assert predict(config(model, options, "denied"), runtime=LOCAL).ok == len(find_images(f"s3://images/few{options}"))


def test_a_missing_bucket_is_one_line(proxy):
    _, options = proxy
    with pytest.raises(UserError, match="s3://nowhere"):
        find_images(f"s3://nowhere/a{options}")


def test_sizes_of_many_objects_are_asked_for_at_once(bucket, proxy, tmp_path):  # noqa: F811
    client, _ = bucket
    server, options = proxy
    client.put_object(Bucket="images", Key="one.jpg", Body=b"123")
    server.delay = 0.05
    begun = time.monotonic()
    sizes = storage.sizes_and_times([f"s3://images/one.jpg{options}"] * 400)
    assert {size for size, _ in sizes} == {3}
    assert time.monotonic() - begun < 400 * 0.05 / 2  # one by one: 20 s


def test_a_server_that_never_answers_does_not_keep_ctrl_c_waiting(tmp_path):
    with socket.create_server(("127.0.0.1", 0), backlog=64) as silent:
        port = silent.getsockname()[1]
        uri = f"s3://b/a?scheme=http&region=x&endpoint_override=127.0.0.1%3A{port}"
        command = [sys.executable, "-m", "unet_ray", "predict", str(make_model(tmp_path / "m")), uri, "--out", "out"]
        process = subprocess.Popen(
            [*command, "--local"],
            cwd=tmp_path,
            env=environment(),
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        silent.accept()  # it has asked
        begun = time.monotonic()
        os.kill(process.pid, signal.SIGINT)
        errors = process.communicate(timeout=60)[1]
        assert process.returncode == 130 and errors.startswith("Stopped."), errors
        assert time.monotonic() - begun < 10  # two seconds, and where others work, the end of an interpreter
