"""Class values, class weights, border maps, clean-up and pixel counts of masks."""

import numpy as np
import pytest
from PIL import Image

from unet_ray.config import Cleanup, DataConfig, UserError
from unet_ray.data.masks import border_map, clean, infer_values, inverse_frequencies, pixel_counts


def stored(folder, *arrays):
    paths = []
    for number, array in enumerate(arrays):
        path = folder / f"{number}.png"
        Image.fromarray(np.array(array, np.uint8)).save(path)
        paths.append(str(path))
    return paths


@pytest.mark.parametrize(
    ("values", "classes", "expected"),
    [
        ([[0, 255]], 1, (0, 255)),
        ([[0, 1]], 1, (0, 1)),
        ([[0, 38]], 1, (0, 38)),
        ([[0, 2]], 4, (0, 1, 2, 3)),
        ([[0, 127, 255]], 3, (0, 127, 255)),
    ],
)
def test_values_become_classes_by_a_rule_for_the_whole_set(tmp_path, values, classes, expected):
    assert infer_values(stored(tmp_path, values, [[0, 0]]), classes, DataConfig()) == expected


def test_the_ignored_value_is_not_a_class(tmp_path):
    assert infer_values(stored(tmp_path, [[0, 1, 255]]), 1, DataConfig(ignore_index=255)) == (0, 1)


@pytest.mark.parametrize("values", [[[0, 1, 255]], [[0, 3, 7, 250]], [[0, 0]]])
def test_values_that_fit_no_rule_are_listed_with_the_remedy(tmp_path, values):
    with pytest.raises(UserError, match=r"--set data.mask_values='\[0, 255\]'"):
        infer_values(stored(tmp_path, values), 1, DataConfig())


def test_the_border_map_by_hand():
    """Two objects, a gap of three pixels between them: equation 2 of the paper with d1 and d2 counted in pixels."""
    mask = np.zeros((9, 11), np.uint8)
    mask[:, :4] = 1
    mask[:, 7:] = 1
    weights = border_map(mask, sigma=5)
    expected = round(255 * np.exp(-((1 + 3) ** 2) / 50))
    assert weights[4, 4:7].tolist() == [expected, round(255 * np.exp(-((2 + 2) ** 2) / 50)), expected]
    assert not weights[mask == 1].any()
    assert not border_map(np.where(np.arange(11) < 4, mask, 0).astype(np.uint8), sigma=5).any()  # one object: no gap


def test_the_border_map_equals_that_from_distances_to_every_object():
    """Against the plain way: a distance transform of the whole image for each object."""
    from scipy import ndimage

    generator = np.random.default_rng(0)
    mask = (ndimage.gaussian_filter(generator.standard_normal((80, 70)), 3) > 0.02).astype(np.uint8)
    labels, count = ndimage.label(mask)
    assert count > 5
    distances = np.sort([ndimage.distance_transform_edt(labels != n) for n in range(1, count + 1)], axis=0)
    expected = np.where(mask == 0, np.rint(255 * np.exp(-((distances[0] + distances[1]) ** 2) / (2 * 3**2))), 0)
    assert np.abs(border_map(mask, sigma=3).astype(int) - expected).max() <= 1


def test_classes_of_different_ids_are_different_objects_and_ignored_pixels_none():
    mask = np.array([[1, 1, 0, 2, 2, 0, 255]], np.uint8)
    assert border_map(mask, sigma=2)[0, 2] == round(255 * np.exp(-((1 + 1) ** 2) / 8))
    assert border_map(np.array([[1, 1, 0, 255, 255]], np.uint8), sigma=2).max() == 0


def test_inverse_frequencies_by_hand(tmp_path):
    paths = stored(tmp_path, [[0, 0, 0, 255]], [[0, 0, 0, 255]])
    assert inverse_frequencies(paths, 2, DataConfig(mask_values=(0, 255))) == pytest.approx(
        (8 / (2 * 6), 8 / (2 * 2)), rel=1e-5
    )
    with pytest.raises(UserError, match="class 2 does not occur in a sample of 2 masks"):
        inverse_frequencies(paths, 3, DataConfig(mask_values=(0, 255, 7)))


def test_clean_up_removes_small_regions_keeps_the_largest_and_fills_holes():
    mask = np.zeros((12, 12), np.uint8)
    mask[1:6, 1:6], mask[3, 3] = 1, 0  # 24 pixels with a hole
    mask[8:10, 8:10] = 1
    mask[11, 0] = 1
    mask[6, 6] = 1  # touches the first by a corner only
    before = mask.copy()

    def cleaned(rule: str) -> int:
        return int(clean(mask, Cleanup.parse(rule)).sum())

    assert cleaned("none") == 30
    assert cleaned("area=2") == 28
    assert cleaned("area=3%") == 24  # of 144: 4.3 pixels
    assert cleaned("largest") == 24
    assert cleaned("largest+holes") == 25
    assert cleaned("holes") == 31
    assert (mask == before).all()


def test_clean_up_of_several_classes_gives_what_it_removes_to_class_0():
    mask = np.array([[1, 1, 1, 2], [1, 0, 1, 2], [1, 1, 1, 2], [2, 0, 0, 1]], np.uint8)
    expected = [[1, 1, 1, 2], [1, 1, 1, 2], [1, 1, 1, 2], [0, 0, 0, 0]]
    assert clean(mask, Cleanup.parse("largest+holes")).tolist() == expected


@pytest.mark.parametrize("rule", ["", "area", "area=x", "area=-1", "biggest", "none+holes", "holes+"])
def test_an_invalid_clean_up_is_refused(rule):
    with pytest.raises(UserError, match="--cleanup"):
        Cleanup.parse(rule)


@pytest.mark.parametrize("classes", [2, 3, 255])
def test_pixels_of_each_class_are_counted(classes):
    mask = np.random.default_rng(0).integers(0, classes, (30, 40)).astype(np.uint8)
    assert pixel_counts(mask, classes) == np.bincount(mask.ravel(), minlength=classes).tolist()
