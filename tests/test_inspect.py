"""`kseg inspect`: what a file is made of, where it can run, what it costs, what makes it slow."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import keras
import numpy as np
import pytest
from ai_edge_litert.interpreter import Interpreter, OpResolverType
from ai_edge_litert.tools import flatbuffer_utils
from tiny import CARD, SIZE, samples, tiny_model

import kseg.export.speed as speed
from kseg import card as cards
from kseg.build import macs as keras_macs
from kseg.cli import main
from kseg.errors import UserError
from kseg.export import tflite
from kseg.export.arena import arena_bytes
from kseg.export.delegates import DELEGATES, EDGE_TPU, ETHOS_U, GPU, HEXAGON, MICRO, NNAPI, refusals
from kseg.export.inspection import Inspection, inspect_file
from kseg.export.inspection_text import show
from kseg.export.interface import Interface
from kseg.export.operators import (
    Network,
    Operator,
    Tensor,
    float_operators,
    is_quantised,
    macs,
    read_network,
    single_operator,
)
from kseg.export.speed import Speed, Timing, little_gained
from kseg.export.xnnpack import outside_xnnpack
from kseg.quiet import quiet


def hard_swish_model():
    """A net with what int8 slows down, a depthwise multiplier, and a third of the image's size."""
    image = keras.Input((*SIZE, 3), name="image")
    x = keras.layers.Rescaling(1 / 127.5, -1.0)(image)
    x = keras.layers.Conv2D(8, 3, strides=2, padding="same", name="stem")(x)
    x = keras.layers.Activation("hard_swish", name="swish")(x)
    x = keras.layers.DepthwiseConv2D(3, padding="same", depth_multiplier=2, name="multiplied")(x)
    x = keras.layers.Conv2D(3, 1, name="classifier")(x)
    logits = keras.layers.Resizing(*SIZE, interpolation="bilinear", name="up")(x)
    return keras.Model(image, {"logits": logits})


def write(model, path, variant):
    path.parent.mkdir(parents=True, exist_ok=True)
    tflite.write(model, path, variant=variant, interface=Interface(), samples=samples)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The two files of one export, float and int8, with HARD_SWISH as others write it."""
    folder = tmp_path_factory.mktemp("export")
    model = hard_swish_model()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tflite, "with_int8_forms", lambda model, samples: model)
        for variant in ("float32", "int8"):
            cards.embed(write(model, folder / tflite.file_name(variant), variant), CARD)
    return folder


@pytest.fixture(scope="module")
def int8(files):
    return files / "model-int8.tflite"


def tensor(index, size, **more):
    plain = Tensor(index, f"t{index}", (size,), "int8", (), (), None, False, (), size, ())
    return replace(plain, **more)


def chain(*steps, sizes, inputs, outputs):
    """A network of operators from and to tensors of so many bytes."""
    operators = [
        Operator(index, name, 1, taken, given, {})
        for index, (name, taken, given) in enumerate(steps)
    ]
    tensors = [tensor(index, size) for index, size in enumerate(sizes)]
    return Network(tuple(tensors), tuple(operators), inputs, outputs)


def test_arena_by_hand():
    """Each line says where LiteRT puts a tensor; offsets are multiples of 64."""
    network = chain(
        ("CONV_2D", (0,), (1,)),
        ("CONV_2D", (1,), (2,)),
        ("CONCATENATION", (1, 2), (3,)),
        ("CONV_2D", (3,), (4,)),
        sizes=(100, 1000, 400, 600, 64),
        inputs=(0,),
        outputs=(4,),
    )
    # The input lives throughout and comes first: 0 to 100.
    # t1, the largest, lives in operators 0 to 2: 128 to 1128.
    # t3 lives in 2 and 3, beside t1 in 2: 1152 to 1752.
    # t2 lives in 1 and 2, beside both: 1792 to 2192.
    # t4 lives in 3, beside the input and t3; the gap between them holds it: 128 to 192.
    assert arena_bytes(network) == 2192


def test_arena_takes_the_smallest_gap():
    network = chain(
        ("SPLIT", (0,), (1, 2, 3)),
        ("CONV_2D", (1,), (4,)),
        ("CONCATENATION", (2, 4), (5,)),
        sizes=(64, 640, 320, 128, 192, 64),
        inputs=(0,),
        outputs=(5,),
    )
    # 0 to 64 the input; then by size t1 64 to 704 (operators 0, 1), t2 704 to 1024 (0 to 2).
    # t4 (1, 2) is beside t1 and t2, so 1024 to 1216; t3, never read, lives on to the end beside
    # all of them: behind t4, 1216 to 1344. t5 (2) finds t1's place free: 64 to 128.
    assert arena_bytes(network) == 1344


@pytest.mark.parametrize(
    ("name", "read_again", "bytes"),
    [
        # Over its input: 64 of the network's input, 128, and 64 of its output.
        ("ADD", False, 256),
        ("RESHAPE", False, 256),
        # No kernel of it does so: 64, 128 and 128 at once.
        ("HARD_SWISH", False, 320),
        # Its input is needed once more: all four at once. Reshaping changes nothing.
        ("ADD", True, 384),
        ("RESHAPE", True, 256),
    ],
)
def test_operators_that_write_over_their_input(name, read_again, bytes):
    network = chain(
        ("CONV_2D", (0,), (1,)),
        (name, (1,) if name != "ADD" else (1, 4), (2,)),
        ("CONCATENATION", (1, 2) if read_again else (2,), (3,)),
        sizes=(64, 128, 128, 64, 128),
        inputs=(0,),
        outputs=(3,),
    )
    addend = replace(network.tensors[4], constant=True)
    assert arena_bytes(replace(network, tensors=(*network.tensors[:4], addend))) == bytes


def test_arena_is_what_litert_allocates(int8):
    """Its reference kernels need no memory of their own, so the tensors' addresses tell."""
    opened = interpreter(int8, OpResolverType.BUILTIN_REF)
    spans = []
    for one in read_network(int8).tensors:
        if not one.constant and one.bytes:
            first = opened.tensor(one.index)().__array_interface__["data"][0]
            spans.append((first, first + one.bytes))
    taken = max(end for _, end in spans) - min(first for first, _ in spans)
    assert arena_bytes(read_network(int8)) == taken


