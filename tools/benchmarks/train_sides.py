"""One side of `python -m tools.benchmark train`, in a process of its own.

    python -m tools.benchmarks.train_sides SIDE NET PRECISION BATCH SIZE

builds the net, makes one step and says "ready"; then, for each number that it reads, it makes so
many steps and prints the seconds they took. Frameworks in one process would share its threads.
"""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from kseg.errors import UserError
from kseg.published.networks import network

NUM_CLASSES = 21
MOMENTUM = 0.9
LEARNING_RATE = 0.01


@dataclass(frozen=True)
class Net:
    """One architecture as each side spells it.

    Attributes:
        model: registry name.
        options: of the builder.
        smp: class of segmentation-models-pytorch.
        encoder: its encoder.
        hub: which net of keras-hub, or None where it has none such.
    """

    model: str
    options: Mapping[str, Any]
    smp: str
    encoder: str
    hub: str | None = None


def _as_smp(name: str, smp: str, encoder: str, **changed: Any) -> Net:  # noqa: ANN401
    """Return smp's net in the very form that its weights are imported in, but for the resize."""
    published = network(f"smp:{name}")
    options = {**published.options, **changed}
    if "align_corners" in options:  # kseg's own resize has half-pixel centres
        options["align_corners"] = False
    return Net(published.model, options, smp, encoder)


NETS = {
    "deeplabv3plus_resnet50": replace(
        _as_smp("deeplabv3plus_resnet50", "DeepLabV3Plus", "resnet50"), hub="deeplabv3plus"
    ),
    "deeplabv3plus_mobilenetv2": _as_smp(
        "deeplabv3plus_resnet50",
        "DeepLabV3Plus",
        "mobilenet_v2",
        backbone="mobilenetv2",
        even_dilation=False,
    ),
    "unet_resnet34": _as_smp("unet_resnet34", "Unet", "resnet34"),
    "unet_resnet50": _as_smp("unet_resnet50", "Unet", "resnet50"),
    "pspnet_resnet50": _as_smp("pspnet_resnet50", "PSPNet", "resnet50"),
    "segformer_b0": Net(
        "segformer",
        {"backbone": "mit_b0", "form": "torch"},
        "Segformer",
        "mit_b0",
        hub="segformer",
    ),
}


def kseg_step(net: Net, precision: str, image: np.ndarray, mask: np.ndarray) -> Callable[[], float]:
    """Return kseg's own training step, as `kseg train` makes it.

    Args:
        net: what to build.
        precision: "float32", "bfloat16", or either with "-jit" behind it.
        image: (B, H, W, 3) 0..255.
        mask: (B, H, W) class ids.
    """
    from kseg.quiet import load_tensorflow

    load_tensorflow()
    import keras
    import tensorflow as tf

    from kseg.engine import Engine
    from kseg.losses.cross_entropy import CrossEntropy
    from kseg.models import build

    dtype, _, jit = precision.partition("-")
    keras.config.set_dtype_policy("mixed_bfloat16" if dtype == "bfloat16" else "float32")
    model = build(net.model, image.shape[1:], NUM_CLASSES, dict(net.options))
    engine = Engine(
        model,
        optimizer=keras.optimizers.SGD(LEARNING_RATE, momentum=MOMENTUM),
        losses={"logits": (CrossEntropy(), 1.0)},
        jit=bool(jit),
    )
    images, masks = tf.constant(image), tf.constant(mask.astype("int32"))
    return lambda: float(engine.step(images, masks))


def smp_step(net: Net, precision: str, image: np.ndarray, mask: np.ndarray) -> Callable[[], float]:
    """Return the training step of segmentation-models-pytorch's net, eager, as its users write it.

    Raises:
        UserError: if torch or the package is missing.
    """
    torch, smp = _torch_and_smp()
    build = getattr(smp, net.smp)
    model = build(net.encoder, encoder_weights=None, classes=NUM_CLASSES)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, momentum=MOMENTUM)
    loss = torch.nn.CrossEntropyLoss(ignore_index=255)
    images = torch.from_numpy(image / 255).permute(0, 3, 1, 2).contiguous()
    masks = torch.from_numpy(mask.astype("int64"))
    if precision == "bfloat16":  # faster there than in the usual layout
        model = model.to(memory_format=torch.channels_last)
        images = images.to(memory_format=torch.channels_last)

    def step() -> float:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            value = loss(model(images), masks)
        value.backward()
        optimizer.step()
        return float(value)

    return step


