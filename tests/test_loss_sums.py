"""What `--loss` says: one loss, sums of them, options, and every way to get it wrong."""

import json

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from street import train_words

from kseg.cli import main
from kseg.engine import Engine
from kseg.errors import UserError
from kseg.losses import CrossEntropy
from kseg.losses.dice import Dice
from kseg.losses.expression import Term, build_loss, listed, parse_loss, takes_class_weights
from kseg.losses.logit_adjustment import LogitAdjusted
from kseg.losses.parts import parts_of, quotient
from kseg.losses.sum_of_losses import SumOfLosses
from kseg.registry import HEAD_LOSSES, LOSSES, MODELS

MASK = np.array([[[0, 0, 1, 255]], [[1, 255, 255, 255]]], "int32")
LOGITS = np.random.default_rng(2).normal(size=(2, 1, 4, 2)).astype("float32")
WEIGHTS = (0.5, 3.0)


def total(loss, mask=MASK, logits=LOGITS):
    parts = parts_of(loss, mask, logits)
    return float(
        sum(part.weight * quotient(tf.reduce_sum(part.values), part.divisor) for part in parts)
    )


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("ce", [Term(1.0, "ce", {})]),
        ("ce+0.5*dice", [Term(1.0, "ce", {}), Term(0.5, "dice", {})]),
        (" 2 * ce + dice ", [Term(2.0, "ce", {}), Term(1.0, "dice", {})]),
        ("1e-2*boundary_distance:radius=8", [Term(0.01, "boundary_distance", {"radius": 8})]),
        (
            "tversky:alpha=0.3,beta=0.7,present-only=false",
            [Term(1.0, "tversky", {"alpha": 0.3, "beta": 0.7, "present_only": False})],
        ),
        (
            "dice + 0.01 .. 1 * boundary_distance",
            [Term(1.0, "dice", {}), Term((0.01, 1.0), "boundary_distance", {})],
        ),
        ("1..0*ce+0...5*dice", [Term((1.0, 0.0), "ce", {}), Term((0.0, 0.5), "dice", {})]),
        ("ohem:threshold=0,share=.25", [Term(1.0, "ohem", {"threshold": 0.0, "share": 0.25})]),
    ],
)
def test_text_to_terms(text, terms):
    assert parse_loss(text) == tuple(terms)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("ce+0.5*dise", "no loss 'dise'; did you mean dice"),
        ("", "a term is empty"),
        ("ce+", "a term is empty"),
        ("2*", "a term is empty"),
        ("x*ce", "the weight 'x' is no number above 0"),
        ("0*ce", "the weight '0' is no number above 0"),
        ("-1*ce", "the weight '-1' is no number above 0"),
        ("nan*ce", "the weight 'nan' is no number above 0"),
        ("inf*ce", "the weight 'inf' is no number above 0"),
        ("0..0*ce", "the weight '0..0' is no number above 0 and no FIRST..LAST"),
        ("-1..1*ce", "the weight '-1..1' is no number above 0"),
        ("0..inf*ce", "the weight '0..inf' is no number above 0"),
        ("..1*ce", "the weight '..1' is no number above 0"),
        ("1..*ce", "the weight '1..' is no number above 0"),
        ("1..2..3*ce", "expected for example"),
        ("ce:gamma=2", "loss ce has no option 'gamma' (it has none)"),
        ("focal:gama=2", "loss focal has no option 'gama'; did you mean gamma"),
        ("focal:gamma", "expected OPTION=VALUE behind the colon, found 'gamma'"),
        ("focal:gamma=two", "option gamma of loss focal is 'two'; it must be a number"),
        ("focal:gamma=nan", "option gamma of loss focal is 'nan'; it must be a number"),
        ("dice:squared=maybe", "it must be true or false"),
        ("boundary_distance:radius=1.5", "it must be a whole number"),
        ("focal:gamma=-1", "loss focal: gamma is -1.0; it must not be negative"),
        ("focal:class_weights=1", "no option 'class_weights'"),
        ("dice:ignore_label=0", "no option 'ignore_label'"),
        ("ce+se_loss", "se_loss judges a head of encnet, which brings it along"),
        ("boundary_aware", "boundary_aware judges a head of pidnet"),
    ],
)
def test_mistakes_are_named(text, told):
    with pytest.raises(UserError) as caught:
        build_loss(text)
    assert told in str(caught.value)


def test_a_single_loss_is_itself_and_a_weight_makes_a_sum():
    assert type(build_loss("ce")) is CrossEntropy
    assert type(build_loss("2*ce")) is SumOfLosses
    assert total(build_loss("2*ce")) == pytest.approx(2 * total(build_loss("ce")), rel=1e-6)


def test_options_reach_the_loss():
    dice = build_loss("dice:squared=false,smoothing=2")
    assert (dice.squared, dice.smoothing) == (False, 2.0)


