"""Data sets in the forms that people have: `doctor` ends with a command that trains on the right thing, as printed."""

import shlex
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import disc
from PIL import Image

from unet_ray import doctor
from unet_ray.cli import main
from unet_ray.config import IGNORE
from unet_ray.data.pairs import find_pairs
from unet_ray.data.rows import Decoder
from unet_ray.data.splits import SPLIT, read_split
from unet_ray.settings import load_train_config

SIDE, COUNT = 32, 10
SMALL = ["--local", "--epochs", "1", "--image-size", "32", "--set", "model.base_channels=8", "--no-report"]


def truth(number: int) -> np.ndarray:
    """Returns the object of an image: bool [SIDE,SIDE]. Each image has another one."""
    return disc(SIDE, (9 + number, 12 + number % 5), 5 + number % 4) > 0


def photo(path: Path, number: int) -> None:
    noise = np.random.default_rng(number).integers(0, 120, (SIDE, SIDE, 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray((noise + 120 * truth(number)[..., None]).astype(np.uint8))
    picture.save(path, **({"quality": 95} if path.suffix == ".jpg" else {}))


def save(path: Path, array: np.ndarray, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)


def gray(number: int, value: int = 255) -> np.ndarray:
    return truth(number).astype(np.uint8) * np.uint8(value)


def each(root: Path, image: str, write: Callable[[int], None], mask: Callable[[int], np.ndarray] = gray, at: str = ""):
    """Writes the images, and the masks at `at`, or by `write`; `#` in a name stands for the number."""
    for number in range(COUNT):
        photo(root / image.replace("#", f"{number:03d}"), number)
        if at:
            save(root / at.replace("#", f"{number:03d}"), mask(number))
        else:
            write(number)


def simple(image: str, mask: str) -> Callable[[Path], None]:
    return lambda root: each(root, image, lambda _: None, at=mask)


def jpeg_masks(root: Path) -> None:
    each(root, "images/#.jpg", lambda n: save(root / f"masks/{n:03d}.jpg", gray(n), quality=70))


def numbered(root: Path) -> None:
    """Instance numbers: as many objects as the image's number says, and all are the object."""

    def write(number: int) -> None:
        rows = np.minimum(np.arange(SIDE) * (1 + number % 4) // SIDE, number % 4) + 1
        save(root / f"m/{number:03d}.png", (truth(number) * rows[:, None]).astype(np.uint8))

    each(root, "i/#.jpg", write)


def palettes(root: Path) -> None:
    """Each file has its own order of colours, as GIF writers make it."""

    def write(number: int) -> None:
        order = [(0, 0, 0), (255, 0, 0)][:: 1 if number % 2 else -1]
        image = Image.fromarray((truth(number) == (order[1] == (255, 0, 0))).astype(np.uint8), "P")
        image.putpalette([part for colour in order for part in colour])
        (root / "masks").mkdir(exist_ok=True)
        image.save(root / f"masks/{number:03d}.png")

    each(root, "images/#.jpg", write)


def colours(root: Path) -> None:
    each(
        root,
        "raw/#.png",
        lambda n: save(
            root / f"labeled/{n:03d}_L.png", np.where(truth(n)[..., None], [64, 0, 128], [0, 0, 0]).astype("u1")
        ),
    )
    (root / "label_colors.txt").write_text("64 0 128\tCar\n128 0 0\tHouse\n0 0 0\tBackground\n")


def several_objects(root: Path) -> None:
    def write(number: int) -> None:
        upper = truth(number) & (np.arange(SIDE) < 14)[:, None]
        for name, part in (("p", upper), ("q", truth(number) & ~upper)):
            save(root / f"{number:03d}/masks/{name}{number * 7}.png", part.astype(np.uint8) * np.uint8(255))

    each(root, "#/images/#.png", write)


def folders_are_classes(root: Path) -> None:
    def write(number: int) -> None:
        upper = truth(number) & (np.arange(SIDE) < 14)[:, None] & bool(number % 3)
        save(root / f"masks/EX/im_{number:03d}_EX.png", (truth(number) & ~upper).astype(np.uint8))
        if number % 3:
            save(root / f"masks/MA/im_{number:03d}_MA.png", upper.astype(np.uint8))

    each(root, "images/im_#.jpg", write)


def splits_by_folder(root: Path) -> None:
    for part, numbers in (("train", range(6)), ("valid", range(6, 8)), ("test", range(8, 10))):
        for number in numbers:
            photo(root / part / f"images/{number}.jpg", number)
            save(root / part / f"masks/{number}.png", gray(number))


def mostly_void(root: Path) -> None:
    def write(number: int) -> None:
        mask = gray(number, 1)
        mask[:2] = 255
        save(root / f"SegmentationClass/{number:03d}.png", mask)
        save(root / f"SegmentationObject/{number:03d}.png", gray(number, 1 + number))

    each(root, "JPEGImages/#.jpg", write)


def quarter(root: Path) -> None:
    each(root, "images/#.jpg", lambda n: save(root / f"masks/{n:03d}.png", gray(n)[::4, ::4]))


def opacity(root: Path) -> None:
    def write(number: int) -> None:
        save(root / f"masks/{number:03d}.png", np.dstack([np.zeros((SIDE, SIDE, 3), np.uint8), gray(number)]))

    each(root, "images/#.jpg", write)


def partly(root: Path) -> None:
    simple("images/#.jpg", "masks/#.png")(root)
    for number in (2, 5):
        (root / f"masks/{number:03d}.png").unlink()


def defect_and_good(root: Path) -> None:
    for kind in ("defect", "good"):
        for number in range(COUNT):
            photo(root / f"images/{kind}/{number:03d}.png", number)
            save(root / f"masks/{kind}/{number:03d}.png", gray(number, 255 * (kind == "defect")))


def camvid_folders(root: Path) -> None:
    for part, numbers in (("train", range(6)), ("val", range(6, 8)), ("test", range(8, 10))):
        for number in numbers:
            photo(root / part / f"{number}.png", number)
            save(root / f"{part}annot/{number}.png", gray(number, 1))


def lists_of_a_split(root: Path) -> None:
    simple("JPEGImages/#.jpg", "SegmentationClass/#.png")(root)
    for part, numbers in (("train", range(5)), ("val", range(5, 8)), ("test", range(8, 10))):
        path = root / f"ImageSets/Segmentation/{part}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{number:03d}\n" for number in numbers))


def blurred_colours(root: Path) -> None:
    def write(number: int) -> None:
        mask = np.where(truth(number)[..., None], [0, 128, 0], [128, 0, 128]).astype("u1")
        mask[: SIDE // 4] = [128, 0, 128]
        picture = Image.fromarray(mask).resize((97, 97), Image.Resampling.BILINEAR)  # smoothed at the edges
        save(root / f"masks/{number:03d}.png", np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.NEAREST)))

    each(root, "images/#.png", write)
    (root / "class.txt").write_text("Class\tR\tG\t B\n1\t128 \t0 \t128 \t_background_\n2\t0 \t128\t 0 \tintact grain\n")