def interpreter(path, kind, **options):
    with quiet():
        opened = Interpreter(
            model_path=str(path), num_threads=1, experimental_op_resolver_type=kind, **options
        )
        opened.allocate_tensors()
    return opened


def test_macs_are_those_of_the_keras_model(int8, tmp_path):
    assert macs(read_network(int8)) == keras_macs(hard_swish_model())
    # 32 x 48 positions: 3 x 3 x 3 to 8, 3 x 3 of 16 channels, 16 to 3.
    assert keras_macs(hard_swish_model()) == 32 * 48 * (216 + 144 + 48)
    path = write(tiny_model(), tmp_path / "m.tflite", "float32")
    assert macs(read_network(path)) == keras_macs(tiny_model())


@pytest.mark.parametrize(
    ("name", "shapes", "count"),
    [
        # 2 products of 6 x 4 and 4 x 5.
        ("BATCH_MATMUL", ((2, 6, 4), (2, 4, 5), (2, 6, 5)), 2 * 6 * 4 * 5),
        # 7 rows of 4 to 5.
        ("FULLY_CONNECTED", ((7, 4), (5, 4), (7, 5)), 7 * 4 * 5),
        # Each of 6 x 8 inputs of 4 channels meets 3 x 3 x 2 weights.
        ("TRANSPOSE_CONV", ((4,), (2, 3, 3, 4), (1, 6, 8, 4), (1, 12, 16, 2)), 48 * 4 * 18),
        ("ADD", ((7, 4), (7, 4), (7, 4)), 0),
    ],
)
def test_macs_by_hand(name, shapes, count):
    tensors = tuple(tensor(index, 0, shape=shape) for index, shape in enumerate(shapes))
    last = len(shapes) - 1
    operator = Operator(0, name, 1, tuple(range(last)), (last,), {})
    assert macs(Network(tensors, (operator,), (0,), (last,))) == count


