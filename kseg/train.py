"""From a configuration to a trained run; reads top to bottom."""

from __future__ import annotations

import contextlib
import logging
import math
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from kseg import card, checkpoint, models
from kseg.config import TrainConfig
from kseg.data.augment import Augmentation
from kseg.data.dataset import Dataset, open_dataset
from kseg.data.doctor import check_dataset
from kseg.data.pipeline import counting, name_the_file, training_batches
from kseg.data.rare import RareSampling, rarity, repeat_factors
from kseg.engine import Engine
from kseg.errors import UserError
from kseg.evaluate import Evaluation, evaluate
from kseg.files import clear_leftovers, replacing
from kseg.inference import Predictor, load, run_model
from kseg.initial_weights import initialise
from kseg.losses.class_weights import PixelCounts, weights_for
from kseg.losses.expression import build_loss, parse_loss, takes_class_weights
from kseg.losses.logit_adjustment import LogitAdjusted
from kseg.optimizers import make_optimizer
from kseg.progress import Display, Pace
from kseg.quantization import quantization_aware
from kseg.registry import MODELS
from kseg.resolve import backbone_weights, check, option_texts, resolve
from kseg.runs import STEP_COLUMNS, MetricsFile, Run
from kseg.summaries import summarise, summarise_pictures, write_preview
from kseg.training_copy import is_fast
from kseg.version import VERSION
from kseg.weights import of_backbone

log = logging.getLogger(__name__)
ROWS = 100  # of steps.csv


@dataclass(frozen=True)
class Trained:
    """What a training gives back.

    Attributes:
        run: the run folder.
        evaluation: of best.keras on the validation split; None if nothing was left to do.
    """

    run: Run
    evaluation: Evaluation | None


class Interrupted(Exception):
    """Ctrl-C: the state has been saved, and the run can be resumed."""


def train(
    config: TrainConfig,
    *,
    callbacks: Sequence[keras.callbacks.Callback] = (),
    strategy: tf.distribute.Strategy | None = None,
) -> Trained:
    """Train a model, or continue a training where its last checkpoint stands.

    Args:
        config: what to train; fields left None are filled in from the data.
        callbacks: Keras callbacks; an epoch, to them, ends with each validation.
        strategy: how devices share each batch. Default: all GPUs of this machine, if several.

    Returns:
        The run folder, and the evaluation of its best model.

    Raises:
        UserError: for a mistake in the configuration or the data.
        Interrupted: after Ctrl-C.
    """
    run, config = _begin(config)
    done = max(checkpoint.steps(run.checkpoints), default=0)
    if done and done == config.steps:
        log.info("%s is finished; nothing is left to do", run.folder)
        return Trained(run, None)
    dataset = open_dataset(config.data)
    keras.utils.set_random_seed(config.seed)
    strategy = strategy or _all_devices()
    training = _Training(run, config, dataset, strategy, fresh=not done)
    checkpoint.check_space(run.folder, training.engine.shapes())
    if Run.is_run(run.folder):
        clear_leftovers(run.folder)
    else:
        # Only now, when everything has been built, is anything written.
        run.create(config)
    training.restore(done)
    try:
        with _stop_on_interrupt() as stop:
            training.loop(stop, callbacks)
    except tf.errors.OpError as error:
        raise name_the_file(error, dataset=dataset) or error from error
    return Trained(run, training.final_evaluation())


def build_model(
    config: TrainConfig, dataset: Dataset, size: tuple[int, int], *, pretrained: bool = False
) -> keras.Model:
    """Build the architecture of a configuration under the current dtype policy.

    Args:
        config: a resolved configuration.
        dataset: gives the number of classes.
        size: height and width of the input.
        pretrained: load the weights of the backbone, if the configuration names some.
    """
    options = models.parse_options(config.model, option_texts(config))
    if pretrained and backbone_weights(config):
        options["backbone_weights"] = backbone_weights(config)
    return models.build(config.model, (*size, 3), len(dataset.classes), options)


