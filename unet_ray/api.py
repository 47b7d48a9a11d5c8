"""Defines the Python interface, for notebooks and other programs: `unet_ray.train`, `predict`, `select`,
`evaluate`, `Segmenter`.

The functions take plain values, build the settings of `config.py` and call what the commands call. They use the Ray of
this process (`ray.init()`) and leave it running. Without one, each call starts a Ray, which takes seconds, and ends it.
With `local=True` they use no Ray.

They leave the process that calls them as it was: see `own_process`. While a call runs, Pillow's own limit of pixels is
lifted for all threads, and a training with `local=True` sets torch's seed and number of threads. When it ends, each is
put back, also after an error; random numbers that other threads drew from torch meanwhile then come again.

tests/test_api.py runs the examples, in a folder with `images` and `masks`.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from unet_ray.config import MAX_PIXELS, EvaluateConfig, MaskOptions, PredictConfig, TrainConfig, UserError, ValueRange
from unet_ray.custom_parts import check_typed, names_in
from unet_ray.data import imaging, masks, pictures, storage
from unet_ray.data.chunks import objects
from unet_ray.data.imaging import ImageError, Source
from unet_ray.data.progress import OnProgress
from unet_ray.evaluation import evaluate as evaluation
from unet_ray.inference import predict as prediction
from unet_ray.inference.reader import Reader
from unet_ray.inference.resolve import pipeline_of
from unet_ray.inference.stages import Prediction
from unet_ray.inference.summary import PredictSummary
from unet_ray.metrics import Scores
from unet_ray.models import SegmentationModel, checkpoint
from unet_ray.ray_backend.session import Runtime
from unet_ray.selection import select as selection
from unet_ray.selection.select import Selection
from unet_ray.settings import from_mapping, load_train_config
from unet_ray.training import run as training
from unet_ray.training.results import TrainResult
from unet_ray.training.run import Callbacks

Watch = Callbacks
"""Functions that a training calls as it goes: the argument `watch` of `train`."""

Location = str | os.PathLike[str]
"""A path, or a URI (`s3://`, `gs://`, `file://`)."""
OneImage = Image.Image | np.ndarray | bytes | Location
"""What `Segmenter` takes."""


def train(
    images: Location | Sequence[Location] | None = None,
    masks: Location | Sequence[Location] | None = None,
    out: Location | None = None,
    *,
    recipe: str | None = None,
    config: TrainConfig | Location | None = None,
    settings: Mapping[str, Any] | None = None,
    init: Location | None = None,
    local: bool = False,
    resume: bool = False,
    verbose: bool = False,
    allow_code: bool = False,
    watch: Callbacks = Callbacks(),
) -> TrainResult:
    """Trains a U-Net on pairs of images and masks and writes the run directory `out`.

    `images`, `masks`: folders; a mask has its image's relative path and stem, with or without `_mask`; or a list of
    pairs, or annotations, see `unet-ray train --help`. Settings are the defaults, or `recipe` (a name of `unet-ray
    recipes`), or `config` (a YAML file or a TrainConfig). `init` (a run or model directory) gives the first weights and
    the network's own settings. `settings` (dotted names, such as `train.epochs`) come last and win. `resume` goes on
    from the last finished epoch in `out`. `verbose` shows Ray's own messages. `allow_code`: import code that a file
    `config` names, see `unet_ray.custom_parts`. `watch.on_epoch` receives each line of metrics.jsonl.

    Raises UserError for what the user must fix.

    >>> import unet_ray
    >>> small = {"train.epochs": 3, "model.base_channels": 8, "data.image_size": 64}
    >>> result = unet_ray.train("images", "masks", "RUN", settings=small, local=True)
    >>> result.epochs, result.best["val_dice"] > 0
    (3, True)
    >>> finer = unet_ray.train("images", "masks", "FINER", init="RUN", settings={"train.epochs": 1}, local=True)
    >>> finer.out.endswith("FINER")
    True
    """
    if out is None:
        raise UserError("out is missing: the run directory to write")
    if recipe is not None and config is not None:
        raise UserError("recipe and config both say all settings: give one of them")
    changed = dict(settings or {})
    if init is not None:
        changed = {**dict(checkpoint.model_settings_of(os.fspath(init))), **changed}
    built = load_train_config(recipe=recipe, config_file=_yaml(config), settings=changed.items())
    typed = names_in(config) if isinstance(config, TrainConfig) else []
    check_typed(built, [*typed, *map(str, changed.values())], allow_code)
    # Paths don't go through `settings`, which are read as YAML.
    folders = _folders(images=images, masks=masks)
    built = dataclasses.replace(built, data=dataclasses.replace(built.data, **folders))
    if init is not None:
        built = dataclasses.replace(built, train=dataclasses.replace(built.train, init=os.fspath(init)))
    return training.train(built, os.fspath(out), runtime=Runtime(local, verbose), resume=resume, callbacks=watch)


def predict(
    model: Location,
    inputs: Location | Iterable[Location],
    out: Location,
    *,
    formats: str | Sequence[str] = "png",
    local: bool = False,
    verbose: bool = False,
    on_progress: OnProgress = lambda _done, _failed, _all: None,
    **options: Any,
) -> PredictSummary:
    """Segments every image of folders, files, globs, lists or buckets and writes the masks into `out`.

    `model`: run or model directory. `formats`: names of `registry.FORMATS` (png, parquet, geotiff, rle, kaggle, coco,
    labelme, labelstudio, prob, overlay), as a list or with commas. `options`: the other fields of PredictConfig, such
    as `tile=512`, `tta=True`, `workers=4`, `overwrite=True`. `on_progress` receives (done, failed, all). Called again
    after a stop, it segments only the missing images. For single images see `Segmenter`.

    Raises UserError for what the user must fix. An image that can't be read is counted in the summary.

    >>> import unet_ray
    >>> summary = unet_ray.predict("RUN", "images", "MASKS", formats="png,overlay", local=True)
    >>> summary.ok, summary.failed
    (12, 0)
    """
    names = formats.split(",") if isinstance(formats, str) else formats
    config = _predict_config(model, inputs, out, names, options)
    return prediction.predict(config, runtime=Runtime(local, verbose), on_progress=on_progress)


def _predict_config(
    model: Location,
    inputs: Location | Iterable[Location],
    out: Location,
    formats: Iterable[str],
    options: Mapping[str, Any],
) -> PredictConfig:
    inputs = [inputs] if isinstance(inputs, (str, os.PathLike)) else inputs
    values = {
        **options,
        "model": os.fspath(model),
        "inputs": [os.fspath(location) for location in inputs],
        "out": os.fspath(out),
        "formats": [*dict.fromkeys(name.strip() for name in formats)],
    }
    return from_mapping(PredictConfig, values)


def select(
    model: Location,
    inputs: Location | Iterable[Location],
    out: Location,
    *,
    count: int = 50,
    format: str = "labelme",
    local: bool = False,
    verbose: bool = False,
    **options: Any,
) -> Selection:
    """Chooses the images of a pool that are worth a label next, and writes them into `out` with a first annotation.

    `model`, `inputs`, `options`: as for `predict`. `format`: one of its formats, `labelme`, `labelstudio`, `coco` or
    `png`. Images that the run has masks of are left out. See `unet-ray select --help`. Raises UserError.

    >>> import unet_ray
    >>> chosen = unet_ray.select("RUN", "more/images", "PICKS", count=3, local=True)
    >>> len(chosen.picks), chosen.pool, 0 <= chosen.picks[0].uncertainty <= 1
    (3, 5, True)
    """
    config = _predict_config(model, inputs, out, [format], options)
    return selection.select(config, count, runtime=Runtime(local, verbose))


def evaluate(
    model: Location,
    images: Location | Sequence[Location] | None = None,
    masks: Location | Sequence[Location] | None = None,
    *,
    local: bool = False,
    verbose: bool = False,
    on_progress: OnProgress = lambda _done, _failed, _all: None,
    **options: Any,
) -> Scores:
    """Scores a model on pairs of images and masks, at each mask's own size.

    Without `images` and `masks`, it scores the pairs that the run held out for validation. `options`: the other fields
    of EvaluateConfig, such as `mask_values=[0, 255]`, `tile=512`. Raises UserError for what the user must fix.

    >>> import unet_ray
    >>> scores = unet_ray.evaluate("RUN", local=True)
    >>> 0 <= scores.dice.mean <= 1
    True
    >>> unet_ray.evaluate("RUN", "images", "masks", local=True).images
    12
    """
    folders = _folders(images=images, masks=masks)
    config = from_mapping(EvaluateConfig, {**options, "model": os.fspath(model), **folders})
    return evaluation.evaluate(config, runtime=Runtime(local, verbose), on_progress=on_progress)


def load_network(model: Location, *, allow_code: bool = False) -> SegmentationModel:
    """Returns the trained network as a torch.nn.Module, on the CPU and in evaluation mode, for your own code.

    It takes images of any size, uint8 [N,C,H,W], and gives logits, float32 [N,K,H,W]: of one class (K = 1) the sigmoid
    is the probability, of several the softmax. Normalisation and padding are inside; `Segmenter` also resizes and
    decides. `allow_code`: import the code of a network of your own, see `unet_ray.custom_parts`. Raises UserError.

    >>> import torch
    >>> import unet_ray
    >>> network = unet_ray.load_network("RUN")
    >>> network(torch.zeros(1, 3, 50, 41, dtype=torch.uint8)).shape
    torch.Size([1, 1, 50, 41])
    """
    location = checkpoint.model_directory(storage.absolute(model))
    return checkpoint.load_model(location, allow_code=allow_code)[0].eval()


def _folders(**given: Location | Sequence[Location] | None) -> dict[str, Any]:
    """Returns the folders that were given as settings take them: a text, or several."""
    return {
        name: os.fspath(each) if isinstance(each, (str, os.PathLike)) else tuple(map(os.fspath, each))
        for name, each in given.items()
        if each is not None
    }


def _yaml(config: TrainConfig | Location | None) -> str | None:
    if config is None or isinstance(config, TrainConfig):
        return None if config is None else config.to_yaml()
    try:
        return storage.read_bytes(storage.absolute(config)).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config {os.fspath(config)}: {getattr(error, 'strerror', None) or error}") from None


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class SegmentedImage:
    """A segmented image, from `Segmenter`. A notebook shows it as the image with the mask drawn in."""

    mask: np.ndarray
    """Class ids, uint8 [H,W], at the image's own size."""
    confidence: float
    """Probability of the decided class: the mean over the pixels, 0 to 1."""
    uncertainty: float
    """Entropy of what was found, 0 to 1, as in the manifest; see `Certainty.uncertainty`."""
    classes: tuple[str, ...]
    """Name of each class id."""
    probabilities: np.ndarray | None
    """uint8 [K,H,W] with 255 for 1; None unless requested. With one class (K = 1), those of the foreground."""
    num_classes: int
    """K: 1 for one foreground class."""
    _draw: Callable[[], bytes]

    def __repr__(self) -> str:
        height, width = self.mask.shape
        counts = masks.pixel_counts(self.mask, len(self.classes))
        shares = ", ".join(
            f"{name} {count / self.mask.size:.1%}" for name, count in zip(self.classes, counts, strict=True) if count
        )
        return f"SegmentedImage: {width}x{height} pixels, {shares}; confidence {self.confidence:.3f}"

    def save(self, location: Location) -> None:
        """Writes the mask as `predict` does: a PNG, 1 bit for one class, a palette for more. Raises UserError."""
        location = storage.absolute(location)
        if not storage.split_options(location)[0].lower().endswith(".png"):
            raise UserError(f"{location}: masks are PNG files: let the name end with .png")
        try:
            storage.write_bytes(location, self.png())
        except OSError as error:
            raise UserError(f"{location}: cannot be written: {error.strerror or error}") from None

    def png(self) -> bytes:
        """Returns the mask as `save` writes it."""
        return pictures.encode_png(self.mask, self.num_classes)

    def overlay(self) -> Image.Image:
        """Returns the image with the mask drawn in, at most 1024 pixels a side; rereads a file. Raises UserError."""
        try:
            with imaging.without_pillows_limit():  # a host's may be lower than our picture's 1024 by 1024
                return Image.open(io.BytesIO(self._draw()))
        except ImageError as error:
            raise UserError(str(error)) from None

    def _repr_jpeg_(self) -> bytes | None:
        """Returns `overlay` as JPEG, for notebooks; None if the file is gone."""
        try:
            return self._draw()
        except ImageError:
            return None