def jpeg_colours(root: Path) -> None:
    """Without a list of classes, of many colours, and larger than the images."""

    def write(number: int) -> None:
        mask = np.where(truth(number)[..., None], [200, 30, 60], [0, 0, 0]).astype("u1")
        save(root / f"masks/{number:03d}.jpg", np.kron(mask, np.ones((4, 4, 1), np.uint8)), quality=90)

    each(root, "images/#.png", write)


def csv_of_pairs(root: Path) -> None:
    simple("shots/x#.jpg", "drawn/y#.png")(root)
    rows = [f"shots/x{number:03d}.jpg,drawn/y{number:03d}.png\n" for number in range(COUNT)]
    (root / "pairs.csv").write_text("image,mask\n" + "".join(rows))


SETS = [
    # (how it is written, --images, --masks, classes, split)
    ("same names", simple("images/#.jpg", "masks/#.png"), "images", "masks", 1, {"train": 8, "val": 2}),
    ("a suffix", simple("in/IS_#.jpg", "gt/IS_#_segmentation.png"), "in", "gt", 1, {"train": 8, "val": 2}),
    ("both suffixes", simple("a/b/#_left8bit.png", "c/b/#_gt_ids.png"), "a", "c", 1, {"train": 8, "val": 2}),
    ("a prefix", simple("images/img_#.jpg", "masks/mask_#.png"), "images", "masks", 1, {"train": 8, "val": 2}),
    ("a channel's number", simple("imagesTr/case_#_0000.png", "labelsTr/case_#.png"), "imagesTr", "labelsTr", 1, None),
    ("two extensions", simple("images/#.jpg", "masks/#.jpg.png"), "images", "masks", 1, None),
    ("one folder", simple("all/#.jpg", "all/#_1stHO.png"), "all", None, 1, None),
    ("one folder, two suffixes", simple("all/#_sat.jpg", "all/#_mask.png"), "all", None, 1, None),
    ("folders in a folder", simple("set/photos/#.jpg", "set/labels/#.png"), "set", None, 1, None),
    ("JPEG masks", jpeg_masks, "images", "masks", 1, None),
    ("numbered objects", numbered, "i", "m", 1, None),
    ("palettes that differ", palettes, "images", "masks", 1, None),
    ("colours and a list", colours, "raw", "labeled", 3, None),
    ("a file an object", several_objects, ".", None, 1, None),
    ("a folder a class", folders_are_classes, "images", "masks", 3, None),
    ("folders of a split", splits_by_folder, ".", None, 1, {"train": 6, "val": 2, "test": 2}),
    ("VOC", mostly_void, "JPEGImages", "SegmentationClass", 1, None),
    ("masks of a quarter", quarter, "images", "masks", 1, None),
    ("opacity", opacity, "images", "masks", 1, None),
    ("partly labelled", partly, "images", "masks", 1, {"train": 6, "val": 2}),
    ("class folders", defect_and_good, "images", "masks", 1, {"train": 16, "val": 4}),
    ("folders with partners", camvid_folders, ".", None, 1, {"train": 6, "val": 2, "test": 2}),
    ("lists of a split", lists_of_a_split, "JPEGImages", "SegmentationClass", 1, {"train": 5, "val": 3, "test": 2}),
    ("smoothed colours", blurred_colours, "images", "masks", 1, None),
    ("JPEG colours", jpeg_colours, "images", "masks", 1, None),
    ("a list of pairs", csv_of_pairs, "pairs.csv", None, 1, {"train": 8, "val": 2}),
]


