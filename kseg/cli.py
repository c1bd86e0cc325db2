"""The parser and one short function a command; TensorFlow is loaded last."""

from __future__ import annotations

import functools
import logging
import operator
import os
import shlex
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from tyro.conf import subcommand

from kseg import config as c
from kseg.arguments import with_recipe, with_weights
from kseg.errors import Failure, UserError
from kseg.listings import backbones, datasets, losses, metrics, models, networks, show
from kseg.registry import METRICS
from kseg.version import VERSION

if TYPE_CHECKING:
    import numpy as np

    from kseg.data.dataset import Dataset
    from kseg.evaluate import Evaluation
    from kseg.inference import Predictor
    from kseg.refinement import Refinement

DESCRIPTION = """Semantic segmentation, from labelled images to a verified model on a device.

`kseg --version` prints the version."""
EXIT_FAILURE, EXIT_USER, EXIT_INTERRUPTED = 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: the words after `kseg`; those of the process if None.

    Returns:
        The exit code: 0, 1 for a failure, 2 for a mistake of the user, 130 after Ctrl-C.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    logging.basicConfig(
        level=logging.INFO, format="%(message)s", handlers=[_log_handler()], force=True
    )
    for noisy in ("absl", "jax", "h5py", "tensorflow"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    try:
        code = _run(words)
        sys.stdout.flush()  # here, where a reader that has gone is noticed, and not at the exit
        return code
    except UserError as error:
        return _complain(error, EXIT_USER)
    except Failure as error:
        return _complain(error, EXIT_FAILURE)
    except BrokenPipeError:
        # The reader, as `head`, has enough; what is still buffered must not fail once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILURE
    except OSError as error:
        if error.filename is None:
            raise
        return _complain(f"{error.filename2 or error.filename}: {error.strerror}", EXIT_USER)
    except KeyboardInterrupt:
        return _complain("interrupted", EXIT_INTERRUPTED)


def train(config: c.TrainConfig) -> int:
    """Train, then print the table of classes and what to type next."""
    from kseg.quiet import load_tensorflow

    load_tensorflow()
    from kseg.train import Interrupted, train

    try:
        trained = train(config)
    except Interrupted as stopped:
        print(f"\nstopped and saved; go on with: kseg train --resume {stopped}")
        return EXIT_INTERRUPTED
    if trained.evaluation is not None:
        folder = trained.run.folder
        show(trained.evaluation.table())
        print(
            f"run: {folder}\nnext:\n  kseg predict {shlex.quote(str(folder))} IMAGE --out out\n"
            f"  kseg export {shlex.quote(str(folder))} --tflite --quantize int8"
        )
    return 0


def evaluate(config: c.EvalConfig) -> int:
    """Measure a model file and print the table."""
    _check_json(config.json)
    taken = [name for name in config.metrics if name not in METRICS and Path(name).exists()]
    if config.model is None and taken:
        raise UserError(f"{taken[0]} is taken for a metric; name the model before --metrics")
    from kseg.quiet import load_tensorflow

    load_tensorflow()
    predictor = _opened(config.model or _newest(), config)
    dataset = _dataset(config.data, predictor)
    if config.crf_search:
        predictor = _with_best_crf(predictor, dataset, config)
    result = _measured(predictor, dataset, config, metrics=config.metrics)
    for table in (*result.tables(), result.table()):
        show(table)
    if config.json is not None:
        result.save_json(config.json)
    return 0


def report(config: c.ReportConfig) -> int:
    """Evaluate a model, write the page and say where it is."""
    from kseg.quiet import load_tensorflow

    load_tensorflow()
    from kseg.files import write_text
    from kseg.progress import counting
    from kseg.report import page_path, report
    from kseg.runs import Run

    path = config.model or _newest()
    run, out = Run(path) if Run.is_run(path) else None, config.out or page_path(path)
    if out.is_dir():
        raise UserError(f"--out {out} is a folder; name the file to write")
    predictor = _opened(path, config)
    dataset = _dataset(config.data, predictor)
    with counting("evaluating") as on_image:
        found = report(
            predictor,
            dataset,
            run=run,
            split=config.split,
            limit=config.limit,
            data=config.data or predictor.card.dataset,
            tiles_apart=lambda: _tiles_on_data(predictor, dataset, config),
            on_image=on_image,
        )
    write_text(out, found)
    print(f"report: {out}")
    return 0


def predict(config: c.PredictConfig) -> int:
    """Label images and say where the results are."""
    from kseg.predict import pictures, predict_files
    from kseg.progress import counting
    from kseg.quiet import load_tensorflow

    if config.model.suffix != ".tflite":
        load_tensorflow()
    predictor = _opened(config.model, config)
    with counting("labelling") as on_image:
        written = predict_files(predictor, config.images, config.out, on_image=on_image)
    print(f"{len(written)} image{'s' if len(written) != 1 else ''} labelled: {config.out}")
    if config.tiles:
        _tiles_apart(predictor, _spread(list(pictures(config.images, config.out))))
    return 0


def compare(config: c.CompareConfig) -> int:
    """Measure two models on the same images and print what sets them apart."""
    _check_json(config.json)
    from kseg.compare import compare

    result = compare(*_evaluations(config))
    show(result.table())
    print(f"{result.sides()}\n{result.sentence()}")
    if config.json is not None:
        result.save_json(config.json)
    return 0


def export(config: c.ExportConfig) -> int:
    """Write the files, print the proof; 1 if a file was rejected."""
    from kseg.quiet import load_tensorflow

    load_tensorflow()
    from kseg.export import export_run, show

    return show(export_run(config))


def verify(config: c.VerifyConfig) -> int:
    """Compare a file with its run, print what was found; 1 if it is rejected."""
    from kseg.quiet import load_tensorflow

    load_tensorflow()
    from kseg.export import show, verify_file

    return show(verify_file(config))


def inspect_tflite(config: c.InspectConfig) -> int:
    """Look at a `.tflite` file, time it and print what was found."""
    _check_json(config.json)
    from kseg.export.inspection import inspect_file
    from kseg.export.inspection_text import show

    found = inspect_file(config.file, against=config.against)
    show(found)
    if config.json is not None:
        found.save_json(config.json)
    return 0


def weights(config: c.WeightsConfig) -> int:
    """Import published weights and say what to type next, or list what can be imported."""
    from kseg.published.networks import network

    command = config.command
    if isinstance(command, c.WeightsListConfig):
        return networks()
    network(command.network)  # a wrong name is answered before TensorFlow is loaded
    from kseg.quiet import load_tensorflow

    load_tensorflow()
    from kseg.published.importing import import_weights

    imported = import_weights(
        command.file,
        command.network,
        command.out,
        classes=command.classes,
        size=command.size,
        keep_backbone=command.keep_backbone,
    )
    print(imported.summary(command.out))
    return 0


_COMMANDS: dict[type, tuple[str, Callable[[Any], int]]] = {
    c.TrainConfig: ("train", train),
    c.EvalConfig: ("evaluate", evaluate),
    c.ReportConfig: ("report", report),
    c.PredictConfig: ("predict", predict),
    c.CompareConfig: ("compare", compare),
    c.ExportConfig: ("export", export),
    c.InspectConfig: ("inspect", inspect_tflite),
    c.VerifyConfig: ("verify", verify),
    c.ModelsConfig: ("models", models),
    c.BackbonesConfig: ("backbones", backbones),
    c.LossesConfig: ("losses", losses),
    c.MetricsConfig: ("metrics", metrics),
    c.DatasetsConfig: ("datasets", datasets),
    c.WeightsConfig: ("weights", weights),
}


def _run(words: list[str]) -> int:
    if words == ["--version"]:
        print(f"kseg {VERSION}")
        return 0
    if words[:1] == ["train"]:
        words = ["train", *with_recipe(with_weights(words[1:]))]
    try:
        config = tyro.cli(_any_command(), prog="kseg", description=DESCRIPTION, args=words)
    except SystemExit as end:  # tyro has answered: help (0) or a mistake (2)
        return int(end.code or 0)
    return _COMMANDS[type(config)][1](config)


def _any_command() -> Any:  # noqa: ANN401 - a union made at run time
    kinds = [Annotated[kind, subcommand(name)] for kind, (name, _) in _COMMANDS.items()]
    return functools.reduce(operator.or_, kinds)


def _dataset(data: str | None, predictor: Predictor) -> Dataset:
    """Open the data set that is named, or else the one that a model was trained on."""
    from kseg.data.dataset import open_dataset

    data = data or predictor.card.dataset
    if not data:
        raise UserError(f"{predictor.path} does not say what it was trained on; name it by --data")
    return open_dataset(data)


def _opened(path: Path, config: c.Inference) -> Predictor:
    from kseg.inference import load

    predictor = _looking_often(load(path, eval_size=config.eval_size, last=config.last), config)
    refinements = _refinements(config)
    if not refinements:
        return predictor
    from kseg.refinement import RefinedPredictor

    return RefinedPredictor.of(predictor, refinements)


def _looking_often(predictor: Predictor, config: c.Inference) -> Predictor:
    """Put flips, tiles and scales around a predictor, as the configuration says."""
    if config.flip:
        from kseg.averaging import FlippedPredictor

        predictor = FlippedPredictor.of(predictor)
    if config.tiles:
        from kseg.tiling import TiledPredictor

        predictor = TiledPredictor.of(predictor, overlap=config.tile_overlap)
    if config.scales:
        from kseg.averaging import ScaledPredictor

        predictor = ScaledPredictor.of(predictor, config.scales)
    return predictor


def _measured(
    predictor: Predictor,
    dataset: Dataset,
    config: c.EvalConfig | c.CompareConfig,
    *,
    metrics: Sequence[str] = (),
    name: str = "",
) -> Evaluation:
    """Evaluate; of tiles say by how much they differ from the whole image."""
    from kseg.evaluate import evaluate
    from kseg.progress import counting

    with counting(f"evaluating {name}".rstrip()) as on_image:
        found = evaluate(
            predictor,
            dataset,
            split=config.split,
            limit=config.limit,
            metrics=metrics,
            on_image=on_image,
        )
    return replace(found, tiles_apart=_tiles_on_data(predictor, dataset, config))


def _tiles_on_data(
    predictor: Predictor, dataset: Dataset, config: c.EvalConfig | c.ReportConfig | c.CompareConfig
) -> float | None:
    """Do what `_tiles_apart` does on images evenly spread over those of a command."""
    if not config.tiles:
        return None
    from kseg.data.pipeline import read_samples

    numbers = _spread(range(dataset.length(config.split))[: config.limit])
    samples = read_samples(dataset, config.split, only=numbers)
    return _tiles_apart(predictor, (image for image, _ in samples))


def _spread(items: Sequence) -> list:
    from kseg.data.doctor import spread
    from kseg.tiling import COMPARED

    return spread(items, COMPARED)


def _tiles_apart(predictor: Predictor, images: Iterable[np.ndarray | Path]) -> float | None:
    """Print, and return, the share of labels that tiles change against the whole images."""
    from kseg.tiling import SMALLEST_SIDE, apart, tiles_of

    try:
        found = apart(tiles_of(predictor), images)
    except UserError as error:  # no fault here: a file of one size can be used in tiles
        print(f"tiles: not compared with the whole image, since {error}")
        return None
    if found is None:
        print(
            "tiles: not compared with the whole image, since one tile holds each (or it is "
            f"narrower than {SMALLEST_SIDE} pixels)"
        )
        return None
    print(found)
    return found.share


def _refinements(config: c.Inference) -> list[Refinement]:
    found = []
    if config.superpixels is not None:
        from kseg.superpixels import Superpixels

        found.append(Superpixels(config.superpixels))
    if config.crf or config.crf_parameters:
        from kseg.crf import DenseCRF

        found.append(DenseCRF(*config.crf_parameters or ()))
    return found


def _with_best_crf(predictor: Predictor, dataset: Dataset, config: c.EvalConfig) -> Predictor:
    from kseg.crf import Predictions, search
    from kseg.evaluate import check_limit
    from kseg.progress import counting
    from kseg.refinement import RefinedPredictor

    if config.crf or config.crf_parameters or config.superpixels:
        raise UserError("--crf-search tries many CRFs; leave --crf and the like out beside it")
    check_limit(config.limit)
    samples = Predictions(predictor, dataset, config.split, config.limit or 100)
    images = samples.length
    with counting("searching") as on_image:
        found = search(
            samples,
            on_sample=lambda number, done: on_image((number - 1) * images + done, 2 * images),
        )
    show(found.table())
    best = found.best
    print(f"best: --crf-parameters {best.w1:g} {best.sigma_alpha:g} {best.sigma_beta:g}")
    return RefinedPredictor.of(predictor, [best])


def _evaluations(config: c.CompareConfig) -> list[Evaluation]:
    """Return the evaluations of both sides, made now or read from files."""
    from kseg.evaluate import Evaluation

    paths = (config.a, config.b)
    read = {path: Evaluation.load_json(path) for path in paths if path.suffix == ".json"}
    models = [path for path in dict.fromkeys(paths) if path not in read]
    said = c.said(config, without=("a", "b", "json", "split"))
    if not models and said:
        raise UserError(f"A and B were evaluated before; leave {said[0]} out beside them")
    if not models and config.split not in ("val", *(one.split for one in read.values())):
        raise UserError(f"A and B were not evaluated on {config.split!r}; leave --split out")
    found = read | (_evaluated(models, config) if models else {})
    return [found[path] for path in paths]


def _evaluated(paths: Sequence[Path], config: c.CompareConfig) -> dict[Path, Evaluation]:
    """Return the evaluations of model files, all on the same images."""
    from kseg.quiet import load_tensorflow

    load_tensorflow()
    from kseg.data.dataset import open_dataset
    from kseg.evaluate import check_classes

    predictors = {path: _opened(path, config) for path in paths}
    dataset = open_dataset(config.data or _same_data(predictors.values()))
    for predictor in predictors.values():
        check_classes(predictor, dataset)
    return {path: _measured(predictor, dataset, config) for path, predictor in predictors.items()}


def _same_data(predictors: Collection[Predictor]) -> str:
    named = {predictor.card.dataset: predictor.path for predictor in predictors}
    if "" in named:
        raise UserError(f"{named['']} does not say what it was trained on; name it by --data")
    if len(named) > 1:
        (data, path), (other, other_path) = list(named.items())[:2]
        raise UserError(
            f"{path} was trained on {data} and {other_path} on {other}; name the images to "
            "compare them on by --data"
        )
    return next(iter(named))


def _check_json(path: Path | None) -> None:
    if path is not None and path.is_dir():
        raise UserError(f"--json {path} is a folder; name the file to write")


def _newest() -> Path:
    from kseg.runs import newest

    return newest().folder


def _complain(error: object, code: int) -> int:
    Console(stderr=True, highlight=False, soft_wrap=True, emoji=False).print(
        f"kseg: {escape(str(error))}"
    )
    return code


def _log_handler() -> logging.Handler:
    console = Console(stderr=True, emoji=False)
    return RichHandler(console=console, show_time=False, show_path=False, show_level=False)
