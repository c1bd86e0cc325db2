"""The certificate as a page: whole, true to its numbers, and on its own."""

import base64
import copy
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from street import SIZE, draw

from kseg.export.page import certificate_page
from kseg.html.pictures import Picture

PALETTE = ((128, 64, 128), (220, 20, 60), (0, 0, 142))
NASTY = "<script>alert('sky')</script>"
VOID = {"meta", "link", "img", "input", "br", "hr"}

FILE = {
    "path": "model-int8.tflite",
    "target": "tflite",
    "variant": "int8",
    "bytes": 1_312_456,
    "sha256": "9f86d081",
    "inputs": {"image": "uint8 (1, 96, 128, 3)"},
    "outputs": {"class_map": "uint8 (1, 96, 128)"},
    "accepted": True,
    "reasons": [],
    "faults": [],
    "images": 60,
    "agreement": 99.52,
    "agreement_interval": [99.4, 99.617],
    "min_agreement": 95.0,
    "agreement_boundary": 95.1,
    "agreement_interior": 99.9996,
    "agreement_by_margin": 99.95,
    "miou": 0.6362,
    "reference_miou": 0.6355,
    "miou_change": 0.07,
    "miou_change_interval": [-0.2, 0.3],
    "classes": [
        {
            "name": "ground",
            "iou": 0.9012,
            "reference_iou": 0.9034,
            "change": -0.22,
            "interval": [-0.4, -0.001],
        },
        {"name": NASTY, "iou": 0.5, "reference_iou": 0.4, "change": 10, "interval": [8, 12]},
    ],
    "shift": {"rows": -0.004, "columns": 0.26},
    "latency": {"runs": 812, "threads": 1, "milliseconds": {"p50": 8.04, "p90": 12.34, "p99": 101}},
    "arena_bytes": 234_567,
    "macs": 123_456_789,
    "operators": {"XNNPACK": {"CONV_2D": 20, "PAD": 1}, "LiteRT": {"ARG_MAX": 1}},
    "notes": ["in float: 2 CAST"],
    "tried": [{"remedy": "last layer in float", "miou_change": -0.9, "sentence": "No better."}],
    "worst": [{"image": "far.png", "agreement": 97.1}],
}
CERTIFICATE = {
    "kseg": "0.1.0",
    "written": "2026-11-23T05:00:00+0000",
    "machine": {"processor": "a chip", "cores": 2, "system": "Linux"},
    "versions": {"tensorflow": "2.21.0"},
    "model": {
        "name": "swiftnet",
        "options": {"backbone": "resnet18"},
        "source": "best.keras",
        "sha256": "5f86d081",
    },
    "data": {"name": "street", "split": "val", "images": 60, "classes": ["ground", NASTY, "pole"]},
    "calibration": {"images": ["first.png", "second.png"]},
    "files": [FILE],
}


