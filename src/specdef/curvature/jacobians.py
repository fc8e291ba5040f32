"""Per-sample Jacobians of a small network with respect to a weight, or to what one of its parts gives.

A part's input and output are seen as rows (token or position, channel): a linear layer multiplies every row by its
weight, and so does a convolution once its input is cut into patches.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What one forward pass of one sample showed.

    Args:
        output: The network's output, flat.
        entered: What entered the part, as rows.
        left: What left it, as rows.
    """

    output: Tensor
    entered: Tensor
    left: Tensor


class Jacobians:
    """A network whose samples do not see each other, evaluated in float64.

    Args:
        model: The network.
        inputs: Samples along the first dimension.
    """

    def __init__(self, model: nn.Module, inputs: Tensor) -> None:
        self.model, self.inputs = model, inputs.double()
        self.state = float64_state(model)

    def run(
        self,
        x: Tensor,
        *,
        at: str = "",
        changed: dict[str, Tensor] | None = None,
        add: Tensor | None = None,
    ) -> Run:
        """Run one sample and watch one part.

        Args:
            x: The sample, without the batch dimension.
            at: Name of the part; empty for the network itself.
            changed: Parameters that take other values.
            add: Rows added to what the part gives.

        Returns:
            What was seen.
        """
        part = self.model.get_submodule(at) if at else self.model
        seen: dict[str, Tensor] = {}

        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            seen["in"] = _in_rows(module, args[0])
            rows = _out_rows(module, output)
            if add is not None:
                output = output + (add.mT if _is_conv(module) else add).reshape(output.shape)
            seen["out"] = rows
            return output

        with ExitStack() as hooks:
            hooks.callback(part.register_forward_hook(hook).remove)
            output = functional_call(self.model, self.state | (changed or {}), (x.unsqueeze(0),))
        return Run(output=output.flatten(), entered=seen["in"], left=seen["out"])

    def weight_jacobian(
        self, block: str, of: Callable[[Run], Tensor], *, at: str = ""
    ) -> Float[Tensor, "samples rows n"]:
        """Differentiate what a run showed by a parameter.

        Args:
            block: The parameter.
            of: Picks a tensor of the run.
            at: The part to watch.

        Returns:
            One Jacobian per sample.
        """

        def value(weight: Tensor, x: Tensor) -> Tensor:
            return of(self.run(x, at=at, changed={block: weight})).flatten()

        found: Tensor = vmap(jacrev(value), (None, 0))(self.state[block], self.inputs)
        return found.flatten(2)

    def part_jacobian(self, at: str) -> Float[Tensor, "samples outputs rows channels"]:
        """Differentiate the network's output by what a part gives.

        Args:
            at: The part.

        Returns:
            One Jacobian per sample.
        """
        with torch.no_grad():
            shape = self.run(self.inputs[0], at=at).left.shape

        def value(add: Tensor, x: Tensor) -> Tensor:
            return self.run(x, at=at, add=add).output

        zero = torch.zeros(shape, dtype=self.inputs.dtype, device=self.inputs.device)
        found: Tensor = vmap(jacrev(value), (None, 0))(zero, self.inputs)
        return found


def float64_state(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of parameters and buffers, floating ones in float64."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    return {n: t.detach().double() if t.is_floating_point() else t for n, t in tensors.items()}


def is_linear(module: nn.Module) -> bool:
    """Say whether a module multiplies rows by its weight: a linear layer, or a convolution without groups."""
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        plain = module.padding_mode == "zeros" and not isinstance(module.padding, str)
        return plain and module.groups == 1
    return isinstance(module, nn.Linear)


def _is_conv(module: nn.Module) -> bool:
    return isinstance(module, (nn.Conv1d, nn.Conv2d))


def _out_rows(module: nn.Module, output: Tensor) -> Tensor:
    """One sample's output as rows of channels."""
    if _is_conv(module):
        return output[0].flatten(1).mT
    return output.reshape(-1, output.shape[-1])


def _in_rows(module: nn.Module, x: Tensor) -> Tensor:
    """One sample's input as the rows that the weight matrix multiplies: for a convolution, its patches."""
    if not isinstance(module, (nn.Conv1d, nn.Conv2d)):
        return x.reshape(-1, x.shape[-1])
    flat = isinstance(module, nn.Conv1d)

    def pair(value: Any, fill: int) -> tuple[int, ...]:
        return (fill, *value) if flat else tuple(value)

    patches = nn.functional.unfold(
        x.unsqueeze(-2) if flat else x,
        pair(module.kernel_size, 1),
        dilation=pair(module.dilation, 1),
        padding=pair(module.padding, 0),
        stride=pair(module.stride, 1),
    )
    return patches[0].mT
