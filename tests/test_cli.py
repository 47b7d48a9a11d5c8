"""The commands as a user types them: exit codes, output, errors of one line."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from conftest import TINY, flags, make_discs
from PIL import Image

from unet_ray.cli import main
from unet_ray.config import ModelConfig
from unet_ray.evaluation.choose_cleanup import CLEANUPS
from unet_ray.models import training_state
from unet_ray.settings import load_train_config, recipe_names, recipe_text

QUICK = flags(TINY)


def run(*arguments: object, code: int = 0):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output + str(result.exception)
    return result


def train(discs, out, *more, settings=QUICK, code=0):
    """Trains without drawing a report."""
    images, masks = discs
    where = ["--images", images, "--masks", masks, "--out", out, "--local", "--no-report"]
    return run("train", *where, *settings, *more, code=code)


def predict(model, images, out, *more, code=0):
    """Predicts without drawing a report."""
    return run("predict", model, images, "--out", out, "--local", "--no-report", *more, code=code)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run directory of a network that finds discs."""
    folder = tmp_path_factory.mktemp("trained")
    discs = make_discs(folder / "discs", 12)
    train(discs, folder / "run", "--epochs", 30, "--set", "train.schedule=one_cycle")
    return folder / "run"


def test_train_says_each_epoch_and_what_is_next(discs, tmp_path):
    images, masks = discs
    output = run("train", "--images", images, "--masks", masks, "--out", tmp_path / "run", "--local", *QUICK).output
    assert "training on 10 pairs, validating on 2" in output
    assert re.search(r"epoch +2/2  loss \d\.\d+ val \d\.\d+  Dice 0\.\d+ IoU 0\.\d+  [\d.]+ img/s  \d+ s\n", output)
    assert f"  report  {tmp_path / 'run'}/report.html" in output and (tmp_path / "run/report.html").exists()
    assert f"unet-ray predict {tmp_path / 'run'} FOLDER --out MASKS" in output


def test_predict_writes_a_mask_and_a_manifest_row_for_every_image(trained, tmp_path):
    folder = tmp_path / "with space" / "sub ü"
    folder.mkdir(parents=True)
    sizes = {"a.png": (40, 31), "b.jpg": (100, 64), "b.png": (8, 8), "c.bmp": (333, 20)}
    for name, size in sizes.items():
        Image.new("RGB", size, (90, 120, 30)).save(folder / name)
    out = tmp_path / "out"
    result = run("predict", trained, tmp_path / "with space", "--out", out, "--format", "png,parquet", "--local")
    assert "4 of 4 images segmented, 0 failed" in result.output
    assert f"  table   {out}/manifest.parquet\n" in result.output and "next:" not in result.output
    assert f"  report  {out}/report.html" in result.output and (out / "report.html").exists()
    masks = {str(p.relative_to(out / "masks")): p for p in (out / "masks").rglob("*.png")}
    # b.jpg and b.png would give the same name; the first has it.
    assert set(masks) == {"sub ü/a.png", "sub ü/b.png", "sub ü/b.png.png", "sub ü/c.png"}
    for name, size in sizes.items():
        mask = Image.open(masks[f"sub ü/{name if name == 'b.png' else name[:-4]}.png"])
        assert (mask.mode, mask.size) == ("1", size)
    manifest = pq.read_table(out / "manifest.parquet").to_pylist()
    assert sorted(Path(row["path"]).name for row in manifest) == sorted(sizes)
    for row in manifest:
        assert row["status"] == "ok" and row["error"] == ""
        assert row["height"] * row["width"] == sum(row["pixels"])
        stored = np.asarray(Image.open(out / row["output"]))
        assert row["pixels"] == [int((~stored).sum()), int(stored.sum())]
        assert 0.5 <= row["confidence"] <= 1
    table = pq.read_table(out / "masks.parquet").to_pylist()
    assert {row["path"]: row["mask"] for row in table} == {
        row["path"]: (out / row["output"]).read_bytes() for row in manifest
    }


