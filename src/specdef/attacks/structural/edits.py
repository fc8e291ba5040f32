"""What structural attacks share: linear layers and their matrices, and replacing modules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from specdef.lock.activations import fitted as fitted
from specdef.lock.compensated import compensated_layers
from specdef.lock.quantization import weight_matrices
from specdef.lock.sequential import CONVOLUTIONS as CONVOLUTIONS
from specdef.lock.sequential import is_linear as is_linear
from specdef.lock.sequential import is_transposed as is_transposed


class Chain(nn.Sequential):
    """Layers in the place of one; `weight` is the first one's, for models that look at the dtype of a layer's weight."""

    @property
    def weight(self) -> Tensor:
        """Weight of the first layer."""
        return self[0].get_parameter("weight")


def linear_modules(model: nn.Module) -> dict[str, nn.Module]:
    """List plain linear layers and convolutions whose weight nobody else holds, by path; a tied head is left out."""
    held = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    return {
        path: module
        for path, module in model.named_modules()
        if path and is_linear(module) and held[id(module.weight)] == 1
    }


def matrix_of(module: nn.Module) -> Tensor:
    """Return the weight of a linear layer or convolution as the matrix (out, in times kernel), without gradient."""
    weight = module.get_parameter("weight").detach()
    return weight.T if is_transposed(module) else weight.flatten(1)


def bias_of(module: nn.Module) -> Tensor | None:
    """Return the bias of a layer, without gradient; None where it has none."""
    bias = getattr(module, "bias", None)
    return bias.detach() if isinstance(bias, Tensor) else None


def pointwise(matrix: Tensor, bias: Tensor | None, like: nn.Module) -> nn.Module:
    """Build a layer that multiplies the channels of another's output by a matrix.

    Args:
        matrix: (out, in), of any dtype.
        bias: (out,); None for no bias.
        like: A convolution asks for a 1 x 1 convolution, anything else for a linear layer; gives dtype and device.

    Returns:
        The layer.
    """
    weight = like.get_parameter("weight")
    kind: Any = next((c for c in CONVOLUTIONS if isinstance(like, c)), nn.Linear)
    sizes = (matrix.shape[1], matrix.shape[0], *(() if kind is nn.Linear else (1,)))
    layer: Any = nn.utils.skip_init(  # type: ignore[no-untyped-call]
        kind, *sizes, bias=bias is not None, device=str(weight.device), dtype=weight.dtype
    )
    with torch.no_grad():
        layer.weight.copy_(matrix.reshape(layer.weight.shape))
        if bias is not None:
            layer.bias.copy_(bias)
    module: nn.Module = layer
    return module


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module in the place of another.

    Args:
        model: The model, changed in place.
        path: Of the module that goes.
        module: What comes.
    """
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def expand_inserted(model: nn.Module) -> None:
    """Write every pair of a compensated lock as what it is: two layers in a row, W~ and then C with the bias."""
    for path, pair in compensated_layers(model).items():
        base: Any = pair.bare()
        if not pair.unlocked:
            second = pointwise(pair.compensation.detach(), bias_of(base), base)
            if isinstance(base, CONVOLUTIONS):
                base.bias = None
            else:
                base = pointwise(matrix_of(base), None, base)
            base = Chain(base, second)
        replace_module(model, path, base)


def matrices(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield name and view (…, out, in) of every weight matrix, embeddings and tensors tied to them left out.

    Args:
        model: Any module.

    Yields:
        Views without gradient: what is written there is written to the model.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    yield from weight_matrices(model).items()


def without_matrices(model: nn.Module) -> str:
    """Say why a model has no weight matrix of its own; empty where it has."""
    if any(".parametrizations." in name for name, _ in model.named_parameters()):
        return "weights are parametrised, so they cannot be edited"
    embedded = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    found = any(p.ndim > 1 and id(p) not in embedded for p in model.parameters())
    return "" if found else "no weight matrix"


def everything(model: nn.Module) -> list[dict[str, Any]]:
    """Return one parameter group of all parameters that can be trained."""
    return [{"params": [p for p in model.parameters() if p.is_floating_point()]}]
