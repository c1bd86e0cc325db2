"""Published weights: our logits are the reference's, and a file that does not fit is refused."""

import importlib
import importlib.util
import os
import pickle
import sys
import warnings

import keras
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from kseg import card as cards
from kseg.cli import main
from kseg.data.dataset import VOC_CLASSES, voc_palette
from kseg.errors import UserError
from kseg.inference import load
from kseg.models import build
from kseg.published.checkpoint import read_checkpoint
from kseg.published.importing import _FIELDS, _shape_there, import_weights
from kseg.published.networks import NETWORKS
from kseg.runtimes import open_tflite
from kseg.upsampling import CornerResize
from kseg.weights import initialise_from, read_model

SIZE = (64, 96)
# Sizes that 32 does not divide. Of smp's networks those with a dilated or cut encoder ask for
# multiples of its output stride, 16 and 8; the others take any.
ANY_SIZE = (97, 129)
ODD = {"deeplabv3plus": (80, 112), "pspnet": (72, 104)}
CLASSES = 5
# One of each head on each kind of encoder; the others are deeper.
QUICK = (
    "torchvision:fcn_resnet50",
    "torchvision:deeplabv3_resnet50",
    "torchvision:deeplabv3_mobilenet_v3_large",
    "torchvision:lraspp_mobilenet_v3_large",
    "smp:unet_resnet18",
    "smp:deeplabv3plus_resnet18",
    "smp:deeplabv3plus_resnet50",
    "smp:pspnet_resnet18",
)
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in NETWORKS if name not in QUICK]


