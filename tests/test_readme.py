"""The README's Python and the examples in every command's --help, run."""

import re
import shlex
import shutil

import nibabel
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import ROOT, TINY, flags, make_discs, make_model
from test_annotations import SQUARE, coco_file
from test_milesial import StandIn

from unet_ray.cli import main

README = (ROOT / "README.md").read_text()


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The current folder, with the files that the examples name."""
    monkeypatch.chdir(tmp_path)
    images, masks = make_discs(tmp_path / "discs", 12, size=64)
    for name in ("train", "photos"):
        shutil.copytree(images, tmp_path / name)
    for name in ("train_masks", "photo_masks", "THEIR_MASKS"):
        shutil.copytree(masks, tmp_path / name)
    return tmp_path


def test_the_python_of_the_readme_runs(here, capsys):
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    for block in blocks:
        exec(block, {})
    assert "(300, 400)" in capsys.readouterr().out
    assert (here / "mask.png").exists() and (here / "RUN/report.html").exists()
    assert len(list((here / "MASKS/masks").iterdir())) == 12


def examples(command: str) -> list[str]:
    """Returns the commands below `Example:` in a command's help."""
    text = main.commands[command].help.partition("Example:\n")[2]
    return [line.strip() for line in text.split("\n\n")[0].splitlines() if line.strip()]


SMALL = ["--local", "--no-report", *flags(TINY)]
DISTILLED = ["--set", "model.base_channels=4", "--epochs", "1", "--may-fall", "1"]
MORE = {
    "train": SMALL,
    "predict": ["--local", "--no-report"],
    "evaluate": ["--local"],
    "doctor": ["--no-timing"],
    "slices": [],
    "masks": ["--local"],
    "export": [],
    "select": ["--local", "--count", "3"],
    "recipes": [],
    "import": [],
    "report": [],
    "distill": [*DISTILLED, "--local", "--no-report"],
}
"""Flags that the tests add to each example, so that it is quick and needs no Ray."""


def test_every_command_has_an_example():
    assert {name for name in main.commands if not examples(name)} == set()
    # The demo's is run by test_jobs.py, that of quantize by test_quantization.py.
    assert set(MORE) | {"demo", "quantize"} == set(main.commands)


