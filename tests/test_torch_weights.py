"""Published weights: our logits are the reference's, and a file that does not fit is refused."""

import importlib
import importlib.util
import json
import warnings

import keras
import numpy as np
import pytest
from PIL import Image

from kseg import card as cards
from kseg.cli import main
from kseg.data.dataset import VOC_CLASSES, voc_palette
from kseg.errors import UserError
from kseg.inference import load
from kseg.models import build
from kseg.published.importing import _FIELDS, _shape_there, import_weights
from kseg.published.networks import NETWORKS
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
        # Float32 through up to 150 layers; a wrong padding, epsilon or resize shows as 1e-2.
        assert relative_error(got, expected["out"]) < 1e-3
    if NETWORKS[name].aux:
        expected = run_reference(torch, theirs, noise(SIZE))["aux"]
        got = read_model(out)(noise(SIZE)[None].astype("float32"), training=False)["aux"]
        assert relative_error(keras.ops.convert_to_numpy(got)[0], expected) < 1e-3