def installed(name):
    """Import a package, or skip; its warnings are its own affair."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(name)


@pytest.fixture(scope="session")
def torch():
    return installed("torch")


@pytest.fixture(scope="session")
def torchvision(torch):
    try:
        return installed("torchvision")
    except RuntimeError:
        # A wheel without compiled operators wants these declared; no network here uses them.
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        torch.kseg_keeps = library
        return installed("torchvision")


@pytest.fixture(scope="session")
def reference(torch, torchvision):
    """Make a network of another library, with random weights and statistics."""

    def make(name, classes=CLASSES, *, aux=True):
        library, _, rest = name.partition(":")
        torch.manual_seed(0)
        if library == "torchvision":
            segmentation = importlib.import_module("torchvision.models.segmentation")
            options = {} if rest.startswith("lraspp") else {"aux_loss": aux}
            made = getattr(segmentation, rest)(
                weights=None, weights_backbone=None, num_classes=classes, **options
            )
        else:
            smp = installed("segmentation_models_pytorch")
            kind, _, encoder = rest.partition("_")
            kinds = {"unet": smp.Unet, "deeplabv3plus": smp.DeepLabV3Plus, "pspnet": smp.PSPNet}
            made = kinds[kind](encoder, encoder_weights=None, classes=classes)
        randomise(torch, made)
        return made.eval()

    return make


def randomise(torch, module):
    """Give statistics and biases values that matter, and keep the maps near unit size."""
    for part in module.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            for tensor in (part.weight, part.running_var):
                torch.nn.init.uniform_(tensor, 0.5, 1.5)
            for tensor in (part.bias, part.running_mean):
                torch.nn.init.normal_(tensor, 0, 0.2)
        elif isinstance(part, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(part.weight)
            if part.bias is not None:
                torch.nn.init.normal_(part.bias, 0, 0.2)


def run_reference(torch, module, image):
    """Return what the reference gives for an image uint8 (H, W, 3), prepared as its users do."""
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    x = (image.astype("float32") / 255 - mean) / std
    with torch.inference_mode():
        out = module(torch.from_numpy(x.transpose(2, 0, 1)[None].astype("float32")))
    out = out if isinstance(out, dict) else {"out": out}
    return {key: value[0].permute(1, 2, 0).numpy() for key, value in out.items()}


def noise(size):
    return np.random.default_rng(7).integers(0, 256, (*size, 3)).astype("uint8")


def relative_error(got, expected):
    assert got.shape == expected.shape
    assert expected.std() > 1e-2
    return np.abs(got - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("name", [*QUICK, *SLOW])
def test_logits_are_those_of_the_reference(name, torch, reference, tmp_path):
    theirs = reference(name)
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    out = tmp_path / "ours.keras"
    import_weights(tmp_path / "theirs.pth", name, out, size=SIZE)
    for size in (SIZE, ODD.get(NETWORKS[name].model, ANY_SIZE)):
        image = noise(size)
        expected = run_reference(torch, theirs, image)
        got = load(out, eval_size=size).forward(image)
        # Rounding gives up to 1e-4; a wrong padding, dilation, tap or resize 0.2 and more.
        assert relative_error(got, expected["out"]) < 1e-3
    if NETWORKS[name].aux:
        expected = run_reference(torch, theirs, noise(SIZE))["aux"]
        got = read_model(out)(noise(SIZE)[None].astype("float32"), training=False)["aux"]
        assert relative_error(keras.ops.convert_to_numpy(got)[0], expected) < 1e-3


# From here on files are made of our own network's shapes, without torch.

SMALL = "torchvision:lraspp_mobilenet_v3_large"


def tensors_of(name, classes=CLASSES, seed=0, **options):
    """Return a checkpoint as the library of `name` would name and shape it."""
    published = NETWORKS[name]
    model = build(published.model, (*SIZE, 3), classes, dict(published.options) | options)
    random = np.random.default_rng(seed)

    def values(shape):
        if len(shape) == 1:
            return random.uniform(0.5, 1.5, shape)
        return random.normal(0, np.prod(shape[1:]) ** -0.5, shape)

    return {
        f"{published.theirs(layer.name)}.{_FIELDS[weight.name]}": values(
            _shape_there(layer, weight)
        ).astype("float32")
        for layer in model.layers
        for weight in layer.weights
    }


@pytest.fixture(scope="module")
def small():
    return tensors_of(SMALL)


@pytest.fixture
def save(tmp_path):
    def saved(tensors, name="theirs.safetensors"):
        # safetensors writes what lies in memory, whatever the strides say.
        whole = {key: np.ascontiguousarray(value) for key, value in tensors.items()}
        save_file(whole, tmp_path / name)
        return tmp_path / name

    return saved


@pytest.fixture
def refused(tmp_path, capsys):
    """Import by the command, and return its one message; nothing may be written."""

    def refuse(path, *words, name=SMALL):
        before = sorted(tmp_path.iterdir())
        out = tmp_path / "ours.keras"
        line = ["weights", "import", str(path), "--as", name, "--out", str(out), *words]
        assert main([*line, "--size", *map(str, SIZE)]) == 2
        assert sorted(tmp_path.iterdir()) == before
        said = capsys.readouterr().err
        assert said.startswith("kseg: ") and "Traceback" not in said
        return said

    return refuse


def imported(path, out, *words, name=SMALL):
    line = ["weights", "import", str(path), "--as", name, "--out", str(out), *words]
    return main([*line, "--size", *map(str, SIZE)])


def test_one_file_is_enough_for_evaluate_predict_and_train(small, save, tmp_path, street, capsys):
    out = tmp_path / "ours.keras"
    assert imported(save(tensors_of(SMALL, 21)), out) == 0
    said = capsys.readouterr().out
    assert "21 classes (background, aeroplane, bicycle and 18 more), 64 x 96" in said
    card = cards.read(out)
    assert (card.classes, card.palette, card.size) == (VOC_CLASSES, voc_palette(21), SIZE)
    assert card.extra == {"weights": SMALL}
    image = street / "val" / "images" / "0.png"
    assert main(["predict", str(out), str(image), "--out", str(tmp_path)]) == 0
    with Image.open(tmp_path / "0.png") as mask:
        assert mask.mode == "P"
    assert imported(save(small | {}), out, "--classes", "2", "--keep-backbone") == 0
    assert main(["evaluate", str(out), "--data", f"folder:{street}", "--limit", "1"]) == 0


@pytest.mark.slow
def test_the_line_to_train_on_is_one_that_train_takes(save, tmp_path, street, capsys):
    out = tmp_path / "ours.keras"
    assert imported(save(tensors_of(SMALL)), out, "--classes", "a,b,c,d,e") == 0
    (line,) = [row for row in capsys.readouterr().out.splitlines() if "kseg train" in row]
    words = line.split()[1:]
    words[words.index("DATA")] = f"folder:{street}"
    size = list(map(str, SIZE))
    words += ["--steps", "1", "--batch-size", "1", "--size", *size, "--eval-size", *size]
    assert main([*words, "--run", str(tmp_path / "run"), "--class-weights", "none"]) == 0
    assert "score_low" in capsys.readouterr().err  # another number of classes: fresh weights


def test_every_kind_of_float_becomes_float32(save):
    import ml_dtypes

    kinds = ("float16", ml_dtypes.bfloat16, "float32", "float64")
    path = save({np.dtype(kind).name: np.array([0.5, 3], kind) for kind in kinds})
    for value in read_checkpoint(path).values():
        assert value.dtype == np.float32
        assert value.tolist() == [0.5, 3]


@pytest.mark.parametrize("prefix", ["module.", "model.", "model._orig_mod."])
def test_what_wrappers_put_before_names_is_taken_off(prefix, save):
    names = ("backbone.conv1.weight", "model.weight", "bn1.num_batches_tracked")
    found = read_checkpoint(save({prefix + name: np.ones(2, "float32") for name in names}))
    assert list(found) == ["backbone.conv1.weight", "model.weight"]


def test_tensors_that_do_not_fit_are_listed(small, save, refused):
    wrong = dict(small)
    del wrong["backbone.0.0.weight"]
    wrong["classifier.scale.1.weight"] = wrong["classifier.scale.1.weight"][:, :5]
    wrong["classifier.cbr.1.bias"] = np.arange(128)
    wrong["classifier.cbr.1.weight"] = np.full(128, np.nan, "float32")
    assert refused(save(wrong | {"extra.weight": np.ones(2, "float32")})).splitlines()[1:] == [
        "  backbone.0.0.weight is missing",
        "  classifier.cbr.1.bias is int64 (128,), not float32 (128,)",
        "  classifier.scale.1.weight is float32 (128, 5, 1, 1), not float32 (128, 960, 1, 1)",
        "  extra.weight is left over",
        "  classifier.cbr.1.weight holds values that are not finite",
    ]
    # A layer or a block is named whole.
    most = refused(save({key: small[key] for key in list(small)[24:]})).splitlines()[1:]
    assert most == [f"  {key} is missing" for key in list(small)[:24]]


def test_of_a_whole_other_network_four_tensors_of_a_kind_are_listed(small, save, refused):
    many = refused(save({f"{i}.{key}": value for i, (key, value) in enumerate(small.items())}))
    lines = many.splitlines()[1:]
    kinds = [line.rsplit(" ", 1)[-1] for line in lines]
    assert kinds == [*["missing"] * 4, "these", *["over"] * 4, "these"]
    assert lines[4] == f"  and {len(small) - 4} more of these"


def test_a_checkpoint_of_another_network_is_refused(small, save, refused):
    assert "does not fit smp:unet_resnet18" in refused(save(small), name="smp:unet_resnet18")


def test_another_number_of_classes_offers_to_keep_the_backbone(
    small, save, refused, tmp_path, capsys
):
    path, out = save(small), tmp_path / "ours.keras"
    said = refused(path, "--classes", "road,car,sky")
    assert "has 5 classes and --classes 3" in said and "--keep-backbone" in said
    assert imported(path, out, "--classes", "road,car,sky", "--keep-backbone") == 0
    assert "start at random: score_high, score_low" in capsys.readouterr().out.replace("\n", " ")
    assert cards.read(out).classes == ("road", "car", "sky")
    model = read_model(out)
    kept = model.get_layer("head_bn").get_weights()[0]
    assert np.array_equal(kept, small["classifier.cbr.1.weight"])
    assert model.get_layer("score_low").get_weights()[0].shape == (1, 1, 40, 3)


def test_classes_are_named_by_count_words_or_table(small, save, refused, tmp_path):
    path, out = save(small), tmp_path / "ours.keras"
    assert imported(path, out) == 0
    assert cards.read(out).classes == tuple(f"class {id_}" for id_ in range(5))
    table = tmp_path / "classes.csv"
    rows = [f"{id_},{name},{id_},0,0" for id_, name in enumerate("abcde")]
    table.write_text("\n".join(["id,name,r,g,b", *rows, "255,ignore,0,0,0"]))
    assert imported(path, out, "--classes", str(table)) == 0
    assert cards.read(out).classes == tuple("abcde")
    assert cards.read(out).palette[4] == (4, 0, 0)
    for wrong in ("road", "1", "a,a", "a,,b"):
        assert "names with commas" in refused(path, "--classes", wrong)


def test_one_class_of_smp_gets_a_background_that_scores_0(save, tmp_path, capsys):
    name = "smp:unet_resnet18"
    tensors = tensors_of(name, 2)
    for part in ("weight", "bias"):
        tensors[f"segmentation_head.0.{part}"] = tensors[f"segmentation_head.0.{part}"][1:]
    out = tmp_path / "ours.keras"
    assert imported(save(tensors), out, name=name) == 0
    assert "one class there: a background whose score is 0" in capsys.readouterr().out
    logits = load(out).forward(noise(SIZE))
    assert not logits[..., 0].any() and logits[..., 1].any()


def test_a_file_that_cannot_be_read_is_refused(small, save, refused, tmp_path):
    whole = save(small).read_bytes()
    for share in (0, 1, 1000, len(whole) - 4):
        (tmp_path / "cut.safetensors").write_bytes(whole[:share])
        assert "cut short" in refused(tmp_path / "cut.safetensors")
    (tmp_path / "notes.txt").write_text("no weights")
    assert "neither a .pth nor" in refused(tmp_path / "notes.txt")
    assert "there is no file" in refused(tmp_path / "gone.pth")
    assert "did you mean torchvision:fcn_resnet50" in refused(
        tmp_path, name="torchvision:fcn_resnt50"
    )
    assert "must end in .keras" in refused(save(small), "--out", str(tmp_path / "ours.h5"))


def test_a_missing_package_is_named_with_its_extra(refused, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "a.pth").write_bytes(b"x")
    assert "pip install 'kseg[torch]'" in refused(tmp_path / "a.pth")


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_code_is_not_run(zipped, torch, refused, tmp_path):
    path = tmp_path / "evil.pth"
    content = {"a": torch.ones(2), "b": Evil(tmp_path / "ran")}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    assert "would run code on loading" in refused(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("protocol", [2, 5])
def test_a_pickle_that_torch_did_not_write_is_not_run(protocol, torch, refused, tmp_path, recwarn):
    path = tmp_path / "evil.pth"
    path.write_bytes(pickle.dumps({"b": Evil(tmp_path / "ran")}, protocol=protocol))
    assert "would run code on loading" in refused(path)
    assert not (tmp_path / "ran").exists()
    assert not recwarn.list


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pth_cut_short_or_of_text_is_refused(zipped, torch, refused, tmp_path):
    path = tmp_path / "cut.pth"
    torch.save({"a": torch.ones(1000)}, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    texts = (b"", b"<!DOCTYPE html>", b"hello there")
    for content in (*texts, *(whole[: len(whole) * share // 10] for share in range(1, 10))):
        path.write_bytes(content)
        assert "cut short" in refused(path)


def test_weights_are_found_among_other_things(torch, tmp_path):
    path = tmp_path / "theirs.pth"
    state = {"a.weight": torch.nn.Parameter(torch.tensor([0.5, 3]))}
    half = {f"module.{key}": value.bfloat16() for key, value in state.items()}
    nested = {"a": 1, "model": {"state_dict": state}}
    for content in ({"model": state, "epoch": 3}, {"state_dict": half}, {"module": state}, nested):
        torch.save(content, path)
        assert read_checkpoint(path)["a.weight"].tolist() == [0.5, 3]


def test_what_is_no_state_dict_is_refused(torch, tmp_path):
    path = tmp_path / "theirs.pth"
    sparse = torch.eye(2).to_sparse()
    for content, told in (
        ({"weights": {"a": torch.ones(2)}}, "it has: weights"),
        ({3: torch.ones(2)}, "it has: 3"),
        ([1], "a list, not a state dict"),
        (torch.ones(2), "a tensor, not a state dict"),
        ({}, "no weights"),
        ({"a": sparse}, "a is torch.float32 torch.sparse_coo"),
    ):
        torch.save(content, path)
        with pytest.raises(UserError, match=told):
            read_checkpoint(path)


def test_what_the_reference_does_not_use_is_said_to_be_left_out(save, tmp_path, capsys):
    name, out = "smp:pspnet_resnet18", tmp_path / "ours.keras"
    unused = {"encoder.layer3.0.conv1.weight": np.ones((2, 2, 3, 3), "float32")}
    assert imported(save(tensors_of(name) | unused), out, name=name) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "left out: encoder.layer3.0.conv1.weight (smp's PSPNet stops at stride 8" in said


@pytest.mark.slow
def test_the_auxiliary_head_comes_along_where_there_is_one(save, tmp_path):
    name, out = "torchvision:fcn_resnet50", tmp_path / "ours.keras"
    tensors = tensors_of(name, aux=True)
    assert imported(save(tensors), out, name=name) == 0
    options = {"backbone": "resnet50", "form": "torch", "aux": True}
    model = build("fcn_resnet", (*SIZE, 3), CLASSES, options)
    assert initialise_from(model, out) == []
    assert np.array_equal(model.get_layer("aux_conv").bias, tensors["aux_classifier.4.bias"])
    without = {key: value for key, value in tensors.items() if not key.startswith("aux")}
    assert imported(save(without), out, name=name) == 0
    assert list(read_model(out).output) == ["logits"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["unet", "deeplabv3plus", "pspnet"])
def test_what_smp_does_otherwise_converts_to_tflite(kind, tmp_path):
    """Nearest neighbours that are cropped and corners that meet are no operators of TFLite."""
    # Installed kseg alone has it; the environment of the references may not.
    write_tflite = pytest.importorskip("kseg.export.tflite").write
    published = NETWORKS[f"smp:{kind}_resnet18"]
    size = ODD.get(published.model, ANY_SIZE)
    model = build(published.model, (*size, 3), CLASSES, dict(published.options))
    interface = importlib.import_module("kseg.export.interface").Interface(output="logits")
    path = tmp_path / "m.tflite"
    write_tflite(model, path, variant="float32", interface=interface, samples=lambda: iter(()))
    got = open_tflite(tmp_path / "m.tflite").forward(noise(size))
    expected = model(noise(size)[None].astype("float32"), training=False)["logits"]
    assert relative_error(got, keras.ops.convert_to_numpy(expected)[0]) < 1e-3


def test_corners_meet_in_a_corner_resize():
    x = np.array([0.0, 30.0], "float32").reshape(1, 1, 2, 1)
    (row,) = np.asarray(CornerResize(1, 4)(x))[0, ..., 0]
    assert row == pytest.approx([0, 10, 20, 30])


def test_any_size_is_for_those_that_were_compared():
    for options in ({"form": "keras"}, {"form": "torch", "backbone": "mobilenetv3_small"}):
        with pytest.raises(UserError, match="multiples of 32"):
            build("deeplabv3", (97, 129, 3), 2, options)
    with pytest.raises(UserError, match="at least 64"):
        build("deeplabv3", (63, 129, 3), 2, {"form": "torch"})
    with pytest.raises(UserError, match="has no even dilation; these have: resnet101"):
        build("deeplabv3plus", (64, 96, 3), 2, {"backbone": "vgg16", "even_dilation": True})
