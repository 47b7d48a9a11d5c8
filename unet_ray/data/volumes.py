"""Turns NIfTI volumes (MRI) into slices that every other command reads as images.

Reading one slice of a compressed volume means reading the whole volume, in every epoch. So the slices are written once,
as PNG files, or as arrays (.npy) if they have more channels than PNG.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from unet_ray.config import UserError
from unet_ray.data import storage
from unet_ray.data.imaging import MODES

IMAGES, MASKS = "images", "masks"
CHANNELS = "unet_ray channels"
"""Key of a PNG's text that names its channels."""
PERCENTILES = 0.5, 99.5
"""Percentiles of a volume's voxels, those of the background apart, that become 1 and 255: MRI has no unit, and a few
voxels are brighter."""
BACKGROUND = 0.1
"""A value that at least this share of a volume's voxels has is its background: 0 in BraTS's files, the lowest value in
volumes that were normalised to mean 0."""
SAMPLE = 1_000_000
"""Voxels among which the background is looked for."""


@dataclass(frozen=True, slots=True)
class SliceSummary:
    """The result of `write_slices`."""

    volumes: int
    """Number of patients."""
    slices: int
    """Number of slices written."""
    labels: tuple[int, ...]
    """Values that occur in the segmentations."""


@dataclass(frozen=True, slots=True)
class _Patient:
    """The volumes of one patient."""

    channels: list[np.ndarray]
    """uint8 [X,Y,Z] of each channel."""
    labels: np.ndarray | None
    """float32 [X,Y,Z]; None if the patient has no segmentation."""
    labels_file: str

    def slice(self, z: int, neighbours: int) -> tuple[np.ndarray, np.ndarray | None] | None:
        """Returns image (uint8 [X,Y,C]) and mask (uint8 [X,Y]) of axial slice `z`; None if every voxel of it is
        background. The channels of `neighbours` slices on each side come before and after its own; beyond the volume's
        ends its last slice counts. Raises UserError."""
        if not any(volume[:, :, z].any() for volume in self.channels):
            return None
        last = self.channels[0].shape[2] - 1
        places = [min(max(0, z + offset), last) for offset in range(-neighbours, neighbours + 1)]
        image = np.stack([volume[:, :, place] for place in places for volume in self.channels], axis=-1)
        if self.labels is None:
            return image, None
        mask = np.rint(self.labels[:, :, z])
        if mask.min() < 0 or mask.max() > 255:
            raise UserError(f"{self.labels_file}: labels from {mask.min():g} to {mask.max():g}: 0 to 255")
        return image, mask.astype(np.uint8)


def write_slices(
    folder: str,
    out: str,
    channels: Sequence[str],
    labels: str | None,
    *,
    every: int = 1,
    neighbours: int = 0,
    on_volume: Callable[[str, int], None] = lambda _name, _slices: None,
) -> SliceSummary:
    """Writes `out`/images/<patient>/<slice>.png, or .npy of more than four channels, and masks/<patient>/<slice>.png.

    A patient is a folder below `folder` with one file `…<channel>.nii` or `.nii.gz` for each of the `channels` (BraTS:
    flair, t1, t1ce, t2) and, unless `labels` is None, one `…<labels>.nii.gz` (BraTS: seg). Slices are axial (along the
    third axis): every `every`th, except those that are background alone, with the channels of `neighbours` slices on
    each side. Voxels between a volume's `PERCENTILES` become 1 to 255, its background (`BACKGROUND`) 0. Masks keep the
    values of the labels. `on_volume` gets each patient's name and number of slices. Raises UserError that names the
    file.
    """
    if not channels:
        raise UserError("--channels is empty: the endings of the volumes' file names, such as flair,t1,t1ce,t2")
    out = storage.absolute(out)
    if storage.names_in(out):
        raise UserError(f"--out {out} is not empty: remove it or choose another")
    patients = _patients(storage.absolute(folder), [*channels, *([labels] if labels else [])])
    count, seen = 0, set[int]()
    for name, files in patients.items():
        patient = _read_patient(files, channels, labels)
        written = 0
        for z in range(0, patient.channels[0].shape[2], every):
            found = patient.slice(z, neighbours)
            if found is None:
                continue
            image, mask = found
            path = f"{name}/{z:04d}"
            _write_image(image, storage.join(out, IMAGES, path), channels)
            if mask is not None:
                seen.update(np.unique(mask).tolist())
                _write_png(Image.fromarray(mask), storage.join(out, MASKS, path + ".png"))
            written += 1
        on_volume(name, written)
        count += written
    return SliceSummary(len(patients), count, tuple(sorted(seen)))