class Page(HTMLParser):
    """A parsed page; raises on a tag that does not close where it should."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.open, self.words = [], [], []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, self.getpos()

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self):
        """What a reader sees, with single spaces."""
        return " ".join(" ".join(self.words).split())

    def images(self, kind):
        """The decoded pictures whose class begins with a word."""
        sources = [a["src"] for tag, a in self.tags if tag == "img" and a["class"].startswith(kind)]
        return [Image.open(io.BytesIO(base64.b64decode(s.partition(",")[2]))) for s in sources]


def picture(*, seed=3, move=2):
    """A drawn scene whose file puts everything `move` pixels to the right."""
    image, reference = draw(SIZE, seed)
    reference[reference == 255] = 0
    labels = np.roll(reference, move, axis=1)
    return Picture("near.png", 98.25, image, reference, labels)


def page_of(pictures=(), **changes):
    certificate = CERTIFICATE | {"files": [copy.deepcopy(FILE) | changes]}
    return certificate_page(certificate, {FILE["path"]: pictures}, palette=PALETTE)


@pytest.mark.parametrize(
    "sentence",
    [
        "✓ The file is accepted",
        "on 60 val images of street , 2026-11-23 05:00 UTC",
        "Label agreement 99.52 % 95 % interval: 99.40 to 99.61 %",
        "over 60 images. At least 95.00 % is needed.",
        "Change of mean IoU, points +0.07 95 % interval: −0.20 to +0.30",
        "0.6355 for the Keras model, 0.6362 for this file. The change cannot be told from chance.",
        "near borders 95.10 %",
        "away from borders 99.99 %",  # of 99.9996: not all agree
        "by sureness 99.95 %",
        "Shift, pixels 0.00 down, +0.26 right",  # -0.004 is no negative zero
        "Time for one image, median 8.04 ms",
        "90 % of the runs took at most 12.3 ms, 99 % of the runs took at most 101.0 ms.",
        "812 runs on 1 thread of a chip",
        "Working memory at its peak 234.6 kB",
        "Size 1.31 MB On disk: 1,312,456 bytes.",
        "Multiply-adds 123,456,789",
        "ground 0.9034 0.9012 −0.22 −0.40 to 0.00",
        "0.4000 0.5000 +10.00 +8.00 to +12.00",
        "XNNPACK (21) CONV_2D × 20, PAD LiteRT (1) ARG_MAX",
        "last layer in float −0.90 points of mean IoU No better.",
        "in float: 2 CAST",
        "best.keras 5f86d081 model-int8.tflite 9f86d081",
        "backbone resnet18",
        "kseg 0.1.0 tensorflow 2.21.0",
        "processor a chip cores 2 system Linux",
        "2 calibration images, which set the ranges of int8 first.png second.png",
        "far.png : 97.10 % of its labels agree",  # without pictures, the worst by name
    ],
)
def test_every_fact_is_there(sentence):
    assert sentence in Page(page_of()).text


def test_names_from_outside_are_text():
    html = page_of([picture()])
    assert NASTY in Page(html).text
    assert NASTY not in html
    # The page's own script is the only one.
    assert html.count("<script") == 1


def test_nothing_is_loaded():
    html = page_of([picture()])
    page = Page(html)
    loaded = [a[name] for _, a in page.tags for name in ("src", "href", "srcset") if name in a]
    assert len(loaded) > 4  # or there was nothing to look at
    assert all(one.startswith(("data:", "#")) for one in loaded)
    assert not re.search(r"url\(|@import|https?://|fetch\(", html)
    (policy,) = [a["content"] for tag, a in page.tags if tag == "meta" and "http-equiv" in a]
    assert "default-src 'none'" in policy


def test_links_lead_to_sections():
    page = Page(page_of())
    ids = {a["id"] for _, a in page.tags if "id" in a}
    links = {a["href"][1:] for tag, a in page.tags if tag == "a"}
    assert links and links <= ids


def test_pictures_come_back_as_they_went_in():
    shown = picture()
    page = Page(page_of([shown]))
    (photo,), (reference, labels) = page.images("photo"), page.images("tint")
    assert photo.size == reference.size == labels.size == (SIZE[1], SIZE[0])
    # JPEG at quality 80 blurs the noise of the drawing, whose standard deviation is 12.
    assert np.abs(np.asarray(photo, float) - shown.image).mean() < 12
    np.testing.assert_array_equal(np.asarray(reference), shown.reference)
    np.testing.assert_array_equal(np.asarray(labels), shown.labels)
    assert labels.getpalette()[:9] == [channel for colour in PALETTE for channel in colour]


def test_outline_goes_round_the_differing_pixels():
    shown = picture()
    (outline,) = Page(page_of([shown])).images("outline")
    alpha = np.asarray(outline.convert("RGBA"))[..., 3] > 0
    scale = outline.width // SIZE[1]
    assert outline.size == (SIZE[1] * scale, SIZE[0] * scale)
    differing = np.kron(shown.reference != shown.labels, np.ones((scale, scale))).astype(bool)
    assert not (alpha & differing).any()
    beside = np.zeros_like(differing)
    beside[:, 1:] |= differing[:, :-1]
    beside[:, :-1] |= differing[:, 1:]
    assert (alpha | differing)[beside].all()


def test_equal_maps_have_no_outline_and_no_swaps():
    html = page_of([picture(move=0)])
    (outline,) = Page(html).images("outline")
    assert not np.asarray(outline).any()
    assert "Most often" not in html


def test_caption_counts_what_differs():
    shown = picture()
    text = Page(page_of([shown])).text
    total = int((shown.reference != shown.labels).sum())
    lost = int(((shown.reference == 1) & (shown.labels == 0)).sum())
    assert f"near.png : 98.25 % of its labels agree, {total:,} pixels differ." in text
    assert f"{NASTY} became ground ({lost:,})" in text


def test_legend_names_the_classes_that_occur():
    page = Page(page_of([picture()]))
    colours = [a["style"] for _, a in page.tags if a.get("class") == "swatch"]
    assert colours == ["background: #804080", "background: #dc143c"]  # no pole in the scene


def test_large_photo_is_made_smaller_and_its_labels_are_not():
    ids = np.zeros((64, 2048), np.uint8)
    wide = Picture("wide.png", 100.0, np.zeros((64, 2048, 3), np.uint8), ids, ids)
    page = Page(page_of([wide]))
    assert page.images("photo")[0].size == (1024, 32)
    assert page.images("tint")[0].size == (2048, 64)


def test_class_map_of_another_size_is_refused():
    image, ids = draw(SIZE, 0)
    with pytest.raises(ValueError, match=r"far.png: .* \(96, 128\) .* got \(48, 64\)"):
        page_of([Picture("far.png", 90.0, image, ids, ids[::2, ::2])])


def test_one_slider_a_picture_has_a_name():
    page = Page(page_of([picture(), picture(seed=4)]))
    sliders = [a for tag, a in page.tags if tag == "input" and a["type"] == "range"]
    assert len(sliders) == 2
    assert all("near.png" in a["aria-label"] for a in sliders)


def test_rejected_file_says_so_first():
    fault = {"name": "shift", "sentence": "It lies 1 pixel to the right.", "agreement": 99.9}
    html = page_of(accepted=False, reasons=["Too few agree."], faults=[fault], agreement=94.998)
    text = Page(html).text
    top, _, section = text.partition("Does it see")
    assert "✗ 1 of 1 file rejected" in top
    assert "It lies 1 pixel to the right. Too few agree." in top
    assert "Fault found: shift" in top
    assert "With this undone, 99.90 % of the labels" in top
    # Not 95.00, which is what is needed.
    assert "Label agreement 94.99 %" in section


def test_a_fault_is_told_once_in_each_place():
    """Its sentence is among the reasons, which are told beside it."""
    fault = {"name": "scale", "sentence": "a scale is wrong", "agreement": None}
    html = page_of(accepted=False, reasons=["a scale is wrong", "too few agree"], faults=[fault])
    text = Page(html).text
    assert text.count("A scale is wrong.") == 2  # at the top, and in the file's own part
    assert text.count("Too few agree.") == 2
    assert "this undone" not in text  # nothing was measured


def test_a_long_time_leaves_out_what_nobody_reads():
    """2154.8 ms broke in the middle of its unit on a telephone of 360 pixels."""
    html = page_of(latency={"runs": 5, "threads": 1, "milliseconds": {"p50": 2154.8}})
    assert "2155 ms" in Page(html).text


@pytest.mark.parametrize(
    ("interval", "sentence"),
    [
        ([-0.3, -0.1], "The file is worse than the model."),
        ([0.1, 0.3], "The file is better than the model."),
        ([-0.1, 0.0], "The change cannot be told from chance."),
    ],
)
def test_change_is_judged_by_its_interval(interval, sentence):
    assert sentence in Page(page_of(miou_change_interval=interval)).text


def test_bars_lie_on_one_scale_round_zero():
    styles = [
        a["style"] for tag, a in Page(page_of()).tags if tag in ("span", "i") and "style" in a
    ]
    # The farthest end, 12 points, is the edge at 100 %; zero is the middle.
    assert styles[2:] == ["left: 83.3%; width: 16.7%", "left: 91.7%"]
    assert styles[1] == "left: 49.1%"  # -0.22 of 12 points


NUMBERS = (
    *("bytes", "images", "agreement", "agreement_interval", "agreement_boundary", "min_agreement"),
    *("agreement_interior", "agreement_by_margin", "miou", "reference_miou", "miou_change"),
    *("miou_change_interval", "latency", "arena_bytes", "macs", "shift", "operators"),
)


@pytest.mark.parametrize("missing", [None, float("nan")])
def test_what_is_not_known_is_a_dash(missing):
    nothing = dict.fromkeys(NUMBERS)
    if missing is not None:
        nothing |= {"agreement": missing, "miou": missing, "miou_change_interval": [missing] * 2}
    rows = [dict.fromkeys(FILE["classes"][0]) | {"name": "ground"}]
    text = Page(page_of(**nothing, classes=rows)).text
    assert not re.search(r"\b(None|nan|NaN|inf)\b", text)
    assert "Label agreement - 95 % interval: -" in text
    assert "Shift, pixels - How far" in text
    assert "ground - - - -" in text
    assert "median - Not measured." in text


def test_what_may_be_left_out_may_be_left_out():
    short = {key: value for key, value in FILE.items() if key not in ("notes", "tried", "worst")}
    html = certificate_page(CERTIFICATE | {"files": [short]}, {}, palette=PALETTE)
    assert not {"Notes", "Remedies tried", "Where it differs most"} & set(Page(html).words)


def test_no_calibration_is_said():
    html = certificate_page(CERTIFICATE | {"calibration": {"images": []}}, {}, palette=PALETTE)
    assert "No image was used for calibration." in Page(html).text
