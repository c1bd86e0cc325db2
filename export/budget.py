"""An accuracy budget: what is tried, in order, where post-training int8 loses too much."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import keras
import numpy as np

from kseg.quantization import convolutions, quantization_aware

from . import tflite
from .calibrate import Samples
from .even_maxima import even_maxima
from .interface import Interface
from .layerwise import Noise, layer_noise
from .operators import layer_of
from .post_training import correct_biases, equalised, set_ranges
from .verify import Attempt, Proof

BLAMED_IMAGES = 8
FEW_IMAGES = 32  # for means and maxima of channels
FLOAT_LAYERS = (1, 2, 4, 8)
SHOWN_LAYERS = 3


@dataclass(frozen=True)
class Recipe:
    """One way of kseg's own to quantise a trained model.

    Attributes:
        percentile: share of a map's values within its range, per cent.
        even: whether channels are equalised and biases corrected.
        in_float: names of the layers that stay in float.
    """

    percentile: float
    even: bool = False
    in_float: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Return it as a person reads it."""
        text = f"ranges of {self.percentile:g} % of the values"
        if self.even:
            text += ", even channels, corrected biases"
        if self.in_float:
            more = len(self.in_float) - SHOWN_LAYERS
            text += f", in float: {', '.join(self.in_float[:SHOWN_LAYERS])}"
            text += f" and {more} more" if more > 0 else ""
        return text


@dataclass(frozen=True)
class Remedies:
    """What the remedies work with.

    Attributes:
        model: the float Keras model.
        float_file: its float `.tflite` file.
        samples: calibration images; more of them than the first attempt had.
        interface: what the file takes and gives.
        prove: writes a file by a function of its path, and proves it against the float model.
        train: trains quantisation-aware, writes a file and proves it, where that is possible.
        told: is called with each attempt.
    """

    model: keras.Model
    float_file: Path
    samples: Samples
    interface: Interface
    prove: Callable[[Callable[[Path], None]], Proof]
    train: Callable[[], Proof] | None
    told: Callable[[Attempt], None]


def within_budget(first: Proof, remedies: Remedies, *, max_drop: float) -> Proof:
    """Return the first file that loses at most `max_drop` points of mean IoU, else the best.

    What costs the device nothing comes first: other ranges, then even channels and corrected
    biases, then some layers in float, at last a quantisation-aware training.

    Args:
        first: of the file by the converter's own post-training quantisation.
        remedies: what there is to try.
        max_drop: the budget, points.

    Returns:
        The proof of the chosen file, with all that was tried; rejected if none is good enough.
    """
    attempts = [attempt("post-training int8, ranges of all values", first)]
    remedies.told(attempts[0])
    best = first
    for name, proof in _tries(first, remedies):
        attempts.append(attempt(name, proof))
        remedies.told(attempts[-1])
        best = max(best, proof, key=lambda one: (one.artifact.reasons == (), change(one)))
        if -change(proof) <= max_drop and not proof.artifact.reasons:
            break
    artifact = replace(best.artifact, reasons=(*best.artifact.reasons, *over(best, max_drop)))
    return replace(best, artifact=artifact, tried=tuple(attempts))


def attempt(name: str, proof: Proof) -> Attempt:
    """Return what one way of quantising bought."""
    return Attempt(name, change(proof), f"{name}: {change(proof):+.2f} points of mIoU")


def change(proof: Proof) -> float:
    """Return a file's mean IoU less the float model's, points."""
    return 100 * (proof.artifact.miou - proof.artifact.keras_miou)


def over(proof: Proof, max_drop: float | None) -> tuple[str, ...]:
    """Return why a file is over its budget; nothing if it is not."""
    if max_drop is None or -change(proof) <= max_drop:
        return ()
    lost = f"it loses {-change(proof):.2f} points of mIoU against the float model"
    return (f"{lost}, --max-drop allows {max_drop:g}",)


def _tries(first: Proof, remedies: Remedies) -> Iterator[tuple[str, Proof]]:
    """Give one attempt after the other."""
    # The converter's own ranges are those of all values.
    found = [(change(first), Recipe(100))]
    for recipe in (Recipe(99.99), Recipe(99.9), Recipe(99.99, even=True)):
        proof = _proved(recipe, remedies)
        found.append((change(proof), recipe))
        yield str(recipe), proof
    _, base = max(found, key=lambda one: one[0])
    blamed = to_blame(first.artifact.path, remedies)
    for count in FLOAT_LAYERS:
        if count <= len(blamed) or count // 2 < len(blamed):
            recipe = replace(base, in_float=tuple(blamed[:count]))
            yield str(recipe), _proved(recipe, remedies)
    if remedies.train is not None:
        yield "quantisation-aware training", remedies.train()


def _proved(recipe: Recipe, remedies: Remedies) -> Proof:
    def few() -> Iterator[np.ndarray]:
        return islice(remedies.samples(), FEW_IMAGES)

    def write(path: Path) -> None:
        model = even_maxima(remedies.model, few)
        model = equalised(model, few) if recipe.even else model
        copy = quantization_aware(model, in_float=recipe.in_float)
        set_ranges(copy, model, remedies.samples, percentile=recipe.percentile)
        if recipe.even:
            correct_biases(copy, model, few)
        _written(copy, path, remedies)

    return remedies.prove(write)


def _written(model: keras.Model, path: Path, remedies: Remedies) -> None:
    tflite.write(model, path, variant="qat", interface=remedies.interface, samples=remedies.samples)


def to_blame(path: Path, remedies: Remedies) -> list[str]:
    """Return the layers that add most noise to an int8 file, the worst first.

    Args:
        path: the int8 file.
        remedies: gives the float file and images.
    """
    images = [sample[0] for sample in islice(remedies.samples(), BLAMED_IMAGES)]
    noises = layer_noise(path, remedies.float_file, images)
    return layers_of(noises, convolutions(remedies.model))


def layers_of(noises: Sequence[Noise], names: Collection[str]) -> list[str]:
    """Return the Keras layers behind noisy operators, the noisiest first, each once."""
    ordered = sorted(noises, key=lambda one: one.lost, reverse=True)
    found = [layer_of(noise.tensor, names) for noise in ordered]
    return list(dict.fromkeys(name for name in found if name is not None))
