"""What attacks through `peft` share: the pairs of a compensated lock as layers it can adapt, and putting adapters in."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from specdef.attacks.partial.parts import CONVOLUTIONS, head_path, output_embeddings
from specdef.lock.compensated import Compensated, compensated_layers

_HOLDER = "model"


def insert_adapters(model: nn.Module, config: Any) -> list[nn.Parameter]:
    """Put adapters into a model, with `peft`.

    Args:
        model: Changed in place; keeps its type.
        config: A configuration of `peft`.

    Returns:
        The adapters' parameters.
    """
    import peft

    for path, pair in compensated_layers(model).items():
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, _as_layer(pair))
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            # Its fast path in evaluation reads the weights and would pass the adapters by; this switches it off.
            module.activation_relu_or_gelu = 0
    before = {id(p) for p in model.parameters()}
    with warnings.catch_warnings():
        # peft sets it itself, layer by layer, and says so
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        # and that it cannot merge these updates, which nobody asks for
        warnings.filterwarnings("ignore", message="LoRA adapter added to ConvNd layer with groups")
        # in a holder without a configuration: peft rewrites the targets it is given for some transformers models
        peft.inject_adapter_in_model(config, nn.ModuleDict({_HOLDER: model}))
    return [p for p in model.parameters() if id(p) not in before]


def exactly(paths: Iterable[str]) -> str:
    """Return the expression for these paths of a model, and no others; in a list, "0" would also match "layer.0"."""
    return "|".join(re.escape(f"{_HOLDER}.{path}") for path in paths)


def task_head(model: nn.Module) -> list[nn.Parameter]:
    """Return the output layer's parameters, which train beside adapters as is usual; none in a language model.

    Args:
        model: Any module.

    Returns:
        Parameters of a classifier's last linear layer.
    """
    path = head_path(model)
    if path is None or output_embeddings(model) is not None:
        return []
    return list(model.get_submodule(path).parameters())


def _as_layer(pair: Compensated) -> nn.Module:
    """Show W~ and C as the one layer they make, so that an adapter stands beside both: y = C W~ x + B A x."""
    base: Any = pair._base
    convolution = isinstance(base, CONVOLUTIONS)
    stored = pair.weight.detach()
    weight = stored if convolution or isinstance(base, nn.Linear) else stored.T
    if not pair.unlocked:
        weight = torch.tensordot(pair.compensation.detach(), weight, 1)
    # Of torch's own type: peft makes an update for a convolution by calling the type of the layer.
    outputs, inputs = weight.shape[:2]
    layer: Any = copy.deepcopy(base) if convolution else nn.Linear(inputs, outputs, device="meta")
    layer._parameters.clear()
    layer.register_buffer("weight", weight)  # DoRA looks at the norms of its columns
    layer.register_parameter("bias", pair.bias)
    layer.pair = pair
    layer.forward = pair.forward
    module: nn.Module = layer
    return module