def hub_step(net: Net, precision: str, image: np.ndarray, mask: np.ndarray) -> Callable[[], float]:
    """Return keras-hub's net under Keras' own `train_on_batch`, without XLA.

    Raises:
        UserError: if the package is missing.
    """
    from kseg.quiet import load_tensorflow

    load_tensorflow()
    import keras

    keras.config.set_dtype_policy("mixed_bfloat16" if precision == "bfloat16" else "float32")
    model = _HUB[net.hub](image.shape[1:])
    model.compile(
        keras.optimizers.SGD(LEARNING_RATE, momentum=MOMENTUM),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=255),
        metrics=[],  # its default counts accuracy, too
        jit_compile=False,
    )
    pixels, labels = image / 255, mask[..., None]
    return lambda: float(model.train_on_batch(pixels, labels, return_dict=True)["loss"])


def _keras_hub() -> Any:  # noqa: ANN401
    try:
        import keras_hub
    except ImportError as error:
        raise UserError(f"the peer needs pip install 'kseg[peers]' ({error})") from error
    return keras_hub


def _hub_deeplabv3plus(input_shape: tuple[int, int, int]) -> Any:  # noqa: ANN401
    hub = _keras_hub()
    resnet = hub.models.ResNetBackbone(
        input_conv_filters=[64],
        input_conv_kernel_sizes=[7],
        stackwise_num_filters=[64, 128, 256, 512],
        stackwise_num_blocks=[3, 4, 6, 3],
        stackwise_num_strides=[1, 2, 2, 2],
        block_type="bottleneck_block",
        image_shape=input_shape,
    )
    backbone = hub.models.DeepLabV3Backbone(
        image_encoder=resnet,
        low_level_feature_key="P2",
        spatial_pyramid_pooling_key="P4",  # stride 16, as the others
        dilation_rates=[6, 12, 18],
        upsampling_size=4,
        image_shape=input_shape,
    )
    return hub.models.DeepLabV3ImageSegmenter(backbone, NUM_CLASSES)


def _hub_segformer(input_shape: tuple[int, int, int]) -> Any:  # noqa: ANN401
    hub = _keras_hub()
    encoder = hub.models.MiTBackbone(
        layerwise_depths=[2, 2, 2, 2],
        num_layers=4,
        hidden_dims=[32, 64, 160, 256],
        layerwise_num_heads=[1, 2, 5, 8],
        layerwise_sr_ratios=[8, 4, 2, 1],
        layerwise_patch_sizes=[7, 3, 3, 3],
        layerwise_strides=[4, 2, 2, 2],
        max_drop_path_rate=0.1,
        image_shape=input_shape,
    )
    backbone = hub.models.SegFormerBackbone(
        image_encoder=encoder, projection_filters=256, image_shape=input_shape
    )
    return hub.models.SegFormerImageSegmenter(backbone, NUM_CLASSES)


_HUB = {"deeplabv3plus": _hub_deeplabv3plus, "segformer": _hub_segformer}
SIDES = {"kseg": kseg_step, "smp": smp_step, "keras-hub": hub_step}


def _torch_and_smp() -> tuple[Any, Any]:
    try:
        import torch

        _import_torchvision(torch)
        import segmentation_models_pytorch
    except ImportError as error:
        raise UserError(f"the peer needs pip install 'kseg[peers]' ({error})") from error
    return torch, segmentation_models_pytorch


def _import_torchvision(torch: Any) -> None:  # noqa: ANN401
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        # PyPI's wheel is a CUDA build: beside torch for CPUs it lacks its operators, and is
        # content when they are declared. No network here calls them.
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        torch.kseg_keeps = library  # what it declares goes with it
        importlib.import_module("torchvision")


def main(side: str, net: str, precision: str, batch: str, size: str) -> None:
    """Answer with seconds until the other end closes the pipe."""
    random = np.random.default_rng(0)
    shape = (int(batch), int(size), int(size))
    image = random.uniform(0, 255, (*shape, 3)).astype("float32")
    mask = random.integers(0, NUM_CLASSES, shape)
    step = SIDES[side](NETS[net], precision, image, mask)
    step()
    print("ready", flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        for _ in range(int(line)):
            step()
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