def test_a_network_is_read_as_it_is(int8):
    network = read_network(int8)
    names = [operator.name for operator in network.operators]
    assert names[0] == "QUANTIZE" and names[-2:] == ["ARG_MAX", "CAST"]
    image, classes = (network.tensors[i[0]] for i in (network.inputs, network.outputs))
    assert (image.dtype, image.shape) == ("uint8", (1, *SIZE, 3))
    assert (image.scales, image.zero_points, image.axis) == ((1.0,), (0,), None)
    assert (classes.dtype, classes.shape, classes.scales) == ("uint8", (1, *SIZE), ())
    stem = network.operators[names.index("CONV_2D")]
    assert (stem.options["strideH"], stem.activation, stem.version) == (2, "NONE", 3)
    weights = network.sources(stem)[1]
    # Per channel, the first axis of a convolution's weights.
    assert (weights.shape, weights.constant, weights.axis) == ((8, 3, 3, 3), True, 0)
    assert (len(weights.scales), set(weights.zero_points), weights.bytes) == (8, {0}, 216)
    up = network.operators[names.index("RESIZE_BILINEAR")]
    assert network.sources(up)[1].values == SIZE
    assert network.fed(up) == [network.sources(up)[0]]


def test_operators_outside_xnnpack(int8):
    network = read_network(int8)
    names = [network.operators[index].name for index in outside_xnnpack(int8)]
    assert names == ["QUANTIZE", "HARD_SWISH", "ARG_MAX", "CAST"]
    floating = int8.with_name("model-float32.tflite")
    names = [read_network(floating).operators[index].name for index in outside_xnnpack(floating)]
    assert names == ["CAST", "ARG_MAX", "CAST"]


def test_operators_left_in_float(int8, tmp_path):
    """LiteRT has no int8 SIN."""
    image = keras.Input((*SIZE, 3), name="image")
    x = keras.layers.Conv2D(3, 3, padding="same")(keras.layers.Rescaling(1 / 255)(image))
    model = keras.Model(image, {"logits": keras.ops.sin(x)})
    left = read_network(write(model, tmp_path / "sin.tflite", "int8"))
    assert [operator.name for operator in float_operators(left)] == ["SIN"]
    assert float_operators(read_network(int8)) == []
    floating = read_network(int8.with_name("model-float32.tflite"))
    assert not is_quantised(floating)
    assert float_operators(floating) == []


def test_a_single_operator_gives_what_it_gives_in_the_network(int8):
    """Bit for bit, each operator of the file, on what it is fed in the whole."""
    kind = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    whole = interpreter(int8, kind, experimental_preserve_all_tensors=True)
    image = whole.get_input_details()[0]
    whole.set_tensor(image["index"], next(samples()))
    whole.invoke()
    network = read_network(int8)
    for operator in network.operators:
        with quiet():
            alone = Interpreter(
                model_content=single_operator(int8, operator.index),
                experimental_op_resolver_type=kind,
            )
            alone.allocate_tensors()
        given = alone.get_input_details()
        assert len(given) == len(network.fed(operator))
        for detail, fed in zip(given, network.fed(operator), strict=True):
            alone.set_tensor(detail["index"], whole.get_tensor(fed.index))
        alone.invoke()
        result = alone.get_tensor(alone.get_output_details()[0]["index"])
        np.testing.assert_array_equal(result, whole.get_tensor(operator.outputs[0]))


def refused(delegate, path):
    return {(one.name, one.reason) for one in refusals(delegate, read_network(path))}


def test_rules_of_the_delegates(int8):
    """Each of these stands in the delegate's own source."""
    floating = int8.with_name("model-float32.tflite")
    multiplied = ("DEPTHWISE_CONV_2D", "depth multiplier")
    assert refused(GPU, int8) == {
        multiplied,
        ("ARG_MAX", "not supported"),
        ("CAST", "uint8 output"),
    }
    assert refused(GPU, floating) == refused(GPU, int8) | {("CAST", "uint8 input")}
    assert refused(NNAPI, int8) == refused(NNAPI, floating) == set()
    # Half-pixel centres came with version 3; the delegate knows two.
    resized = ("RESIZE_BILINEAR", "version 3")
    assert refused(HEXAGON, int8) == {multiplied, resized, ("CAST", "not supported")}
    missing = {(name, "not supported") for name in ("HARD_SWISH", "ARG_MAX", "CAST")}
    assert refused(EDGE_TPU, int8) == missing
    assert refused(ETHOS_U, int8) == {("CAST", "not supported")}
    assert refused(MICRO, int8) == {("CAST", "uint8 output")}
    for delegate in (HEXAGON, EDGE_TPU, ETHOS_U):
        taken = len(read_network(floating).operators) - len(
            refusals(delegate, read_network(floating))
        )
        assert taken == 0, delegate.name


