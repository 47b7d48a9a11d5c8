"""Slices of NIfTI volumes: written, trained on, split by patient."""

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from unet_ray.cli import main
from unet_ray.config import UserError
from unet_ray.data.imaging import decode_image
from unet_ray.data.volumes import write_slices

nibabel = pytest.importorskip("nibabel")
CHANNELS = ("flair", "t1", "t1ce", "t2")


def brats(folder, patients=5, shape=(24, 20, 6)):
    """Patients as BraTS names them: a ball of brain with a tumor of labels 1, 2 and 4; the last slice empty."""
    generator = np.random.default_rng(0)
    for number in range(patients):
        name = f"BraTS20_Training_{number:03d}"
        (folder / name).mkdir(parents=True)
        x, y, z = np.mgrid[: shape[0], : shape[1], : shape[2]]
        brain = ((x - 12) ** 2 + (y - 10) ** 2 < 80) & (z < shape[2] - 1)
        labels = np.zeros(shape, np.uint8)
        for label, radius in ((2, 30), (4, 14), (1, 5)):
            labels[brain & ((x - 10) ** 2 + (y - 9 - number % 3) ** 2 < radius)] = label
        for k, channel in enumerate(CHANNELS):
            values = brain * (300 + 100 * k + 200 * (labels == 2) + 350 * (labels == 4) + 90 * (labels == 1))
            values = values + brain * generator.normal(0, 20, shape)
            nibabel.save(
                nibabel.Nifti1Image(values.astype(np.float32), np.eye(4)), folder / name / f"{name}_{channel}.nii.gz"
            )
        nibabel.save(nibabel.Nifti1Image(labels, np.eye(4)), folder / name / f"{name}_seg.nii.gz")
    return folder


def test_a_slice_has_the_values_of_its_volume(tmp_path):
    source = brats(tmp_path / "brats", patients=1)
    summary = write_slices(str(source), str(tmp_path / "out"), CHANNELS, "seg")
    assert (summary.volumes, summary.slices, summary.labels) == (1, 5, (0, 1, 2, 4))  # the empty slice is left out
    name = "BraTS20_Training_000"
    image, size = decode_image((tmp_path / f"out/images/{name}/0002.png").read_bytes(), 4, None)
    assert size == (24, 20)
    for k, channel in enumerate(CHANNELS):
        values = np.asarray(nibabel.load(source / name / f"{name}_{channel}.nii.gz").dataobj)
        low, high = np.percentile(values[values > 0], [0.5, 99.5])
        expected = np.rint(1 + 254 * ((values[:, :, 2] - low) / (high - low)).clip(0, 1)) * (values[:, :, 2] > 0)
        assert np.abs(image[..., k] - expected).max() <= 1
    mask = np.asarray(Image.open(tmp_path / f"out/masks/{name}/0002.png"))
    assert np.array_equal(mask, np.asarray(nibabel.load(source / name / f"{name}_seg.nii.gz").dataobj)[:, :, 2])


def test_volumes_of_mean_0_keep_what_is_below_it(tmp_path):
    """Their background is their lowest value, or 0 with values on both sides of it."""
    folder = tmp_path / "in/p"
    folder.mkdir(parents=True)
    values = np.random.default_rng(0).normal(0, 1, (20, 20, 4)).astype(np.float32)
    for name, background in (("a", -9), ("b", 0)):
        values[:, :5] = background
        nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), folder / f"x_{name}.nii.gz")
    write_slices(str(tmp_path / "in"), str(tmp_path / "out"), ["a", "b"], None)
    image, _ = decode_image((tmp_path / "out/images/p/0001.png").read_bytes(), 2, None)
    assert image[:, :5].max() == 0 and image[:, 5:].min() >= 1
    assert (np.abs(np.median(image[:, 5:].astype(float), axis=(0, 1)) - 128) < 15).all()


