"""Lists of pairs: every form of a list trains on what it says, and a list that can't be right is one line."""

import csv
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import TINY, make_discs

import unet_ray
from unet_ray.config import DataConfig, UserError
from unet_ray.data import pages, pair_lists
from unet_ray.data.pairs import find_pairs
from unet_ray.data.rows import Decoder
from unet_ray.data.splits import read_split


@pytest.fixture
def files(tmp_path):
    """Paths of six images and their masks, relative to the folder of the lists."""
    images, masks = make_discs(tmp_path / "some discs", 6)
    return [
        (f"some discs/{images.name}/{p.name}", f"some discs/{masks.name}/{p.name}") for p in sorted(images.iterdir())
    ]


def as_csv(rows, path, header=("image", "mask")):
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([header, *rows] if header else rows)


def as_text(rows, path, separator=" "):
    path.write_text("# a comment\n" + "".join(f"{image}{separator}{mask}\n" for image, mask in rows))


def as_json(rows, path):
    path.write_text("".join(json.dumps({"id": 1, "image": image, "label": mask}) + "\n" for image, mask in rows))


def as_paths(rows, path):
    pq.write_table(pa.table({"file_name": [image for image, _ in rows], "mask": [mask for _, mask in rows]}), path)


def as_cells(rows, path, names=True):
    """Encoded images and masks, as Hugging Face stores them, in row groups of two."""

    def cells(column):
        encoded = [(path.parent / row[column]).read_bytes() for row in rows]
        named = [row[column].rpartition("/")[2] if names else None for row in rows]
        return [{"bytes": data, "path": name} for data, name in zip(encoded, named, strict=True)]

    pq.write_table(
        pa.table({"scene": ["x"] * len(rows), "image": cells(0), "annotation": cells(1)}), path, row_group_size=2
    )


LISTS = {
    "pairs.csv": as_csv,
    "no_names.csv": lambda rows, path: as_csv(rows, path, None),
    "other_names.csv": lambda rows, path: as_csv(rows, path, ("rgb", "truth")),
    "pairs.tsv": lambda rows, path: as_text(rows, path, "\t"),
    "pairs.txt": as_text,
    "commas.txt": lambda rows, path: as_text(rows, path, ","),
    "pairs.jsonl": as_json,
    "paths.parquet": as_paths,
    "cells.parquet": as_cells,
    "unnamed.parquet": lambda rows, path: as_cells(rows, path, names=False),
}


@pytest.mark.parametrize("name", LISTS)
def test_every_form_of_a_list_gives_the_pairs_that_it_names(files, tmp_path, name):
    LISTS[name](files, tmp_path / name)
    pairs = find_pairs(DataConfig(images=str(tmp_path / name)))
    stems = [image.rpartition("/")[2].removesuffix(".png") for image, _ in files]
    assert [pair.key for pair in pairs] == (stems if "unnamed" not in name else [f"{row:09d}" for row in range(6)])
    for pair, (image, mask) in zip(pairs, files, strict=True):
        assert pages.read_file(pair.image, 10**6) == (tmp_path / image).read_bytes()
        assert pages.read_file(pair.mask, 10**6) == (tmp_path / mask).read_bytes()


def test_a_row_is_not_matched_by_name_but_by_the_list(files, tmp_path):
    crossed = [(image, mask) for (image, _), (_, mask) in zip(files, reversed(files), strict=True)]
    as_csv(crossed, tmp_path / "crossed.csv")
    pairs = find_pairs(DataConfig(images=str(tmp_path / "crossed.csv")))
    assert [pair.mask for pair in pairs] == [str(tmp_path / mask) for _, mask in crossed]


def test_cells_are_decoded_in_any_order(files, tmp_path):
    as_cells(files, tmp_path / "cells.parquet")
    data = DataConfig(images=str(tmp_path / "cells.parquet"), image_size=32, mask_values=(0, 255))
    decoder = Decoder(data, 3)
    for pair, (image, mask) in reversed([*zip(find_pairs(data), files, strict=True)]):
        row, wanted = decoder(pair.image, pair.mask), decoder(str(tmp_path / image), str(tmp_path / mask))
        assert all((row[part] == wanted[part]).all() for part in ("image", "mask"))
    source, _, cell = pair.image.partition("#")
    with pytest.raises(UserError, match=r"cells\.parquet#99:image: the file has no row 99"):
        decoder(f"{source}#99:{cell.partition(':')[2]}", pair.mask)


