"""report.html of a training and of a prediction; shown in a browser where there is one."""

import html
import html.parser
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, make_bad, make_discs, make_photos
from PIL import Image

from unet_ray.config import EvaluateConfig, PredictConfig, UserError
from unet_ray.evaluation.evaluate import evaluate
from unet_ray.inference.predict import predict
from unet_ray.ray_backend.session import LOCAL
from unet_ray.report.page import write
from unet_ray.settings import load_train_config
from unet_ray.training.run import train


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    images, masks = make_discs(folder / "discs <b>&", 20, size=48)
    settings = [*TINY, ("data.images", str(images)), ("data.masks", str(masks)), ("data.val_fraction", 0.7)]
    train(load_train_config(settings=settings), str(folder / "run"), runtime=LOCAL)
    return folder / "run"


@pytest.fixture(scope="module")
def page(run) -> str:
    assert write(str(run)) == str(run / "report.html")
    return (run / "report.html").read_text()


@pytest.fixture(scope="module")
def prediction(run, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("prediction")
    photos, out = make_photos(folder / "photos", 30), folder / "out"
    make_bad(photos / "bad")
    predict(PredictConfig(model=str(run), inputs=(str(photos),), out=str(out)), runtime=LOCAL)
    write(str(out))
    return out


VOID = {"meta", "link", "img"}


class Parsed(html.parser.HTMLParser):
    """What a page holds. Fails unless all elements are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.pictures: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.links += [attributes[name] for name in ("href", "xlink:href") if name in attributes]
        self.pictures += [attributes["src"]] if "src" in attributes else []
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        self.text += " "

    def handle_data(self, data):
        self.text += data


def check_self_contained(page: str) -> Parsed:
    """Checks that nothing is fetched, that every link leads to an id of the page, and that ids are unique."""
    parsed = Parsed(page)
    assert len(set(parsed.ids)) == len(parsed.ids)
    assert all(source.startswith("data:image/jpeg;base64,") for source in parsed.pictures)
    assert all(link == "data:," or link[1:] in parsed.ids for link in parsed.links), parsed.links
    assert "@import" not in page and not re.search(r"url\((?!#)", page)
    assert len(page) < 5 * 2**20
    return parsed


def test_a_training_is_shown_with_its_scores_curves_and_pictures(run, page):
    parsed = check_self_contained(page)
    scores = evaluate(EvaluateConfig(model=str(run), backend="torch"), runtime=LOCAL)
    assert scores.images == 14
    for name in ("dice", "iou", "precision", "recall"):
        assert f"{scores.means[name].mean:.4f}" in parsed.text
    low, high = scores.dice.ci95
    assert f"{low:.4f} – {high:.4f}" in parsed.text
    assert page.count("<svg") == 4
    # Six worst, three in the middle, three best; of each the picture, the true mask, the predicted one, the difference.
    assert len(parsed.pictures) == 4 * 12 and page.count('<figure class="row"') == 12
    order = np.argsort(scores.each.means()["dice"], kind="stable")
    worst = Path(scores.each.paths[order[0]])
    assert parsed.text.index("Worst") < parsed.text.index(f"{worst.parent.name}/{worst.name}")
    assert f"unet-ray train --config {run}/config.yaml" in parsed.text
    assert "discs <b>&" in parsed.text, "names are text, not markup"


def test_an_outlier_leads_to_its_pictures(run, tmp_path):
    moved = tmp_path / "run"
    shutil.copytree(run, moved)
    config = load_train_config(config_file=(run / "config.yaml").read_text())
    data = tmp_path / "data"
    shutil.copytree(config.data.images, data / "images")
    shutil.copytree(config.data.masks, data / "masks")
    text = (moved / "config.yaml").read_text()
    for name in ("images", "masks"):
        text = text.replace(str(Path(config.data.images).parent / name), str(data / name))
    (moved / "config.yaml").write_text(text)
    [victim] = [line.split(",")[0] for line in (run / "split.csv").read_text().splitlines() if line.endswith("val")][:1]
    elsewhere = np.zeros((48, 48), np.uint8)
    elsewhere[0, 0] = 255
    Image.fromarray(elsewhere).save(data / "masks" / f"{victim}.png")
    write(str(moved))
    parsed = check_self_contained((moved / "report.html").read_text())
    assert any(link.startswith("#image-") for link in parsed.links)


def _scores(run: Path):
    return evaluate(EvaluateConfig(model=str(run), backend="torch"), runtime=LOCAL)


def test_without_its_images_a_training_still_has_its_curves(run, tmp_path):
    moved = tmp_path / "run"
    shutil.copytree(run, moved)
    text = (moved / "config.yaml").read_text()
    (moved / "config.yaml").write_text(text.replace("discs <b>&", "gone"))
    write(str(moved))
    parsed = check_self_contained((moved / "report.html").read_text())
    assert "could not be scored again" in parsed.text and "How it went" in parsed.text
    assert not parsed.pictures


def test_several_classes_have_a_table_with_their_names(tmp_path):
    images, masks = make_discs(tmp_path / "discs", 8, mask_value=1)
    for number, path in enumerate(sorted(masks.iterdir())):
        ids = np.array(Image.open(path))
        ids[: 4 + number % 3] = 2
        Image.fromarray(ids).save(path)
    settings = [*TINY, ("data.images", str(images)), ("data.masks", str(masks)), ("data.val_fraction", 0.5)]
    settings += [("model.num_classes", 3), ("data.classes", ["background", "disc", "bar"])]
    train(load_train_config(settings=settings), str(tmp_path / "run"), runtime=LOCAL)
    write(str(tmp_path / "run"))
    parsed = check_self_contained((tmp_path / "run/report.html").read_text())
    scores = _scores(tmp_path / "run")
    assert set(scores.per_class) == {"background", "disc", "bar"}
    for name, row in scores.per_class.items():
        assert re.search(rf"{name}\s+\d+\.\d+%\s+{row['dice']:.4f}", parsed.text), name


def test_a_prediction_is_shown_with_its_failures_and_masks(prediction):
    parsed = check_self_contained((prediction / "report.html").read_text())
    summary = json.loads((prediction / "summary.json").read_text())
    assert summary["failed"] == 10
    assert re.search(rf"{summary['ok']}\s+segmented", parsed.text)
    for reason, count in summary["failures"].items():
        assert reason in parsed.text and str(count) in parsed.text
    assert "bad/empty.jpg" in parsed.text
    assert len(parsed.pictures) == 24  # a dozen of the least confident, a dozen drawn


def test_masks_are_read_from_parquet_too_and_without_masks_there_is_still_a_page(run, tmp_path):
    photos = make_photos(tmp_path / "photos", 3)
    for formats, pictures in (("parquet", 6), ("rle", 0)):
        out = tmp_path / formats
        predict(PredictConfig(model=str(run), inputs=(str(photos),), out=str(out), formats=(formats,)), runtime=LOCAL)
        if formats == "parquet":
            (out / "masks.parquet/.0f.tmp").write_bytes(b"PAR1")  # of a killed run
        write(str(out))
        assert len(check_self_contained((out / "report.html").read_text()).pictures) == pictures


def test_a_folder_that_is_no_run_is_one_line(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        write(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="no finished training"):
        write(str(tmp_path))


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PROBE = """
<body style="margin:0"><iframe id="page" style="border:0;width:{width}px;height:900px" srcdoc="{page}"></iframe>
<pre></pre>
<script>
document.querySelector('iframe').onload = event => {{
  const page = event.target.contentDocument, width = event.target.contentWindow.innerWidth;
  const wide = [...page.querySelectorAll('body *')].filter(
    e => !e.closest('.wide') && !e.closest('svg') && e.getBoundingClientRect().right > width + 1);
  const broken = [...page.images].filter(image => !image.naturalWidth);
  document.querySelector('pre').textContent = JSON.stringify(
    {{width, scroll: page.documentElement.scrollWidth, wide: wide.map(e => e.outerHTML.slice(0, 80)),
      pictures: page.images.length, broken: broken.length}});
}};
</script>
"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_a_browser_nothing_is_too_wide_and_nothing_fails(run, page, prediction, tmp_path, width, scheme):
    for path in (run, prediction):
        content = html.escape((path / "report.html").read_text(), quote=True)
        probe = tmp_path / "probe.html"
        probe.write_text(PROBE.format(width=width, page=content))
        dark = ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
        command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", *dark]
        command += [
            f"--user-data-dir={tmp_path / 'profile'}",
            "--window-size=1400,1000",
            "--virtual-time-budget=60000",
            "--dump-dom",
            f"file://{probe}",
        ]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        found = json.loads(html.unescape(re.search(r"<pre>(.*?)</pre>", ran.stdout, re.DOTALL).group(1)))
        assert found["width"] == width and found["scroll"] <= width and not found["wide"], found
        assert found["pictures"] and not found["broken"]
        assert "CONSOLE" not in ran.stderr, ran.stderr[-2000:]