class Segmenter:
    """Segments single images without Ray, as `predict` does for folders; the model is loaded once.

    `model`: run or model directory. `tile`, `overlap`, `tta`, `ensemble`, `cleanup`, `threshold`, `max_pixels`,
    `device`, `precision`, `backend`, `allow_code`: see MaskOptions. Raises UserError for what the user must fix, also
    for an image that is unusable.

    >>> import numpy as np
    >>> import unet_ray
    >>> segmenter = unet_ray.Segmenter("RUN")
    >>> result = segmenter(np.zeros((48, 72, 3), np.uint8))
    >>> result.mask.shape, result.mask.dtype
    ((48, 72), dtype('uint8'))
    >>> segmenter("images/a_000.png", probabilities=True).probabilities.shape
    (1, 32, 32)
    >>> segmenter("images/a_000.png").save("mask.png")
    """

    def __init__(
        self,
        model: Location,
        *,
        tile: int = 0,
        overlap: float = 0.5,
        tta: bool = False,
        ensemble: Sequence[Location] = (),
        cleanup: str | None = None,
        threshold: float | None = None,
        max_pixels: int = MAX_PIXELS,
        device: str = "auto",
        precision: str = "auto",
        backend: str = "auto",
        allow_code: bool = False,
    ) -> None:
        options = from_mapping(
            MaskOptions,
            {
                "tile": tile,
                "overlap": overlap,
                "tta": tta,
                "ensemble": [os.fspath(other) for other in ensemble],
                "cleanup": cleanup,
                "threshold": threshold,
                "max_pixels": max_pixels,
                "device": device,
                "precision": precision,
                "backend": backend,
                "allow_code": allow_code,
            },
        )
        self.pipeline = pipeline_of(os.fspath(model), options).chosen_here()
        self.batches = self.pipeline.segmenter(one_by_one=True)

    def __repr__(self) -> str:
        card = self.pipeline.card
        height, width = card.image_size
        return (
            f"Segmenter: {storage.without_secrets(self.pipeline.model)} ({card.model.name} at {width}x{height} pixels, "
            f"classes {', '.join(self.classes)}), on {self.batches.device.type}"
        )

    @property
    def classes(self) -> tuple[str, ...]:
        """Name of each class id."""
        card = self.pipeline.card
        if card.classes:
            return card.classes
        count = card.model.num_classes
        return ("background", "foreground") if count == 1 else tuple(f"class {k}" for k in range(count))

    def __call__(self, image: OneImage, *, probabilities: bool = False) -> SegmentedImage:
        """Returns the mask of one image of any size.

        `image`: uint8 [H,W] (gray) or [H,W,C], a PIL.Image, the bytes of a file, or a path or URI. Arrays and PIL
        images are treated like a PNG file: channels are converted as the model needs them. (A large JPEG file is
        decoded at a smaller size where that is enough. An image that Pillow has opened is not, so a few pixels may
        differ.)
        """
        [result] = self.batch([image], probabilities=probabilities)
        if isinstance(result, UserError):
            raise result
        return result

    def batch(self, images: Iterable[OneImage], *, probabilities: bool = False) -> list[SegmentedImage | UserError]:
        """Returns the masks of several images, which a GPU segments together. A UserError stands in the place of one
        that is unusable. All are in memory at once.

        >>> import unet_ray
        >>> segmenter = unet_ray.Segmenter("RUN")
        >>> [type(each).__name__ for each in segmenter.batch(["images/a_000.png", "no.png"])]
        ['SegmentedImage', 'UserError']
        """
        read = [self._read(image) for image in images]
        usable = [source for _, source in read if not isinstance(source, UserError)]
        predictions = iter(self.pipeline.each(self.batches, usable, probabilities=probabilities) if usable else ())
        return [
            source if isinstance(source, UserError) else self._result(name, source, next(predictions))
            for name, source in read
        ]

    def _read(self, image: OneImage) -> tuple[str, Source | str | UserError]:
        """Returns the name of an image, for messages, and what is decoded: also the reason why it can't be read."""
        if isinstance(image, (str, os.PathLike)):
            path = storage.absolute(image)
            [source] = self.pipeline.reader().encoded({"path": objects([os.fsencode(path)])})
            return path, source
        card = self.pipeline.card
        try:
            return "", _source(image, card.model.in_channels, card.value_range)
        except UserError as error:
            return "", error

    def _result(self, path: str, source: Source | str, prediction: Prediction) -> SegmentedImage | UserError:
        found, num_classes = prediction.segmented, self.pipeline.card.model.num_classes
        if found is None:
            return UserError(f"{storage.without_secrets(path) or 'the image'}: {prediction.error}")
        draw = functools.partial(_drawn, self.pipeline.reader(), path or source, found.mask, num_classes)
        return SegmentedImage(
            found.mask, found.confidence, found.uncertainty, self.classes, found.probabilities, num_classes, draw
        )