def test_neighbours_become_channels(tmp_path):
    source = brats(tmp_path / "brats", patients=1)
    for number, channels in enumerate((["flair"], ["flair", "t1"])):
        alone, beside = (tmp_path / f"{kind}{number}" for kind in ("alone", "beside"))
        write_slices(str(source), str(alone), channels, "seg")
        write_slices(str(source), str(beside), channels, "seg", neighbours=1)
        own = [path.read_bytes() for path in sorted((alone / "images").rglob("*.png"))]
        files = sorted(path for path in (beside / "images").rglob("*") if path.is_file())
        assert {path.suffix for path in files} == {".png" if len(channels) == 1 else ".npy"} and len(files) == len(own)
        count = len(channels)
        slices = [decode_image(data, count, None)[0].reshape(24, 20, count) for data in own]
        slices.append(np.zeros_like(slices[0]))  # the last one is background
        for number, file in enumerate(files):
            image, _ = decode_image(file.read_bytes(), 3 * count, None)
            around = [slices[max(0, number - 1)], slices[number], slices[number + 1]]
            assert np.array_equal(image, np.concatenate(around, axis=-1))
    with pytest.raises(UserError, match="--channels is empty"):
        write_slices(str(source), str(tmp_path / "none"), [], None)


def test_a_fourth_channel_is_not_transparency(tmp_path):
    """Resized channel by channel: where the fourth is 0, the others keep their values."""
    pixels = np.full((8, 8, 4), 200, np.uint8)
    pixels[:, 4:, 3] = 0
    Image.fromarray(pixels, "RGBA").save(tmp_path / "x.png")
    image, _ = decode_image((tmp_path / "x.png").read_bytes(), 4, (4, 4))
    assert image[..., :3].min() == image[..., :3].max() == 200


def test_from_volumes_to_a_score_with_the_recipe(tmp_path):
    source = brats(tmp_path / "brats")
    runner = CliRunner()
    result = runner.invoke(main, ["slices", str(source), "--out", str(tmp_path / "slices")])
    assert result.exit_code == 0 and "25 slices of 5 patients" in result.stdout and "labels 0, 1, 2, 4" in result.stdout
    command = ["train", "--images", str(tmp_path / "slices/images"), "--masks", str(tmp_path / "slices/masks")]
    command += ["--out", str(tmp_path / "run"), "--recipe", "brats", "--local", "--epochs", "2", "--batch-size", "5"]
    small = ["model.base_channels=4", "model.depth=2", "data.image_size=[24, 20]", "train.precision=fp32"]
    result = runner.invoke(main, command + [part for setting in small for part in ("--set", setting)])
    assert result.exit_code == 0, result.output
    assert "groups by '^[^/]+': 5, 0 shared by training and validation" in result.output
    result = runner.invoke(main, ["evaluate", str(tmp_path / "run"), "--local"])
    assert "edema" in result.output


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "BraTS20_Training_000_t1ce.nii.gz").unlink(), "missing BraTS20_Training_000: t1ce"),
        (lambda folder: (folder / "BraTS20_Training_000_t2.nii.gz").write_bytes(b"no"), "_t2.nii.gz: cannot be read"),
        (
            lambda folder: nibabel.save(
                nibabel.Nifti1Image(np.zeros((3, 3, 3), np.uint8), np.eye(4)), folder / "BraTS20_Training_000_t1.nii.gz"
            ),
            r"_t1.nii.gz: \(3, 3, 3\) voxels, flair has \(24, 20, 6\)",
        ),
    ],
)
def test_bad_volumes_are_errors_that_name_the_file(tmp_path, change, message):
    source = brats(tmp_path / "brats", patients=1)
    change(source / "BraTS20_Training_000")
    with pytest.raises(UserError, match=message):
        write_slices(str(source), str(tmp_path / "out"), CHANNELS, "seg")


def test_a_folder_without_volumes_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        write_slices(str(tmp_path / "no"), str(tmp_path / "out"), CHANNELS, "seg")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no folder in it has files like …_flair\.nii\.gz"):
        write_slices(str(tmp_path / "empty"), str(tmp_path / "out"), CHANNELS, "seg")
