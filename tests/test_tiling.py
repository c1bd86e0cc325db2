"""Tiles: any size, no more than a row of them in memory, and the labels of the whole image."""

import dataclasses
import functools
import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from nets import box, colours, keras_net, numpy_net
from PIL import Image
from street import write_street
from tiny import CARD, SIZE, drawn, samples, tiny_model

from kseg import card as cards
from kseg import models
from kseg.averaging import FlippedPredictor, ScaledPredictor
from kseg.cli import main
from kseg.errors import UserError
from kseg.export import onnx as onnx_target
from kseg.export import tflite as tflite_target
from kseg.export.interface import Interface
from kseg.export.saved_model import write as write_saved_model
from kseg.image_files import MOST_PIXELS
from kseg.inference import Predictor, feed, load, read_image
from kseg.probabilities import softmax
from kseg.tiling import TiledPredictor, apart, places, tiles_of

# Where tiles lie.


@pytest.mark.parametrize(("tile", "overlap"), [(64, 16), (96, 48), (100, 0), (480, 90), (40, 20)])
@pytest.mark.parametrize("length", [1, 39, 64, 65, 97, 128, 130, 481, 1000])
def test_weights_are_one_in_sum_and_tiles_cover_everything(length, tile, overlap):
    total = np.zeros(length)
    for place in places(length, tile, overlap):
        assert len(place.weights) == min(tile, length)
        assert (place.weights >= 0).all() and place.weights.dtype == np.float32
        total[place.start : place.start + len(place.weights)] += place.weights
    np.testing.assert_allclose(total, 1, atol=1e-6)  # float32


@pytest.mark.parametrize("length", [65, 97, 128, 130, 481, 1000])
def test_tiles_lie_where_the_maps_of_a_net_have_pixels(length):
    starts = [place.start for place in places(length, 64, 16)]
    assert all(start % 32 == 0 for start in starts[:-1])
    assert starts[-1] == length - 64
    assert all(16 <= 64 - (b - a) for a, b in zip(starts, starts[1:], strict=False))


def test_weights_by_hand():
    # Two tiles, 0..63 and 32..95. Pixel 47 is 16.5 from the end of the first, so (16.5 - 8) / 16
    # = 0.53125 of the way up: sin(0.53125 * 90 degrees)^2 = 0.54901.
    first, second = places(96, 64, 32)
    assert (first.start, second.start) == (0, 32)
    assert (first.weights[:40] == 1).all() and (first.weights[56:] == 0).all()
    np.testing.assert_allclose(first.weights[47], 0.54901, atol=1e-5)
    np.testing.assert_array_equal(second.weights, first.weights[::-1])
    assert (np.diff(first.weights) <= 0).all()


def test_without_overlap_each_pixel_has_one_tile():
    first, second = places(128, 64, 0)
    assert (first.weights == 1).all() and (second.weights == 1).all()


# Labels of the whole image.


@pytest.mark.parametrize("size", [(1, 1), (1, 200), (63, 65), (64, 96), (65, 97), (130, 301)])
def test_a_net_of_one_pixel_does_not_notice_tiles(size):
    image = drawn(200, 400)[: size[0], : size[1]]
    tiled = TiledPredictor.of(numpy_net(colours, SIZE))
    expected = softmax(colours(image.astype(np.float32)))
    np.testing.assert_allclose(tiled.probabilities(image), expected, atol=1e-6)
    np.testing.assert_array_equal(tiled.predict(image), expected.argmax(-1))
    assert tiled.predict(image).dtype == np.uint8


def test_overlap_of_four_reaches_gives_what_the_whole_image_gives():
    image = drawn(160, 224)
    net = functools.partial(box, reach=5)
    whole = numpy_net(net, (160, 224)).probabilities(image)
    by_overlap = {
        overlap: np.abs(
            TiledPredictor.of(numpy_net(net, SIZE), overlap=overlap).probabilities(image) - whole
        )
        for overlap in (0, 8, 20)
    }
    assert by_overlap[20].max() < 1e-5
    assert by_overlap[0].max() > 0.1  # seams, or the test would show nothing
    assert by_overlap[0].mean() > by_overlap[8].mean() > 1e-5


# SegNet: 3x3 convolutions at strides 1 to 16, two, two, three, three and three of them, reach
# 2 + 4 + 12 + 24 + 48 = 90 pixels on the way down and as many up, and blocks of 32 pixels are
# pooled: 90 + 31 + 31 + 90. U-Net: two at each of the strides 1, 2, 4, 8 both ways and at 16,
# blocks of 16: 30 + 15 + 32 + 15 + 30.
REACH = {"segnet": 242, "unet": 122}


