"""What is wrong with a file that does not behave like its model, told by what it answers.

Each hypothesis says what the Keras model would answer if it had the fault. The one that explains
most of the disagreement is the fault; where it leaves much open, two at once are tried.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import keras
import numpy as np
import tensorflow as tf
from keras import layers

from kseg.inference import Predictor, feed
from kseg.integer_arithmetic import is_bilinear
from kseg.metrics.iou import count_pairs
from kseg.runtimes import FED, logits_of
from kseg.upsampling import CornerResize, EdgeResize

from .comparison import View
from .faults import Fault

FARTHEST = 8  # pixels that a shift is searched for
EXPLAINED = 0.5  # share of the disagreement that a hypothesis has to explain
CERTAIN = 85.0  # per cent of labels that it has to predict
ALONE = 98.0  # per cent at which rounding explains the rest, and no second fault is looked for
FOLLOWED, FEWEST = 2, 100  # times as many pixels as follow the model; pixels that count at all
CAFFE_MEAN = (103.939, 116.779, 123.68)  # blue, green, red

Batch = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Probe:
    """An image, and the class ids (H, W) that model and file give, at the model's size."""

    pixels: np.ndarray
    model: np.ndarray
    file: np.ndarray
    turned: np.ndarray  # the file's, with rows and columns exchanged


# A fault, and the images with what the model gives if it has that fault (or the file, if undone).
Hypothesis = tuple[Fault, list[Probe]]


def probes(file: Predictor, seen: Sequence[View]) -> list[Probe]:
    """Return what a file makes of images."""
    found = []
    for one in seen:
        result = file.forward(one.pixels)
        size = one.labels.shape
        turned = np.ascontiguousarray(result.swapaxes(0, 1))
        fed = feed(one.pixels, size)
        found.append(Probe(fed, one.labels, file.labels(result, size), file.labels(turned, size)))
    return found


def behavioural_faults(model: keras.Model, found: Sequence[Probe], *, resizes: bool) -> list[Fault]:
    """Return the fault that explains best what a file does, or two if one leaves much open.

    Args:
        model: the Keras model, from float images (1, H, W, 3) of 0..255 to logits.
        found: some images.
        resizes: whether other ways to enlarge maps are among what is tried.

    Returns:
        No fault where none explains half of the disagreement.
    """
    before = _mean_share(found)
    inputs = list(_of_inputs(model, found))
    inputs += _of_resizes(model, found) if resizes else []
    best, changed = max((*_of_results(found), *inputs), key=lambda one: one[0].agreement)
    likely = best.agreement >= CERTAIN and _sides_with(found, changed)
    alone = [best] if likely or _explains([best], before) else []
    if before == 100 or best.agreement >= ALONE:
        return alone
    pair = max(_pairs(found, inputs), key=lambda two: two[1].agreement)
    return pair if _explains(pair, max(before, best.agreement)) else alone


def _explains(faults: Sequence[Fault], before: float) -> bool:
    """Tell whether faults explain much of what is left open at `before` per cent."""
    return faults[-1].agreement >= max(before + EXPLAINED * (100 - before), CERTAIN)


def _sides_with(found: Sequence[Probe], changed: Sequence[Probe]) -> bool:
    """Tell whether the file mostly follows a changed model where that and the model disagree.

    In int8, rounding may change as many labels as another resize does; but it does not take sides.
    """
    theirs = ours = 0
    for one, other in zip(found, changed, strict=True):
        if other.model.shape != one.model.shape or other.file is not one.file:
            return False  # a moved or renamed class map, of which all is seen by agreement
        apart = one.model != other.model
        theirs += np.count_nonzero(apart & (one.file == other.model))
        ours += np.count_nonzero(apart & (one.file == one.model))
    return theirs >= max(FOLLOWED * ours, FEWEST)


def _pairs(found: Sequence[Probe], inputs: Sequence[Hypothesis]) -> Iterator[list[Fault]]:
    """Give what could have happened at once: to image and class map, or to its places and ids."""
    for fault, changed in inputs:
        for second, _ in _of_results(changed):
            yield [replace(fault, agreement=second.agreement), second]
    for fault, changed in _moved(found, _purity):
        second, _ = _relabelled(changed)
        yield [replace(fault, agreement=second.agreement), second]


