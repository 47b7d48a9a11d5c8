"""What the values and colours of mask files mean."""

import io

import numpy as np
import pytest
from PIL import Image

from unet_ray.config import IGNORE, DataConfig, UserError
from unet_ray.data.imaging import ImageError, decode_mask, problem_of_sizes, stored_values
from unet_ray.data.masks import check_comparisons

RED, GREEN, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 0)


def png(values, mode: str | None = None, format: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image = values if isinstance(values, Image.Image) else Image.fromarray(np.asarray(values), mode)
    image.save(stream, format, **options)
    return stream.getvalue()


def npy(values: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, values)
    return stream.getvalue()


def decoded(data, size_hw=None, **settings) -> list:
    return decode_mask(data, DataConfig(**settings), size_hw)[0].tolist()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"mask_values": (0, (1, 3)), "ignore_index": 2}, [0, 1, IGNORE, 1]),
        ({"mask_values": ((0, 2), (1, 3))}, [0, 1, 0, 1]),
        ({"mask_values": (0, ">0")}, [0, 1, 1, 1]),
        ({"mask_values": (0, ">=2")}, [0, 0, 1, 1]),
        ({"mask_values": ("<2", ">=2")}, [0, 0, 1, 1]),
        ({"mask_values": (">1", "<=1")}, [1, 1, 0, 0]),
        ({"mask_values": (0, ">0", ">=3")}, [0, 1, 1, 2]),
        ({"mask_values": (0, ">0"), "ignore_index": (1, 3)}, [0, IGNORE, 1, IGNORE]),
        ({"mask_values": (3, 2, 1, 0)}, [3, 2, 1, 0]),
    ],
)
def test_values_ranges_and_several_values_are_classes(settings, expected):
    assert decoded(png(np.array([[0, 1, 2, 3]], np.uint8)), **settings) == [expected]


def test_values_below_0_can_be_left_out_and_nothing_else():
    data = npy(np.array([[-1, 0, 1, 65535]], np.int32))
    assert decoded(data, mask_values=(0, 1), ignore_index=(-1, 65535)) == [[IGNORE, 0, 1, IGNORE]]
    assert decoded(data, mask_values=(0, 1, 65535), ignore_index=-1) == [[IGNORE, 0, 1, 2]]
    with pytest.raises(ImageError, match="mask values from -1 to 65535"):
        decoded(data, mask_values=(0, 1, 65535))
    with pytest.raises(ImageError, match="outside the classes"):
        decoded(data, mask_values=(0, 1), ignore_index=-1)


def test_floating_point_masks_of_whole_numbers_are_read():
    assert decoded(npy(np.array([[0.0, 1.0]], np.float32)), mask_values=(0, 1)) == [[0, 1]]
    for values in ([[0.0, 0.5]], [[0.0, np.nan]]):
        with pytest.raises(ImageError, match="floating-point values"):
            decoded(npy(np.array(values, np.float32)), mask_values=(0, 1))


@pytest.mark.parametrize("written", [((255, 0, 0), (0, 255, 0)), ("#ff0000", "00FF00")])
def test_colours_are_classes(written):
    data = png(np.array([[RED, GREEN, BLACK]], np.uint8))
    colours = ((0, 0, 0), *written)
    assert decoded(data, mask_colors=colours) == [[1, 2, 0]]
    assert decoded(data, mask_colors=written, ignore_index="#000000") == [[0, 1, IGNORE]]
    assert decoded(data, mask_colors=((0, 0, 0), written)) == [[1, 1, 0]]
    with pytest.raises(ImageError, match=r"1 colour\(s\) of no class \(#000000\): add them to data.mask_colors"):
        decoded(data, mask_colors=written)


def test_palettes_that_differ_are_read_by_their_colours():
    for order in ((BLACK, RED), (RED, BLACK)):
        image = Image.fromarray(np.array([[order.index(RED), order.index(BLACK)]], np.uint8), "P")
        image.putpalette([part for colour in order for part in colour])
        assert decoded(png(image), mask_colors=(BLACK, RED)) == [[1, 0]]
        assert decoded(png(image, format="GIF"), mask_colors=(BLACK, RED)) == [[1, 0]]