@pytest.mark.parametrize("name", REACH)
def test_far_from_the_sides_of_tiles_nets_give_what_the_whole_image_gives(name):
    reach, overlap, (height, width), tile = REACH[name], 32, (64, 1024), 640
    image = drawn(height, width)
    net = keras_net(name, (height, tile), base_channels=2)
    tiled = TiledPredictor.of(net, overlap=overlap).probabilities(image)
    apart = np.abs(tiled - net.at_size((height, width)).probabilities(image)).max((0, 2))
    # Tiles 0..639 and 384..1023; the outer 8 pixels of the overlap do not count.
    left, right = min(384 + 8, 640 - reach), max(640 - 8, 384 + reach)
    assert apart[:left].max() < 1e-5 and apart[right:].max() < 1e-5
    assert apart[384 + 8 : 384 + 24].max() > 1e-3  # near a side it does differ


def test_rows_of_tiles_and_columns_of_them():
    image = drawn(384, 352)
    net = keras_net("unet", (256, 256), base_channels=2)
    tiled = TiledPredictor.of(net, overlap=64)
    apart = np.abs(tiled.probabilities(image) - net.at_size((384, 352)).probabilities(image)).max(
        -1
    )
    # Tiles 0..255 and 128..383 down, 0..255 and 96..351 across; 16 pixels do not count.
    exact = [*range(112), *range(250, 352)], [*range(134), *range(250, 384)]
    assert apart[np.ix_(exact[1], exact[0])].max() < 1e-5
    assert apart.max() > 1e-3


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The same net in every format, and its class map."""
    folder, model = tmp_path_factory.mktemp("files"), tiny_model()
    made = {"keras": folder / "m.keras", "saved_model": folder / "served" / "1"}
    model.save(made["keras"])
    options = {"variant": "float32", "samples": samples}
    write_saved_model(model, made["saved_model"], interface=Interface(), **options)
    for output in ("logits", "probabilities", "classes"):
        made[output] = folder / f"{output}.tflite"
        tflite_target.write(model, made[output], interface=Interface(output=output), **options)
    made["onnx"] = folder / "m.onnx"
    onnx_target.write(model, made["onnx"], interface=Interface(output="logits"), **options)
    for name, path in made.items():
        output = name if name in ("probabilities", "classes") else "logits"
        cards.embed(path, dataclasses.replace(CARD, output=output))
    return made


@pytest.mark.parametrize("name", ["keras", "saved_model", "logits", "probabilities", "onnx"])
def test_every_format_is_tiled_alike(files, name):
    image = drawn(128, 192)
    large = tiny_model((128, 192))
    large.set_weights(load(files["keras"]).model.get_weights())
    expected = Predictor.from_keras(large, CARD).probabilities(image)
    # The net reaches 8 pixels: one at stride 1, two dilated and one of the resize at stride 2.
    tiled = TiledPredictor.of(load(files[name]), overlap=32)
    np.testing.assert_allclose(tiled.probabilities(image), expected, atol=1e-4)
    assert len(np.unique(tiled.predict(image))) > 1


def test_a_scale_is_a_smaller_image():
    image = drawn(151, 230)
    half = feed(image, (76, 115))  # 75.5 is rounded to even
    net = numpy_net(colours, SIZE)
    tiled, plain = TiledPredictor.of(net).scaled(0.5), TiledPredictor.of(net)
    np.testing.assert_array_equal(
        tiled.probabilities(image, size=(76, 115)), plain.probabilities(half)
    )
    assert tiled.predict(image).shape == (151, 230)
    expected = softmax(colours(half.astype(np.float32)))
    assert tiled.probabilities(image).shape == (151, 230, 3)
    np.testing.assert_allclose(tiled.probabilities(image)[0, 0], expected[0, 0], atol=1e-6)


def test_what_stands_around_the_model_is_told():
    tiled = TiledPredictor.of(FlippedPredictor.of(numpy_net(colours, SIZE)))
    assert tiled.refinements == ("flip", "tiles of 64 x 96, overlap 16")
    assert ScaledPredictor.of(tiled, [0.5, 1]).refinements == (*tiled.refinements, "scales 0.5 1")
    assert tiled.scaled(0.5).refinements[1] == "tiles of 64 x 96, overlap 16 at scale 0.5"


# How far tiles are from the whole image.


def test_tiles_of_a_net_that_pools_everything_are_measured():
    net = keras_net("fastscnn", SIZE, bins=(1, 2), expansion=2)
    tiled, image = TiledPredictor.of(net), drawn(100, 400)
    assert apart(tiled, [drawn(*SIZE)]) is None  # one tile
    assert apart(tiled, [drawn(63, 400)]) is None  # narrower than models are
    found = apart(tiled, [image])
    assert found.size == (96, 192)  # multiples of 32, two tiles at most
    part = image[2:98, 104:296]
    expected = tiled.predict(part) != net.at_size((96, 192)).predict(part)
    assert found.share == found.largest == expected.mean() > 0
    assert str(found).endswith("labels (the middle 96 x 192 of one image)")


class Whole:
    """A stand-in for the net at a larger size: of its labels, some are not those of tiles."""

    def __init__(self, different):
        self.different = different
        self.sizes = []

    def at_size(self, size):
        self.sizes.append(size)
        return self

    def predict(self, pixels):
        labels = colours(pixels.astype(np.float32)).argmax(-1)
        labels.flat[: self.different] += 1
        return labels


def test_all_labels_of_several_images_count_alike(monkeypatch):
    # 96 labels differ on each: of 64 x 192 and of 128 x 192 pixels, 192 of 36,864 = 1/192.
    whole = Whole(96)
    tiled = TiledPredictor.of(numpy_net(colours, SIZE))
    monkeypatch.setattr(type(tiled.inner), "at_size", lambda self, size: whole.at_size(size))
    found = apart(tiled, [drawn(*SIZE), drawn(70, 500), drawn(200, 200), drawn(9, 9)])
    assert found.images == 2 and found.size == (128, 192)
    assert found.share == 1 / 192 and found.largest == 1 / 128
    assert whole.sizes == [(64, 192), (128, 192)]
    assert str(found) == (
        "tiles change 0.52% of the whole images' labels (the middle 128 x 192 of 2 images, evenly "
        "spread; of one of them 0.78%)"
    )


def test_a_net_is_built_anew_only_for_another_size(monkeypatch):
    net = keras_net("fastscnn", SIZE, bins=(1, 2), expansion=2)
    built, build = [], models.build
    monkeypatch.setattr(models, "build", lambda *words: built.append(words[1]) or build(*words))
    images = [drawn(64, 200), drawn(64, 210), drawn(140, 96)]
    assert apart(TiledPredictor.of(net), images).images == 3
    assert built == [(64, 192, 3), (128, 96, 3)]


def test_a_file_of_one_size_cannot_be_compared():
    with pytest.raises(UserError, match="net.tflite takes 64 x 96 only"):
        apart(TiledPredictor.of(numpy_net(colours, SIZE)), [drawn(200, 200)])


def test_the_tiles_are_found_again():
    tiled = TiledPredictor.of(numpy_net(colours, SIZE))
    assert tiles_of(ScaledPredictor.of(tiled, [1.0, 0.5])) is tiled
    assert tiles_of(numpy_net(colours, SIZE)) is None


# Bad input.


def test_class_maps_cannot_be_blended(files):
    with pytest.raises(UserError, match=r"classes\.tflite gives a class map.*--output logits"):
        TiledPredictor.of(load(files["classes"]))


@pytest.mark.parametrize("overlap", [-1, 33])
def test_overlaps_that_do_not_do(overlap):
    with pytest.raises(UserError, match=rf"overlap of {overlap} pixels.*0 to 32 is wanted"):
        TiledPredictor.of(numpy_net(colours, SIZE), overlap=overlap)


def write_header_of_png(path, width, height):
    """Write a PNG that says it is large, and holds nothing."""

    def chunk(name, data):
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )
    return path


# The second is one that Pillow alone would only warn of.
@pytest.mark.parametrize("side", [30_000, 12_500])
def test_images_too_large_are_refused_by_their_header(tmp_path, side):
    assert 12_000 * 8_000 < MOST_PIXELS < 12_500**2
    path = write_header_of_png(tmp_path / "huge.png", side, side)
    with pytest.raises(UserError, match=r"^\S*huge\.png has more than 150 million pixels.*cut it"):
        read_image(path)


@pytest.fixture(scope="module")
def unet(tmp_path_factory):
    """A `.keras` file that can be rebuilt at another size."""
    path = tmp_path_factory.mktemp("unet") / "unet.keras"
    net = keras_net("unet", (96, 128), num_classes=2, base_channels=2)
    net.model.save(path)
    cards.embed(path, net.card)
    return path


@pytest.mark.parametrize("command", ["predict", "evaluate"])
def test_commands_refuse_images_too_large(tmp_path, unet, command, capsys):
    data = write_street(tmp_path / "data")
    huge = write_header_of_png(data / "val" / "images" / "1.png", 30_000, 30_000)
    more = {
        "predict": [str(huge), "--out", str(tmp_path / "out")],
        "evaluate": ["--data", f"folder:{data}"],
    }
    assert main([command, str(unet), *more[command], "--tile"]) == 2
    assert "1.png has more than 150 million pixels" in capsys.readouterr().err.replace("\n", "")


# Commands.


def test_predict_in_tiles_says_how_far_they_are_from_the_whole(tmp_path, unet, capsys):
    for name, size in (("a", (200, 300)), ("one", (1, 1))):
        Image.fromarray(drawn(300, 300)[: size[0], : size[1]]).save(tmp_path / f"{name}.png")
    words = ["predict", str(unet), "--out", str(tmp_path / "out"), "--tile-overlap", "32"]
    assert main([*words, str(tmp_path / "a.png"), str(tmp_path / "one.png")]) == 0
    said = capsys.readouterr().out
    assert "2 images labelled" in said
    assert "of the whole image's labels (the middle 192 x 256 of one image)" in said
    for name, size in (("a", (300, 200)), ("one", (1, 1))):
        with Image.open(tmp_path / "out" / f"{name}.png") as ids:
            assert ids.size == size


def test_evaluate_tells_what_stood_around_the_model(tmp_path, unet, street, capsys):
    words = ["evaluate", str(unet), "--eval-size", "64", "64", "--json", str(tmp_path / "r")]
    words += ["--data", f"folder:{street}"]
    assert main([*words, "--tile", "--flip", "--scales", "0.5", "1"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "2 images, flip, tiles of 64 x 64, overlap 16, scales 0.5 1" in said
    result = json.loads((tmp_path / "r").read_text())
    assert result["refinements"] == ["flip", "tiles of 64 x 64, overlap 16", "scales 0.5 1"]
    assert 0 <= result["tiles_apart"] <= 1
    assert f"tiles change {result['tiles_apart']:.2%} of the whole images' labels" in said
    assert "(the middle 96 x 128 of 2 images, evenly spread; of one of them" in said


def test_the_images_that_are_compared_are_spread_over_those_of_the_command(
    tmp_path, unet, monkeypatch
):
    data = write_street(tmp_path / "data", train=1, val=12)
    compared = []
    monkeypatch.setattr("kseg.tiling.apart", lambda tiled, images: compared.extend(images))
    words = ["evaluate", str(unet), "--eval-size", "64", "64", "--data", f"folder:{data}", "--tile"]
    assert main([*words, "--limit", "11"]) == 0
    # Five of eleven: 0, 10 / 4 = 2.5, 5, 7.5 and 10, rounded down.
    assert len(compared) == 5
    for number, image in zip((0, 2, 5, 7, 10), compared, strict=True):
        name = sorted((data / "val" / "images").iterdir(), key=lambda path: path.name)[number].name
        np.testing.assert_array_equal(image, read_image(data / "val" / "images" / name))


def test_a_file_of_one_size_is_not_compared(tmp_path, files, capsys):
    Image.fromarray(drawn(100, 200)).save(tmp_path / "a.png")
    words = ["predict", str(files["logits"]), str(tmp_path / "a.png"), "--tile"]
    assert main([*words, "--out", str(tmp_path / "out")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "1 image labelled" in said
    assert "not compared with the whole image, since" in said
    assert "logits.tflite takes 64 x 96 only" in said


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--tile-overlap", "300"], "an overlap of 300 pixels does not do"),
        (["--scales", "0"], "scales are 0.25 to 4, and 0 is none"),
        (["--scales", "0.5"], "m.tflite takes 64 x 96 only; other scales need --tile"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, files, words, told, capsys):
    path = tmp_path / "m.tflite"
    path.write_bytes(files["logits"].read_bytes())
    Image.fromarray(drawn(9, 9)).save(tmp_path / "a.png")
    assert main(["predict", str(path), str(tmp_path / "a.png"), *words]) == 2
    said = capsys.readouterr().err
    assert told in said.replace("\n", " ")
    assert "Traceback" not in said


@pytest.mark.slow
def test_a_picture_of_96_million_pixels_takes_less_than_3_gib(tmp_path):
    net = keras_net("swiftnet", (512, 512), num_classes=19, widths=(8,) * 4, blocks=(1,) * 4)
    net.model.save(tmp_path / "m.keras")
    cards.embed(tmp_path / "m.keras", net.card)
    picture = np.tile(drawn(800, 1200), (10, 10, 1))
    Image.fromarray(picture).save(tmp_path / "large.jpg")
    out = tmp_path / "out"
    words = ["predict", str(tmp_path / "m.keras"), str(tmp_path / "large.jpg"), "--tile"]
    code = (
        "from pathlib import Path; from kseg.cli import main\n"
        f"assert main({[*words, '--out', str(out)]!r}) == 0\n"
        # Not ru_maxrss: that keeps what the tests' own process held when it started this one.
        "status = Path('/proc/self/status').read_text()\n"
        "print(int(status.split('VmHWM:')[1].split()[0]) / 2**20)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # Some of it is the comparison with the whole, on 2 x 2 tiles.
    assert "the middle 1024 x 1024 of one image" in done.stdout
    assert float(done.stdout.split()[-1]) < 3
    assert Path(out / "large.png").read_bytes()[16:24] == struct.pack(">II", 12_000, 8_000)
