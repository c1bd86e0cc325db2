from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kseg.errors import UserError
from kseg.overlay import blend, contact_sheet, overlay, palette_image
from kseg.predict import predict_files

CLASSES = ("road", "sky", "a class with a rather long name")
PALETTE = ((128, 64, 128), (70, 130, 180), (0, 0, 142))


@dataclass
class Halves:
    """Calls the upper half sky and the lower half road."""

    classes: tuple = CLASSES
    palette: tuple = PALETTE

    def predict(self, image, *, size=None):
        ids = np.zeros(image.shape[:2], np.uint8)
        ids[: len(ids) // 2] = 1
        return ids


def photo(path: Path, *, size=(144, 96), **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3)).astype(np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return path


def files(folder: Path) -> set[str]:
    return {str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()}


def test_class_map_is_an_8_bit_palette_png_of_the_picture_s_size(tmp_path):
    (written,) = predict_files(Halves(), [photo(tmp_path / "street.jpg")], tmp_path / "out")
    assert written == tmp_path / "out" / "street.png"
    with Image.open(written) as image:
        assert (image.mode, image.size) == ("P", (144, 96))
        assert image.getpalette()[:9] == [channel for colour in PALETTE for channel in colour]
        np.testing.assert_array_equal(np.asarray(image), Halves().predict(np.zeros((96, 144, 3))))
    header = written.read_bytes()[:26]
    assert tuple(header[24:26]) == (8, 3)  # bits a pixel and colour type of the PNG header


def test_overlay_is_a_jpeg_with_the_whole_picture_above_the_legend(tmp_path):
    predict_files(Halves(), [photo(tmp_path / "street.jpg")], tmp_path / "out")
    with Image.open(tmp_path / "out" / "street_overlay.jpg") as image:
        assert image.format == "JPEG"
        assert image.width == 144 and image.height > 96


def test_folders_are_searched_and_kept(tmp_path):
    for name in ("a.png", "sub/b.JPG", "sub/deep/a.bmp", "c.webp", "d.tif", "e.jpeg"):
        photo(tmp_path / "in" / name)
    photo(tmp_path / "in" / ".hidden.png")
    photo(tmp_path / "in" / ".cache" / "x.png")
    (tmp_path / "in" / "notes.txt").write_text("no picture")
    (tmp_path / "in" / "folder.png").mkdir()
    single = photo(tmp_path / "one.more.jpg")
    predict_files(Halves(), [tmp_path / "in", single], tmp_path / "out")
    stems = {"a", "sub/b", "sub/deep/a", "c", "d", "e", "one.more"}
    assert files(tmp_path / "out") == {
        stem + end for stem in stems for end in (".png", "_overlay.jpg")
    }


def test_camera_orientation_is_honoured(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to see it upright
    photo(tmp_path / "phone.jpg", size=(144, 96), exif=exif)
    (written,) = predict_files(Halves(), [tmp_path / "phone.jpg"], tmp_path / "out")
    with Image.open(written) as image:
        assert image.size == (96, 144)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1"])
def test_pictures_of_other_modes(tmp_path, mode):
    Image.new("RGB", (64, 48), (10, 200, 30)).convert(mode).save(tmp_path / "a.png")
    (written,) = predict_files(Halves(), [tmp_path / "a.png"], tmp_path / "out")
    with Image.open(written) as image:
        assert image.size == (64, 48)


def test_second_run_into_the_same_folder_replaces(tmp_path):
    photo(tmp_path / "in" / "a.jpg")
    out = tmp_path / "in" / "out"
    for _ in range(2):  # the results of the first are no input of the second
        predict_files(Halves(), [tmp_path / "in"], out)
    assert files(out) == {"a.png", "a_overlay.jpg"}


def test_picture_named_twice_is_done_once(tmp_path):
    photo(tmp_path / "in" / "a.jpg")
    calls = []
    predict_files(
        Halves(),
        [tmp_path / "in", tmp_path / "in" / "a.jpg"],
        tmp_path / "out",
        on_image=lambda done, total: calls.append((done, total)),
    )
    assert calls == [(1, 1)]


def test_two_pictures_never_share_a_result(tmp_path):
    photo(tmp_path / "in" / "a.jpg")
    photo(tmp_path / "in" / "a.png")
    with pytest.raises(UserError, match=r"a\.jpg and .*a\.png would both be written to .*a\.png"):
        predict_files(Halves(), [tmp_path / "in"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_pictures_of_one_name_in_two_folders(tmp_path):
    inputs = [photo(tmp_path / folder / "a.jpg") for folder in ("one", "two")]
    with pytest.raises(UserError, match="would both be written"):
        predict_files(Halves(), inputs, tmp_path / "out")


@pytest.mark.parametrize("picture", ["a.png", "a.jpg"])
def test_a_file_beside_the_picture_is_never_replaced(tmp_path, picture):
    photo(tmp_path / picture)
    label = tmp_path / "a.png"  # the picture itself, or perhaps its hand-made label
    if not label.exists():
        label.write_bytes(b"label")
    before = label.read_bytes()
    with pytest.raises(UserError, match=r"a\.png exists already"):
        predict_files(Halves(), [tmp_path / picture], tmp_path)
    assert label.read_bytes() == before


def test_results_beside_the_picture_where_nothing_is_lost(tmp_path):
    predict_files(Halves(), [photo(tmp_path / "a.jpg")], tmp_path)
    assert files(tmp_path) == {"a.jpg", "a.png", "a_overlay.jpg"}


def test_truncated_picture_is_named_and_what_was_done_stays(tmp_path):
    photo(tmp_path / "in" / "a.jpg")
    broken = photo(tmp_path / "in" / "b.png")
    broken.write_bytes(broken.read_bytes()[:2000])
    with pytest.raises(UserError, match=r"b\.png"):
        predict_files(Halves(), [tmp_path / "in"], tmp_path / "out")
    assert files(tmp_path / "out") == {"a.png", "a_overlay.jpg"}


@pytest.mark.parametrize("content", [b"", b"no picture at all"])
def test_file_that_is_no_picture_is_named(tmp_path, content):
    (tmp_path / "x.jpg").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.jpg"):
        predict_files(Halves(), [tmp_path / "x.jpg"], tmp_path / "out")


def test_missing_path_is_named_before_anything_is_written(tmp_path):
    inputs = [photo(tmp_path / "a.jpg"), tmp_path / "nowhere"]
    with pytest.raises(UserError, match=r"nowhere: there is no such file or folder"):
        predict_files(Halves(), inputs, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_folder_without_a_picture(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no picture in .*empty; expected files that end in \.png"):
        predict_files(Halves(), [tmp_path / "empty"], tmp_path / "out")


def test_out_that_is_a_file(tmp_path):
    with pytest.raises(UserError, match="is a file; --out takes a folder"):
        predict_files(Halves(), [tmp_path], photo(tmp_path / "a.jpg"))


# Overlays.


def drawn(width, height, num_classes=3):
    random = np.random.default_rng(0)
    coarse = random.integers(0, num_classes, (4, 6)).astype(np.uint8)
    ids = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.NEAREST))
    return random.integers(0, 256, (height, width, 3)).astype(np.uint8), ids


@pytest.mark.parametrize("size", [(144, 96), (480, 360), (360, 480), (2000, 200), (16, 16)])
def test_overlay_keeps_the_picture_and_adds_the_legend_below(size):
    image, ids = drawn(*size)
    sheet = overlay(image, ids, CLASSES, PALETTE)
    picture = np.asarray(sheet)[: size[1], : size[0]]
    np.testing.assert_array_equal(picture, np.asarray(blend(image, ids, PALETTE)))
    legend = np.asarray(sheet)[size[1] :].reshape(-1, 3)
    for colour in PALETTE:
        assert (legend == colour).all(axis=1).sum() > 50  # its swatch


@pytest.mark.parametrize("size", [(144, 96), (480, 360), (16, 16)])
def test_no_entry_of_the_legend_is_cut_off(size):
    image, ids = drawn(*size)
    legend = np.asarray(overlay(image, ids, CLASSES, PALETTE))[size[1] :]
    assert (legend[:, -3:] == 255).all() and (legend[-3:] == 255).all()


def test_legend_lists_only_classes_that_occur():
    image, ids = drawn(480, 360)
    sheet = np.asarray(overlay(image, np.zeros_like(ids), CLASSES, PALETTE))[360:]
    assert not (sheet == PALETTE[1]).all(axis=-1).any()


def test_legend_of_a_large_photo_is_large():
    # Letters of about a fortieth of the picture's side: 4 % or more of its height in all.
    image, ids = drawn(2000, 1500)
    assert overlay(image, ids, CLASSES, PALETTE).height >= 1.04 * 1500


def test_blend_is_half_photo_half_colour_inside_a_class():
    image = np.full((8, 8, 3), 100, np.uint8)
    ids = np.ones((8, 8), np.uint8)
    np.testing.assert_array_equal(np.asarray(blend(image, ids, PALETTE))[4, 4], [85, 115, 140])


def test_blend_leaves_ignored_pixels():
    image, _ = drawn(8, 8)
    ids = np.full((8, 8), 255, np.uint8)
    np.testing.assert_array_equal(np.asarray(blend(image, ids, PALETTE)), image)
    assert overlay(image, ids, CLASSES, PALETTE).height >= 8


def test_palette_image_holds_the_ids():
    ids = np.arange(3, dtype=np.uint8)[None]
    image = palette_image(ids, PALETTE)
    np.testing.assert_array_equal(np.asarray(image), ids)
    np.testing.assert_array_equal(np.asarray(image.convert("RGB"))[0], PALETTE)


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_contact_sheet_shows_every_picture(count):
    pictures = [Image.new("RGB", (40, 30), (10 * n, 0, 0)) for n in range(count)]
    sheet = np.asarray(contact_sheet(pictures)).reshape(-1, 3)
    for n in range(count):
        assert (sheet == (10 * n, 0, 0)).all(axis=1).sum() == 40 * 30


def test_overlay_of_a_12_megapixel_photo():
    image, ids = drawn(4000, 3000)
    assert overlay(image, ids, CLASSES, PALETTE).width == 4000