def suggested(root: Path, images: str, masks: str | None) -> doctor.Report:
    return doctor.examine(str(root / images), None if masks is None else str(root / masks), timing=False)


@pytest.mark.parametrize("form", SETS, ids=[form[0] for form in SETS])
def test_the_suggested_command_trains_on_the_right_thing(form, tmp_path):
    _, write, images, masks, classes, split = form
    write(tmp_path)
    report = suggested(tmp_path, images, masks)
    assert report.exit_code < 2 and report.suggestion is not None, [f.text for f in report.findings]
    words = shlex.split(report.suggestion.command)
    assert words[:2] == ["unet-ray", "train"]
    words[words.index("RUN")] = str(tmp_path / "RUN")
    ran = CliRunner().invoke(main, [*words[1:], *SMALL])
    assert ran.exit_code == 0, ran.output
    config = load_train_config(config_file=(tmp_path / "RUN/config.yaml").read_text())
    assert config.model.num_classes == classes
    sides = read_split(str(tmp_path / "RUN" / SPLIT))
    assert split is None or Counter(sides.values()) == split, ran.output
    check_masks(config, sides)


def check_masks(config, sides: dict[str, str]) -> None:
    """Each mask is where its image has the object."""
    pairs = find_pairs(config.data)
    assert len(pairs) == len(sides) >= 8
    decoder = Decoder.of(config)
    for pair in pairs:
        row = decoder(pair.image, pair.mask)
        valid = row["mask"] != IGNORE
        found = (row["mask"] > 0) & valid
        seen = (row["image"].mean(axis=2) > 120) & valid
        if found.any() or "good" not in pair.image:
            wrong = (found != seen).mean()
            assert wrong < (0.08 if config.data.mask_resize else 0.04), f"{pair}: {wrong:.3f}"


