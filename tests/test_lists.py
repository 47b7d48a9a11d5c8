"""Lists as spreadsheets and scripts write them; files named one by one; globs; predictions among the images."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import make_discs, make_model

from unet_ray.config import PredictConfig, UserError
from unet_ray.data.inputs import find_images, iter_images
from unet_ray.inference.naming import images_of, shown
from unet_ray.inference.predict import predict
from unet_ray.ray_backend.session import LOCAL

NAMES = ["a/1.jpg", "b, c/2.png"]


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    return folder


def names_in(location: Path, column: str | None = None) -> list[str]:
    return [image.name for image in iter_images(str(location), column)]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("l.txt", b"\xef\xbb\xbf# mine\r\n./a/1.jpg\r\n\r\n'b, c/2.png'\r\n"),
        ("l.txt", "a/1.jpg\nb, c/2.png\n".encode("utf-16")),
        ("l.txt", "a/1.jpg\nb, c/2.png\n".encode("utf-16-le")),
        ("l.txt", "a/1.jpg\nb, c/2.png\n".encode("utf-16-be")),
        ("l.txt", "\ufeffa/1.jpg\nb, c/2.png\n".encode("utf-16")),
        ("l.csv", b'label,path\ncar,a/1.jpg\n# a comment\ncar,"b, c/2.png"\n'),
        ("l.csv", b"Path;label\na/1.jpg;car\nb, c/2.png;car\n"),
        ("l.csv", b'a/1.jpg,0\n"b, c/2.png",1\n'),
        ("l.csv", b'0,a/1.jpg\n1,"x/../b, c/2.png"\n'),
        ("l.tsv", b"size\tfile_name\n1\ta/1.jpg\n1\tb, c/2.png\n"),
        ("l.jsonl", b'{"path": "a/1.jpg"}\n\n{"path": "b, c/2.png", "label": 1}\n'),
        ("l.ndjson", b'"a/1.jpg"\n"b, c/2.png"\n'),
    ],
)
def test_lists_as_they_come_name_the_same_images(tmp_path, name, data):
    touch(tmp_path, *NAMES)
    (tmp_path / name).write_bytes(data)
    found = list(iter_images(str(tmp_path / name)))
    assert [image.name for image in found] == NAMES
    assert [image.path for image in found] == [str(tmp_path / name) for name in NAMES]
    assert all(image.size == 1 for image in found)


def test_an_uri_of_a_file_and_a_line_without_an_image_are_rows(tmp_path):
    touch(tmp_path, "a b.jpg")
    uri = (tmp_path / "a b.jpg").as_uri()
    (tmp_path / "l.jsonl").write_text(f'{{"path": "{uri}"}}\n{{"path": null}}\nnonsense\n{{"path": "gone.jpg"}}\n[1]\n')
    found = list(iter_images(str(tmp_path / "l.jsonl")))
    assert [image.name for image in found] == ["a b.jpg", "l.jsonl#2", "l.jsonl#3", "gone.jpg", "l.jsonl#5"]
    assert [image.size for image in found] == [1, -1, -1, -1, -1]


def test_the_column_is_known_or_named(tmp_path):
    touch(tmp_path, *NAMES)
    (tmp_path / "l.csv").write_text('front,back\na/1.jpg,"b, c/2.png"\n')
    assert names_in(tmp_path / "l.csv", "back") == ["b, c/2.png"]
    with pytest.raises(UserError, match=r"no column 'bakc': did you mean 'back'\?: it has front, back"):
        names_in(tmp_path / "l.csv", "bakc")
    with pytest.raises(UserError, match=r"no column path, uri, .* --column"):
        names_in(tmp_path / "l.csv")
    pq.write_table(pa.table({"front": ["a/1.jpg", None]}), tmp_path / "l.parquet")
    assert names_in(tmp_path / "l.parquet", "front") == ["a/1.jpg", "l.parquet#2"]
    with pytest.raises(UserError, match="name the right one of front with --column"):
        names_in(tmp_path / "l.parquet")


def test_a_list_may_say_size_and_time_of_objects_which_are_then_not_asked(tmp_path, monkeypatch):
    from unet_ray.data import storage

    asked = []
    monkeypatch.setattr(storage, "sizes_and_times", lambda paths: asked.extend(paths) or [(7, 7)] * len(paths))
    lines = "path,size,mtime_ns,mtime\ns3://b/1.jpg,5,6,\ns3://b/2.jpg,5,,1970-01-01T00:00:01Z\ns3://b/3.jpg,,,2\n"
    (tmp_path / "l.csv").write_text(lines)
    found = list(iter_images(str(tmp_path / "l.csv")))
    assert [(image.size, image.mtime_ns) for image in found] == [(5, 6), (5, 10**9), (7, 7)]
    assert asked == ["s3://b/3.jpg"]


def test_parquet_below_folders_and_hugging_faces_layout(tmp_path):
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    for part in ("x=1/y=2", "x=2"):
        (tmp_path / "t.parquet" / part).mkdir(parents=True)
        pq.write_table(pa.table({"image": [b"1", b"2"]}), tmp_path / "t.parquet" / part / "0.parquet")
    assert len(names_in(tmp_path / "t.parquet")) == 4
    rows = pa.array([{"bytes": b"1", "path": "cat.jpg"}, {"bytes": b"2", "path": None}], image)
    touch(tmp_path / "hub", "README.md")
    (tmp_path / "hub/data").mkdir()
    pq.write_table(pa.table({"image": rows}), tmp_path / "hub/data/train-00000-of-00001.parquet")
    start = "data/train-00000-of-00001"
    assert names_in(tmp_path / "hub") == [f"{start}/cat.jpg", f"{start}/000000001"]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("day*/cam", ["day1/cam/1.jpg", "day1/cam/below/2.jpg", "day2/cam/3.jpg"]),
        ("day[2]/*/*.jpg", ["day2/cam/3.jpg"]),
        ("**/[12].jpg", ["day1/cam/1.jpg", "day1/cam/below/2.jpg"]),
    ],
)
@pytest.mark.parametrize("uri", [False, True])
def test_globs_of_files_and_folders(tmp_path, monkeypatch, pattern, names, uri):
    touch(tmp_path, "day1/cam/1.jpg", "day1/cam/below/2.jpg", "day2/cam/3.jpg", "day2/other/4.png", "night/cam/5.jpg")
    if uri:  # a bucket that is a folder
        from pyarrow.fs import LocalFileSystem, SubTreeFileSystem

        from unet_ray.data import storage

        bucket = SubTreeFileSystem(str(tmp_path), LocalFileSystem())
        monkeypatch.setattr(storage, "resolve", lambda location: (bucket, location.partition("://b")[2].lstrip("/")))
        assert [image.name for image in find_images(f"s3://b/{pattern}")] == names
    else:
        assert [image.name for image in find_images(f"{tmp_path}/{pattern}")] == names


def test_files_named_one_by_one_are_one_input_below_their_common_folder(tmp_path):
    folder = touch(tmp_path / "imgs", "a/1.jpg", "b/1.jpg", "b/2.jpg")
    files = [str(folder / name) for name in ("a/1.jpg", "b/1.jpg")]
    assert [image.name for image in images_of(files)] == ["a/1.jpg", "b/1.jpg"]
    assert shown(files) == shown([*files, str(folder / "b/2.jpg")]) == [f"{folder}/*"]
    assert [image.name for image in images_of([str(folder / "a"), *files])] == [
        "a/1.jpg",
        "imgs/a/1.jpg",
        "imgs/b/1.jpg",
    ]
    with pytest.raises(UserError, match=r"gone.jpg: no such folder or file"):
        list(images_of([*files, str(folder / "gone.jpg")]))


def predicted(model: Path, *inputs: Path, out: Path):
    config = PredictConfig(model=str(model), inputs=tuple(map(str, inputs)), out=str(out), precision="fp32")
    return predict(config, runtime=LOCAL)


def test_a_prediction_inside_its_input_is_not_segmented(tmp_path, caplog):
    images, _ = make_discs(tmp_path, 3)
    model = make_model(tmp_path / "model")
    for _ in range(2):
        assert predicted(model, tmp_path / "images", out=images / "out").images == 3
    assert f"{images}/out was written by `predict`: it is left out" in caplog.text
    assert predicted(model, images, out=tmp_path / "another").images == 3


def test_bad_lines_are_failed_rows_duplicates_are_done_once_and_one_more_file_goes_on(tmp_path, caplog):
    images, _ = make_discs(tmp_path, 3)
    model = make_model(tmp_path / "model")
    first, second, third = sorted(images.iterdir())
    lines = [
        {"path": f"images/{first.name}"},
        {"path": f"./images/{first.name}"},
        {"path": None},
        {"path": "x://y.jpg"},
    ]
    (tmp_path / "l.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = predicted(model, tmp_path / "l.jsonl", out=tmp_path / "out")
    assert (summary.images, summary.ok, summary.failed) == (3, 1, 2)
    assert "this row of the list names no image" in str(summary.failures)
    assert "1 images are listed more than once: each is done once" in caplog.text
    assert predicted(model, first, second, out=tmp_path / "files").images == 2
    summary = predicted(model, first, second, third, out=tmp_path / "files")
    assert (summary.images, summary.already_done) == (3, 2)
    assert {mask.name for mask in (tmp_path / "files/masks").iterdir()} == {image.name for image in images.iterdir()}
