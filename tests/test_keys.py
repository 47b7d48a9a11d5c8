"""Keys in URIs work, in this process and in workers, and are never printed nor written."""

import pickle
import subprocess
import sys

import pytest
from conftest import TINY, environment, flags, make_discs
from test_buckets import bucket, uploaded  # noqa: F401 - a fixture

from unet_ray import keys
from unet_ray.config import PredictConfig, UserError
from unet_ray.data import storage
from unet_ray.settings import load_train_config

SECRET = "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY"
KEY = "AKIAIOSFODNN7EXAMPLE"


@pytest.fixture(autouse=True)
def _forgotten(monkeypatch):
    monkeypatch.setattr(keys, "_known", {})


@pytest.mark.parametrize(
    ("given", "clean", "user"),
    [
        (f"s3://{KEY}:{SECRET}@b/a@b.jpg?region=x", "s3://b/a@b.jpg?region=x", f"{KEY}:wJalrXUtnFEMI%2FK7MDENG%2B"),
        ("s3://key:se%2Fcret@b", "s3://b", "key:se%2Fcret"),
        ("gs://anonymous@b/x", "gs://b/x", "anonymous"),
        ("data.cache=s3://k:s@b/c", "data.cache=s3://b/c", "k:s"),
        ("s3://b/mail@home/1.jpg", "s3://b/mail@home/1.jpg", ""),
        ("/disk/a@b/s3", "/disk/a@b/s3", ""),
    ],
)
def test_a_uri_loses_its_user_part_which_is_known_for_its_bucket(given, clean, user):
    assert keys.stripped(given) == clean
    found = keys.of("gs://b" if "gs://" in clean else "s3://b")
    assert found.startswith(user) and bool(found) == bool(user)


def test_settings_and_lists_lose_them_too_and_workers_get_them(tmp_path):
    uri = f"s3://{KEY}:{SECRET}@b/a"
    config = PredictConfig(model=uri, inputs=(uri, "x"), out=uri)
    assert (config.model, config.inputs, config.out) == ("s3://b/a", ("s3://b/a", "x"), "s3://b/a")
    settings = load_train_config(settings=[*TINY, ("data.images", uri), ("compute.cache", uri), ("train.init", uri)])
    assert SECRET not in settings.to_yaml()
    assert storage.absolute(uri) == "s3://b/a"
    carried = pickle.dumps(keys.Keys())
    keys._known.clear()
    pickle.loads(carried)
    assert keys.of("s3://b").startswith(KEY) and SECRET not in repr(keys.Keys())


def test_a_location_that_cannot_be_opened_does_not_tell_the_key():
    with pytest.raises(UserError) as error:
        storage.exists(f"s3://{KEY}:{SECRET}@b/a?no_such_option=1")
    assert "no_such_option" in str(error.value) and SECRET[-9:] not in str(error.value)


def test_anonymous_needs_no_credentials_and_signs_nothing(monkeypatch):
    monkeypatch.setattr("unet_ray.data.buckets._has_aws", lambda: False)
    filesystem, path = storage.resolve("s3://anonymous@b/a?region=us-east-1&endpoint_override=127.0.0.1:1&scheme=http")
    assert path == "b/a" and "'anonymous': True" in str(filesystem.__reduce__())


@pytest.mark.parametrize("way", ["--local", pytest.param("ray", marks=pytest.mark.cluster)])
def test_no_file_and_no_line_of_a_run_holds_the_secret(bucket, tmp_path, way):  # noqa: F811
    client, options = bucket
    make_discs(tmp_path / "discs", 6)
    uploaded(client, tmp_path / "discs", "secret")
    at = f"s3://{KEY}:{SECRET}@images/secret"
    variables = {name: value for name, value in environment().items() if not name.startswith("AWS_")}
    variables |= {"AWS_EC2_METADATA_DISABLED": "true", "TMPDIR": str(tmp_path)}
    local = [way] if way == "--local" else []

    def output_of(*arguments: str, code: int = 0) -> str:
        command = [sys.executable, "-m", "unet_ray", *arguments]
        ran = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, check=False)
        assert ran.returncode == code, ran.stdout + ran.stderr
        return ran.stdout + ran.stderr

    train = ["train", "--images", f"{at}/images{options}", "--masks", f"{at}/masks{options}", "--out", "run"]
    said = output_of(*train, *flags(TINY), *local)
    said += output_of("predict", "run", f"{at}/images{options}", "--out", "out", *local)
    said += output_of("predict", "run", f"{at}/gone{options}", "--out", "gone", *local, code=2)
    said += output_of("doctor", "--images", f"{at}/images{options}", "--masks", f"{at}/masks{options}", code=0)
    files = [path for path in tmp_path.rglob("*") if path.is_file() and "discs" not in path.parts]
    assert len(files) > 20
    found = [
        path for path in files if SECRET.encode() in path.read_bytes() or b"bPxRfiCYEXAMPLEKEY" in path.read_bytes()
    ]
    assert not found and SECRET not in said and "EXAMPLEKEY" not in said