def test_each_term_of_a_sum_keeps_its_own_divisor():
    # Four valid pixels in two images, and weights that sum to something else.
    text = "ce+0.5*dice+weighted_ce+2*ohem:threshold=0,share=0.5"
    loss = build_loss(text, class_weights=WEIGHTS)
    alone = [total(build_loss(term, class_weights=WEIGHTS)) for term in text.split("+")]
    assert total(loss) == pytest.approx(sum(alone), rel=1e-6)
    assert float(loss.call(MASK, LOGITS)) == pytest.approx(total(loss), rel=1e-6)


def test_class_weights_go_to_the_losses_that_take_them():
    loss = build_loss("ce+dice", class_weights=WEIGHTS)
    assert loss.losses[0].class_weights == WEIGHTS
    assert takes_class_weights("ce") and not takes_class_weights("dice")


def test_sums_of_all_ignored_batches_are_zero():
    mask = np.full_like(MASK, 255)
    loss = build_loss("+".join(LOSSES))
    assert total(loss, mask) == 0 and float(loss.call(mask, LOGITS)) == 0


@pytest.mark.parametrize(
    "loss",
    [
        build_loss("ce+0.5*dice:smoothing=1", class_weights=WEIGHTS),
        build_loss("dice+0.01..1*boundary_distance"),
        LogitAdjusted(build_loss("ce+lovasz"), (0.75, 0.25), 0.5),
    ],
    ids=["sum", "changing", "adjusted"],
)
def test_config_round_trip_through_json(loss):
    text = json.dumps(keras.saving.serialize_keras_object(loss))
    again = keras.saving.deserialize_keras_object(json.loads(text))
    assert again.get_config() == loss.get_config()
    assert total(again) == total(loss)


def test_logit_adjustment_by_hand():
    # Logits 0 and a prior of (3/4, 1/4): the softmax is the prior to the power tau, scaled.
    zero = np.zeros((1, 1, 1, 2), "float32")
    for tau, expected in ((1.0, 1 / 4), (0.0, 1 / 2), (2.0, 1 / 10)):
        loss = LogitAdjusted(CrossEntropy(), (0.75, 0.25), tau)
        assert total(loss, np.array([[[1]]]), zero) == pytest.approx(-np.log(expected), rel=1e-6)


def test_logit_adjustment_reaches_every_term():
    prior = np.array([0.9, 0.1])
    loss = LogitAdjusted(build_loss("ce+dice"), prior)
    assert total(loss) == pytest.approx(total(build_loss("ce+dice"), MASK, LOGITS + np.log(prior)))
    with pytest.raises(ValueError, match="above 0"):
        LogitAdjusted(CrossEntropy(), (1.0, 0.0))


def pixel_net(rate=0.0):
    """A net whose logits are the image, and an optimiser that by default leaves it so."""
    image = keras.Input((1, 4, 2), name="image")
    x = layers.Conv2D(2, 1, use_bias=False, name="classify")(image)
    model = keras.Model(image, {"logits": layers.Activation("linear", name="logits")(x)})
    model.get_layer("classify").kernel.assign(np.eye(2)[None, None])
    return {"model": model, "optimizer": keras.optimizers.SGD(rate)}


@pytest.mark.parametrize("jit", [False, True])
def test_the_step_divides_every_term_by_its_own(jit):
    loss = build_loss("ce+0.5*dice+weighted_ce+focal", class_weights=WEIGHTS)
    engine = Engine(**pixel_net(), losses={"logits": (loss, 2.0)}, jit=jit)
    found = float(engine.step(tf.constant(LOGITS), tf.constant(MASK)))
    assert found == pytest.approx(2 * total(loss), rel=1e-5)


def losses_of_steps(text, *, steps, weight=1.0, first=0, taken=3):
    """Return what the engine's steps cost on two pixels of class 0 and two of 1, at p = 1/2."""
    losses = {"logits": (build_loss(text), weight)}
    engine = Engine(**pixel_net(), losses=losses, steps=steps)
    engine.finished = first
    batch = tf.zeros((1, 1, 4, 2)), tf.constant([[[0, 0, 1, 1]]])
    return [float(engine.step(*batch)) for _ in range(taken)]


def test_the_weight_of_kervadec_rises_as_worked_by_hand():
    # Dice, squared: 1 - 2 * (2 / 2) / (2 + 4 / 4) = 1/3 a class. The boundary loss is 0.25 (its
    # docstring), times 0.01, 0.505 half-way and 1.
    found = losses_of_steps("dice+0.01..1*boundary_distance", steps=3)
    assert found == pytest.approx([1 / 3 + 0.0025, 1 / 3 + 0.12625, 1 / 3 + 0.25], abs=1e-6)