def bad_folder(folder: Path) -> Path:
    folder.mkdir()
    for number in range(10):
        Image.fromarray(np.random.default_rng(number).integers(0, 255, (48, 48, 3)).astype(np.uint8)).save(
            folder / f"{number}.jpg"
        )
    (folder / "3.jpg").write_bytes((folder / "3.jpg").read_bytes()[:500])
    (folder / "5.jpg").write_bytes(b"")
    (folder / "7.jpg").write_text("<html>404</html>")
    return folder


def test_one_truncated_image_does_not_stop_the_folder(trained, tmp_path):
    folder = bad_folder(tmp_path / "bad")
    result = predict(trained, folder, tmp_path / "out", code=1)
    assert "7 of 10 images segmented, 3 failed" in result.output
    assert result.output.endswith("next:\n  fix the files and give the same command again (others: --retry-failed)\n")
    rows = {Path(r["path"]).name: r for r in pq.read_table(tmp_path / "out/manifest.parquet").to_pylist()}
    assert len(rows) == 10
    assert "truncated" in rows["3.jpg"]["error"].lower()
    assert rows["5.jpg"]["error"] == "the file is empty"
    assert "not an image" in rows["7.jpg"]["error"]
    assert [name for name, row in rows.items() if row["status"] == "failed"] == ["3.jpg", "5.jpg", "7.jpg"]
    assert len(list((tmp_path / "out/masks").iterdir())) == 7
    for allowed, code in (("3", 0), ("2", 1), ("30%", 0), ("29%", 1)):
        repeated = predict(trained, folder, tmp_path / "out", "--allow-failures", allowed, "--json", code=code)
        summary = json.loads(repeated.stdout)
        assert (summary["images"], summary["failed"], summary["already_done"]) == (10, 3, 10)


def test_a_stopped_prediction_goes_on_and_ends_the_same(trained, tmp_path, monkeypatch, small_chunks):
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(30):
        Image.fromarray(np.random.default_rng(number).integers(0, 255, (20, 20, 3)).astype(np.uint8)).save(
            folder / f"{number}.png"
        )
    formats = ["--format", "png,parquet"]
    predict(trained, folder, tmp_path / "whole", *formats)

    from unet_ray.inference.write import Write

    write, calls = Write.__call__, []

    def stopped(self, chunk, predictions):
        calls.append(chunk)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return write(self, chunk, predictions)

    monkeypatch.setattr(Write, "__call__", stopped)
    assert "Stopped" in predict(trained, folder, tmp_path / "stopped", *formats, code=130).output
    monkeypatch.setattr(Write, "__call__", write)
    summary = json.loads(predict(trained, folder, tmp_path / "stopped", *formats, "--json").stdout)
    assert (summary["images"], summary["ok"], summary["already_done"]) == (30, 30, 16)

    def contents(out):
        return {
            str(p.relative_to(out)): p.read_bytes() for d in ("masks", "masks.parquet") for p in (out / d).rglob("*.*")
        }

    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")


def test_a_changed_image_is_done_again(trained, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (20, 20)).save(folder / "1.png")

    def already_done() -> int:
        return json.loads(predict(trained, folder, tmp_path / "out", "--json").stdout)["already_done"]

    assert already_done() == 0
    assert already_done() == 1
    Image.new("RGB", (30, 20)).save(folder / "1.png")
    assert already_done() == 0
    assert Image.open(tmp_path / "out/masks/1.png").size == (30, 20)