def _share(one: Probe) -> float:
    return 100 * float(np.mean(one.model == one.file))


def _purity(one: Probe) -> float:
    """Return the share of labels that would be equal after the best exchange of ids."""
    return 100 * float(count_pairs(one.model, one.file).max(axis=0).sum() / one.file.size)


def _mean_share(found: Sequence[Probe]) -> float:
    return float(np.mean([_share(one) for one in found]))


def _rated(name: str, sentence: str, changed: list[Probe]) -> Hypothesis:
    return Fault(name, sentence, _mean_share(changed)), changed


def _of_results(found: Sequence[Probe]) -> Iterator[Hypothesis]:
    """Give what could have happened to the class map."""
    yield from _moved(found, _share)
    yield _relabelled(found)


def _moved(found: Sequence[Probe], alike: Callable[[Probe], float]) -> Iterator[Hypothesis]:
    """Give the ways that the class map could have been moved."""
    yield _shifted(found, alike)
    turned = [replace(one, file=one.turned) for one in found]
    yield _rated(
        "transposed", "the class map is transposed: rows and columns are exchanged", turned
    )
    for what, (down, right) in (
        ("left and right are exchanged", (1, -1)),
        ("top and bottom are exchanged", (-1, 1)),
        ("it is turned by 180 degrees", (-1, -1)),
    ):
        changed = [replace(one, model=one.model[::down, ::right]) for one in found]
        yield _rated("mirrored", f"the class map is mirrored: {what}", changed)


def _shifted(found: Sequence[Probe], alike: Callable[[Probe], float]) -> Hypothesis:
    """Return the whole-pixel shift that explains most, over what both maps show."""
    reach = range(-FARTHEST, FARTHEST + 1)
    ways = [(down, right) for down in reach for right in reach if (down, right) != (0, 0)]
    shares = {way: np.mean([alike(_overlap(one, *way)) for one in found]) for way in ways}
    down, right = max(shares, key=shares.get)
    parts = [(abs(down), "below" if down > 0 else "above")] if down else []
    parts += [(abs(right), "to the right of" if right > 0 else "to the left of")] if right else []
    text = " and ".join(f"{n} pixel{'s' if n > 1 else ''} {where}" for n, where in parts)
    changed = [_overlap(one, down, right) for one in found]
    return _rated("shift", f"the class map lies {text} the model's", changed)


def _overlap(one: Probe, down: int, right: int) -> Probe:
    """Return what both maps show if the file's lies so many pixels below and to the right."""
    height, width = one.model.shape
    rows = slice(max(-down, 0), height - max(down, 0))
    columns = slice(max(-right, 0), width - max(right, 0))
    moved_rows = slice(max(down, 0), height - max(-down, 0))
    moved_columns = slice(max(right, 0), width - max(-right, 0))
    return replace(one, model=one.model[rows, columns], file=one.file[moved_rows, moved_columns])


def _relabelled(found: Sequence[Probe]) -> Hypothesis:
    """Return the exchange of class ids that explains most."""
    pairs = sum(count_pairs(one.model, one.file) for one in found)
    meant = pairs.argmax(axis=0)  # by id of the file, that of the model
    ids = np.flatnonzero(pairs.sum(axis=0))
    if len(set(meant[ids])) < max(len(ids), 2) or np.array_equal(meant[ids], ids):
        return Fault("relabelled", "", 0.0), list(found)
    # Ids are bytes: one below 0 is 255.
    offsets = set((ids - meant[ids]).astype(np.int8).tolist())
    if len(offsets) == 1:
        text = f"every class id is off by {offsets.pop():+d}"
    else:
        moved = [f"{meant[i]} is given as {i}" for i in ids if meant[i] != i]
        text = f"class ids are exchanged: {', '.join(moved[:4])}" + ", ..." * (len(moved) > 4)
    return _rated("relabelled", text, [replace(one, file=meant[one.file]) for one in found])