def test_a_weight_depends_on_the_step_alone():
    # |ln 0.5| a pixel, times 1, 1.5, 2, 2.5, 3 and the weight 2 of the output.
    whole = losses_of_steps("1..3*ce", steps=5, weight=2.0, taken=5)
    assert whole == pytest.approx(2 * 0.693147 * np.array([1, 1.5, 2, 2.5, 3]), rel=1e-5)
    assert losses_of_steps("1..3*ce", steps=5, weight=2.0, first=3, taken=2) == whole[3:]


def test_a_resumed_training_has_the_weights_of_one_that_was_not_stopped():
    losses = {"logits": (build_loss("dice+0.01..1*boundary_distance"), 1.0)}
    whole, stopped, resumed = (Engine(**pixel_net(1.0), losses=losses, steps=4) for _ in range(3))
    for engine, steps in ((whole, 4), (stopped, 2)):
        for _ in range(steps):
            engine.step(tf.constant(LOGITS), tf.constant(MASK))
    resumed.restore(stopped.state(), finished=2)
    for _ in range(2):
        resumed.step(tf.constant(LOGITS), tf.constant(MASK))
    kernels = [one.model.get_layer("classify").kernel.numpy() for one in (whole, resumed)]
    np.testing.assert_array_equal(*kernels)
    assert np.abs(kernels[0] - np.eye(2)).max() > 0.01


def test_where_the_length_is_unknown_or_one_step_the_first_weight_holds():
    assert losses_of_steps("1..3*ce", steps=None) == pytest.approx([0.693147] * 3, rel=1e-5)
    assert losses_of_steps("1..3*ce", steps=1, taken=1) == pytest.approx([0.693147], rel=1e-5)
    # and so it does for one who calls the loss itself
    assert total(build_loss("1..3*ce")) == total(build_loss("ce"))
    assert float(build_loss("1..3*ce").call(MASK, LOGITS)) == pytest.approx(
        total(build_loss("ce")), rel=1e-6
    )


def test_a_changing_weight_reaches_all_terms_of_a_nested_sum():
    inner = SumOfLosses([CrossEntropy(), Dice()], [1.0, 0.5])
    parts = SumOfLosses([inner], [(2.0, 6.0)]).parts(MASK, LOGITS)
    assert [(part.weight, part.rise) for part in parts] == [(2.0, 4.0), (1.0, 2.0)]
    changing = SumOfLosses([CrossEntropy()], [(1.0, 2.0)])
    (part,) = SumOfLosses([changing], [3.0]).parts(MASK, LOGITS)
    assert (part.weight, part.rise) == (3.0, 3.0)
    with pytest.raises(ValueError, match="a weight that changes stands before a loss"):
        SumOfLosses([changing], [(1.0, 2.0)]).parts(MASK, LOGITS)


def test_aux_heads_take_the_sum_too():
    main_loss = Dice()
    losses = MODELS.entry("pspnet").losses(main_loss, ["logits", "aux"])
    assert all(loss is main_loss for loss, _ in losses.values())


def test_weights_for_a_loss_that_takes_none_are_refused_but_not_the_default(tmp_path, capsys):
    words = ["train", "--loss", "dice", "--steps", "1", "--run", str(tmp_path / "run")]
    assert main([*words, "--class-weights", "median"]) == 2
    said = capsys.readouterr().err.replace("\n", " ")
    assert "nothing in --loss dice takes class weights" in said and "ce" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_sum_is_trained_and_resumed(street, tmp_path):
    more = ["--loss", "ce+0.5*dice+0.1*lovasz", "--logit-adjustment", "0.5"]
    assert main(train_words(street, tmp_path / "run", *more, "--rare-crops", "0.5")) == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    assert config["loss"] == "ce+0.5*dice+0.1*lovasz"


def test_all_are_listed(capsys):
    assert main(["losses"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in LOSSES)
    assert listed().row_count == len(LOSSES)
    assert "--loss 'ce+0.5*dice" in said


def test_every_loss_of_a_head_is_registered_and_shown(capsys):
    brought = [loss for name in MODELS for loss, _ in MODELS.entry(name).aux.values() if loss]
    assert {type(loss) for loss in brought} == {HEAD_LOSSES[name] for name in HEAD_LOSSES}
    assert main(["losses"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in HEAD_LOSSES)
    assert main(["losses", "se_loss"]) == 0
    assert "mask and a presence logit for each class" in " ".join(capsys.readouterr().out.split())


def test_one_is_shown_with_its_options(capsys):
    assert main(["losses", "tversky"]) == 0
    said = capsys.readouterr().out
    assert "--loss tversky:OPTION=VALUE" in said
    assert "price of false negatives" in said and "1706.05721" in said
    assert "ignore_label " not in said
