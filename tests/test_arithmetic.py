"""A prediction chooses its arithmetic once, by what all machines have; it records it and goes on with it."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import make_model, make_photos

from unet_ray.config import MaskOptions, PredictConfig, UserError
from unet_ray.inference import arithmetic, backends, choose_arithmetic, output_folder, pipeline
from unet_ray.inference import predict as prediction
from unet_ray.inference.arithmetic import NOT_RECORDED, Arithmetic, Machine
from unet_ray.inference.choose_arithmetic import Work, choose, go_on
from unet_ray.inference.predict import predict
from unet_ray.models import checkpoint, compiling
from unet_ray.models.operations import floating_point_operations
from unet_ray.ray_backend.session import LOCAL, Runtime

FULL = Machine("one", bf16=False, compiles=True, instructions="AVX2", libraries={"torch": "2.14", "openvino": "2026.4"})
WITH_BF16 = dataclasses.replace(FULL, name="amx", bf16=True, instructions="AVX512+VNNI+AMX")
BARE = dataclasses.replace(FULL, name="bare", libraries={"torch": "2.14"})
OPENVINO = Arithmetic("cpu", "openvino", "fp32", version="2026.4")
TORCH = Arithmetic("cpu", "torch", "fp32", version="2.14")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def work(model, monkeypatch):
    """Returns a function that makes Work for machines and options; OpenVINO can run the network."""
    monkeypatch.setattr(backends, "openvino_problem", lambda _location: "")
    card = checkpoint.read_card(str(model))

    def for_machines(*machines: Machine, device: str = "cpu", images: int = 0, **options) -> Work:
        return Work((str(model),), card, MaskOptions(**options), device, machines, images)

    return for_machines


def accept_int8(model: Path, instructions: str) -> None:
    record = {"network": "int8-0123", "instructions": instructions}
    checkpoint.save_choice(str(model), checkpoint.INT8, checkpoint.read_card(str(model)), record)


def test_every_machine_must_have_it(work, caplog):
    assert choose(work(FULL, FULL)) == OPENVINO
    assert choose(work(WITH_BF16)) == dataclasses.replace(OPENVINO, precision="bf16")
    assert choose(work(WITH_BF16, FULL)) == OPENVINO, "fp32, since one can't compute in bf16"
    assert choose(work(BARE, BARE)) == TORCH
    assert not caplog.records
    assert choose(work(FULL, BARE)) == TORCH
    [line] = caplog.messages
    assert line == "bare has no OpenVINO: pip install 'unet_ray[cpu]': torch in fp32 on CPUs is used instead"
    assert choose(work(WITH_BF16, device="cuda")) == Arithmetic("cuda", "torch", "bf16", version="2.14")


def test_what_is_asked_for_is_used_or_refused(work):
    for options, machines, error in (
        ({"backend": "openvino"}, (FULL, BARE), r"bare has no OpenVINO: pip install 'unet_ray\[cpu\]'"),
        ({"backend": "openvino", "precision": "bf16"}, (FULL,), "OpenVINO has no bf16 on one"),
        ({"backend": "compiled"}, (FULL, dataclasses.replace(FULL, name="two", compiles=False)), "two has no C\\+\\+"),
        ({"backend": "openvino", "device": "cuda"}, (FULL,), "is for CPUs: add --device cpu"),
        ({"precision": "fp16"}, (FULL,), "use bf16 or fp32 on CPUs"),
        ({"precision": "int8", "backend": "torch"}, (FULL,), "leave --backend torch out"),
    ):
        with pytest.raises(UserError, match=error):
            choose(work(*machines, **{"device": "cpu", **options}))
    assert choose(work(FULL, precision="bf16")) == dataclasses.replace(TORCH, precision="bf16"), "torch emulates it"
    assert choose(work(BARE, backend="compiled")).backend == "compiled"


def test_a_network_that_openvino_cannot_run_is_run_by_torch_and_one_line_says_so(model, monkeypatch, caplog):
    pytest.importorskip("openvino")
    shutil.rmtree(model / backends.EXPORTED, ignore_errors=True)

    def fail(*_arguments: object) -> None:
        raise RuntimeError("no such operation\nat line 1")

    monkeypatch.setattr(backends, "export", fail)
    work = Work((str(model),), checkpoint.read_card(str(model)), MaskOptions(), "cpu", (FULL,))
    assert choose(work) == TORCH
    [line] = [record.getMessage() for record in caplog.records if record.name == "unet_ray"]
    assert "no such operation: torch in fp32 on CPUs is used instead" in line
    with pytest.raises(UserError, match="no such operation"):
        choose(dataclasses.replace(work, options=MaskOptions(backend="openvino")))


def test_long_work_is_done_by_whichever_is_faster_and_later_predictions_do_the_same(work, model, monkeypatch):
    asked = []

    def times(ways):
        asked.append([way.backend for way in ways])
        return seconds

    def chosen(**changes) -> str:
        changes = {"times": times, "threads": 2, **changes}
        return choose(dataclasses.replace(work(FULL, images=1000), **changes)).backend

    per_image = floating_point_operations(work(FULL).card.model, work(FULL).card.image_size)
    monkeypatch.setattr(choose_arithmetic, "TIMED_FROM", 999 * per_image / (2 * compiling.FLOPS["cpu"]))
    seconds = [1.0, 2.0]
    assert chosen(images=998) == "openvino", "short work is not worth it"
    monkeypatch.setattr(choose_arithmetic, "TIMED_IMAGES", 1001)
    assert chosen() == "openvino", "four images would be much of it"
    monkeypatch.undo()
    monkeypatch.setattr(backends, "openvino_problem", lambda _location: "")
    monkeypatch.setattr(choose_arithmetic, "TIMED_FROM", 0.0)
    assert chosen(options=MaskOptions(backend="openvino")) == "openvino"
    assert chosen(options=MaskOptions(ensemble=(str(model),))) == "openvino"
    assert chosen(times=None) == "openvino" and not asked
    assert chosen(times=lambda _ways: []) == "openvino", "a machine did not answer"
    assert chosen() == "torch" and asked == [["torch", "openvino"]]
    seconds = [2.0, 1.0]
    assert chosen() == "torch" and len(asked) == 1, "it is kept beside the model"
    assert chosen(images=1, times=None) == "torch", "for short work, too"
    assert chosen(threads=4) == "openvino" and len(asked) == 2
    assert chosen(machines=(FULL, WITH_BF16)) == "openvino" and len(asked) == 3
    assert chosen(options=MaskOptions(tile=64)) == "openvino" and len(asked) == 4
    newer = dataclasses.replace(FULL, libraries={**FULL.libraries, "openvino": "2027.1"})
    assert chosen(machines=(newer,)) == "openvino" and len(asked) == 5
    assert chosen(machines=(FULL, BARE)) == "torch" and len(asked) == 5, "there is no choice"
    accept_int8(model, "AVX2")
    assert choose(work(FULL, images=1000)).int8
    (model / "int8.json").unlink()


@pytest.mark.parametrize("error", [PermissionError("read-only"), UserError("s3://b/m: cannot be written")])
def test_a_model_that_cannot_be_written_is_timed_each_time(work, model, monkeypatch, error):
    (model / "fastest.json").unlink(missing_ok=True)
    monkeypatch.setattr(choose_arithmetic, "TIMED_FROM", 0.0)

    def refuse(*_arguments: object) -> None:
        raise error

    monkeypatch.setattr(checkpoint, "save_choice", refuse)
    for seconds, backend in (([1.0, 2.0], "torch"), ([2.0, 1.0], "openvino")):
        times = dataclasses.replace(work(FULL, images=1000), times=lambda _ways, seconds=seconds: seconds)
        assert choose(times).backend == backend


def test_a_part_that_timed_for_long_goes_on_as_another_part_began(model, tmp_path, monkeypatch):
    pytest.importorskip("openvino")
    photos = make_photos(tmp_path / "photos", 4)

    def config(part: str) -> PredictConfig:
        return PredictConfig(model=str(model), inputs=(str(photos),), out=str(tmp_path / "out"), part=part)

    def slow(work: Work) -> Arithmetic:
        monkeypatch.undo()
        predict(config("2/2"), runtime=LOCAL)  # begins and ends meanwhile
        return work.with_version(Arithmetic("cpu", "torch", "fp32"))

    monkeypatch.setattr(prediction, "choose", slow)
    predict(config("1/2"), runtime=LOCAL)
    assert [way.backend for way in output_folder.arithmetics(str(tmp_path / "out"))] == ["openvino"]


@pytest.mark.parametrize("settings", [(), (("model.padding", "valid"), ("data.image_size", 100))])
@pytest.mark.parametrize("tile", [0, 40])
def test_steps_are_timed_here_at_the_size_of_the_work(tmp_path, monkeypatch, tile, settings):
    pytest.importorskip("openvino")
    monkeypatch.setattr(choose_arithmetic, "TIMED_FROM", 0.0)
    monkeypatch.setattr(choose_arithmetic, "TIMED_IMAGES", 0)
    model, photos = make_model(tmp_path / "model", *settings), make_photos(tmp_path / "photos", 3)
    threads, timed = torch.get_num_threads(), []

    def shortest_times(segmenters, image):
        timed.append(([type(segmenter.models[0][0]).__name__ for segmenter in segmenters], image.shape[1:3]))
        assert min(real(segmenters, image)) > 0
        return [1.0, 2.0]

    real = pipeline.shortest_times
    monkeypatch.setattr(pipeline, "shortest_times", shortest_times)
    for out in ("a", "b"):
        config = PredictConfig(model=str(model), inputs=(str(photos),), out=str(tmp_path / out), tile=tile)
        predict(config, runtime=LOCAL)
        assert [way.backend for way in output_folder.arithmetics(str(tmp_path / out))] == ["torch"]
    size = checkpoint.read_card(str(model)).image_size
    assert timed == [(["Torch", "OpenVino"], (tile, tile) if tile else tuple(size))]
    assert torch.get_num_threads() == threads


def test_on_ray_the_nodes_time_them_as_replicas_do(ray_cluster, model, tmp_path, monkeypatch):
    pytest.importorskip("openvino")
    (model / "fastest.json").unlink(missing_ok=True)
    monkeypatch.setattr(choose_arithmetic, "TIMED_FROM", 0.0)
    monkeypatch.setattr(choose_arithmetic, "TIMED_IMAGES", 0)
    photos = make_photos(tmp_path / "photos", 3)
    predict(PredictConfig(model=str(model), inputs=(str(photos),), out=str(tmp_path / "out")), runtime=Runtime())
    answers = json.loads((model / "fastest.json").read_text())
    del answers["weights_sha256"]
    [way] = output_folder.arithmetics(str(tmp_path / "out"))
    assert [*answers.values()] == [way.backend]
    (model / "fastest.json").unlink()


def test_compiling_is_for_many_images_of_a_large_network(tmp_path, work):
    settings = [("model.base_channels", 64), ("model.depth", 4), ("data.image_size", 512)]
    card = checkpoint.read_card(str(make_model(tmp_path / "large", *settings)))
    assert floating_point_operations(card.model, card.image_size) == pytest.approx(385e9, rel=0.01)
    machine = dataclasses.replace(WITH_BF16, libraries={"torch": "2.14"})
    for changes, backend in (
        ({"images": 0}, "torch"),
        ({"images": 100}, "torch"),
        ({"images": 100_000}, "compiled"),
        ({"images": 10_000}, "compiled"),
        ({"images": 10_000, "threads": 64}, "torch"),
        ({"images": 100_000, "card": checkpoint.read_card(work(machine).models[0])}, "torch"),
        ({"images": 100_000, "options": MaskOptions(precision="fp32")}, "torch"),
        ({"images": 100_000, "machines": (dataclasses.replace(machine, compiles=False),)}, "torch"),
    ):
        large = dataclasses.replace(work(machine), card=card, threads=2)
        assert choose(dataclasses.replace(large, **changes)).backend == backend, changes


def test_int8_is_for_the_instruction_set_on_which_it_was_accepted(work, model, caplog):
    accept_int8(model, "AVX2")
    accepted = dataclasses.replace(OPENVINO, int8="int8-0123", instructions="AVX2")
    assert choose(work(FULL)) == accepted
    assert choose(work(FULL), int8=False) == OPENVINO
    assert choose(work(FULL, precision="fp32")) == OPENVINO
    assert choose(work(FULL, ensemble=(str(model),))) == OPENVINO
    assert not caplog.records
    assert choose(work(FULL, WITH_BF16)) == OPENVINO
    assert (
        "int8 was accepted on AVX2, amx has AVX512+VNNI+AMX: measure it there with `unet-ray quantize`" in caplog.text
    )
    with pytest.raises(UserError, match="amx has AVX512"):
        choose(work(WITH_BF16, precision="int8"))
    with pytest.raises(UserError, match="bare has no OpenVINO"):
        choose(work(BARE, precision="int8"))
    with pytest.raises(UserError, match=r"begun with OpenVINO in int8 .*amx has AVX512.*--allow-mixed"):
        go_on(work(WITH_BF16), [accepted], allow_mixed=False)
    with pytest.raises(UserError, match="has no int8-4567 any more"):
        go_on(work(FULL), [dataclasses.replace(accepted, int8="int8-4567")], allow_mixed=False)
    (model / checkpoint.INT8).unlink()


def test_a_stopped_prediction_goes_on_as_it_began_or_not_at_all(work, caplog):
    assert go_on(work(FULL), [TORCH], allow_mixed=False) == TORCH, "not the faster OpenVINO"
    assert go_on(work(FULL), [OPENVINO, TORCH], allow_mixed=True) == TORCH
    assert not caplog.records
    newer = dataclasses.replace(TORCH, version="2.15")
    assert go_on(work(FULL), [newer], allow_mixed=False) == TORCH
    assert caplog.messages.pop() == "torch is 2.14 now, and was 2.15: masks may differ by rounding"
    for machine, options, begun, problem in (
        (BARE, {}, OPENVINO, "bare has no OpenVINO"),
        (FULL, {"backend": "openvino"}, TORCH, "--backend openvino asks for another"),
        (FULL, {"precision": "bf16"}, TORCH, "--precision bf16 asks for another"),
        (FULL, {}, dataclasses.replace(TORCH, device="cuda"), "--device cuda goes on as begun"),
        (FULL, {}, NOT_RECORDED, "an arithmetic of an earlier version of unet-ray, and which one was not recorded"),
    ):
        with pytest.raises(UserError, match=f"was begun with .*{problem}.*--allow-mixed goes on .*--overwrite begins"):
            go_on(work(machine, **options), [begun], allow_mixed=False)
        mixed = go_on(work(machine, **options), [begun], allow_mixed=True)
        assert mixed != begun and not mixed.contradicts(MaskOptions(**options))
        assert caplog.messages[-1] == f"begun with {begun}, goes on with {mixed}"


class _StoppedError(Exception):
    pass


def segment(model: Path, folder: Path, out: Path, *, stop_after: int | None = None, **options):
    """Predicts; `stop_after`: stops after this number of images."""

    def stop(done: int, _failed: int, images: int) -> None:
        if images and stop_after is not None and done >= stop_after:
            raise _StoppedError

    config = PredictConfig(model=str(model), inputs=(str(folder),), out=str(out), device="cpu", **options)
    return predict(config, runtime=LOCAL, on_progress=stop)


def masks(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.rglob("*.png")}


def test_a_prediction_is_resumed_without_openvino_only_if_that_is_allowed(model, tmp_path, monkeypatch):
    pytest.importorskip("openvino")
    photos, out = make_photos(tmp_path / "photos", 40), tmp_path / "out"
    with pytest.raises(_StoppedError):
        segment(model, photos, out, stop_after=1)
    settings = json.loads((out / "settings.json").read_text())
    [used] = settings["arithmetic"]
    assert used["backend"] == "openvino" and used["version"]
    with pytest.raises(UserError, match="--backend torch asks for another"):
        segment(model, photos, out, backend="torch")

    here = Machine.here("cpu")
    without = dataclasses.replace(here, libraries={"torch": here.libraries["torch"]})
    monkeypatch.setattr(Machine, "here", lambda _device: without)
    before = masks(out)
    with pytest.raises(UserError, match=r"has no OpenVINO.*--allow-mixed"):
        segment(model, photos, out)
    assert masks(out) == before
    summary = segment(model, photos, out, allow_mixed=True)
    assert summary.ok == 40 and summary.already_done
    assert [each.split(" on ")[0].split(" in ")[0] for each in summary.arithmetic] == ["OpenVINO", "torch"]
    assert len(json.loads((out / "settings.json").read_text())["arithmetic"]) == 2
    monkeypatch.undo()
    assert len(segment(model, photos, out, allow_mixed=True).arithmetic) == 2, "nothing was left to do"
    segment(model, photos, out, overwrite=True)
    assert [each["backend"] for each in json.loads((out / "settings.json").read_text())["arithmetic"]] == ["openvino"]


def test_a_prediction_of_an_earlier_version_goes_on_only_if_that_is_allowed(model, tmp_path):
    photos, out = make_photos(tmp_path / "photos", 40), tmp_path / "out"
    with pytest.raises(_StoppedError):
        segment(model, photos, out, stop_after=1)
    settings = json.loads((out / "settings.json").read_text())
    del settings["arithmetic"]
    (out / "settings.json").write_text(json.dumps({**settings, "precision": "auto", "backend": "auto"}))
    with pytest.raises(UserError, match="begun with an arithmetic of an earlier version of unet-ray"):
        segment(model, photos, out)
    summary = segment(model, photos, out, allow_mixed=True)
    assert summary.arithmetic[0] == "an arithmetic of an earlier version of unet-ray" and len(summary.arithmetic) == 2


def test_before_the_first_mask_the_choice_is_free(model, tmp_path, monkeypatch):
    photos, out = make_photos(tmp_path / "photos", 4), tmp_path / "out"

    def fail(*_arguments: object, **_options: object) -> None:
        raise UserError("no")

    monkeypatch.setattr(choose_arithmetic.backends, "load", fail)
    with pytest.raises(UserError, match="no"):
        segment(model, photos, out, backend="torch")
    monkeypatch.undo()
    assert output_folder.arithmetics(str(out))[0].backend == "torch"
    monkeypatch.setattr(arithmetic, "bf16_is_fast", lambda _device: False)
    assert segment(model, photos, out).ok == 4