def test_the_chosen_cleanup_is_kept_with_the_model_and_used_by_predict(tmp_path):
    discs = make_discs(tmp_path / "discs", 12)
    train(discs, tmp_path / "run", "--epochs", 12)
    output = run("evaluate", tmp_path / "run", "--choose-cleanup", "--local").output
    table = dict(re.findall(r"^(none|\S*(?:holes|largest)) +(0\.\d{4})", output, re.MULTILINE))
    assert set(table) == {"none", *CLEANUPS}
    kept = json.loads((tmp_path / "run/model/cleanup.json").read_text())
    assert f"{kept['cleanup']:<20} {table[kept['cleanup']]}  <- kept for predict" in output
    assert {name: f"{dice:.4f}" for name, dice in kept["dice"].items()} == table
    # Scored with it, the Dice is the table's.
    scores = json.loads(run("evaluate", tmp_path / "run", "--cleanup", "largest+holes", "--local", "--json").stdout)
    assert f"{scores['dice']['mean']:.4f}" == table["largest+holes"]
    kept["cleanup"] = "area=100%"  # removes all
    (tmp_path / "run/model/cleanup.json").write_text(json.dumps(kept))
    result = predict(tmp_path / "run", discs[0], tmp_path / "out")
    assert "masks were cleaned up: area=100%" in result.output
    assert not any(row["pixels"][1] for row in pq.read_table(tmp_path / "out/manifest.parquet").to_pylist())
    predict(tmp_path / "run", discs[0], tmp_path / "plain", "--cleanup", "none")
    assert any(row["pixels"][1] for row in pq.read_table(tmp_path / "plain/manifest.parquet").to_pylist())
    # A choice that was made for other weights is not used.
    train(discs, tmp_path / "other", "--epochs", 2)
    (tmp_path / "other/model/cleanup.json").write_text(json.dumps(kept))
    assert "cleaned up" not in predict(tmp_path / "other", discs[0], tmp_path / "o").output


def test_evaluate_scores_and_its_json_is_one_object(trained):
    result = run("evaluate", trained, "--local", "--json")
    scores = json.loads(result.stdout)
    assert scores["images"] == 2
    for name in ("dice", "iou", "pixel_accuracy"):
        assert set(scores[name]) == {"mean", "ci95", "global"}
        assert scores[name]["ci95"][0] <= scores[name]["mean"] <= scores[name]["ci95"][1]
    table = run("evaluate", trained, "--local").output
    assert f"Dice                {scores['dice']['mean']:.4f}" in table


def test_evaluate_agrees_with_the_masks_that_predict_writes(trained, tmp_path):
    images, masks = make_discs(tmp_path / "unseen", 9, seed=5)
    scores = json.loads(run("evaluate", trained, "--images", images, "--masks", masks, "--local", "--json").stdout)
    predict(trained, images, tmp_path / "out")
    dice = []
    for path in sorted(masks.iterdir()):
        ground_truth, mask = (np.asarray(Image.open(p)) > 0 for p in (path, tmp_path / "out/masks" / path.name))
        dice.append(2 * (ground_truth & mask).sum() / (ground_truth.sum() + mask.sum()))
    assert scores["dice"]["mean"] == pytest.approx(np.mean(dice))
    assert scores["dice"]["mean"] > 0.7


def test_masks_with_other_values_are_scored_when_the_values_are_named(trained, tmp_path):
    images, masks = make_discs(tmp_path / "ids", 4, mask_value=1)
    pairs = ["--images", images, "--masks", masks, "--local"]
    assert "outside the classes" in run("evaluate", trained, *pairs, code=2).output
    for values in ("0,1", "[0, '>0']"):
        assert run("evaluate", trained, *pairs, "--mask-values", values).exit_code == 0
    assert (
        "is no value and no comparison" in run("evaluate", trained, *pairs, "--mask-values", "[0, 'x']", code=2).output
    )


def broken(discs, kind: str) -> None:
    images, masks = discs
    first = sorted(images.iterdir())[0].name
    if kind == "two masks":
        (masks / first.replace(".png", "_mask.png")).write_bytes((masks / first).read_bytes())
    elif kind == "mask of another size":
        Image.new("L", (31, 32)).save(masks / first)
    elif kind == "mask value":
        Image.new("L", (32, 32), 7).save(masks / first)
    elif kind == "truncated image":
        (images / first).write_bytes((images / first).read_bytes()[:200])
    elif kind == "empty folder":
        for path in images.iterdir():
            path.unlink()


