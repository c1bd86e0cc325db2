"""One frozen dataclass a command; the command line and its help are made from these fields.

Nothing here imports TensorFlow or Keras: help and mistakes must answer at once.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import (
    FlagCreatePairsOff,
    OmitSubcommandPrefixes,
    Positional,
    UseAppendAction,
    arg,
    subcommand,
)

from kseg.errors import UserError

Switch = FlagCreatePairsOff[bool]
Size = Annotated[tuple[int, int] | None, arg(metavar="H W", help_behavior_hint="")]
Sizes = Annotated[UseAppendAction[tuple[tuple[int, int], ...]], arg(metavar="H W")]
Count = Annotated[int | None, arg(metavar="N", help_behavior_hint="")]
Text = Annotated[str | None, arg(metavar="NAME", help_behavior_hint="")]
Folder = Annotated[Path | None, arg(metavar="RUN", help_behavior_hint="")]
Options = Annotated[
    UseAppendAction[tuple[str, ...]], arg(name="option", aliases=["-o"], metavar="NAME=VALUE")
]
CrfParameters = Annotated[
    tuple[float, float, float] | None,
    arg(metavar="W1 SIGMA_ALPHA SIGMA_BETA", help_behavior_hint=""),
]
WEIGHTINGS = "none|inverse|median|effective[:BETA]|sqrt|enet|FILE"
Scales = Annotated[tuple[float, ...], arg(metavar="S S ...", help_behavior_hint="")]
Quantization = Literal["float16", "dynamic", "int8", "int16x8", "qat"]
Input = Literal["uint8", "float"]
Output = Literal["classes", "logits", "probabilities"]
Layout = Literal["nhwc", "nchw"]
Feed = Literal["bytes", "unit", "signed", "imagenet"]


@dataclass(frozen=True)
class TrainConfig:
    """Train a model: labelled images in, a run folder out."""

    data: str = "scenes"
    """Data set, NAME[:PATH]; `kseg datasets` lists them."""
    model: str = "swiftnet"
    """Architecture; `kseg models` lists them."""
    backbone: Text = None
    """Feature extractor, where the model takes one; `kseg backbones` lists them."""
    weights: Annotated[str, arg(metavar="none|imagenet|FILE|RUN")] = "none"
    """Where training starts: random, an ImageNet backbone, a .keras file or a run."""
    size: Size = None
    """Training window, pixels. Default: the most frequent image size, at most 512 a side."""
    eval_size: Size = None
    """What evaluate, predict and export feed. Default: the most frequent image size, rounded up."""
    batch_size: int = 8
    """Images a step, over all devices."""
    steps: Count = None
    """Length of the training in steps. Default: 30 passes over the data; fewer for scenes."""
    epochs: Annotated[float | None, arg(metavar="X", help_behavior_hint="")] = None
    """Length of the training in passes over the data, in place of --steps."""
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    """Optimiser; sgd has momentum 0.9."""
    learning_rate: float = 3e-3
    """Peak learning rate."""
    schedule: Literal["poly", "cosine", "constant"] = "cosine"
    """How the learning rate falls after the warm-up; poly has power 0.9."""
    warmup: Count = None
    """Steps of linear warm-up. Default: 5 % of the training."""
    weight_decay: float = 0.01
    """Decoupled weight decay of kernels; biases and BN are left out."""
    ema: float = 0.99
    """Decay of the averaged weights that are evaluated and kept; 0 turns averaging off."""
    loss: str = "ce"
    """Loss, or a sum as 'ce+0.5*dice:smoothing=1'; `kseg losses` lists them and their options."""
    class_weights: Annotated[str, arg(metavar=WEIGHTINGS)] = "sqrt"
    """Weight of each class in the losses that take it, from the masks or a file of name,weight."""
    logit_adjustment: float = 0.0
    """Train on logits plus this times ln(share of the class), for rare classes; 1 is usual."""
    repeat_rare: float = 0.0
    """Repeat images with classes that fewer than this share of the images hold, 0..1."""
    rare_crops: float = 0.0
    """Share of the windows that are cut around a rare class of the image, 0..1."""
    scale: Annotated[tuple[float, float], arg(metavar="MIN MAX")] = (0.5, 2.0)
    """Random scale of the window, relative to the image's own pixels."""
    jitter: float = 1.0
    """Strength of the random brightness, contrast, saturation and hue; 0 turns them off."""
    precision: Literal["float32", "mixed_float16", "mixed_bfloat16", "auto"] = "float32"
    """Arithmetic; auto is mixed_bfloat16 where it is fast, else float32. Files are float32."""
    jit: Switch = False
    """Compile the step with XLA; on CPUs this is several times slower."""
    quantize_aware: Switch = False
    """Go on training a trained model (--weights) that rounds as its int8 file will."""
    frozen_bn: Switch = False
    """Keep the backbone's batch normalisation as its weights bring it."""
    sync_bn: Switch = False
    """Normalise by the batch of all devices, not by each device's share of it."""
    head_rate: float = 1.0
    """Learning rate outside the backbone, as a multiple of --learning-rate; DeepLab's is 10."""
    seed: int = 0
    """Of weights, order and augmentation; equal seeds give equal runs."""
    eval_every: Count = None
    """Steps between validations. Default: a quarter of the training."""
    checkpoint_every: Count = None
    """Steps between checkpoints. Default: as --eval-every, at most 200."""
    run: Folder = None
    """Folder to write. Default: runs/DATE-TIME-MODEL."""
    resume: Folder = None
    """Continue this run, exactly where its last checkpoint stands; takes no other flag."""
    recipe: Annotated[str | None, arg(metavar="NAME|FILE.toml", help_behavior_hint="")] = None
    """Settings from a recipe; flags beside it win. Default: scenes, if no --data is named."""
    options: Options = ()
    """Option of the model, as in -o decoder_channels=48; `kseg models NAME` shows them."""

    def to_json(self) -> str:
        """Return the config as JSON text."""
        return json.dumps(dataclasses.asdict(self), indent=1, default=str)

    @staticmethod
    def from_dict(raw: dict[str, Any]) -> TrainConfig:
        """Return the config that `to_json` wrote.

        Raises:
            UserError: if a field is unknown, as of a newer kseg.
        """
        known = {field.name for field in dataclasses.fields(TrainConfig)}
        for name in raw.keys() - known:
            raise UserError(f"{name!r} is of a newer kseg; this one does not know it")
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()}
        for name in ("run", "resume"):
            values[name] = Path(values[name]) if values.get(name) else None
        return TrainConfig(**values)


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """The labelled images that a command measures on."""

    data: Text = None
    """Data set, NAME[:PATH]. Default: the one the model was trained on."""
    split: str = "val"
    """Which part of the data set."""
    limit: Count = None
    """Use only the first N images."""