@pytest.mark.parametrize("command", MORE)
def test_the_examples_of_the_help_run(command, here):
    if command in ("predict", "evaluate", "export", "select"):
        for name in ("RUN", "OTHER_RUN"):
            make_model(here / name)
    if command in ("report", "doctor", "distill"):
        run("train", ["--images", "train", "--masks", "train_masks", "--out", "RUN", *SMALL])
    if command == "import":
        torch.save(StandIn(3, 2).state_dict(), "checkpoint_epoch5.pth")
    if command == "masks":
        (here / "photos").mkdir(exist_ok=True)
        coco_file(here / "instances.json", {p.name: [(1, [SQUARE], 0)] for p in (here / "photos").iterdir()})
    if command == "slices":
        patient = here / "BraTS2020_TrainingData/BraTS20_001"
        for number in (1, 2):
            folder = patient.with_name(f"BraTS20_{number:03d}")
            folder.mkdir(parents=True)
            volume = np.random.default_rng(number).integers(0, 900, (32, 32, 4)).astype(np.int16)
            for name in ("flair", "t1", "t1ce", "t2"):
                nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), folder / f"{folder.name}_{name}.nii.gz")
            labels = np.array([0, 1, 2, 4], np.uint8)[volume // 225 % 4]  # as BraTS numbers its classes
            nibabel.save(nibabel.Nifti1Image(labels, np.eye(4)), folder / f"{folder.name}_seg.nii.gz")
    for example in examples(command):
        program, name, *arguments = shlex.split(example.partition(" > ")[0])
        assert program == "unet-ray"
        more = MORE[name] if name != "train" or command == "train" else [*SMALL, *MULTI]
        run(name, [*arguments, *more])


MULTI = ["--set", "model.in_channels=4", "--set", "model.num_classes=4"]


def run(name: str, arguments: list[str]) -> None:
    result = CliRunner().invoke(main, [name, *map(str, arguments)])
    assert result.exit_code == 0, result.output


CLAIMS = {
    "one mask and one manifest row for each image, and a file that can't be read never ends the job": [
        "test_prediction.py::test_ten_kinds_of_bad_files_become_ten_rows_with_a_reason_and_harm_nothing_else",
        "test_cli.py::test_one_truncated_image_does_not_stop_the_folder",
    ],
    "The same commands run on a laptop's one CPU, on one big machine and on a Ray cluster": [
        "test_prediction.py::test_ray_and_one_process_write_the_same_files",
        "test_prediction.py::test_ray_and_one_process_give_the_same_scores",
        "test_training.py::test_one_and_three_workers_and_none_train_the_same_network",
        "test_jobs.py::test_jobs_are_plain_scripts_with_the_commands_exit_codes",
        "test_nodes.py::test_a_prediction_loses_a_node_gains_one_and_outlives_its_cluster",
    ],
    "A demo, from nothing to masks": ["test_jobs.py::test_the_demo_of_the_readme_ends_with_dice_above_09"],
    "masks of the same names in another (with or without `_mask`)": ["test_pairs.py::test_kaggles_layout_is_paired"],
    "With `--local` a command works in this process, without Ray": [
        "test_layers.py::test_training_and_prediction_in_one_process_load_no_ray"
    ],
    "what is wrong with them, and which command fits them": [
        "test_doctor.py::test_a_single_planted_problem_is_the_only_finding",
        "test_doctor.py::test_the_suggested_command_fits_the_data",
    ],
    "Training and prediction end with `report.html`: curves, scores, the worst and the best images": [
        "test_report.py::test_a_training_is_shown_with_its_scores_curves_and_pictures",
        "test_report.py::test_a_prediction_is_shown_with_its_failures_and_masks",
    ],
    "goes on when the command is given again (train: with `--resume`) and ends with the same result": [
        "test_cli.py::test_a_stopped_prediction_goes_on_and_ends_the_same",
        "test_cli.py::test_ctrl_c_ends_a_local_training_that_can_be_resumed",
        "test_kills.py::test_killed_twice_it_ends_with_the_same_bytes_and_does_no_image_twice",
        "test_faults.py::test_a_killed_driver_is_resumed",
    ],
    "`quantize` makes a network in int8": ["test_quantization.py::test_int8_is_kept_used_and_close"],
    "`distill` a small one that learns from a run's": [
        "test_distill.py::test_a_small_network_is_accepted_or_refused_by_its_score_and_is_a_run"
    ],
    "Images that look unlike those of the training are said": [
        "test_looks.py::test_predict_says_it_and_its_report_notes_it"
    ],
    "`predict --adapt` fits the model to them": [
        "test_adapt.py::test_an_adapted_model_is_better_on_images_of_another_camera_and_nothing_stays_behind"
    ],
    "`masks` draws annotations": ["test_drawn_masks.py::test_killed_three_times_it_ends_with_the_same_bytes"],
    "and annotations (COCO, labelme, YOLO, CVAT, VIA, Label Studio, run lengths)": [
        "test_annotations.py::test_cvat_polygons_boxes_ellipses_and_masks",
    ],
    "`slices` turns NIfTI volumes into images": ["test_volumes.py::test_from_volumes_to_a_score_with_the_recipe"],
    "`recipes` lists settings that work": ["test_cli.py::test_every_recipe_prints_names_its_source_and_trains"],
    "`import` reads milesial's weights": ["test_milesial.py::test_the_output_is_the_same_to_rounding"],
    "1 some images failed": ["test_cli.py::test_one_truncated_image_does_not_stop_the_folder"],
    "2 an error that you must fix, in one line on stderr": [
        "test_cli.py::test_what_a_user_can_cause_is_one_line_and_exit_code_2"
    ],
    "3 a fault of ours": ["test_cli.py::test_a_fault_of_ours_has_a_traceback_and_a_code_of_its_own"],
    "130 stopped by Ctrl-C or SIGTERM": ["test_cli.py::test_ctrl_c_ends_a_local_training_that_can_be_resumed"],
    "keeps all views of a car on one side": ["test_splits.py::test_a_split_by_group_keeps_each_car_on_one_side"],
    "All nodes must see images, masks, model and `--out` under the same name": [
        "test_nodes.py::test_a_folder_that_only_one_node_sees_is_refused"
    ],
    "each call uses the Ray of the process, or else starts one and ends it": [
        "test_host_process.py::test_a_hosts_process_stays_as_it_was"
    ],
    "Errors that you must fix are `unet_ray.UserError`": [
        "test_api.py::test_a_mistake_is_one_line_that_names_the_remedy"
    ],
    "nnU-Net `train D 2d 0` … `4`": [
        "test_cli.py::test_folds_train_and_score_every_fold_and_resume_only_what_is_missing"
    ],
    "is this process ours, or a host's": ["test_host_process.py::test_the_commands_process_is_our_own"],
    "secrets of URIs": ["test_keys.py::test_no_file_and_no_line_of_a_run_holds_the_secret"],
    "exactly once, also after a stop": [
        "test_ledger.py::test_stopped_anywhere_it_ends_with_the_same_files_and_does_nothing_twice"
    ],
    "a node on which they always die": ["test_replicas.py"],
    "only `ray_backend/` imports Ray": ["test_layers.py::test_only_the_ray_backend_imports_ray"],
    "takes two places, its own code and one name in a table": [
        "test_prediction.py::test_a_format_is_added_by_its_class_and_its_name_alone"
    ],
    "the error for a misspelt name offers the nearest one": [
        "test_config.py::test_an_unknown_recipe_names_the_nearest",
        "test_config.py::test_an_unknown_format_is_an_error",
    ],
}
"""What the README says that the commands do -> the tests that hold it."""


@pytest.mark.parametrize("claim", CLAIMS)
def test_what_the_readme_claims_is_tested(claim):
    assert claim in " ".join(README.split()), "the README doesn't say so any more"
    for test in CLAIMS[claim]:
        file, _, name = test.partition("::")
        assert not name or f"def {name}(" in (ROOT / "tests" / file).read_text(), f"there is no test {test}"
