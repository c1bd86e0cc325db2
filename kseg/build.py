"""From a model's name and options to the model, and what can be read off a built one."""

from __future__ import annotations

import inspect
import math
import typing
from collections.abc import Mapping
from typing import Any

import keras

from kseg.errors import UserError
from kseg.options import convert, describe
from kseg.registry import MODELS, nearest


def build(
    name: str,
    input_shape: tuple[int, int, int],
    num_classes: int,
    options: Mapping[str, Any] | None = None,
) -> keras.Model:
    """Build the model registered as `name`.

    Args:
        name: registry name.
        input_shape: (height, width, channels).
        num_classes: number of classes, background among them.
        options: keyword options of its builder.

    Returns:
        The model; its output is a dict whose "logits" are (B, H, W, num_classes) float32.

    Raises:
        UserError: where the name or an option is unknown, or the builder refuses a value.
    """
    options = options or {}
    for option, value in options.items():
        annotation = _parameter(name, option).annotation
        choices = typing.get_args(annotation)
        if typing.get_origin(annotation) is typing.Literal and value not in choices:
            raise UserError(
                f"option {option} of {name} is {value!r}; it must be {describe(annotation)}"
            )
    try:
        return MODELS[name](tuple(input_shape), num_classes, **options)
    except UserError:
        raise
    except ValueError as error:
        given = ", ".join(f"{option}={value}" for option, value in options.items())
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{name} cannot be built with {given or 'its defaults'}: {reason}"
        ) from error


def inference_model(model: keras.Model) -> keras.Model:
    """Return a model of the same layers and weights whose only output is "logits"."""
    return keras.Model(model.input, {"logits": model.output["logits"]}, name=model.name)


def option_types(name: str) -> dict[str, inspect.Parameter]:
    """Return the options of a model's builder by name, their annotations as types.

    Raises:
        UserError: where there is no such model.
    """
    signature = inspect.signature(MODELS[name], eval_str=True)
    return {
        option: parameter
        for option, parameter in signature.parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }


def parse_options(name: str, texts: Mapping[str, str]) -> dict[str, Any]:
    """Turn options given as text into the types that the builder's signature declares.

    Args:
        name: registry name of the model.
        texts: for example {"bins": "1,2,3,6", "aux": "true"}.

    Returns:
        The values by option.

    Raises:
        UserError: where an option is unknown or its text is not of its type.

    Example:
        >>> parse_options("fastscnn", {"bins": "1,2,3,6"})
        {'bins': (1, 2, 3, 6)}
    """
    values = {}
    for option, text in texts.items():
        annotation = _parameter(name, option).annotation
        try:
            values[option] = convert(text.strip(), annotation)
        except ValueError as error:
            raise UserError(
                f"option {option} of {name} is {text!r}; it must be {describe(annotation)}"
            ) from error
    return values


def trainable_parameters(model: keras.Model) -> int:
    """Return the trainable weights behind "logits", BN statistics left out (as papers count)."""
    weights = inference_model(model).trainable_variables
    return sum(math.prod(weight.shape) for weight in weights)


def macs(model: keras.Model) -> int:
    """Return the multiply-accumulates of convolutions and dense layers for one image.

    Training-only outputs are left out; so are normalisation, activation and resizing.
    """
    # The nodes of the graph, not its layers: a layer used twice computes twice.
    graph = inference_model(model)._nodes_by_depth.values()
    return sum(_node_macs(node) for nodes in graph for node in nodes)


def _node_macs(node: Any) -> int:  # noqa: ANN401 (Keras has no public name for the class)
    layer = node.operation
    if isinstance(layer, keras.layers.Conv2DTranspose):
        return math.prod(layer.kernel.shape) * math.prod(node.input_tensors[0].shape[1:3])
    if isinstance(layer, keras.layers.Conv2D | keras.layers.DepthwiseConv2D | keras.layers.Dense):
        return math.prod(layer.kernel.shape) * math.prod(node.outputs[0].shape[1:-1])
    return 0


def _parameter(name: str, option: str) -> inspect.Parameter:
    parameters = option_types(name)
    if option not in parameters:
        raise UserError(
            f"model {name} has no option {option!r}{nearest(option, parameters)} "
            f"(it has: {', '.join(parameters)})"
        )
    return parameters[option]