@dataclass(frozen=True, kw_only=True)
class Inference:
    """How a model is run."""

    last: Switch = False
    """Take last.keras of the run instead of best.keras."""
    eval_size: Size = None
    """Size fed to the model, pixels. Default: the model's own."""
    tile: Switch = False
    """Keep the image's own pixels: cut tiles of the model's size, and blend their borders."""
    tile_overlap: Count = None
    """The same with tiles that share N pixels. Default: a quarter of a tile's shorter side."""
    flip: Switch = False
    """Average the probabilities of the image and of its mirror image."""
    scales: Scales = ()
    """Average the probabilities at these scales of the image; files of one size need --tile."""
    superpixels: Count = None
    """Label about N superpixels an image (SLIC) as wholes; before the CRF, if both are named."""
    crf: Switch = False
    """Refine the labels by the dense CRF of DeepLab, at the image's own size."""
    crf_parameters: CrfParameters = None
    """The same with these parameters, as `kseg evaluate --crf-search` finds them."""

    @property
    def tiles(self) -> bool:
        """Whether images are cut into tiles."""
        return self.tile or self.tile_overlap is not None


# The last base comes first in the help.
@dataclass(frozen=True)
class EvalConfig(Inference, Labelled):
    """Measure a run or a model file on a data set."""

    model: Annotated[Positional[Path | None], arg(metavar="RUN|FILE", help_behavior_hint="")] = None
    """Run folder, .keras, .tflite, .onnx or SavedModel. Default: the newest run."""
    crf_search: Switch = False
    """First find the CRF's parameters as DeepLab did: 155 CRFs an image, of 100 or --limit."""
    metrics: Annotated[tuple[str, ...], arg(metavar="NAME", help_behavior_hint="")] = ()
    """Measure these, too, in more time; `kseg metrics` lists them."""
    json: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """Write the result here, fractions of 1."""


