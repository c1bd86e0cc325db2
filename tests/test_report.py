"""The report: what is drawn of numbers, what is advised from them, and the page of a real run."""

import base64
import csv
import io
import math
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from kseg.advice import advice
from kseg.cli import main
from kseg.config import TrainConfig
from kseg.evaluate import Evaluation
from kseg.html import with_code
from kseg.html.charts import HEIGHT, WIDTH, line_chart, ticks
from kseg.html.pictures import RED, Picture, layers
from kseg.metrics import ConfusionMatrix
from kseg.metrics.per_image import ImageCounts, PerImage
from kseg.report import _kinds


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.13, 0.58, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]),
        (0, 2500, [0, 500, 1000, 1500, 2000, 2500]),
        (31.7, 31.8, [31.7, 31.72, 31.74, 31.76, 31.78, 31.8]),
        (5, 5, [4.4, 4.6, 4.8, 5, 5.2, 5.4, 5.6]),
    ],
)
def test_ticks_are_round_and_reach_over_both_ends(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)


def test_points_of_a_chart_by_hand():
    """x from 0 to 10 fills the width; y from 0 to 1 the height, upwards."""
    points = [(0, 0.0), (5, 0.5), (10, 1.0), (7, math.nan)]
    chart = line_chart({"a": points}, title="t", x_label="x", y_label="y")
    (line,) = chart.lines
    assert line.dots == ((0, HEIGHT), (WIDTH / 2, HEIGHT / 2), (WIDTH, 0))
    assert [tick.text for tick in chart.y_ticks] == ["0", "0.2", "0.4", "0.6", "0.8", "1"]
    assert chart.y_ticks[0].at == HEIGHT and chart.y_ticks[-1].at == 0
    assert line_chart({"a": [(1, math.nan)]}, title="t", x_label="x", y_label="y") is None


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        (1, ([0], [], [])),
        (3, ([0, 1], [], [2])),
        (9, ([0, 1], [3, 4], [8, 7])),
    ],
)
def test_no_image_is_shown_twice(images, expected):
    assert tuple(_kinds(range(images)).values()) == expected


def test_ignored_pixels_are_clear_and_never_wrong():
    reference, labels = np.array([[0, 255, 1]], np.uint8), np.array([[0, 1, 0]], np.uint8)
    picture = Picture("a.png", 50.0, np.zeros((1, 3, 3), np.uint8), reference, labels)
    shown = layers(picture, ("road", "sky"), ((1, 2, 3), (4, 5, 6)))
    assert shown.differing == 1
    assert [entry.name for entry in shown.legend] == ["road", "sky"]
    assert [(swap.reference, swap.label, swap.pixels) for swap in shown.swaps] == [
        ("sky", "road", 1)
    ]
    clear = np.asarray(opened(shown.reference).convert("RGBA"))[0, :, 3]
    assert clear.tolist() == [255, 0, 255]
    wrong = np.asarray(opened(shown.errors).convert("RGBA"))[0]
    assert wrong[2].tolist() == [*RED, 255] and wrong[:2, 3].tolist() == [0, 0]


def test_pixels_of_a_large_image_are_all_counted():
    """The drawn map has every second pixel; the sentence speaks of the image's own."""
    reference = np.zeros((4, 4000), np.uint8)
    labels = reference.copy()
    labels[:, :1001] = 1
    picture = Picture("a.png", 75.0, np.zeros((4, 4000, 3), np.uint8), reference, labels)
    shown = layers(picture, ("road", "sky"), ((1, 2, 3), (4, 5, 6)))
    assert shown.differing == shown.swaps[0].pixels == 4004
    assert opened(shown.labels).size == (2000, 2)


def test_code_in_a_sentence_is_escaped_first():
    assert with_code("a <b> `c & d`") == "a &lt;b&gt; <code>c &amp; d</code>"


def evaluation(matrix, images=1):
    """An evaluation of so many images that were all labelled alike."""
    matrix = np.array(matrix)
    confusion = ConfusionMatrix(len(matrix))
    confusion.matrix += images * matrix
    one = ImageCounts.of("a.png", np.zeros((1, 1), np.uint8), matrix)
    return Evaluation(
        confusion=confusion,
        classes=tuple("abc"[: len(matrix)]),
        dataset="drawn",
        split="val",
        images=images,
        per_image=PerImage(len(matrix), (one,) * images),
    )


def curve(*scores):
    return [{"step": 10.0 * n, "miou": score} for n, score in enumerate(scores, start=1)]


GOOD = [[90, 0], [0, 10]]
TRAINED = TrainConfig(weights="imagenet")


@pytest.mark.parametrize(
    ("found", "config", "scores", "waiting", "words"),
    [
        (GOOD, TRAINED, (), math.nan, None),
        (GOOD, TRAINED, (0.5, 0.505), 0.1, None),
        (GOOD, TRAINED, (0.5, 0.53), 0.1, "still 3.0 points better"),
        (GOOD, TRAINED, (0.5, 0.6, 0.55), 0.1, "highest at step 20 and fell by 5.0 points"),
        (GOOD, TrainConfig(model="deeplabv3"), (), 0.1, "began with random weights"),
        (GOOD, TrainConfig(model="fastscnn"), (), 0.1, None),
        (GOOD, TRAINED, (), 0.25, "waited for data 25 % of its time"),
        # b: 5 of 1000 pixels, 1 of them found, so IoU 1/5.
        ([[995, 0], [4, 1]], TRAINED, (), 0.1, "b: less than 1 % of the pixels each"),
        # b: 20 of 100 pixels are given as a, and that alone.
        ([[100, 0], [20, 80]], TRAINED, (), 0.1, "20 % of b is given as a"),
    ],
)
def test_advice_follows_from_what_was_measured(found, config, scores, waiting, words):
    given = advice(evaluation(found), config, curve(*scores), waiting)
    seen = " ".join(one.seen for one in given)
    assert (words in seen) if words else not given
    assert all(one.remedy for one in given)