def _served_model(config: TrainConfig, dataset: Dataset, size: tuple[int, int]) -> keras.Model:
    """Return the model of a configuration with logits as its only output."""
    model = models.inference_model(build_model(config, dataset, size))
    return quantization_aware(model) if config.quantize_aware else model


def _begin(config: TrainConfig) -> tuple[Run, TrainConfig]:
    """Return the run and its resolved configuration; write nothing."""
    if config.resume is None:
        check(config)
        if config.run is not None:
            Run(config.run).check_free()
        dataset = open_dataset(config.data)
        check_dataset(dataset, ("train", "val"))
        config = resolve(config, dataset)
        return Run(config.run), config
    if replace(config, resume=None) != TrainConfig():
        raise UserError(
            "--resume continues a run as it was started and takes no other flag; "
            "leave the others out, or start a new run with them"
        )
    run = Run(config.resume)
    return run, run.config()


class _Training:
    """The parts of one training and the loop over them."""

    def __init__(
        self,
        run: Run,
        config: TrainConfig,
        dataset: Dataset,
        strategy: tf.distribute.Strategy,
        *,
        fresh: bool,
    ) -> None:
        self.run = run
        self.config = config
        self.dataset = dataset
        self.strategy = strategy
        self.counts = counting(dataset)
        self.class_weights = _class_weights(config, dataset, self.counts)
        _check_shares(config, strategy)
        with strategy.scope():
            self.engine = self._engine(fresh=fresh)
        with dtype_policy("float32"):
            self.served = _served_model(config, dataset, config.eval_size)
        self.card = _card(config, dataset)
        self.predictor = Predictor(run.best, self.card, run_model(self.served, run.best))
        self.best = float("-inf")
        self.evaluation: Evaluation | None = None  # of best.keras, if this process has written it
        self.lost = 0

    def _engine(self, *, fresh: bool) -> Engine:
        config = self.config
        with dtype_policy(config.precision):
            model = build_model(config, self.dataset, config.size, pretrained=fresh)
        if config.frozen_bn or config.head_rate != 1.0:
            _check_backbone(config, model)
        if fresh:
            initialise(model, config)
        if config.frozen_bn:
            _freeze_batch_norm(model)
        if config.quantize_aware:
            # Training-only heads are not in a finished model, and fresh ones would only disturb it.
            model = quantization_aware(models.inference_model(model))
        heads = [v.path for layer in model.layers if not of_backbone(layer) for v in layer.weights]
        return Engine(
            model,
            optimizer=make_optimizer(config, heads=heads),
            losses=self._losses(model),
            steps=config.steps,
            ema=config.ema,
            jit=config.jit,
            sync_bn=config.sync_bn,
            strategy=self.strategy,
        )

    def _losses(self, model: keras.Model) -> dict[str, tuple[keras.losses.Loss, float]]:
        config = self.config
        main = build_loss(config.loss, class_weights=self.class_weights)
        if config.logit_adjustment:
            main = LogitAdjusted(main, self.counts().prior, config.logit_adjustment)
        if config.quantize_aware:
            return {"logits": (main, 1.0)}
        return MODELS.entry(config.model).losses(main, model.output)

    def restore(self, step: int) -> None:
        """Go to the state of checkpoint `step`; 0 is the start."""
        if step:
            tensors, facts = checkpoint.load(self.run.checkpoints, step)
            path = self.run.checkpoints / f"step-{step}"
            checkpoint.check(path, tensors, self.engine.shapes())
            self.engine.restore(tensors, finished=step)
            self.best = facts["best"]
        self.metrics = MetricsFile(self.run.metrics_file, until=step)
        self.steps = MetricsFile(self.run.steps_file, until=step, columns=STEP_COLUMNS)

    def loop(self, stop: Callable[[], bool], callbacks: Sequence[keras.callbacks.Callback]) -> None:
        """Train from the engine's step to the end, validating and saving on the way."""
        config, engine = self.config, self.engine
        batches = self._batches()
        if engine.finished == 0:
            write_preview(self.run.preview, batches, self.dataset)
        calls = keras.callbacks.CallbackList(list(callbacks), model=engine.model)
        engine.model.stop_training = False
        calls.on_train_begin()
        writer = tf.summary.create_file_writer(str(self.run.tensorboard))
        pace = Pace(config.batch_size)
        with Display(config, done=engine.finished) as display, writer.as_default():
            display.started(
                models.trainable_parameters(engine.model), self.dataset.classes, self.class_weights
            )
            if not is_fast(config.precision):
                display.slow()
            calls.on_epoch_begin(self._epoch())
            for image, mask in self.strategy.experimental_distribute_dataset(batches):
                pace.works()
                self._step(image, mask, display, calls, pace)
                pace.waits()
                if engine.model.stop_training:
                    break
                if stop() and engine.finished < config.steps:
                    self._save()
                    calls.on_train_end()
                    raise Interrupted(str(self.run.folder))
        if engine.finished % config.checkpoint_every and engine.finished < config.steps:
            self._save()  # a callback has ended the training early
        calls.on_train_end()

    def _step(
        self,
        image: tf.Tensor,
        mask: tf.Tensor,
        display: Display,
        calls: keras.callbacks.CallbackList,
        pace: Pace,
    ) -> None:
        """Train on one batch; validate and save where it is time to."""
        config, engine = self.config, self.engine
        rate = engine.learning_rate()
        calls.on_train_batch_begin(engine.finished)
        loss = float(engine.step(image, mask))
        step = engine.finished
        pace.done(loss)
        if step % max(1, config.steps // ROWS) == 0 or step == config.steps:
            self.steps.add({"step": step, "learning_rate": rate} | pace.row())
        calls.on_train_batch_end(step - 1, {"loss": loss})
        display.update(step, loss=loss, learning_rate=rate)
        self._check_loss(loss)
        if step % config.eval_every == 0 or step == config.steps:
            epoch = self._epoch() - (step % config.eval_every == 0)
            miou = self._validate(display, loss=loss, rate=rate)
            calls.on_epoch_end(epoch, {"loss": loss, "val_miou": miou})
            if step < config.steps:
                calls.on_epoch_begin(epoch + 1)
        if step % config.checkpoint_every == 0 or step == config.steps:
            self._save()

    def _epoch(self) -> int:
        """Return how many validations lie behind; an epoch, to callbacks, ends with one."""
        return self.engine.finished // self.config.eval_every

    def final_evaluation(self) -> Evaluation:
        """Return the measure of best.keras, which may be older than the last step."""
        if self.evaluation is not None:
            return self.evaluation
        # A callback may have ended the training before its first validation.
        file = self.run.best if self.run.best.is_file() else self.run.last
        return evaluate(load(file), self.dataset, split="val")

    def _batches(self) -> tf.data.Dataset:
        config = self.config
        return training_batches(
            self.dataset,
            split="train",
            size=config.size,
            batch_size=config.batch_size,
            seed=config.seed,
            start_step=self.engine.finished,
            steps=config.steps,
            augmentation=_augmentation(config),
            sampling=self._sampling(),
        )

    def _sampling(self) -> RareSampling:
        """Return how often images are used and where they are cut; counts only where it matters."""
        config = self.config
        return RareSampling(
            repeats=repeat_factors(self.counts().per_image > 0, config.repeat_rare)
            if config.repeat_rare
            else None,
            crops=config.rare_crops,
            rarity=rarity(self.counts().pixels) if config.rare_crops else None,
        )

    def _check_loss(self, loss: float) -> None:
        """Refuse to go on without a loss; loss scaling may skip some steps while it adapts."""
        self.lost = 0 if math.isfinite(loss) else self.lost + 1
        allowed = 50 if self.config.precision == "mixed_float16" else 0
        if self.lost > allowed:
            raise UserError(
                f"the loss is {loss} at step {self.engine.finished}; "
                f"lower --learning-rate (it is {self.config.learning_rate:g}) and start again"
            )

    def _serve(self) -> None:
        """Give the served model the weights of now."""
        assign(self.served, self.engine.weights())

    def _validate(self, display: Display, *, loss: float, rate: float) -> float:
        self._serve()
        result = evaluate(self.predictor, self.dataset, split="val")
        step = self.engine.finished
        measured = {"miou": result.miou, "pixel_accuracy": result.pixel_accuracy}
        measured |= {"loss": loss, "learning_rate": rate}
        summarise(step, measured)
        speed = {"images_per_second": display.images_per_second}
        self.metrics.add({"step": step} | measured | speed)
        summarise_pictures(step, self.predictor, self.dataset)
        better = result.miou > self.best
        if better:
            self.best, self.evaluation = result.miou, result
            save_model(self.run.best, self.served, self.card)
        display.validated(step, result.miou, best=better)
        return result.miou

    def _save(self) -> None:
        self._serve()
        save_model(self.run.last, self.served, self.card)
        checkpoint.save(
            self.run.checkpoints,
            step=self.engine.finished,
            tensors=self.engine.state(),
            facts={"best": self.best},
        )


@contextlib.contextmanager
def dtype_policy(name: str) -> Iterator[None]:
    """Build layers under this dtype policy, and put the old one back."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(name)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


def assign(model: keras.Model, weights: Mapping[str, np.ndarray]) -> None:
    """Set every weight of `model` from `weights` by its path."""
    for variable in model.weights:
        variable.assign(weights[variable.path])


def save_model(path: Path, model: keras.Model, facts: card.ModelCard) -> None:
    """Write a `.keras` file that carries its card, atomically."""
    with replacing(path) as temporary:
        model.save(temporary)
        card.embed(temporary, facts)


@contextlib.contextmanager
def _stop_on_interrupt() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C into a wish that is granted between two steps."""
    asked: list[int] = []

    def remember(number: int, frame: object) -> None:
        asked.append(number)
        signal.signal(signal.SIGINT, before)

    try:
        before = signal.signal(signal.SIGINT, remember)
    except ValueError:  # not the main thread: signals are not ours
        yield lambda: False
        return
    try:
        yield lambda: bool(asked)
    finally:
        signal.signal(signal.SIGINT, before)


def _all_devices() -> tf.distribute.Strategy:
    several = len(tf.config.list_physical_devices("GPU")) > 1
    return tf.distribute.MirroredStrategy() if several else tf.distribute.get_strategy()


def _check_shares(config: TrainConfig, strategy: tf.distribute.Strategy) -> None:
    devices = strategy.num_replicas_in_sync
    if config.batch_size % devices:
        raise UserError(
            f"--batch-size {config.batch_size} cannot be shared evenly by {devices} devices; "
            f"take a multiple of {devices}"
        )


def _check_backbone(config: TrainConfig, model: keras.Model) -> None:
    if not any(of_backbone(layer) for layer in model.layers):
        raise UserError(
            f"{config.model} has no backbone of its own, so --frozen-bn and --head-rate have "
            "nothing to tell apart; leave them out"
        )


def _freeze_batch_norm(model: keras.Model) -> None:
    for layer in model.layers:
        if of_backbone(layer) and isinstance(layer, keras.layers.BatchNormalization):
            layer.trainable = False


def _class_weights(
    config: TrainConfig, dataset: Dataset, counts: Callable[[], PixelCounts]
) -> tuple[float, ...] | None:
    if not any(takes_class_weights(term.name) for term in parse_loss(config.loss)):
        return None
    return weights_for(config.class_weights, dataset.classes, counts)


def _augmentation(config: TrainConfig) -> Augmentation:
    usual, strength = Augmentation(), config.jitter
    return replace(
        usual,
        scale=config.scale,
        brightness=strength * usual.brightness,
        contrast=strength * usual.contrast,
        saturation=strength * usual.saturation,
        hue=strength * usual.hue,
    )


def _card(config: TrainConfig, dataset: Dataset) -> card.ModelCard:
    return card.ModelCard(
        model=config.model,
        options=models.parse_options(config.model, option_texts(config)),
        classes=dataset.classes,
        palette=dataset.palette,
        size=config.eval_size,
        dataset=config.data,
        version=VERSION,
        extra={"quantize_aware": True} if config.quantize_aware else {},
    )