@dataclass(frozen=True)
class ReportConfig(Inference, Labelled):
    """Write one HTML page on a run: numbers, curves, images, what to try next."""

    model: Annotated[Positional[Path | None], arg(metavar="RUN|FILE", help_behavior_hint="")] = None
    """Run folder, or a model file. Default: the newest run."""
    out: Annotated[Path | None, arg(metavar="FILE.html", help_behavior_hint="")] = None
    """Where the page goes. Default: RUN/report.html, or NAME-report.html beside the file."""


@dataclass(frozen=True)
class PredictConfig(Inference):
    """Label images: palette PNG masks and overlays with a legend."""

    model: Annotated[Positional[Path], arg(metavar="RUN|FILE")]
    """Run folder, .keras, .tflite, .onnx or SavedModel."""
    images: Annotated[Positional[tuple[Path, ...]], arg(metavar="IMAGE|FOLDER")]
    """Images and folders of images."""
    out: Annotated[Path, arg(metavar="FOLDER")] = Path("predictions")
    """Where the results go; sub-folders are kept."""


@dataclass(frozen=True)
class CompareConfig(Inference, Labelled):
    """Tell whether one model is better than another on the same images."""

    a: Annotated[Positional[Path], arg(metavar="A")]
    """Run folder, model file, or what `kseg evaluate --json` wrote: compared with."""
    b: Annotated[Positional[Path], arg(metavar="B")]
    """The same of the model in question."""
    json: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """Write the result here, fractions of 1."""


@dataclass(frozen=True)
class ExportConfig:
    """Write a run as files for devices and servers, and prove that they work."""

    run: Annotated[
        Positional[Path | None], arg(metavar="RUN|FILE.keras", help_behavior_hint="")
    ] = None
    """Run folder, or a .keras file. Default: the newest run."""
    tflite: Switch = False
    """Write model-float32.tflite, and one file for each --quantize."""
    saved_model: Switch = False
    """Write saved_model/1, as TF Serving reads it."""
    onnx: Switch = False
    """Write model.onnx."""
    quantize: Annotated[tuple[Quantization, ...], arg(help_behavior_hint="")] = ()
    """Further .tflite files; qat is int8 after a quantisation-aware training, in RUN/qat."""
    qat_steps: Count = None
    """Length of the training of qat. Default: a fifth of the run's."""
    input: Input = "uint8"
    """Type of the image that the files take, 0..255 in both cases."""
    output: Output = "classes"
    """What the files give: the class map (uint8), or logits or probabilities (float32)."""
    layout: Layout = "nhwc"
    """Order of the axes in an ONNX file."""
    size: Sizes = ()
    """Input size of the files, pixels; repeat it for several. Default: the run's --eval-size."""
    data: Text = None
    """Data set for calibration and proof. Default: the one the run was trained on."""
    min_agreement: Annotated[float | None, arg(metavar="PERCENT", help_behavior_hint="")] = None
    """Least share of labels equal to Keras's. Default: 99.9, float16 99.5, qat 99.5, else 95."""
    max_drop: Annotated[float | None, arg(metavar="POINTS", help_behavior_hint="")] = None
    """Mean IoU that a file may lose. An int8 file that loses more is mended, or rejected."""
    calibration_images: int = 100
    """Training images that set the int8 ranges."""
    verify_images: Count = None
    """Validation images of the proof, evenly spread. Default: all."""
    seconds: float = 20.0
    """How long each file is timed."""
    out: Annotated[Path | None, arg(metavar="FOLDER", help_behavior_hint="")] = None
    """Where the files go. Default: RUN/export, or NAME-export beside NAME.keras."""
    last: Switch = False
    """Take last.keras of the run instead of best.keras."""


@dataclass(frozen=True)
class VerifyConfig:
    """Compare any model file with the run it is of; name what is wrong with it."""

    file: Annotated[Positional[Path], arg(metavar="FILE")]
    """.tflite, .onnx or SavedModel."""
    against: Annotated[Path, arg(metavar="RUN|FILE.keras")]
    """What the file must behave like. Of a qat file, its own training is taken, in RUN/qat."""
    feed: Feed = "bytes"
    """Images that clients give the file: of 0..255, 0..1, -1..1, or less ImageNet's mean and by its
    deviation."""
    data: Text = None
    """Data set of the proof. Default: the one the run was trained on."""
    min_agreement: Annotated[float | None, arg(metavar="PERCENT", help_behavior_hint="")] = None
    """Least share of labels equal to Keras's. Default: 99.9, float16 99.5, qat 99.5, else 95."""
    max_drop: Annotated[float | None, arg(metavar="POINTS", help_behavior_hint="")] = None
    """Mean IoU that the file may lose against the float model."""
    verify_images: Count = None
    """Validation images of the proof. Default: all."""
    seconds: float = 20.0
    """How long the file is timed."""
    out: Annotated[Path | None, arg(metavar="FOLDER", help_behavior_hint="")] = None
    """Where FILE.certificate.json and .html go. Default: beside the file."""
    last: Switch = False
    """Take last.keras of the run instead of best.keras."""