def _check_values(image: np.ndarray, value_range: ValueRange) -> None:
    """Raises UserError for an array that an 8-bit model would see in black, with the conversion to write."""
    if value_range is not None or image.dtype in (np.uint8, bool) or not image.size:
        return
    low, high = image.min(), image.max()
    if image.dtype.kind == "f":
        conversion = "(255 * image).round().astype(np.uint8)" if high <= 1 else "image.round().astype(np.uint8)"
    elif high <= 255:
        conversion = "image.astype(np.uint8)"
    else:
        return  # 16 bits, of which the upper 8 count, as in a file
    raise UserError(
        f"an array of {image.dtype} from {low:g} to {high:g}, and the model takes 0 to 255 in uint8: pass {conversion}"
    )


def _check_kind(image: Any, channels: int) -> None:
    """Raises UserError for what is no image, or one in another order, with what to write instead."""
    if isinstance(image, (list, tuple)):
        raise UserError("one image at a time: write segmenter.batch(images)")
    if type(image).__module__ == "torch":
        order = ".permute(1, 2, 0)" if image.ndim == 3 else ""
        raise UserError(f"a tensor of {[*image.shape]}: pass image{order}.cpu().numpy(), uint8 [H,W,C]")
    if not isinstance(image, np.ndarray) or image.dtype.kind not in "biuf":
        what = f"an array of {image.dtype}" if isinstance(image, np.ndarray) else type(image).__name__
        raise UserError(
            f"an image is an array of numbers, a PIL.Image, the bytes of a file, a path or a URI, not {what}"
        )
    if image.ndim == 3 and image.shape[0] == channels != image.shape[2] and image.shape[2] not in imaging.MODES:
        raise UserError(f"an array of {[*image.shape]}: channels come last: pass image.transpose(1, 2, 0)")


def _source(image: Image.Image | np.ndarray | bytes, channels: int, value_range: ValueRange) -> Source:
    if isinstance(image, (Image.Image, bytes)):
        return image
    _check_kind(image, channels)
    pixels = image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image
    known = pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in imaging.MODES)
    if known and pixels.size and pixels.dtype == np.uint8 and channels in imaging.MODES:
        return Image.fromarray(np.ascontiguousarray(pixels))
    _check_values(image, value_range)
    # Other types and other numbers of channels are treated like a .npy file.
    stream = io.BytesIO()
    np.save(stream, image, allow_pickle=False)
    return stream.getvalue()


def _drawn(reader: Reader, image: Source | str, mask: np.ndarray, num_classes: int) -> bytes:
    """Draws a mask into an image, or into that at a path."""
    if isinstance(image, str):
        [image] = reader.encoded({"path": objects([os.fsencode(image)])})
    return reader.overlay(image, mask, num_classes)
