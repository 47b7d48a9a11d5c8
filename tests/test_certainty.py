"""The uncertainty of a mask: the entropy of what may be foreground."""

import math

import pytest
import torch

from unet_ray.inference.certainty import Certainty


def logit(probability: float) -> float:
    return math.log(probability / (1 - probability))


def image(inside: float, outside: float, side: int) -> torch.Tensor:
    """Returns logits [1,1,64,64]: these probabilities of foreground inside and outside a square."""
    logits = torch.full((1, 1, 64, 64), logit(outside))
    logits[..., :side, :side] = logit(inside)
    return logits


def uncertainty(logits: torch.Tensor) -> float:
    return Certainty.of(logits).uncertainty().item()


def test_it_is_from_0_to_1():
    assert uncertainty(image(0.5, 0.5, 0)) == pytest.approx(1, abs=2e-3)
    assert uncertainty(torch.full((1, 1, 8, 8), 80.0)) == 0
    assert uncertainty(torch.full((1, 1, 8, 8), -80.0)) == 0
    assert uncertainty(torch.zeros(1, 5, 8, 8)) == pytest.approx(1, abs=2e-3)


def test_a_large_certain_background_does_not_hide_an_uncertain_object():
    small, large = uncertainty(image(0.6, 1e-6, 8)), uncertainty(image(0.6, 1e-6, 48))
    assert small == pytest.approx(large, abs=0.06) and small > 0.9
    assert uncertainty(image(0.6, 0.2, 8)) == pytest.approx(small), "a pixel that is hardly foreground does not count"
    assert uncertainty(image(0.999, 1e-6, 48)) < 0.05
    # the mean over all pixels, by which the small object would be the surer one
    assert Certainty.of(image(0.6, 1e-6, 8)).confidence() > Certainty.of(image(0.999, 0.02, 48)).confidence()


def test_an_image_in_which_surely_nothing_is_found_is_not_uncertain():
    assert uncertainty(image(0.5, 1e-4, 0)) < 0.01


def test_one_logit_and_two_classes_agree():
    one = torch.randn(3, 1, 40, 30, generator=torch.Generator().manual_seed(0)) * 3
    two = torch.cat([torch.zeros_like(one), one], dim=1)
    torch.testing.assert_close(Certainty.of(one).uncertainty(), Certainty.of(two).uncertainty(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(Certainty.of(one).confidence(), Certainty.of(two).confidence(), rtol=1e-5, atol=1e-6)


def test_bands_add_up_to_the_image():
    logits = torch.randn(1, 3, 60, 50, generator=torch.Generator().manual_seed(0)) * 3
    bands = Certainty.of(logits[:, :, :20]) + Certainty.of(logits[:, :, 20:])
    torch.testing.assert_close(bands.uncertainty(), Certainty.of(logits).uncertainty())
    torch.testing.assert_close(bands.confidence(), Certainty.of(logits).confidence())


def test_the_rows_and_columns_that_are_left_out_hardly_matter():
    coarse = torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 6
    fine = torch.nn.functional.interpolate(coarse, (512, 512), mode="bilinear")
    parts = [
        Certainty.of(fine[:, :, top : top + 64, left : left + 64])
        for top in range(0, 512, 64)
        for left in range(0, 512, 64)
    ]
    whole = sum(parts[1:], parts[0])
    assert uncertainty(fine) == pytest.approx(whole.uncertainty().item(), rel=0.02)