def _read_patient(files: Mapping[str, str], channels: Sequence[str], labels: str | None) -> _Patient:
    """Reads a patient's volumes. Raises UserError if their shapes differ."""
    volumes = {channel: _scaled(_volume(files[channel])) for channel in channels}
    segmentation = _volume(files[labels]) if labels else None
    expected = volumes[channels[0]].shape
    for name, volume in [*volumes.items(), (labels or "", segmentation)]:
        if volume is not None and volume.shape != expected:
            raise UserError(f"{files[name]}: {volume.shape} voxels, {channels[0]} has {expected}")
    return _Patient([volumes[channel] for channel in channels], segmentation, files[labels] if labels else "")


def _patients(folder: str, endings: Sequence[str]) -> dict[str, dict[str, str]]:
    """Returns patient -> ending -> file. Raises UserError that lists missing files."""
    if not storage.is_folder(folder):
        raise UserError(f"{folder}: no such folder")
    found: dict[str, dict[str, str]] = {}
    for file in storage.list_files(folder):
        path = PurePosixPath(file.path)
        stem = path.name.removesuffix(".gz").removesuffix(".nii")
        if stem == path.name:
            continue
        for ending in endings:
            # The whole ending must match: `t1` is not `t1ce`, and `…_t1` is not `…_ht1`.
            if stem == ending or stem.endswith((f"_{ending}", f"-{ending}")):
                patient = found.setdefault(path.parent.name, {})
                if ending in patient:
                    raise UserError(f"{path.parent}: two files {ending}: {patient[ending]} and {path.name}")
                patient[ending] = str(path)
    if not found:
        raise UserError(f"{folder}: no folder in it has files like …_{endings[0]}.nii.gz")
    missing = [f"{name}: {ending}" for name in sorted(found) for ending in endings if ending not in found[name]]
    if missing:
        raise UserError(f"{folder}: missing {', '.join(missing[:5])}" + (" and more" if len(missing) > 5 else ""))
    return dict(sorted(found.items()))


def _volume(path: str) -> np.ndarray:
    """Reads a NIfTI volume, float32 [X,Y,Z]. Raises UserError."""
    try:
        import nibabel
    except ImportError:
        raise UserError("NIfTI volumes need nibabel: pip install 'unet_ray[brats]'") from None
    try:
        volume: Any = nibabel.load(path)
        values = np.asarray(volume.dataobj, np.float32)
    except Exception as error:  # nibabel and zlib raise many types on bad files
        raise UserError(f"{path}: cannot be read: {' '.join(str(error).split())}") from None
    if values.ndim != 3:
        raise UserError(f"{path}: {values.ndim} dimensions: one volume a file")
    return values


def _scaled(values: np.ndarray) -> np.ndarray:
    """Scales a volume to uint8 [X,Y,Z]: 0 where voxels are background, 1 to 255 elsewhere."""
    found, counts = np.unique(values.ravel()[:: max(1, values.size // SAMPLE)], return_counts=True)
    background = found[counts.argmax()] if counts.max() >= BACKGROUND * counts.sum() else np.nan
    inside = values != background
    if not inside.any():
        return np.zeros(values.shape, np.uint8)
    low, high = np.percentile(values[inside], PERCENTILES)
    scaled = 1 + 254 * ((values - low) / max(high - low, 1e-6)).clip(0, 1)
    return np.where(inside, np.rint(scaled), 0).astype(np.uint8)


def _write_image(image: np.ndarray, location: str, channels: Sequence[str]) -> None:
    """Writes uint8 [X,Y,C]: as PNG if it has so many channels, else as an array."""
    if image.shape[-1] in MODES:
        bands = [Image.fromarray(band) for band in np.moveaxis(image, -1, 0)]
        names = list(channels) * (len(bands) // len(channels))
        _write_png(Image.merge(MODES[len(bands)], bands), location + ".png", names)
        return
    stream = io.BytesIO()
    np.save(stream, image)
    storage.write_bytes(location + ".npy", stream.getvalue())


def _write_png(image: Image.Image, location: str, channels: Sequence[str] = ()) -> None:
    """Writes a PNG. The names of its `channels` go into its header: a fourth one is no transparency."""
    stream, text = io.BytesIO(), PngInfo()
    if channels:
        text.add_text(CHANNELS, ",".join(channels))
    image.save(stream, "PNG", pnginfo=text)
    storage.write_bytes(location, stream.getvalue())