def test_a_folder_of_hugging_face_trains_on_its_own_parts_and_is_scored(files, tmp_path):
    folder = tmp_path / "set"
    (folder / "data").mkdir(parents=True)
    parts = {
        "train-00000-of-00002": files[:2],
        "train-00001-of-00002": files[2:4],
        "validation-00000-of-00001": files[4:],
    }
    for name, rows in parts.items():
        as_cells(rows, tmp_path / "part.parquet")
        (tmp_path / "part.parquet").rename(folder / f"data/{name}.parquet")
    run = tmp_path / "run"
    unet_ray.train(folder, folder, run, settings=dict(TINY), local=True)
    split = read_split(str(run / "split.csv"))
    assert sorted(split.values()) == ["train"] * 4 + ["val"] * 2
    assert {key.split("/")[0] for key in split} == {"train", "validation"}
    assert unet_ray.evaluate(run, local=True).images == 2
    assert unet_ray.evaluate(run, folder, folder, local=True).images == 6


def test_rows_without_a_mask_are_left_out_and_counted(files, tmp_path, caplog):
    as_csv([*files[:4], (files[4][0], "")], tmp_path / "pairs.csv")
    assert len(find_pairs(DataConfig(images=str(tmp_path / "pairs.csv")), say=True)) == 4
    assert "1 images have no mask" in caplog.text


def test_an_image_in_several_rows_has_several_masks(files, tmp_path):
    as_csv([*files[:2], (files[0][0], files[2][1])], tmp_path / "pairs.csv")
    with pytest.raises(UserError, match="several masks"):
        find_pairs(DataConfig(images=str(tmp_path / "pairs.csv")))
    first, _ = find_pairs(DataConfig(images=str(tmp_path / "pairs.csv"), several_masks="union"))
    assert first.mask.split("\0") == [str(tmp_path / mask) for mask in (files[0][1], files[2][1])]


@pytest.mark.parametrize(
    "rows, message",
    [
        ([("image", "mask"), ("a.png", "b.png")], r"list\.csv: 2 of the files that it names are not there: .*a\.png"),
        ([("a.png",)], r"list\.csv: a list of pairs has a column of images, .* and one of masks, such as mask"),
        ([("x", "y", "z")], r"list\.csv: a list of pairs has a column of images"),
    ],
)
def test_a_list_that_cant_be_right_is_one_line(tmp_path, rows, message):
    as_csv(rows, tmp_path / "list.csv", None)
    with pytest.raises(UserError, match=message):
        find_pairs(DataConfig(images=str(tmp_path / "list.csv")))


def test_a_list_and_a_rule_for_names_exclude_each_other(files, tmp_path):
    as_csv(files, tmp_path / "pairs.csv")
    with pytest.raises(UserError, match="leave out --match"):
        find_pairs(DataConfig(images=str(tmp_path / "pairs.csv"), match="x"))


@pytest.mark.parametrize("name", ["pairs.csv", "cells.parquet"])
def test_what_doctor_says_of_a_list_trains(files, tmp_path, name):
    from unet_ray.doctor import examine

    LISTS[name](files, tmp_path / name)
    found = examine(str(tmp_path / name), timing=False)
    assert found.pairs == 6
    assert not [finding for finding in found.findings if finding.level == "error"]
    assert "--masks" not in found.suggestion.command
    assert str(tmp_path / name) in found.suggestion.command


def test_only_lists_and_folders_of_parquet_are_lists_of_pairs(files, tmp_path):
    as_cells(files, tmp_path / "cells.parquet")
    assert not pair_lists.is_pair_list(str(tmp_path))  # there are images, one folder deeper
    assert not pair_lists.is_pair_list(str(tmp_path / "some discs"))
    (tmp_path / "set").mkdir()
    (tmp_path / "cells.parquet").rename(tmp_path / "set/cells.parquet")
    assert pair_lists.is_pair_list(str(tmp_path / "set"))