def test_micro_runs_a_whole_file_or_none_and_runs_logits(int8, quick, capsys, tmp_path):
    """kernels/cast.cc has no uint8; without the class map there is no CAST."""
    reaches = {one.delegate: one for one in inspect_file(int8).reaches}
    assert (reaches["TFLite-Micro"].taken, reaches["TFLite-Micro"].macs) == (0, 0)
    show(inspect_file(int8))
    said = " ".join(capsys.readouterr().out.split())
    assert "does not run: CAST (uint8 output); take --output logits" in said
    logits = tmp_path / "logits.tflite"
    interface = Interface(output="logits")
    tflite.write(hard_swish_model(), logits, variant="int8", interface=interface, samples=samples)
    assert refused(MICRO, logits) == set()


def test_every_delegate_says_where_its_rules_stand():
    for delegate in DELEGATES:
        assert delegate.source.startswith("https://") and delegate.version and delegate.note


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda path: path.unlink(), "No such file"),
        (lambda path: path.write_text("a text, no network"), "is no .tflite file"),
        (lambda path: path.write_bytes(path.read_bytes()[:4000]), "is damaged or cut off"),
        (lambda path: path.write_bytes(path.read_bytes()[:9]), "is damaged or cut off"),
        (lambda path: path.unlink() or path.mkdir(), "Is a directory"),
        (lambda path: double(path), "has 2 subgraphs"),
    ],
)
def test_files_that_cannot_be_inspected(spoil, told, int8, tmp_path, capsys):
    path = tmp_path / "m.tflite"
    path.write_bytes(int8.read_bytes())
    spoil(path)
    assert main(["inspect", str(path)]) == 2
    said = capsys.readouterr()
    assert told in said.err and "m.tflite" in said.err
    assert said.out == "" and "Traceback" not in said.err


def double(path):
    model = flatbuffer_utils.read_model(path)
    model.subgraphs *= 2
    path.write_bytes(flatbuffer_utils.convert_object_to_bytearray(model))


def test_a_float_file_of_something_else_is_no_twin(int8, tmp_path, capsys):
    other = write(tiny_model(size=(32, 32)), tmp_path / "other.tflite", "float32")
    assert main(["inspect", str(int8), "--against", str(other)]) == 2
    assert "is no float twin of" in capsys.readouterr().err
    assert main(["inspect", str(int8), "--against", str(int8)]) == 2
    assert main(["inspect", str(int8), "--json", str(tmp_path)]) == 2
    assert "is a folder" in capsys.readouterr().err


@pytest.fixture
def quick(monkeypatch):
    """Replace the clock: int8 takes 30 ms, float 20; alone, an int8 operator 4 and a float one 1.

    Gives the calls, each the number of runs that took turns.
    """
    calls = []

    def medians(runs, *, rounds, seconds):
        for run in runs:
            run()  # it must run
        calls.append(len(runs))
        whole = rounds == speed.ROUNDS and seconds == speed.SECONDS
        return [30.0, 20.0][: len(runs)] if whole else [4.0, 1.0][: len(runs)]

    monkeypatch.setattr(speed, "medians", medians)
    monkeypatch.setattr(speed, "ALONE_SECONDS", speed.SECONDS - 1)
    return calls