@pytest.mark.parametrize(
    ("kind", "more", "message"),
    [
        ("two masks", [], "with several masks (a_000: a_000.png, a_000_mask.png)"),
        ("mask of another size", [], "31x32 pixels, but its image"),
        ("mask value", ["--set", "data.mask_values=[0, 255]"], "value(s) 7 outside the classes"),
        ("mask value", [], "--set data.mask_values="),
        ("truncated image", [], "a_000.png: cannot be decoded"),
        ("empty folder", [], "no image in it"),
        ("", ["--images", "/no/such/folder"], "/no/such/folder: no such folder"),
        ("", ["--recipe", "carvanna"], "did you mean 'carvana'?"),
        ("", ["--set", "train.epoch=3"], "did you mean 'train.epochs'?"),
        ("", ["--set", "train.epochs"], "write KEY=VALUE"),
        ("", ["--set", "model.padding=valid", "--image-size", "33"], "--image-size 33 can't be divided by 2"),
        ("", ["--workers", "2"], "--workers 2 with --local"),
        ("", ["--workers", "3-2"], "1 or more, or [fewest, most]"),
        ("", ["--folds", "1"], "--folds 1: 2 or more"),
        ("", ["--folds", "20"], "20 folds of 12 groups: use --folds 12 or fewer"),
        ("", ["--set", "train.loss=fokal"], "'fokal' is not a loss: did you mean 'focal'?"),
        ("", ["--set", "train.class_weights=[1, 2, 3]"], "train.class_weights has 3 entries: 2 are needed"),
        ("", ["--set", "train.class_weights=often"], "setting train.class_weights is 'often'"),
        ("", ["--set", "data.tile=64"], "data.tile 64 is larger than --image-size 32"),
        ("", ["--batch-size", "2", "--workers", "3"], "use 3 or more"),
        ("", ["--config", "/no/such.yaml"], "--config /no/such.yaml: No such file"),
        ("", ["--group-by", "^x"], "finds nothing in 'a_000'"),
    ],
)
def test_what_a_user_can_cause_is_one_line_and_exit_code_2(discs, tmp_path, kind, more, message):
    broken(discs, kind)
    result = train(discs, tmp_path / "run", *more, code=2)
    assert message in result.stderr
    assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1
    assert not (tmp_path / "run/model").exists()


def test_an_out_that_holds_another_run_is_refused(trained, discs, tmp_path):
    assert "holds another run" in train(discs, trained, code=2).stderr
    images, _ = discs
    predict(trained, images, tmp_path / "out")
    other = predict(trained, images, tmp_path / "out", "--format", "parquet", code=2)
    assert "holds another run (other formats)" in other.stderr
    assert "holds other files" in predict(trained, images, trained, code=2).stderr


def test_a_model_that_is_not_there_is_an_error(discs, tmp_path):
    images, _ = discs
    assert "no such folder" in predict(tmp_path / "no", images, tmp_path / "o", code=2).stderr
    assert "no model in it" in run("evaluate", images, "--local", code=2).stderr


def test_a_printed_recipe_runs_as_a_config(discs, tmp_path):
    (tmp_path / "mine.yaml").write_text(run("recipes", "carvana-fast").output)
    more = ["--set", "model.base_channels=4", "--set", "model.depth=2", "--epochs", 1, "--image-size", 32]
    train(discs, tmp_path / "run", "--config", tmp_path / "mine.yaml", settings=more)
    listing = run("recipes").output
    assert all(name in listing for name in ("carvana ", "carvana-cpu", "carvana-fast"))


@pytest.mark.parametrize("command", sorted(main.commands))
def test_every_command_has_help_with_an_example(command):
    assert "Example:" in run(command, "--help").output


def test_the_module_runs_as_a_script():
    result = subprocess.run([sys.executable, "-m", "unet_ray", "--version"], capture_output=True, text=True, check=True)
    assert result.stdout.startswith("unet-ray, version ")