def test_opacity_is_the_mask_where_the_colours_say_nothing():
    opacity = np.array([[0, 255, 0]], np.uint8)
    image = np.zeros((1, 3, 4), np.uint8)
    image[..., 3] = opacity
    assert stored_values(png(image)).tolist() == opacity.tolist()
    image[0, 0, :3] = 7  # now the colours say something
    assert stored_values(png(image)).tolist() == [[7, 0, 0]]


def test_several_masks_make_one():
    parts = [png(np.array([row], np.uint8)) for row in ([0, 255, 0, 0], [0, 0, 255, 9])]
    settings = {"mask_values": (0, 255), "ignore_index": 9}
    assert decoded(parts, several_masks="union", **settings) == [[0, 1, 1, IGNORE]]
    assert decoded(parts, several_masks="classes", **settings) == [[0, 1, 2, IGNORE]]
    assert decoded([None, parts[0]], several_masks="classes", **settings) == [[0, 2, 0, 0]]
    with pytest.raises(ImageError, match="the masks of one image have different sizes, 2x1 and 4x1"):
        decoded([parts[0], png(np.zeros((1, 2), np.uint8))], several_masks="union", **settings)


def test_masks_of_another_size_fit_if_their_proportions_do():
    asked, not_asked = DataConfig(mask_resize=True), DataConfig()
    assert problem_of_sizes((683, 1024), (171, 256), asked) == ""
    assert "--set data.mask_resize=true resizes it" in problem_of_sizes((683, 1024), (171, 256), not_asked)
    for data in (asked, not_asked):
        assert "the two must match" in problem_of_sizes((100, 100), (100, 50), data)
        assert problem_of_sizes((100, 50), (100, 50), data) == ""


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mask_values": (0, "x")}, "'x' is no value and no comparison such as '>0'"),
        ({"mask_values": (0, -1)}, "-1 can't be stored in a mask"),
        ({"mask_values": (0, (1, 0))}, "names a value twice"),
        ({"mask_values": (0, 1), "ignore_index": 1}, "names a value twice"),
        ({"mask_values": (0, 1), "ignore_index": "#000000"}, "numbers are needed, or data.mask_colors"),
        ({"mask_colors": ((0, 0, 0), "#00000")}, "'#00000' is no colour"),
        ({"mask_colors": ((0, 0, 256), (0, 0, 0))}, "is no colour"),
        ({"mask_colors": ((0, 0, 0), "#000000")}, "names a colour twice"),
        ({"mask_colors": ((0, 0, 0),), "mask_values": (0,)}, "give one of them"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings, message):
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        DataConfig(**settings)


def test_colours_that_jpeg_or_smoothing_made_are_of_the_nearest_class():
    stream = io.BytesIO()
    stored = np.array([[[0, 0, 0], [5, 2, 0], [130, 4, 0], [60, 0, 0], [70, 0, 0], [0, 0, 250]]], np.uint8)
    Image.fromarray(stored).save(stream, "PNG")
    colours = {"mask_colors": ("#000000", "#800000"), "ignore_index": "#0000ff"}
    assert decode_mask(stream.getvalue(), DataConfig(**colours, mask_nearest=True), None)[0].tolist() == [
        [0, 0, 1, 0, 1, IGNORE]
    ]
    with pytest.raises(ImageError, match=r"--set data\.mask_nearest=true"):
        decode_mask(stream.getvalue(), DataConfig(**colours), None)


@pytest.mark.parametrize("comparison", [">=300", ">255", "<0"])
def test_a_comparison_that_no_value_of_8_bits_meets_is_an_error(tmp_path, comparison):
    for number in range(3):
        Image.fromarray(np.full((4, 4), 255 * (number % 2), np.uint8)).save(tmp_path / f"{number}.png")
    paths = [str(tmp_path / f"{number}.png") for number in range(3)]
    with pytest.raises(UserError, match=r"no value of 8 bits is .*0\.png"):
        check_comparisons(paths, DataConfig(mask_values=(0, comparison)))
    check_comparisons(paths, DataConfig(mask_values=(0, ">=255")))
    Image.fromarray(np.full((4, 4), 400, np.uint16)).save(tmp_path / "1.png")
    check_comparisons(paths, DataConfig(mask_values=(0, comparison)))