def test_the_slow_operators_are_found(int8, quick):
    found = inspect_file(int8).speed
    assert found.twin == int8.with_name("model-float32.tflite")
    assert (found.milliseconds, found.twin_milliseconds, found.faster) == (30.0, 20.0, False)
    outside = [one for one in found.operators if one.outside]
    # QUANTIZE is none of the float file's: all that it takes is excess.
    assert [(one.name, one.excess) for one in outside] == [
        ("QUANTIZE", 4.0),
        ("HARD_SWISH", 3.0),
        ("ARG_MAX", 3.0),
        ("CAST", 3.0),
    ]
    # 30 - 13 is below 95 % of 20, so no other operator was timed.
    assert found.explained and len(found.operators) == 4
    # Both files, then each operator with its twin but QUANTIZE.
    assert quick == [2, 1, 2, 2, 2]


def test_costly_operators_are_timed_where_the_others_explain_too_little(
    int8, quick, monkeypatch, tmp_path
):
    monkeypatch.setattr(speed, "COSTLY", 2)
    for name in ("model-int8.tflite", "model-float32.tflite"):
        (tmp_path / name).write_bytes(int8.with_name(name).read_bytes())
    real = speed.medians

    def slower(runs, **options):
        times = real(runs, **options)
        return [100.0, 20.0] if times[0] == 30.0 else times

    monkeypatch.setattr(speed, "medians", slower)
    found = inspect_file(tmp_path / "model-int8.tflite").speed
    assert not found.explained
    # The convolutions with the most multiply-accumulates: the stem's 216 and the 144 per position.
    inside = [one.name for one in found.operators if not one.outside]
    assert inside == ["CONV_2D", "DEPTHWISE_CONV_2D"]


def test_a_processor_whose_int8_kernels_are_no_faster_is_to_blame(int8, quick, capsys, monkeypatch):
    found = inspect_file(int8)
    kernels = [Timing(i, "CONV_2D", False, 4.0, before) for i, before in enumerate((6.0, 3.5))]
    slow = replace(found.speed, milliseconds=20.0, operators=tuple(kernels))
    # 8 of 9.5 ms are more than 80 %.
    said = "on XNNPACK the costliest operators take 8.0 ms instead of 9.5"
    assert little_gained(slow).startswith(said)
    show(replace(found, speed=slow))
    shown = " ".join(capsys.readouterr().out.split())
    assert said in shown and "use model-float32.tflite on such processors. Those with" in shown
    assert "To do for CONV_2D" not in shown
    monkeypatch.setattr(speed, "measure", lambda *_, **__: slow)
    assert said in speed.why_slower(int8, int8.with_name("model-float32.tflite"))


@pytest.mark.parametrize(
    "operators",
    [
        (Timing(0, "CONV_2D", False, 4.0, 5.0),),  # 80 %
        (Timing(0, "ARG_MAX", True, 4.0, 1.0),),  # not XNNPACK's
        (Timing(0, "QUANTIZE", False, 4.0, None),),  # not in the float file
        (),
    ],
)
def test_kernels_that_gain_or_were_not_timed_are_not_to_blame(operators):
    assert little_gained(Speed(20.0, None, 20.0, operators)) is None


def test_a_faster_file_needs_no_further_timing(int8, quick, monkeypatch):
    monkeypatch.setattr(speed, "FASTER", 2.0)  # 30 is less than twice 20
    found = inspect_file(int8).speed
    assert found.faster and found.operators == ()
    assert quick == [2]


def test_without_a_twin_the_operators_outside_are_timed(int8, quick, tmp_path, capsys):
    path = tmp_path / "alone.tflite"
    path.write_bytes(int8.read_bytes())
    found = inspect_file(path)
    assert (found.speed.twin, found.speed.milliseconds) == (None, 30.0)
    assert [one.twin_milliseconds for one in found.speed.operators] == [None] * 4
    show(found)
    said = capsys.readouterr().out
    assert "30.0 ms" in said and "--against" in said and "faster" not in said


def test_the_twin_of_a_size_has_that_size(int8, quick, tmp_path):
    for name in ("model-int8", "model-float32"):
        content = int8.with_name(f"{name}.tflite").read_bytes()
        (tmp_path / f"{name}-64x96.tflite").write_bytes(content)
    found = inspect_file(tmp_path / "model-int8-64x96.tflite")
    assert found.speed.twin == tmp_path / "model-float32-64x96.tflite"


