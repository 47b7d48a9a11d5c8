"""Tiles give the same as the whole image."""

import pytest
import torch

from unet_ray.config import IGNORE, ModelConfig, UserError
from unet_ray.models import build
from unet_ray.models.tiles import by_tiles, mirror_margin
from unet_ray.settings import load_train_config
from unet_ray.training.crops import random_tiles


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_overlap_tiles_equal_the_whole_image_at_once(norm):
    """Checks the paper's property on an image more than three tiles wide."""
    config = ModelConfig(padding="valid", norm=norm, base_channels=4, depth=3)
    network = build(config).eval().double()
    fitting = [size for size in range(20, 220) if config.fits(size)]
    tile, side = fitting[2], fitting[-1]
    assert side > 3 * tile
    image = torch.randint(0, 256, (1, 3, side, side), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    with torch.inference_mode():
        whole = double(network)(mirror_margin(image, config.margin))
        parts = by_tiles(double(network), image, tile, config)
    assert whole.shape == parts.shape == (1, 1, side, side)
    assert torch.allclose(parts, whole, rtol=0, atol=1e-12)
    assert whole.std() > 0


def double(network):
    """Returns the network in float64, from normalised pixels on, so that rounding can't hide an error."""
    return lambda image: network.body(image.double() * network.pixel_scale + network.pixel_shift)


def test_tiles_cover_sizes_that_no_tile_divides():
    config = ModelConfig(padding="valid", base_channels=2, depth=2)
    tile = next(size for size in range(20, 60) if config.fits(size))
    network = build(config).eval()
    image = torch.randint(0, 256, (2, 3, 3 * tile + 7, tile + 1), dtype=torch.uint8)
    with torch.inference_mode():
        assert by_tiles(network, image, tile, config).shape == (2, 1, 3 * tile + 7, tile + 1)


def test_a_random_tile_is_a_part_of_image_and_mask_with_its_surroundings():
    mask = torch.arange(10 * 12, dtype=torch.uint8).reshape(1, 10, 12).expand(3, -1, -1)
    arrays = {"image": mask[..., None], "mask": mask, "border": mask}
    cut = random_tiles(arrays, [0, 1, 2], 4, margin=2, seed=0, epoch=1)
    assert cut["image"].shape == (3, 8, 8, 1) and cut["mask"].shape == (3, 4, 4)
    assert torch.equal(cut["image"][:, 2:-2, 2:-2, 0], cut["mask"])
    assert torch.equal(cut["border"], cut["mask"])
    corners = {
        int(one[0, 0])
        for epoch in range(40)
        for one in random_tiles({"mask": mask}, [0, 1, 2], 4, margin=0, seed=0, epoch=epoch)["mask"]
    }
    assert len(corners) > 20 and max(corners) <= 6 * 12 + 8
    again = random_tiles({"mask": mask[:1]}, [1], 4, margin=0, seed=0, epoch=1)
    assert torch.equal(again["mask"][0], cut["mask"][1])


def test_a_share_of_the_tiles_has_an_object_in_its_middle_each_class_equally_often():
    mask = torch.zeros(1, 64, 96, dtype=torch.uint8)
    mask[0, 2:50, 4:60] = 1
    mask[0, 40, 90] = 2  # one pixel, near the edge
    mask[0, 60:, :10] = IGNORE

    def middles(foreground: float) -> list[set[int]]:
        tiles = (
            random_tiles({"mask": mask}, [0], 8, margin=0, seed=0, epoch=epoch, foreground=foreground)["mask"][0]
            for epoch in range(300)
        )
        return [set(tile.flatten().tolist()) for tile in tiles]

    rare = sum(2 in values for values in middles(1.0))
    assert 120 < rare < 180, "half of them, though it is one pixel"
    assert all(values & {1, 2} for values in middles(1.0))
    assert 20 < sum(2 in values for values in middles(0.33)) < 80
    assert sum(2 in values for values in middles(0.0)) < 10
    empty = torch.zeros(1, 64, 96, dtype=torch.uint8)
    at = {"margin": 0, "seed": 0, "epoch": 3}
    plain = random_tiles({"mask": mask}, [5], 8, **at)["mask"]
    assert torch.equal(random_tiles({"mask": mask, "border": empty}, [5], 8, **at, foreground=1e-9)["mask"], plain)
    assert random_tiles({"mask": empty}, [5], 8, **at, foreground=1.0)["mask"].shape == (1, 8, 8)
    with pytest.raises(UserError, match=r"it needs data\.tile"):
        load_train_config(settings=[("train.foreground", 0.33)])