@dataclass(frozen=True)
class InspectConfig:
    """Tell what a .tflite file is made of, where it runs, and what makes it slow."""

    file: Annotated[Positional[Path], arg(metavar="FILE.tflite")]
    """The file."""
    against: Annotated[Path | None, arg(metavar="FLOAT.tflite", help_behavior_hint="")] = None
    """Float file to compare the speed with. Default: model-float32.tflite beside it."""
    json: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """Write everything here."""


Name = Annotated[Positional[str | None], arg(metavar="NAME", help_behavior_hint="")]


@dataclass(frozen=True)
class ModelsConfig:
    """List the architectures, or show one."""

    name: Name = None
    """Show this one: what it is, its options, its source."""
    sort: str = "name"
    """Order of the list: name, parameters, macs, float-mb, int8-mb, float-ms or int8-ms."""
    json: Switch = False
    """Print all that is known of each as one JSON list."""


@dataclass(frozen=True)
class BackbonesConfig:
    """List the feature extractors, or show one."""

    name: Name = None
    """Show this one: what it is, its options, its source."""


@dataclass(frozen=True)
class LossesConfig:
    """List the losses, or show one."""

    name: Name = None
    """Show this one: what it is, its options, its source."""


@dataclass(frozen=True)
class MetricsConfig:
    """List the metrics, or show what one measures."""

    name: Name = None
    """Show this one: what it measures, its formula, its source; or conventions."""


@dataclass(frozen=True)
class DatasetsConfig:
    """List the kinds of data sets, or show how one is laid out."""

    name: Name = None
    """Show this one's docstring."""


@dataclass(frozen=True)
class WeightsImportConfig:
    """Write published weights as a .keras file that evaluate, predict and train take."""

    file: Annotated[Positional[Path], arg(metavar="FILE")]
    """The weights, .pth or .safetensors."""
    network: Annotated[str, arg(name="as", metavar="LIBRARY:NETWORK")]
    """What they are of; `kseg weights list` lists the networks."""
    out: Annotated[Path, arg(metavar="FILE.keras")]
    """The file to write."""
    classes: Annotated[str | None, arg(metavar="N|NAME,NAME,...|FILE", help_behavior_hint="")] = (
        None
    )
    """Names of the classes, their count, or a classes.csv. Default: the network's own."""
    size: Size = None
    """Input size of the model, pixels. Default: the network's own."""
    keep_backbone: Switch = False
    """Import all but the classifier, which starts at random: for another number of classes."""


@dataclass(frozen=True)
class WeightsListConfig:
    """List the networks whose published weights can be imported."""


@dataclass(frozen=True)
class WeightsConfig:
    """Take over the weights that other libraries have published."""

    command: OmitSubcommandPrefixes[
        Annotated[WeightsImportConfig, subcommand("import")]
        | Annotated[WeightsListConfig, subcommand("list")]
    ]
    """What to do."""


def quantize_aware_config(config: TrainConfig) -> TrainConfig:
    """Return the quantisation-aware training that goes on where another training has ended.

    A fifth of its steps at a thirtieth of its learning rate, which is where rounded kernels stop
    jumping between two steps; in float32.
    """
    return dataclasses.replace(
        config,
        quantize_aware=True,
        steps=math.ceil(config.steps / 5) if config.steps else None,
        epochs=config.epochs / 5 if config.epochs else None,
        learning_rate=config.learning_rate / 30,
        head_rate=1.0,
        precision="float32",
        jit=False,
        frozen_bn=False,
        sync_bn=False,
        **dict.fromkeys(("warmup", "eval_every", "checkpoint_every", "run", "resume", "recipe")),
    )


def said(config: CompareConfig, *, without: Collection[str]) -> list[str]:
    """Return the options that have another value than their default, as they are typed."""
    fields = [field for field in dataclasses.fields(config) if field.name not in without]
    return [
        "--" + field.name.replace("_", "-")
        for field in fields
        if getattr(config, field.name) != field.default
    ]