def test_ctrl_c_ends_a_local_training_that_can_be_resumed(discs, tmp_path):
    """A real signal to a real process."""
    import signal
    import time

    images, masks = discs
    command = [sys.executable, "-m", "unet_ray", "train", "--images", images, "--masks", masks]
    command += ["--out", tmp_path / "run", "--local", *QUICK, "--set", "train.epochs=2000"]
    process = subprocess.Popen(
        [str(c) for c in command],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        # In a shell's background job, which a CI may be, processes inherit that SIGINT is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "run/last/state.safetensors").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.startswith("Stopped.") and errors.count("\n") == 1
    # From the state, not from metrics.jsonl: a stop after the line and before the state repeats that epoch.
    done = training_state.read_state(str(tmp_path / "run/last")).epoch
    resumed = train(discs, tmp_path / "run", "--resume", "--epochs", done + 1)
    assert f"epoch {done + 1:>3}/" in resumed.output and f"epoch {done:>3}/" not in resumed.output


def test_commands_that_run_in_one_process_leave_the_environment_alone(trained, discs, tmp_path):
    images, masks = discs
    before = dict(os.environ)
    predict(trained, images, tmp_path / "out")
    run("evaluate", trained, "--images", images, "--masks", masks, "--local")
    train(discs, tmp_path / "run", "--epochs", 1)
    assert dict(os.environ) == before


def test_evaluate_writes_a_table_and_tests_the_difference_to_another_model(trained, tmp_path):
    images, masks = make_discs(tmp_path / "unseen", 9, seed=5)
    train((images, masks), tmp_path / "other", "--epochs", 1)
    pairs = ["--images", images, "--masks", masks, "--local"]
    result = run("evaluate", trained, *pairs, "--table", tmp_path / "t.parquet", "--against", tmp_path / "other")
    assert re.search(
        r"against .*other \(Dice 0\.\d+\): [+-]0\.\d+ \(95 % .* of 9 images, p = .* \(Wilcoxon\)", result.stdout
    )
    assert f"{tmp_path / 'other'} was trained on 7 of these 9 images" in result.stderr
    assert "was trained on" not in result.stderr.replace("other was trained on", "")
    table = pq.read_table(tmp_path / "t.parquet").to_pydict()
    assert len(table["path"]) == 9 and set(table["class"]) == {"foreground"}
    scores = json.loads(run("evaluate", trained, *pairs, "--json", "--against", tmp_path / "other").stdout)
    assert scores["dice"]["mean"] == pytest.approx(np.mean(table["dice"]))
    assert scores["surface_dice"]["mean"] == pytest.approx(np.mean(table["surface_dice"]))
    comparison = scores["against"]["comparison"]
    assert comparison["difference"] == pytest.approx(scores["dice"]["mean"] - scores["against"]["dice"]["mean"])
    assert comparison["better"] + comparison["worse"] <= comparison["images"] == 9


def test_evaluate_keeps_to_the_images_that_were_held_out_when_the_folder_grows(discs, tmp_path):
    images, masks = discs
    train(discs, tmp_path / "run", "--epochs", 1)
    before = json.loads(run("evaluate", tmp_path / "run", "--local", "--json").stdout)
    for name in ("x_new", "y_new", "z_new"):
        for folder in (images, masks):
            (folder / f"{name}.png").write_bytes((folder / "a_000.png").read_bytes())
    after = json.loads(run("evaluate", tmp_path / "run", "--local", "--json").stdout)
    assert before["images"] == after["images"] == 2 and before["dice"] == after["dice"]
    held_out = [
        row.split(",")[0] for row in (tmp_path / "run/split.csv").read_text().splitlines() if row.endswith(",val")
    ]
    (images / f"{held_out[0]}.png").unlink()
    (masks / f"{held_out[0]}.png").unlink()
    assert "1 of the 2 validation images" in run("evaluate", tmp_path / "run", "--local", code=2).stderr


def test_folds_train_and_score_every_fold_and_resume_only_what_is_missing(discs, tmp_path):
    group = ["--folds", "3", "--group-by", "^[abc]"]
    output = train(discs, tmp_path / "cv", *group).output
    assert re.search(r"Dice +0\.\d{4} ± 0\.\d{4} \(mean and sd of 3 folds\)", output)
    assert output.count("groups by '^[abc]': 3, 0 shared by training and validation") == 3
    folds = json.loads((tmp_path / "cv/folds.json").read_text())
    dice = [scores["dice"]["mean"] for scores in folds["folds"]]
    assert [scores["images"] for scores in folds["folds"]] == [4, 4, 4]
    assert folds["dice"]["mean"] == pytest.approx(np.mean(dice))
    assert folds["dice"]["sd"] == pytest.approx(np.std(dice, ddof=1))
    held_out = set()
    for number in (1, 2, 3):
        rows = (tmp_path / f"cv/fold-{number}/split.csv").read_text().splitlines()
        held_out |= {row for row in rows if row.endswith(",val")}
    assert len(held_out) == 12
    (tmp_path / "cv/fold-2/scores.json").unlink()
    (tmp_path / "cv/fold-2/last/state.safetensors").unlink()
    resumed = train(discs, tmp_path / "cv", *group, "--resume").output
    assert resumed.count("training on") == 1
    assert json.loads((tmp_path / "cv/folds.json").read_text())["dice"] == folds["dice"]


def test_groups_that_the_names_show_are_pointed_out(discs, tmp_path):
    output = train(discs, tmp_path / "run").output
    assert "note: the names look like 3 groups, and 2 of them are shared by training and validation" in output
    assert "use --group-by '^[^_]+(?=_)'" in output
    grouped = train(discs, tmp_path / "grouped", "--group-by", "^[^_]+(?=_)").output
    assert "note:" not in grouped and "3, 0 shared" in grouped


@pytest.mark.parametrize("name", sorted(recipe_names()))
def test_every_recipe_prints_names_its_source_and_trains(discs, tmp_path, name):
    """With a small network, small images and one epoch; all else as it stands."""
    text = run("recipes", name).output
    assert text == recipe_text(name) and "# Source: " in text
    config = load_train_config(config_file=text)
    (tmp_path / "c.yaml").write_text(text)
    images, masks = discs
    for path in [*images.iterdir(), *masks.iterdir()]:
        image = Image.open(path)
        if path.parent == masks:
            values = np.asarray(image) // 255
            stored = config.data.mask_values or (0, 255)
            image = Image.fromarray(np.array(stored, np.uint8)[values])
        image.resize((96, 96), Image.Resampling.NEAREST).save(path)
    small = {"model.base_channels": 4, "model.depth": 2, "train.epochs": 1, "data.fraction": 1.0, "train.batch_size": 4}
    small["data.image_size"] = 96
    if config.data.tile:
        small["data.tile"] = next(s for s in range(40, 96) if ModelConfig(padding="valid", depth=2).fits(s))
    if config.data.group_by:
        small["data.group_by"] = "^[^_]+"
    settings = flags(small.items())
    output = train(discs, tmp_path / "r", "--config", tmp_path / "c.yaml", settings=settings).output
    assert "best: epoch 1" in output


def test_a_fault_of_ours_has_a_traceback_and_a_code_of_its_own(monkeypatch):
    def fault(*_arguments, **_options):
        raise RuntimeError("a bug")

    monkeypatch.setattr(main.commands["recipes"], "callback", fault)
    result = CliRunner().invoke(main, ["recipes"])
    assert result.exit_code == 3
    assert "RuntimeError: a bug" in result.stderr and "A fault of unet-ray" in result.stderr


def test_a_reader_that_goes_away_is_no_fault():
    command = f"{sys.executable} -m unet_ray recipes carvana-fast | true; exit ${{PIPESTATUS[0]}}"
    ran = subprocess.run(["bash", "-c", command], stderr=subprocess.PIPE, text=True, check=False)
    assert ran.returncode in (0, 141) and not ran.stderr