def test_a_class_folder_and_a_rest_are_the_classes_in_the_order_of_their_names(tmp_path):
    folders_are_classes(tmp_path)
    report = suggested(tmp_path, "images", "masks")
    config = report.suggestion.config()
    assert config.data.classes == ("background", "EX", "MA")
    assert config.data.several_masks == "classes"


def test_both_sides_of_a_drawn_split_have_objects(tmp_path):
    defect_and_good(tmp_path)
    report = suggested(tmp_path, "images", "masks")
    assert "--group-by" not in report.suggestion.command


def test_the_images_to_test_with_are_scored_when_asked(tmp_path):
    splits_by_folder(tmp_path)
    words = shlex.split(suggested(tmp_path, ".", None).suggestion.command)
    words[words.index("RUN")] = str(tmp_path / "RUN")
    assert CliRunner().invoke(main, [*words[1:], *SMALL]).exit_code == 0
    for part, count in (("test", 2), ("val", 2), ("train", 6)):
        ran = CliRunner().invoke(main, ["evaluate", str(tmp_path / "RUN"), "--part", part, "--local", "--json"])
        assert ran.exit_code == 0 and f'"images": {count}' in ran.output, ran.output


def test_a_match_that_is_given_is_kept(tmp_path):
    simple("in/IS_#.jpg", "gt/IS_#_segmentation.png")(tmp_path)
    report = doctor.examine(str(tmp_path / "in"), str(tmp_path / "gt"), match=r"IS_[0-9]+", timing=False)
    assert report.pairs == COUNT and "--match 'IS_[0-9]+'" in report.suggestion.command


@pytest.mark.parametrize(
    ("name", "text", "kind"),
    [
        ("instances.json", '{"images": [], "annotations": [], "categories": []}', "COCO's JSON"),
        ("000.json", '{"version": "5.0", "shapes": [], "imagePath": "000.jpg"}', "labelme's JSON"),
        ("annotations.xml", "<annotations><version>1.1</version><image id='0'/></annotations>", "CVAT's XML"),
        ("train.csv", "ImageId,EncodedPixels\n000.jpg,1 3 10 5\n", "run lengths in a table"),
        ("000.txt", "0 0.1 0.1 0.5 0.1 0.5 0.5\n", "YOLO's polygons"),
    ],
)
@pytest.mark.parametrize("given", ["file", "folder", "beside"])
def test_annotations_are_recognised_and_said(tmp_path, name, text, kind, given):
    for number in range(3):
        photo(tmp_path / f"images/{number:03d}.jpg", number)
    folder = tmp_path / ("images" if given == "beside" else "labels")
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    masks = {"file": f"labels/{name}", "folder": "labels", "beside": None}[given]
    report = suggested(tmp_path, "images", masks)
    [finding] = [finding for finding in report.findings if finding.code == "annotations"]
    assert kind in finding.text and f"{report.pairs} annotated image" in finding.text
    assert report.suggestion is None and report.pairs <= 1  # nothing can be trained on so few


def test_a_list_of_all_that_is_to_train_on_is_no_split(tmp_path):
    simple("images/#.jpg", "masks/#.png")(tmp_path)
    (tmp_path / "images/train.txt").write_text("".join(f"{number:03d}\n" for number in range(COUNT)))
    assert "--split" not in suggested(tmp_path, "images", "masks").suggestion.command
