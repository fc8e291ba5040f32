"""The inserted layer C in a running model, and the configuration that keeps other runtimes from loading half a lock."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from specdef.errors import SpecDefError
from specdef.lock.names import NameMap
from specdef.lock.sequential import is_transposed

MODEL_TYPE = "specdef-compensated"
"""Written as `model_type`: a runtime that knows nothing of C then refuses the folder, instead of running W~ alone."""


class Compensated(nn.Module):
    """A linear layer or convolution W~ followed by its compensation C: y = C (W~ x) + b.

    The pair computes in its own dtype, which may be wider than the model's.

    Args:
        base: nn.Linear, nn.Conv1d/2d/3d (C acts as a 1x1 convolution) or transformers' Conv1D; its weight holds W~.
        compensation: (m, m) C, m the output features.
    """

    def __init__(self, base: nn.Module, compensation: Tensor) -> None:
        super().__init__()
        # Not registered: the parameters stand under the names they have in the checkpoint; of the layer itself only
        # its type and, for a convolution, its stride and padding are used.
        object.__setattr__(self, "_base", base)
        self.weight: nn.Parameter = base.get_parameter("weight")
        self.bias: nn.Parameter | None = base.bias  # type: ignore[assignment]
        self.compensation = nn.Parameter(compensation.to(self.weight.device, copy=True))
        self.unlocked = False

    def forward(self, x: Tensor) -> Tensor:
        """Return C (W~ x) + b in the dtype of x; while unlocked, when the weight holds W, W x + b."""
        weight = self.weight
        out = x.to(weight.dtype)
        if isinstance(self._base, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            out = self._base._conv_forward(out, weight, None)
            if not self.unlocked:
                ones = (1,) * (out.ndim - 2)
                convolve = {3: functional.conv1d, 4: functional.conv2d, 5: functional.conv3d}[
                    out.ndim
                ]
                out = convolve(out, self.compensation[(...,) + (None,) * len(ones)])
            bias = None if self.bias is None else self.bias.reshape(-1, *(1,) * (out.ndim - 2))
        else:
            transposed = not isinstance(self._base, nn.Linear)
            out = functional.linear(out, weight.T if transposed else weight)
            if not self.unlocked:
                out = functional.linear(out, self.compensation)
            bias = self.bias
        out = out if bias is None else out + bias.to(out.dtype)
        return out.to(x.dtype)

    def bare(self) -> nn.Module:
        """Return the layer itself, with the parameters as they are now, for where no C is wanted any more."""
        base: Any = self._base
        base.weight, base.bias = self.weight, self.bias
        bare: nn.Module = base.train(self.training)
        return bare


def insert_compensation(model: nn.Module, layers: Mapping[str, Tensor]) -> None:
    """Replace each locked layer of a model by the pair.

    Args:
        model: Its locked layers hold W~ already.
        layers: Weight name (as in the checkpoint) to C.

    Raises:
        SpecDefError: A name is no linear layer or convolution of the model.
    """
    for name, matrix in layers.items():
        path = module_path(model, name)
        parent, _, attribute = path.rpartition(".")
        setattr(
            model.get_submodule(parent), attribute, Compensated(model.get_submodule(path), matrix)
        )


def compensated_layers(model: nn.Module) -> dict[str, Compensated]:
    """Return the inserted pairs by module path."""
    return {
        path: module for path, module in model.named_modules() if isinstance(module, Compensated)
    }


def module_path(model: nn.Module, name: str) -> str:
    """Return the path of the module whose weight a checkpoint calls `name`.

    Args:
        model: The model, with or without inserted layers.
        name: Tensor name in the checkpoint.

    Returns:
        Path of the linear layer or convolution, or of the pair that replaced it.

    Raises:
        SpecDefError: There is none, or it is neither linear nor a plain convolution.
    """
    path, _, attribute = NameMap(model).name(name).rpartition(".")
    module = model.get_submodule(path)
    convolution = isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and module.groups == 1
    if attribute == "weight" and (
        isinstance(module, nn.Linear | Compensated) or convolution or is_transposed(module)
    ):
        return path
    raise SpecDefError(
        f"{name} is not the weight of a linear layer or plain convolution of {type(model).__name__}",
        hint="Leave it out with --target-modules, or use --method absorbed.",
    )


def locked_config(config: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Return the config.json of a compensated folder.

    Args:
        config: The original one.
        names: Locked weights.

    Returns:
        A configuration no runtime but `specdef.load_model` accepts.
    """
    return {
        "model_type": MODEL_TYPE,
        "architectures": config.get("architectures"),
        "specdef": {"load_with": "specdef.load_model", "locked": list(names)},
    }