def _of_inputs(model: keras.Model, found: Sequence[Probe]) -> Iterator[Hypothesis]:
    """Give what could have happened to the image."""
    answer = _answers(model)
    for name, sentence, change in _changes(model):
        yield _rated(name, sentence, _answered(found, lambda x, c=change: answer(c(x))))


def _answered(found: Sequence[Probe], answer: Batch) -> list[Probe]:
    return [replace(one, model=answer(one.pixels.astype("float32"))) for one in found]


def _changes(model: keras.Model) -> Iterator[tuple[str, str, Batch]]:
    """Give a name, a sentence, and the change of the image that has the same effect."""
    yield "channels", "red and blue are exchanged", lambda image: image[..., ::-1]
    scale, offset = _normalisation(model)
    ours = lambda image: image * scale + offset  # noqa: E731
    normal = {
        "left out: the network sees 0..255": lambda image: image,
        "x / 255": lambda image: image / 255,
        "x / 127.5 - 1": lambda image: image / 127.5 - 1,
        "ImageNet's mean and deviation": FED["imagenet"],
        "ImageNet's mean in BGR, as Caffe's": lambda image: image[..., ::-1] - CAFFE_MEAN,
        "done twice": lambda image: ours(ours(image)),
        "of signed bytes, which lie 128 too low": lambda image: ours(image - 128),
    }
    drawn = np.random.default_rng(0).uniform(0, 255, (8, 8, 3))
    for text, function in normal.items():
        if np.allclose(function(drawn), ours(drawn), atol=0.02 * np.ptp(ours(drawn))):
            continue  # the model's own
        yield (
            "normalisation",
            f"the image's normalisation is not the model's, but {text}",
            lambda image, f=function: (f(image) - offset) / scale,
        )


def _normalisation(model: keras.Model) -> tuple[np.ndarray, np.ndarray]:
    """Return scale and offset of each channel by the model's own first layer; (1, 0) if none."""
    layer = next((one for one in model.layers if isinstance(one, layers.Rescaling)), None)
    if layer is None or not isinstance(_made_by(layer.input), layers.InputLayer):
        return np.ones(3), np.zeros(3)
    return tuple(
        np.broadcast_to(np.asarray(value, "float64"), 3) for value in (layer.scale, layer.offset)
    )


def _made_by(tensor: keras.KerasTensor) -> keras.Layer:
    return tensor._keras_history.operation


def _of_resizes(model: keras.Model, found: Sequence[Probe]) -> Iterator[Hypothesis]:
    """Give what the model answers if other pixels of its maps meet when they are enlarged."""
    resizes = [layer for layer in model.layers if is_bilinear(layer)]
    kinds = {"align_corners": CornerResize, "corners in place of pixel centres": EdgeResize}
    for text, kind in kinds.items():
        for what, chosen in (("every map", resizes), ("the last map", resizes[-1:])):
            answer = _answers(_with_resizes(model, {layer.name for layer in chosen}, kind))
            yield _rated("resize", f"{what} is enlarged with {text}", _answered(found, answer))


def bilinear_resizes(model: keras.Model) -> int:
    """Return how often a model enlarges a map of more than one pixel bilinearly."""
    found = [layer for layer in model.layers if is_bilinear(layer)]
    return sum(set(layer.input.shape[1:3]) != {1} for layer in found)


def _with_resizes(model: keras.Model, names: set[str], kind: type[keras.Layer]) -> keras.Model:
    """Return a model that shares its weights' values, with other layers where it resizes."""

    def clone(layer: keras.Layer) -> keras.Layer:
        if layer.name in names:
            return kind(*layer.output.shape[1:3], dtype="float32", name=layer.name)
        return type(layer).from_config(layer.get_config())

    copy = keras.models.clone_model(model, clone_function=clone)
    copy.set_weights(model.get_weights())
    return copy


def _answers(model: keras.Model) -> Batch:
    """Return the function from an image float32 (H, W, 3) to class ids uint8 (H, W)."""

    @tf.function
    def ids(image: tf.Tensor) -> tf.Tensor:
        return tf.cast(tf.argmax(logits_of(model(image, training=False)), -1), tf.uint8)

    return lambda image: ids(tf.constant(image[None], tf.float32)).numpy()[0]