def test_integer_weights_alone_are_compared_with_float_too(quick, tmp_path, capsys):
    image = keras.Input((*SIZE, 3), name="image")
    # The converter keeps weights of fewer than 1024 elements in float.
    model = keras.Model(image, {"logits": keras.layers.Conv2D(48, 3)(image)})
    floating = write(model, tmp_path / "model-float32.tflite", "float32")
    found = inspect_file(write(model, tmp_path / "model-dynamic.tflite", "dynamic"))
    assert not found.quantised and found.speed.twin == floating
    assert found.weights == {"int8 per channel": 1}
    show(found)
    assert "float with integer weights" in capsys.readouterr().out
    assert inspect_file(floating).speed.twin is None


def test_tensorflow_is_not_loaded(int8):
    code = f"""
import sys
from kseg.cli import main
assert main(["inspect", {str(int8)!r}]) == 0
assert not {{"tensorflow", "keras"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "HARD_SWISH" in done.stdout


def test_medians_take_turns():
    order = []
    runs = [lambda name=name: order.append(name) for name in "ab"]
    times = speed.medians(runs, rounds=2, seconds=60)
    assert "".join(order) == "ab" + "abab"  # the first round is not counted
    assert len(times) == 2 and min(times) >= 0
    # Without any time left, each is timed once nevertheless.
    order.clear()
    speed.medians(runs, rounds=9, seconds=0)
    assert "".join(order) == "ab" + "ab"


def test_the_page_fits_80_columns_and_blames(int8, quick, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    show(inspect_file(int8))
    lines = capsys.readouterr().out.splitlines()
    free = [line for line in lines if "https://" not in line and str(int8) not in line]
    assert max(len(line.rstrip()) for line in free) <= 80
    text = " ".join(" ".join(lines).split())
    for words in (
        "quantised, 0.0",
        "weights: 3 int8 per channel",
        "1.50 times slower than float",
        "HARD_SWISH 1 none 4.00 1.00",
        "-o activation=relu6, where `kseg models tiny` shows that option",
        "To do for QUANTIZE, ARG_MAX, CAST: see `kseg export`",
        "all from the first HARD_SWISH on",
        "All others are by rules",
    ):
        assert words in text, words


def test_a_fast_file_is_not_blamed(int8, quick, capsys):
    found = inspect_file(int8)
    fast = replace(found.speed, milliseconds=10.0, operators=())
    show(replace(found, speed=fast))
    said = " ".join(capsys.readouterr().out.split())
    assert "2.00 times faster than float" in said
    assert "To do" not in said
    equal = replace(found.speed, milliseconds=20.0, operators=())
    show(replace(found, speed=equal))
    assert "no faster than float" in capsys.readouterr().out


def test_json_holds_everything(int8, tmp_path, capsys, quick):
    path = tmp_path / "found.json"
    assert main(["inspect", str(int8), "--json", str(path)]) == 0
    assert "HARD_SWISH" in capsys.readouterr().out
    found = json.loads(path.read_text())
    assert set(found) == {field for field in Inspection.__dataclass_fields__}
    network = read_network(int8)
    assert found["operators"] == sum(kind["count"] for kind in found["kinds"])
    assert found["macs"] == macs(network) == sum(kind["macs"] for kind in found["kinds"])
    assert found["arena"] == arena_bytes(network)
    assert [reach["delegate"] for reach in found["reaches"]] == ["XNNPACK"] + [
        delegate.name for delegate in DELEGATES
    ]
    assert [reach["ran"] for reach in found["reaches"]] == [True] + [False] * len(DELEGATES)
    assert found["speed"]["faster"] is False and found["speed"]["explained"] is True
    assert Path(found["speed"]["twin"]).name == "model-float32.tflite"


def test_what_litert_cannot_run_is_told(int8, tmp_path):
    """An operator that no kernel of this LiteRT has."""
    model = flatbuffer_utils.read_model(int8)
    for code in model.operatorCodes:
        code.version = 99
    path = tmp_path / "new.tflite"
    path.write_bytes(flatbuffer_utils.convert_object_to_bytearray(model))
    with pytest.raises(UserError, match="new.tflite cannot be run by LiteRT"):
        inspect_file(path)
