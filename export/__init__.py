"""Trained models as files for devices and servers, each proved against Keras before it counts.

Functions and one literal table only: in a clone, `import export` makes a second module of this one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path

from rich.console import Console

from kseg.artifact import Artifact, artifact_table
from kseg.config import ExportConfig, TrainConfig, VerifyConfig, quantize_aware_config
from kseg.errors import Failure, UserError
from kseg.inference import Predictor, load
from kseg.runs import Run, newest

from .demands import Demands
from .interface import Interface

# Target to the module of this package that writes it; loaded when chosen.
TARGETS = {"tflite": "tflite", "saved_model": "saved_model", "onnx": "onnx"}


def export_run(config: ExportConfig) -> list[Artifact]:
    """Write a run as files, prove each, and record them in RUN/export/manifest.json.

    Args:
        config: what `kseg export` was asked for.

    Returns:
        One artifact a file, rejected ones too.

    Raises:
        UserError: if nothing was asked for, or the run or its data cannot be used.
    """
    plan = _plan(config)
    _check_numbers(config)
    source = config.run if config.run is not None else newest().folder
    if source.suffix != ".keras":
        Run(source).config()  # says what is wrong with the folder
    elif "qat" in config.quantize:
        raise UserError(f"{source} is no run: --quantize qat goes on with a run's own training")
    models = _models(config, source)
    spec = config.data or _spec(source, models[0])
    from kseg.data.dataset import open_dataset

    from .writer import export_model

    dataset = open_dataset(spec)
    artifacts: list[Artifact] = []
    for predictor in models:
        artifacts += export_model(
            predictor,
            dataset,
            quantisation_aware=_training(config, source, predictor.size),
            folder=config.out or _folder(source),
            plan=plan,
            suffix="-{}x{}".format(*predictor.size) if len(models) > 1 else "",
            interface=Interface(config.input, config.output, config.layout),
            demands=_demands(config),
        )
    return artifacts


def _models(config: ExportConfig, source: Path) -> list[Predictor]:
    """Return the float model at each size that is wanted."""
    sizes = dict.fromkeys(config.size) or (None,)
    return [load(source, eval_size=size, last=config.last).without_quantization() for size in sizes]


def _spec(source: Path, predictor: Predictor) -> str:
    """Return the data that a run or a model was trained on."""
    spec = predictor.card.dataset if source.suffix == ".keras" else Run(source).config().data
    if not spec:
        raise UserError(f"{source} does not name its data; name a data set with --data")
    return spec


def _folder(source: Path) -> Path:
    """Return where the files go: RUN/export, or NAME-export beside NAME.keras."""
    if source.suffix == ".keras":
        return source.with_name(f"{source.stem}-export")
    return Run(source).export


def _training(
    config: ExportConfig, source: Path, size: tuple[int, int]
) -> Callable[[], Predictor] | None:
    """Return what gives the quantisation-aware model, where there is a run to go on with."""
    if source.suffix == ".keras":
        return None
    return lambda: _rounded(Run(source), config, size)


def verify_file(config: VerifyConfig) -> list[Artifact]:
    """Compare a model file of any origin with a run, and certify what was found.

    Args:
        config: what `kseg verify` was asked for.

    Returns:
        The file as an artifact.

    Raises:
        UserError: if the file, the run or its data cannot be used, or the file was written from a
            quantisation-aware training that is not there.
        Failure: if the file cannot be opened because its scales contradict each other.
    """
    _check_numbers(config)
    file = _opened(config)
    named = load(config.against, eval_size=file.size, last=config.last)
    reference = named.without_quantization()
    from kseg.data.dataset import open_dataset

    from .writer import verify_model

    if reference.model is None:
        raise UserError(f"{config.against} is no Keras model; name a run or a .keras file")
    if file.model is not None and config.feed != "bytes":
        raise UserError(f"--feed {config.feed} is for files of other formats than .keras")
    spec = config.data or _spec(config.against, reference)
    return verify_model(
        file,
        reference,
        open_dataset(spec),
        quantisation_aware=_origin(file, named, config.against),
        folder=config.out,
        demands=_demands(config),
        fed_as=config.feed,
    )


def _origin(file: Predictor, named: Predictor, against: Path) -> Predictor | None:
    """Return the quantisation-aware model that a file was written from; None for other files.

    Raises:
        UserError: if that model is not there.
    """
    from .operators import is_quantised, read_network

    if file.path.suffix != ".tflite" or not is_quantised(read_network(file.path)):
        return None
    if named.quantize_aware:
        # Another program's file does not say what it was written from.
        return named if file.quantize_aware or not file.card.model else None
    if not file.quantize_aware:
        return None
    trained = _trained_in(against).folder
    if not Run.is_run(trained):
        raise UserError(
            f"{file.path} was written from a quantisation-aware training, which changes labels, "
            f"and {against} holds none; name the run of that training with --against"
        )
    return load(trained, eval_size=file.size)


def _trained_in(run: Path) -> Run:
    """Return the run in which export goes on with a run, quantisation-aware."""
    return Run(run / "qat")


def _opened(config: VerifyConfig) -> Predictor:
    """Open the file; say what is wrong with its scales where LiteRT refuses it for them."""
    try:
        return load(config.file, fed_as=config.feed)
    except UserError:
        if config.file.suffix != ".tflite" or not config.file.is_file():
            raise
        contradiction = _contradiction(config.file)
        if contradiction is None:
            raise
    raise Failure(f"rejected: {config.file} cannot be opened: {contradiction}")


def _contradiction(path: Path) -> str | None:
    """Return what is wrong with the scales of a `.tflite` file, where it can be read at all."""
    from .faults import structural_faults
    from .operators import read_network

    try:
        return next((one.sentence for one in structural_faults(read_network(path))), None)
    except UserError:
        return None


def _rounded(run: Run, config: ExportConfig, size: tuple[int, int]) -> Predictor:
    """Return the quantisation-aware model of the run itself, or of RUN/qat, trained to its end."""
    settings = run.config()
    if settings.quantize_aware:
        _check_steps(run, config)
        return load(run.folder, eval_size=size)
    from kseg import checkpoint
    from kseg.train import train

    inner = _trained_in(run.folder)
    if not Run.is_run(inner.folder):
        wanted = quantize_aware_config(settings)
        wanted = replace(wanted, weights=str(run.folder), run=inner.folder)
        train(replace(wanted, steps=config.qat_steps or wanted.steps))
    else:
        _check_steps(inner, config)
        if max(checkpoint.steps(inner.checkpoints), default=0) < inner.config().steps:
            train(TrainConfig(resume=inner.folder))
    return load(inner.folder, eval_size=size)


def _check_steps(trained: Run, config: ExportConfig) -> None:
    """Refuse another length than that of the quantisation-aware run that is there."""
    steps = trained.config().steps
    if config.qat_steps not in (None, steps):
        raise UserError(
            f"{trained.folder} has {steps} quantisation-aware steps, not {config.qat_steps}; "
            "leave --qat-steps out, or remove that folder first"
        )


def show(artifacts: Sequence[Artifact]) -> int:
    """Print what was written and how it compares; return the exit code, 1 if a file failed."""
    console = Console(emoji=False)
    console.print(artifact_table(artifacts))
    for one in artifacts:
        for note in one.notes:
            console.print(f"{one.name}: {note}", soft_wrap=True)
    failed = [one for one in artifacts if not one.accepted]
    for one in failed:
        text = f"rejected: {one.path}: {'; '.join(one.reasons)}"
        console.print(text, style="red", soft_wrap=True, markup=False)
    for page in dict.fromkeys(one.certificate for one in artifacts):
        console.print(f"certificate: {page}", soft_wrap=True, markup=False)
    return 1 if failed else 0


def _plan(config: ExportConfig) -> dict[str, tuple[str, ...]]:
    """Return target to variants, as the flags of the command mean it."""
    if config.quantize and not config.tflite:
        raise UserError("--quantize makes further .tflite files; it needs --tflite")
    if config.qat_steps is not None and "qat" not in config.quantize and config.max_drop is None:
        raise UserError("--qat-steps is of --quantize qat and --max-drop; name one of them")
    if config.layout != "nhwc" and not config.onnx:
        raise UserError(f"--layout {config.layout} is for ONNX files; it needs --onnx")
    plan: dict[str, tuple[str, ...]] = {}
    if config.tflite:
        plan["tflite"] = tuple(dict.fromkeys(("float32", *config.quantize)))
    if config.saved_model:
        plan["saved_model"] = ("float32",)
    if config.onnx:
        plan["onnx"] = ("float32",)
    if not plan:
        raise UserError("nothing to export; name at least one of --tflite, --saved-model, --onnx")
    return plan


def _check_numbers(config: ExportConfig | VerifyConfig) -> None:
    for name in ("calibration_images", "verify_images", "qat_steps"):
        value = getattr(config, name, None)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}; at least 1 is needed")
    least = config.min_agreement
    if least is not None and not 0 <= least <= 100:
        raise UserError(f"--min-agreement is {least}; it is a share in per cent, 0 to 100")
    for name in ("max_drop", "seconds"):
        value = getattr(config, name)
        if value is not None and not 0 <= value < math.inf:
            raise UserError(f"--{name.replace('_', '-')} is {value}; 0 or more is needed")


def _demands(config: ExportConfig | VerifyConfig) -> Demands:
    known = {field.name for field in fields(Demands)} & vars(config).keys()
    return Demands(**{name: getattr(config, name) for name in known})
