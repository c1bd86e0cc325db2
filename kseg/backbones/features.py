"""What a backbone gives: its maps by stride, and the rule that trades strides for dilation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

from keras import KerasTensor

from kseg.errors import UserError

Form = Literal["keras", "torch"]

OUTPUT_STRIDES = (8, 16, 32)


class Features(dict[int, KerasTensor]):
    """The maps of a backbone, keyed by stride; the value is the deepest map of that stride.

    Attributes:
        stages: the last map of each stage, shallow to deep. It always has five entries: where
            `output_stride` is below 32 the last ones share a stride, and only this tuple still
            reaches the shallower of them (`stages[-2]`, for an auxiliary head).
    """

    def __init__(
        self,
        maps: Mapping[int, KerasTensor],
        stages: tuple[KerasTensor, ...],
        *,
        output_stride: int,
    ) -> None:
        """Key the maps by the stride they really have.

        Args:
            maps: stride in the undilated network (2 to 32, ascending) to its deepest map.
            stages: the last map of each stage, shallow to deep.
            output_stride: the stride at which the network stops shrinking its maps.
        """
        super().__init__({min(stride, output_stride): map_ for stride, map_ in maps.items()})
        self.stages = stages


class Step(NamedTuple):
    """How one unit moves over its input, once lost strides have become dilation.

    Attributes:
        strides: 2 or 1.
        entry: dilation rate of the layer that strides, or would have.
        rate: dilation rate of every layer behind it.
    """

    strides: int
    entry: int
    rate: int

    @property
    def downsamples(self) -> bool:
        """Whether the undilated network strides here."""
        return self.strides == 2 or self.entry < self.rate


def enter(stride: int, output_stride: int) -> Step:
    """Return the step of a unit that brings the undilated network to `stride`.

    The layer that loses its stride keeps the dilation of what came before, and only what follows
    is dilated further: every layer then reads the pixels it read before, and the dilated map
    sampled at the old stride equals the old map.

    Source: torchvision's `replace_stride_with_dilation`; mmsegmentation's `contract_dilation`.
    """
    rate = max(1, stride // output_stride)
    return Step(2 if stride <= output_stride else 1, max(1, rate // 2), rate)


def stay(stride: int, output_stride: int) -> Step:
    """Return the step of a unit that lies wholly at `stride` of the undilated network."""
    rate = max(1, stride // output_stride)
    return Step(1, rate, rate)


def check_options(output_stride: int, form: str) -> None:
    """Raise UserError unless both options of a backbone are among the known ones."""
    if output_stride not in OUTPUT_STRIDES:
        raise UserError(f"output_stride must be 8, 16 or 32, not {output_stride}")
    if form not in ("keras", "torch"):
        raise UserError(f"form must be keras or torch, not {form!r}")


def check_undilated(output_stride: int) -> None:
    """Raise UserError where a backbone that cannot dilate is asked for less than stride 32."""
    if output_stride != 32:
        raise UserError(
            f"this backbone does not dilate, and the model asks for stride {output_stride} at "
            "most; take another backbone or, where the model has it, output_stride 32 (ocrnet: 4)"
        )
