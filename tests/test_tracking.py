"""Metrics for TensorBoard and MLflow."""

import os
import struct
import sys
from contextlib import contextmanager, nullcontext
from itertools import chain, repeat
from pathlib import Path
from types import SimpleNamespace

import pytest
from runs import config_for

from unet_ray.config import UserError
from unet_ray.ray_backend.session import LOCAL
from unet_ray.training import tracking
from unet_ray.training.run import train
from unet_ray.training.tracking import scalars


def events(folder):
    """Returns (tag, step, value) of every scalar in the folder's event files: TFRecords of protocol buffers."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            data = data[12 + length + 4 :]
            found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
    return found


def test_tensorboard_gets_what_metrics_jsonl_says(discs, tmp_path):
    result = train(config_for(discs), str(tmp_path / "run"), runtime=LOCAL)
    found = {(tag, step): value for tag, step, value in events(tmp_path / "run/tensorboard")}
    for line in result.history:
        assert found["val/dice", line["epoch"]] == pytest.approx(line["val_dice"], rel=1e-5)
        assert found["train/loss", line["epoch"]] == pytest.approx(line["train_loss"], rel=1e-5)
        assert found["learning_rate", line["epoch"]] == pytest.approx(line["learning_rate"], rel=1e-5)


def test_what_is_a_number_is_plotted():
    assert scalars({"epoch": 3, "val_dice": 0.5, "val_counts": [[1, 2, 3]]}) == {"val_dice": 0.5}


def test_mlflow_gets_settings_and_metrics(discs, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # only for this file store; a server does not need it
    mlflow = pytest.importorskip("mlflow")
    uri = (tmp_path / "mlruns").as_uri()
    result = train(config_for(discs, ("compute.mlflow", uri)), str(tmp_path / "run"), runtime=LOCAL)
    client = mlflow.MlflowClient(uri)
    [experiment] = [e for e in client.search_experiments() if e.name == "unet_ray"]
    [run] = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "run"
    assert run.data.params["model.base_channels"] == "4"
    history = client.get_metric_history(run.info.run_id, "val_dice")
    assert [m.value for m in history] == pytest.approx([line["val_dice"] for line in result.history])


def test_mlflow_that_is_not_installed_is_an_error_with_the_remedy(discs, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(UserError, match="pip install 'unet_ray\\[mlflow\\]'"):
        train(config_for(discs, ("compute.mlflow", "file:///x")), str(tmp_path / "run"), runtime=LOCAL)


def test_a_tracker_that_fails_never_ends_the_training_and_gets_the_rest_later(discs, tmp_path, monkeypatch, caplog):
    got: list[int] = []
    down = chain([True, True, False, True], repeat(False))

    def track(line):
        if next(down):
            raise ConnectionError("the server is down\nand more")
        got.append(line["epoch"])

    @contextmanager
    def tracker(_config, _name):
        yield track

    monkeypatch.setattr(tracking, "_mlflow", tracker)
    config = config_for(discs, ("compute.mlflow", "http://user:secret@127.0.0.1:1"), ("train.epochs", 5))
    assert train(config, str(tmp_path / "run"), runtime=LOCAL).epochs == 5
    assert got == [1, 2, 3, 4, 5], "in order, each once"
    warnings = [record.message for record in caplog.records if "MLflow" in record.message]
    assert (
        len(warnings) == 1 and "the server is down: the training goes on" in warnings[0] and "secret" not in warnings[0]
    )


@pytest.mark.parametrize("fails_in_training", [False, True])
def test_an_mlflow_that_fails_between_its_steps_gets_one_run_and_its_settings_once(monkeypatch, fails_in_training):
    calls, wrong = [], iter([False, True, False])

    def log_params(_settings):
        calls.append("params")
        if next(wrong, False):
            raise ConnectionError("down")

    fake = SimpleNamespace(
        set_tracking_uri=lambda _uri: next(wrong),
        set_experiment=lambda _name: None,
        start_run=lambda **_: calls.append(f"patience {os.environ['MLFLOW_HTTP_REQUEST_MAX_RETRIES']}"),
        log_params=log_params,
        log_metrics=lambda _metrics, step: calls.append(step),
        end_run=calls.append,
    )
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", raising=False)
    config = config_for((Path("images"), Path("masks")), ("compute.mlflow", "http://127.0.0.1:1"))
    error = pytest.raises(OSError) if fails_in_training else nullcontext()
    with error, tracking._mlflow(config, "run") as track:
        with pytest.raises(ConnectionError):
            track({"epoch": 1})
        track({"epoch": 1})
        track({"epoch": 2})
        if fails_in_training:
            raise OSError("the disk")
    assert calls == ["patience 1", "params", "params", 1, 2, "FAILED" if fails_in_training else "FINISHED"]
    assert "MLFLOW_HTTP_REQUEST_MAX_RETRIES" not in os.environ, "the process is the host's"


def test_a_tracker_that_never_comes_back_is_said_at_the_end(discs, tmp_path, monkeypatch, caplog):
    def broken(_line):
        raise OSError("no space left")

    @contextmanager
    def tracker(_folder):
        yield broken

    monkeypatch.setattr(tracking, "_tensorboard", tracker)
    assert train(config_for(discs), str(tmp_path / "run"), runtime=LOCAL).epochs == 2
    assert "TensorBoard: no space left: the training goes on" in caplog.text
    assert "TensorBoard has not got 2 epochs" in caplog.text


def test_an_mlflow_server_that_is_down_costs_seconds(discs, tmp_path, caplog):
    pytest.importorskip("mlflow")
    config = config_for(discs, ("compute.mlflow", "http://127.0.0.1:9"))
    assert train(config, str(tmp_path / "run"), runtime=LOCAL).epochs == 2
    assert "MLflow (http://127.0.0.1:9)" in caplog.text and "has not got 2 epochs" in caplog.text