def test_what_was_done_for_rare_classes_is_not_advised_again():
    def remedy(**settings):
        config = replace(TRAINED, **settings)
        return advice(evaluation([[995, 0], [4, 1]]), config, [], math.nan)[0].remedy

    assert "`--rare-crops 0.5 --repeat-rare 0.5`" in remedy()
    assert "`--class-weights sqrt --repeat-rare" in remedy(class_weights="none", rare_crops=0.5)
    assert "--class-weights" not in remedy(class_weights="none", loss="dice")  # takes none
    assert remedy(rare_crops=0.5, repeat_rare=0.5) == "Label more of them."


def test_a_wide_interval_is_told():
    """Two images, one all right and one all wrong: nothing is known of mIoU."""
    one = ImageCounts.of("a.png", np.zeros((1, 1)), np.array([[5, 0], [0, 5]]))
    other = ImageCounts.of("b.png", np.zeros((1, 1)), np.array([[0, 5], [5, 0]]))
    confusion = ConfusionMatrix(2)
    confusion.matrix += 5
    images = PerImage(2, (one, other))
    found = Evaluation(confusion, ("a", "b"), "drawn", "val", 2, per_image=images)
    given = advice(found, TRAINED, [], math.nan)
    assert any("With 2 images mIoU is only known from 0.000 to 1.000" in a.seen for a in given)


class Page(HTMLParser):
    """The text, the images and every address of a page."""

    def __init__(self, text):
        super().__init__()
        self.words, self.images, self.addresses, self.charts = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.addresses += [found[name] for name in ("src", "href") if found.get(name)]
        if tag == "img":
            self.images.append((found.get("class", ""), found["src"]))
        if tag == "svg":
            self.charts.append(found["aria-label"])

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def opened(uri):
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


def test_the_report_of_a_run(run_folder, tmp_path, capsys):
    out = tmp_path / "page.html"
    assert main(["report", str(run_folder), "--out", str(out)]) == 0
    assert str(out) in capsys.readouterr().out.replace("\n", "")
    html = out.read_text(encoding="utf-8")
    page = Page(html)
    # Nothing is loaded: every address is in the page or data.
    assert all(one.startswith(("data:", "#")) for one in page.addresses)
    assert "url(" not in html
    rows = list(csv.DictReader((run_folder / "metrics.csv").read_text().splitlines()))
    best = max(float(row["miou"]) for row in rows)
    assert f"Mean IoU {best:.4f}" in page.text
    for words in (
        "What to try next",
        "What is taken for what",
        "-bound : the training waited for images",
        "kseg train --data",
        "Boundary F1",
        "Calibration error",
        "The worst images",
        "Show these pixels alone, in red",
        ", weight ",  # on a phone, where the columns have no place
    ):
        assert words in page.text, words
    assert {"Loss over the training", "Validation mIoU over the training"} <= set(page.charts)
    assert "Share of right pixels over the model's confidence" in page.charts
    # Two validation images: both are among the worst, none in the middle or best.
    assert [kind for kind, _ in page.images].count("photo") == 2
    for _, uri in page.images:
        assert opened(uri).size[0] > 0


def test_a_file_has_a_report_without_a_training(run_folder, street, tmp_path, capsys):
    file = tmp_path / "best.keras"
    shutil.copy(run_folder / "best.keras", file)
    assert main(["report", str(file), "--limit", "1", "--flip"]) == 0
    page = Page((tmp_path / "best-report.html").read_text(encoding="utf-8"))
    assert ", with flip." in page.text
    assert "over the training" not in " ".join(page.charts)
    assert "1 val image of" in page.text


def test_a_report_on_tiles_says_how_far_they_are_from_whole_images(run_folder, tmp_path, capsys):
    out = tmp_path / "tiles.html"
    words = ["report", str(run_folder), "--eval-size", "64", "64", "--out", str(out), "--tile"]
    assert main(words) == 0
    said = " ".join(capsys.readouterr().out.split())
    (share,) = re.findall(r"tiles change ([\d.]+)% of the whole images' labels", said)
    page = Page(out.read_text(encoding="utf-8"))
    number = float(share)
    shown = f"{number:.1f}" if number >= 9.95 else share
    assert f"tiles change {shown} % of the labels" in page.text


def test_what_a_report_refuses(run_folder, tmp_path, capsys):
    assert main(["report", str(tmp_path / "none")]) == 2
    assert "there is no" in capsys.readouterr().err
    assert main(["report", str(run_folder), "--split", "tset"]) == 2
    assert "no split 'tset'" in " ".join(capsys.readouterr().err.split())
    spoilt = tmp_path / "run"
    shutil.copytree(run_folder, spoilt)
    whole = (spoilt / "metrics.csv").read_text()
    for table in (whole.replace(",0.", ",zero.", 1), "step,loss,miou\n3,1,0.5\n"):
        (spoilt / "metrics.csv").write_text(table)
        assert main(["report", str(spoilt)]) == 2
        assert "metrics.csv is damaged" in " ".join(capsys.readouterr().err.split())
    assert not (spoilt / "report.html").exists()
