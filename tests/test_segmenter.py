"""Tiles, flips and ensembles give the same as the plain computation."""

import io

import numpy as np
import pytest
import torch
from conftest import make_model
from PIL import Image
from torch import nn

from unet_ray.config import UserError
from unet_ray.data.imaging import ImageError, Pixels
from unet_ray.inference.arithmetic import Arithmetic
from unet_ray.inference.backends import fold_batch_norm
from unet_ray.inference.segmenter import BatchSegmenter
from unet_ray.models import checkpoint

FP32 = Arithmetic("cpu", "torch", "fp32")
SIZES = [(1, 1), (3, 200), (64, 64), (65, 63), (300, 7), (129, 130)]


def pixels_of(array: np.ndarray) -> Pixels:
    stream = io.BytesIO()
    np.save(stream, array)
    return Pixels(stream.getvalue(), array.shape[-1] if array.ndim == 3 else 1, None, 10**9)


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, shape).astype(np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    make_model(folder / "one", ("augment.vflip", 0.5))
    make_model(folder / "two", seed=1)
    make_model(folder / "three", ("model.num_classes", 3), ("data.mask_values", [0, 1, 2]))
    # At depth 3 a tile has 8n + 4 pixels, and a step 8n.
    valid = [("model.padding", "valid"), ("model.depth", 3), ("data.tile", 36), ("data.image_size", 100)]
    make_model(folder / "valid", *valid, ("model.in_channels", 1))
    return folder


@torch.inference_mode()
def test_batch_norm_is_folded_into_the_convolutions_before_it(folder):
    model, _ = checkpoint.load_model(str(folder / "one"))
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():  # as after a training, rather than 0 and 1
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            module.weight.uniform_(0.5, 2, generator=generator)
            module.bias.normal_(generator=generator)
    image = torch.from_numpy(noise(1, 3, 32, 32))
    expected = model.eval()(image)
    fold_batch_norm(model)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert torch.allclose(model(image), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("overlap", [0, 0.3, 0.5, 0.75])
@pytest.mark.parametrize("size", SIZES)
def test_tiles_put_every_pixel_back_where_it_was(folder, size, overlap):
    segmenter = BatchSegmenter(str(folder / "one"), FP32)
    # This network returns each pixel.
    segmenter._logits = lambda image: torch.from_numpy(image).permute(0, 3, 1, 2).float() - 100
    image = noise(*size)
    segmented = segmenter.by_tiles(pixels_of(image), 64, overlap, 0.5, probabilities=True)
    assert (segmented.mask == (image > 100)).all()
    expected = torch.sigmoid(torch.from_numpy(image).float() - 100)
    assert np.abs(segmented.probabilities[0] - 255 * expected.numpy()).max() <= 1
    assert segmented.confidence == pytest.approx(float(torch.maximum(expected, 1 - expected).mean()), abs=1e-4)


@pytest.mark.parametrize("name", ["one", "three"])
@torch.inference_mode()
def test_tiles_agree_with_the_whole_image_away_from_its_border(folder, name):
    segmenter = BatchSegmenter(str(folder / name), FP32)
    image = np.asarray(Image.fromarray(noise(24, 20, 3)).resize((310, 290)))
    tiled = torch.cat([logits for _, logits in segmenter._bands(pixels_of(image), 128, 0.5)], dim=1)
    whole = segmenter._logits(image[None].copy())[0]
    inside = (..., slice(32, -32), slice(32, -32))
    difference = (tiled - whole)[inside].abs().mean()
    # With random weights many pixels are nearly undecided, so the test compares logits. Tiles' edges always contribute
    # a little, so they differ a little.
    assert difference < 0.01 * whole[inside].std()
    assert (tiled - whole).abs().mean() > difference  # at the border, tiles are mirrored and the whole image is padded


@torch.inference_mode()
def test_an_unpadded_network_by_tiles_is_exactly_the_whole(folder):
    segmenter = BatchSegmenter(str(folder / "valid"), FP32)
    image = noise(100, 100, 1)
    whole = segmenter._logits(image[None].copy())[0, 0].numpy() > 0
    assert 0 < whole.mean() < 1
    assert (segmenter.by_tiles(pixels_of(image), 36, 0.5, 0.5, probabilities=False).mask == whole).all()


@torch.inference_mode()
def test_flips_are_averaged_as_probabilities(folder):
    plain = BatchSegmenter(str(folder / "one"), FP32)
    assert plain.card.flips == "hv"
    flipped = BatchSegmenter(str(folder / "one"), FP32, flips="hv")
    image = noise(2, 32, 32, 3)
    views = []
    for axes in ((), (2,), (1,), (1, 2)):
        logits = plain._logits(np.flip(image, axes).copy())
        views.append(logits.sigmoid().numpy())
        views[-1] = np.flip(views[-1], [axis + 1 for axis in axes])
    expected = np.mean(views, axis=0)
    assert np.allclose(flipped._logits(image.copy()).sigmoid().numpy(), expected, atol=1e-5)
    assert np.allclose(1 / (1 + np.exp(-flipped(image).logits.astype(float))), expected, atol=1e-3)
    assert not np.allclose(expected, views[0], atol=1e-3)


@pytest.mark.parametrize(("first", "second"), [("one", "two"), ("three", "three")])
@torch.inference_mode()
def test_an_ensemble_is_the_mean_of_its_probabilities(folder, first, second):
    image = noise(2, 32, 32, 3)
    each = [BatchSegmenter(str(folder / name), FP32)._logits(image.copy()) for name in (first, second)]
    both = BatchSegmenter(str(folder / first), FP32, ensemble=[str(folder / second)])._logits(image.copy())
    if first == "one":
        assert torch.allclose(both.sigmoid(), (each[0].sigmoid() + each[1].sigmoid()) / 2, atol=1e-5)
    else:
        assert torch.allclose(both.softmax(1), each[0].softmax(1), atol=1e-5)


def test_models_that_do_not_go_together_are_refused(folder):
    with pytest.raises(UserError, match=r"its number of classes is 3, that of .*one 1"):
        BatchSegmenter(str(folder / "one"), FP32, ensemble=[str(folder / "three")])
    with pytest.raises(UserError, match="its channels is 1"):
        BatchSegmenter(str(folder / "one"), FP32, ensemble=[str(folder / "valid")])


@pytest.mark.parametrize("fits", [1, 3])
def test_a_gpu_that_is_too_small_for_a_batch_gets_smaller_ones(folder, monkeypatch, fits):
    segmenter = BatchSegmenter(str(folder / "one"), FP32)
    batch, large = noise(13, 32, 32, 3), pixels_of(noise(65, 200, 3))
    whole = segmenter(batch), segmenter.by_tiles(large, 32, 0.5, 0.5, probabilities=False)
    given = []

    def logits(image_NHWC, kept=segmenter._logits):
        given.append(len(image_NHWC))
        if len(image_NHWC) > fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return kept(image_NHWC)

    monkeypatch.setattr(segmenter, "_logits", logits)
    segmenter.at_once = 8
    in_pieces = segmenter(batch)
    assert given[0] == 8
    assert max(given[given.index(segmenter.at_once) :]) <= fits  # tried once
    assert np.allclose(in_pieces.logits, whole[0].logits, atol=0.01)
    segmenter.at_once = 8
    assert np.array_equal(segmenter.by_tiles(large, 32, 0.5, 0.5, probabilities=False).mask, whole[1].mask)


def test_a_gpu_that_is_too_small_for_one_image_is_one_line(folder, monkeypatch):
    segmenter = BatchSegmenter(str(folder / "one"), FP32)

    def too_large(_image):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(segmenter, "_logits", too_large)
    with pytest.raises(UserError, match="no room for one image of 32x48"):
        segmenter(noise(2, 48, 32, 3))


def test_windows_of_an_image_are_the_pixels_of_the_decoded_one():
    stream = io.BytesIO()
    image = Image.fromarray(noise(20, 30, 3))
    image.save(stream, "PNG", exif=Image.Exif())
    pixels = Pixels(stream.getvalue(), 3, None, 10**6)
    rows, columns = np.array([3, 2, 1, 0, 1]), np.array([29, 28, 29])
    assert pixels.size_hw == (20, 30)
    assert (pixels.window(rows, columns) == np.asarray(image)[rows][:, columns]).all()
    with pytest.raises(ImageError, match="600 pixels, more than --max-pixels 599"):
        Pixels(stream.getvalue(), 3, None, 599)
