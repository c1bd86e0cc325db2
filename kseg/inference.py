"""One way to use a trained model, whatever it is in: run, .keras, .tflite, .onnx, SavedModel."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps

from kseg import card as cards
from kseg import resize, runtimes
from kseg.card import ModelCard
from kseg.data.dataset import voc_palette
from kseg.errors import Failure, UserError
from kseg.image_files import opened_image
from kseg.probabilities import as_logits, softmax
from kseg.published.checkpoint import refuse_checkpoint
from kseg.runs import Run

if TYPE_CHECKING:
    import keras

    from kseg.config import Feed

TAKEN = "a run folder, a .keras file, a .tflite file, an .onnx file or a SavedModel folder"


@dataclass(frozen=True)
class Predictor:
    """A trained model that labels images of any size.

    An image is resized to the model's size and rounded to whole pixel values, so that every
    format sees the same bytes; logits are resized to the image's own size, then the best class
    is taken. A file that gives a class map has it resized by nearest neighbour.

    Attributes:
        path: where the model came from.
        card: what the file says about itself; made up from its shapes where it says nothing.
        runtime: the opened file.
    """

    path: Path
    card: ModelCard
    runtime: runtimes.Runtime

    @staticmethod
    def from_keras(model: keras.Model, card: ModelCard) -> Predictor:
        """Return a predictor of a model in memory; it follows the model's weights.

        Args:
            model: gives logits, alone or in a dict.
            card: what it is; its size is taken from the model.
        """
        path = Path(f"{card.model or model.name}.keras")
        runtime = run_model(model, path)
        return Predictor(path, _checked(path, card, runtime), runtime)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the model's input."""
        return self.runtime.size

    @property
    def classes(self) -> tuple[str, ...]:
        """Name of each class."""
        return self.card.classes

    @property
    def palette(self) -> tuple[tuple[int, int, int], ...]:
        """Colour (r, g, b) of each class."""
        return self.card.palette

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.card.classes)

    @property
    def classes_known(self) -> bool:
        """Whether the file tells its classes; a class map of another program does not."""
        return self.runtime.num_classes is not None or bool(self.card.model)

    @property
    def quantize_aware(self) -> bool:
        """Whether it is a quantisation-aware model, or a file written from one."""
        return bool(self.card.extra.get("quantize_aware"))

    @property
    def output(self) -> runtimes.Output:
        """Whether the file gives "logits" or "classes"."""
        return self.runtime.output

    @property
    def refinements(self) -> tuple[object, ...]:
        """What stands around the model until a class is taken: nothing."""
        return ()

    @property
    def settled(self) -> Sequence[tuple[float, ...]]:
        """For each image so far, the share that each stage of a layer cascade settled of it."""
        return self.runtime.settled

    @property
    def model(self) -> keras.Model | None:
        """The Keras model, where the file holds one."""
        return self.runtime.model

    def predict(
        self, image: np.ndarray | Path | str, *, size: tuple[int, int] | None = None
    ) -> np.ndarray:
        """Label an image.

        Args:
            image: uint8 (h, w, 3), RGB, or the path of an image file.
            size: height and width of the result; the image's own by default.

        Returns:
            (h, w) uint8 class ids.
        """
        pixels = pixels_of(image)
        return self.labels(self.forward(pixels), size or pixels.shape[:2])

    def class_map(self, image: np.ndarray | Path | str) -> np.ndarray:
        """Return the class ids (H, W) uint8 at the model's own size, as an exported file does."""
        return self.predict(image, size=self.size)

    def logits(
        self, image: np.ndarray | Path | str, *, size: tuple[int, int] | None = None
    ) -> np.ndarray:
        """Return the logits (h, w, C) float32 at the image's own size, or at `size`.

        Raises:
            Failure: if the file gives a class map.
        """
        self._check_logits()
        pixels = pixels_of(image)
        return resize.bilinear(self.forward(pixels), size or pixels.shape[:2])

    def probabilities(
        self, image: np.ndarray | Path | str, *, size: tuple[int, int] | None = None
    ) -> np.ndarray:
        """Return the probabilities (h, w, C) float32 at the image's own size, or at `size`.

        Raises:
            Failure: if the file gives a class map.
        """
        pixels = pixels_of(image)
        return np.concatenate(list(self.bands(pixels, size or pixels.shape[:2])))

    def bands(self, pixels: np.ndarray, size: tuple[int, int]) -> Iterator[np.ndarray]:
        """Yield the probabilities of an image from top to bottom, so that few are held at once.

        Args:
            pixels: uint8 (h, w, 3).
            size: height and width of the result.

        Yields:
            (32 or fewer, width, C) float32; the same heights for one size, whatever the predictor.

        Raises:
            Failure: if the file gives a class map.
        """
        self._check_logits()
        logits = self.forward(pixels)
        for band in resize.bilinear_bands([logits], logits.shape[:2], size):
            yield softmax(band)

    def at_size(self, size: tuple[int, int]) -> Predictor:
        """Return a predictor of the same weights that takes images of another size.

        Args:
            size: height and width.

        Raises:
            UserError: if the file has one size, or the model cannot take this one.
        """
        if size == self.size:
            return self
        card, runtime = _at_size(self.path, self.card, self.runtime, size)
        return Predictor(self.path, _checked(self.path, card, runtime), runtime)

    def without_quantization(self) -> Predictor:
        """Return the float model of a quantisation-aware one; any other as it is."""
        if self.model is None or not self.quantize_aware:
            return self
        from kseg.models import build, inference_model
        from kseg.quantization import without_quantization

        card = self.card
        model = build(card.model, (*self.size, 3), self.num_classes, dict(card.options))
        model = inference_model(model)
        without_quantization(self.model, model)
        extra = {name: value for name, value in card.extra.items() if name != "quantize_aware"}
        plain = Predictor.from_keras(model, dataclasses.replace(card, extra=extra))
        return dataclasses.replace(plain, path=self.path)

    def scaled(self, scale: float) -> Predictor:
        """Return a predictor that sees images `scale` times as large, to a multiple of 32.

        Raises:
            UserError: if the file has one size, or the model cannot take this one.
        """
        if scale == 1:
            return self
        if self.model is None:
            raise UserError(
                "{} takes {} x {} only; other scales need --tile, or the run's .keras file".format(
                    self.path, *self.size
                )
            )
        height, width = (max(32, 32 * round(scale * side / 32)) for side in self.size)
        return self.at_size((height, width))

    def forward(self, pixels: np.ndarray) -> np.ndarray:
        """Return what the file gives for an image uint8 (h, w, 3), at the file's own size."""
        return self.runtime.forward(feed(pixels, self.size))

    def labels(self, result: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """Return the class ids uint8 at `size` that a result of `forward` means."""
        if self.output == "classes":
            return resize.nearest(result, size)
        return resize.bilinear_argmax(result, size)

    def _check_logits(self) -> None:
        if self.output == "classes":
            raise Failure(f"{self.path} gives a class map; export it with --output logits")


def feed(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return the bytes that a model of `size` is given for an image: uint8 (H, W, 3)."""
    if pixels.shape[:2] == size:
        return pixels
    return np.rint(resize.bilinear(pixels, size)).astype(np.uint8)


def read_image(path: Path | str) -> np.ndarray:
    """Read an image file as a person sees it: RGB, turned as its EXIF data says.

    Returns:
        (h, w, 3) uint8.

    Raises:
        UserError: if there is no such file, it is not an image, or it has more than
            `image_files.MOST_PIXELS`.
    """
    try:
        with opened_image(path) as image:
            ImageOps.exif_transpose(image, in_place=True)
            return np.asarray(_rgb(image))
    except FileNotFoundError as error:
        raise UserError(f"there is no file {path}") from error
    except UserError:
        raise
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{path} cannot be read as an image: {error}") from error


def _rgb(image: Image.Image) -> Image.Image:
    """Return an image as RGB, and itself where it is; its copy may be of half a gigabyte."""
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16"):  # by its high bytes: Pillow itself would clip it to white
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


def load(
    path: Path | str,
    *,
    eval_size: tuple[int, int] | None = None,
    last: bool = False,
    threads: int | None = None,
    fed_as: Feed = "bytes",
) -> Predictor:
    """Open a trained model.

    Args:
        path: a run folder, a .keras, .tflite or .onnx file, or a SavedModel folder.
        eval_size: height and width to feed; a Keras model is rebuilt at this size with the same
            weights, the other formats have the one size they were exported for.
        last: of a run, take last.keras instead of best.keras.
        threads: processor threads of a .tflite or .onnx file.
        fed_as: the form of the images that clients give another program's file.

    Raises:
        UserError: if there is no such file, it is no model, it is damaged, or it cannot take the
            size.
    """
    path = Path(path)
    found, opener = _find(path, last=last, threads=threads, fed_as=fed_as)
    card, runtime = cards.read(found), opener(found)
    if card is not None and card.output == "probabilities":
        runtime = _as_logits(runtime)
    predictor = Predictor(found, _checked(found, card, runtime), runtime)
    return predictor if eval_size is None else predictor.at_size(tuple(eval_size))


def _as_logits(runtime: runtimes.Runtime) -> runtimes.Runtime:
    """Return the runtime of a file of probabilities with their logarithms, which are logits."""
    return dataclasses.replace(runtime, forward=lambda image: as_logits(runtime.forward(image)))


def pixels_of(image: np.ndarray | Path | str) -> np.ndarray:
    """Return an image uint8 (h, w, 3), read where it is the path of a file.

    Raises:
        UserError: if it is an array of another kind, or as `read_image`.
    """
    if not isinstance(image, np.ndarray):
        return read_image(image)
    if image.ndim != 3 or image.shape[-1] != 3 or image.dtype != np.uint8:
        raise UserError(
            f"expected an image of uint8 (h, w, 3), got {image.dtype} {image.shape}; "
            "convert it to RGB with values 0..255"
        )
    return image


def _find(
    path: Path, *, last: bool, threads: int | None, fed_as: Feed
) -> tuple[Path, Callable[[Path], runtimes.Runtime]]:
    """Return the file that `path` stands for and what opens it."""
    if not path.exists():
        raise UserError(f"there is no {path}; expected {TAKEN}")
    if Run.is_run(path):
        return Run(path).model_file(last=last), _open_keras
    if path.suffix == ".keras":
        return path, _open_keras
    if path.suffix == ".tflite":
        return path, lambda found: runtimes.open_tflite(found, threads=threads, fed_as=fed_as)
    if path.suffix == ".onnx":
        return path, lambda found: runtimes.open_onnx(found, threads=threads, fed_as=fed_as)
    refuse_checkpoint(path)
    folder = _saved_model(path)
    if folder is None:
        raise UserError(f"{path} is no model that kseg can open; expected {TAKEN}")
    return folder, lambda found: runtimes.open_saved_model(found, fed_as=fed_as)


def _open_keras(path: Path) -> runtimes.Runtime:
    return run_model(runtimes.keras_model(path), path)


def run_model(model: keras.Model, path: Path) -> runtimes.Runtime:
    """Return a Keras model as a runtime.

    A layer cascade is run stage by stage, a quantisation-aware model in whole numbers.
    """
    from kseg.integer_arithmetic import integer_forward, is_rounded
    from kseg.models.layer_cascade import is_cascade

    if is_rounded(model):
        return runtimes.run_keras(model, path=path, function=integer_forward(model))
    if is_cascade(model):
        return runtimes.run_cascade(model, path=path)
    return runtimes.run_keras(model, path=path)


def _saved_model(path: Path) -> Path | None:
    """Return the SavedModel at `path`, or its newest version where TF Serving's layout is."""
    if (path / "saved_model.pb").is_file():
        return path
    versions = [file.parent for file in path.glob("*/saved_model.pb") if file.parent.name.isdigit()]
    return max(versions, key=lambda folder: int(folder.name), default=None)


def _at_size(
    path: Path, card: ModelCard, runtime: runtimes.Runtime, size: tuple[int, int]
) -> tuple[ModelCard, runtimes.Runtime]:
    have = "{} x {}".format(*runtime.size)
    if runtime.model is None:
        raise UserError(
            f"{path} takes {have} only; export the run again with --size {size[0]} {size[1]}"
        )
    if not card.model:
        raise UserError(f"{path} does not say how it was built, so it can only be used at {have}")
    from kseg.models import build, inference_model
    from kseg.weights import copy_weights

    model = inference_model(build(card.model, (*size, 3), len(card.classes), dict(card.options)))
    if card.extra.get("quantize_aware"):
        from kseg.quantization import quantization_aware

        model = quantization_aware(model)
    copy_weights(runtime.model, model)
    return dataclasses.replace(card, size=size), run_model(model, path)


def _checked(path: Path, card: ModelCard | None, runtime: runtimes.Runtime) -> ModelCard:
    """Return a card that fits what the file really does."""
    if card is None:
        # A class map does not tell how many classes there are; 255 is the ignored label.
        count = runtime.num_classes or 255
        names = tuple(f"class {id_}" for id_ in range(count))
        card = ModelCard("", {}, names, voc_palette(count), runtime.size)
    if runtime.num_classes not in (None, len(card.classes)):
        raise UserError(
            f"{path} gives {runtime.num_classes} classes but names {len(card.classes)}; "
            "its kseg.json belongs to another model"
        )
    return dataclasses.replace(card, size=runtime.size, output=runtime.output)
