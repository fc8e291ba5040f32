"""Blockwise K-FAC: Martens & Grosse 2015, arXiv 1503.05671; convolutions as in Grosse & Martens 2016, arXiv 1602.01407."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from specdef.attacks.optimizers.base import Params, decay, evaluated, wide
from specdef.attacks.optimizers.scales import row_and_column_scales, scales


@dataclass(slots=True, kw_only=True)
class _Block:
    """A layer, and what its last forward and backward passes showed: sums over rows, and the numbers of both."""

    layer: nn.Module
    weight: nn.Parameter
    bias: nn.Parameter | None
    inputs: Tensor | None = None
    grads: Tensor | None = None
    rows: int = 0
    samples: int = 0

    def clear(self) -> None:
        self.inputs = self.grads = None
        self.rows = self.samples = 0


class KFAC(torch.optim.Optimizer):
    """W <- W - lr times the momentum of G^-1 dW A^-1, with A = E[a a^T] of a layer's inputs and G = E[g g^T] of its gradients.

    A row is a token, a sample, or a place of a convolution. With a bias, a ends in 1. The Fisher matrix is the empirical one,
    of the gradients of the loss itself: no second backward pass with drawn labels. Damping (section 6.3): A + pi sqrt(l) I and
    G + sqrt(l)/pi I; pi^2 is the ratio of the medians of the diagonals where the paper takes their means, which a few scaled
    channels would decide alone. Solved by Cholesky factors in float64, whose error does not grow with the scales of channels.
    With `relative` a weight is measured in the scales its row and its column have at the first step, and damping is that of the
    weights so measured: scales of channels, taken back by another layer, then change nothing. (Damping by the factors' own
    diagonals does not see scales either, but nothing then holds a channel back that is hardly ever active.) Parameters outside
    the blocks follow the momentum of the gradient in such scales.
    Cost: n^3/3 per side and step, and two passes over the rows.

    Args:
        params: Parameters or groups. Weights of other layers, and of those with a side above `max_size`, follow momentum.
        model: Where the layers are found: nn.Linear, transformers' Conv1D, nn.Conv2d without groups.
        lr: Learning rate.
        weight_decay: Decoupled.
        damping: l.
        relative: Measure weights in the scales of their rows and columns.
        momentum: Of heavy ball.
        decay: Of the running factors, at most 1 - 1/step.
        max_size: Largest side of a factor.
    """

    def __init__(
        self,
        params: Params,
        model: nn.Module,
        *,
        lr: float,
        weight_decay: float = 0.0,
        damping: float = 1e-3,
        relative: bool = False,
        momentum: float = 0.9,
        decay: float = 0.95,
        max_size: int = 4096,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.damping, self.relative = damping, relative
        self.momentum, self.decay = momentum, decay
        trained = {id(p) for group in self.param_groups for p in group["params"]}
        self.blocks: list[_Block] = []
        for layer in model.modules():
            if not _has_block(layer) or id(layer.weight) not in trained:
                continue
            bias = layer.bias if id(layer.bias) in trained else None
            block = _Block(layer=layer, weight=layer.weight, bias=bias)  # type: ignore[arg-type]
            out, inp = _matrix(block, block.weight).shape
            if max(out, inp + (bias is not None)) <= max_size:
                trained -= {id(block.weight), id(bias)}  # a shared weight has one block
                self.blocks.append(block)
                layer.register_forward_hook(_watch(block))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, and what the layers showed.

        Args:
            set_to_none: As in torch.
        """
        super().zero_grad(set_to_none)
        for block in self.blocks:
            block.clear()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: Computes the loss and leaves gradients behind; None where they are there already.

        Returns:
            What the closure gave.
        """
        value = evaluated(closure)
        natural = {id(p): d for block in self.blocks for p, d in self._directions(block)}
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                direction = natural.get(id(parameter))
                if direction is None:
                    direction = self._outside(wide(parameter.grad), parameter, state)
                if "m" not in state:
                    state["m"] = torch.zeros_like(direction)
                decay(parameter, group)
                state["m"].mul_(self.momentum).add_(direction)
                parameter.sub_(state["m"], alpha=group["lr"])
        return value

    def _directions(self, block: _Block) -> list[tuple[Tensor, Tensor]]:
        """Average a layer's factors and solve with them; nothing for a layer the loss did not go through."""
        if block.inputs is None or block.grads is None or block.weight.grad is None:
            return []
        state = self.state[block.weight]
        state["step"] = state.get("step", 0) + 1
        keep = min(1 - 1 / state["step"], self.decay)
        # The loss is a mean over samples: times their number a row's gradient is its own.
        for name, now in (
            ("A", block.inputs / block.samples),
            ("G", block.grads * (block.samples**2 / block.rows)),
        ):
            state[name] = now if name not in state else state[name].lerp_(now, 1 - keep)
        block.clear()
        grad = _matrix(block, block.weight.grad).double()
        if block.bias is not None:
            assert block.bias.grad is not None
            grad = torch.cat([grad, block.bias.grad.double()[:, None]], 1)
        A, G = state["A"], state["G"]
        r, c = self._units(block, A) if self.relative else (G.new_ones(len(G)), A.new_ones(len(A)))
        A, G = damped(c[:, None] * A * c, r[:, None] * G * r, self.damping)
        solved = torch.cholesky_solve(r[:, None] * grad * c, torch.linalg.cholesky(G))
        solved = r[:, None] * torch.cholesky_solve(solved.mT, torch.linalg.cholesky(A)).mT * c
        weight = solved if block.bias is None else solved[:, :-1]
        weight = weight.mT if isinstance(block.layer, Conv1D) else weight
        out = [(block.weight, weight.reshape(block.weight.shape))]
        if block.bias is not None:
            out.append((block.bias, solved[:, -1]))
        return [(p, d.to(wide(p).dtype)) for p, d in out]

    def _units(self, block: _Block, A: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scales of a layer's outputs and inputs, as they were at its first step."""
        state = self.state[block.weight]
        if "units" not in state:
            r, c = row_and_column_scales(_matrix(block, block.weight))
            if block.bias is not None:  # as an input that contributes as much as the others
                middle = float((c.square() * A.diagonal()[:-1]).median().sqrt())
                c = torch.cat([c, c.new_tensor([middle or 1.0])])
            state["units"] = r, c
        units: tuple[Tensor, Tensor] = state["units"]
        return units

    def _outside(self, grad: Tensor, parameter: Tensor, state: dict[str, Any]) -> Tensor:
        if not self.relative:
            return grad
        if "scales" not in state:
            state["scales"] = scales(parameter)
        out: Tensor = grad * state["scales"].square()
        return out


def damped(A: Tensor, G: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Return A + pi sqrt(l) I and G + sqrt(l)/pi I.

    Args:
        A: `[n, n]`.
        G: `[m, m]`.
        damping: l.

    Returns:
        Both.

    >>> damped(4 * torch.eye(1), torch.eye(1), 0.25)
    (tensor([[5.]]), tensor([[1.2500]]))
    """
    a, g = float(A.diagonal().median()), float(G.diagonal().median())
    pi = math.sqrt(a / g) if a > 0 and g > 0 else 1.0
    root = math.sqrt(damping)
    return _plus(A, pi * root), _plus(G, root / pi)


def _plus(matrix: Tensor, amount: float) -> Tensor:
    out = matrix.clone()
    out.diagonal().add_(amount)
    return out


def _has_block(layer: nn.Module) -> bool:
    if isinstance(layer, nn.Conv2d):
        plain = layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
        return plain and layer.groups == 1
    return isinstance(layer, (nn.Linear, Conv1D))


def _matrix(block: _Block, weight: Tensor) -> Tensor:
    """Return a weight, or its gradient, as `[out, in]`."""
    return weight.mT if isinstance(block.layer, Conv1D) else weight.flatten(1)


def _watch(block: _Block) -> Callable[[nn.Module, Any, Tensor], None]:
    def seen(layer: nn.Module, args: Any, output: Tensor) -> None:
        if not output.requires_grad:
            return
        x = args[0].detach()

        def graded(grad: Tensor) -> None:
            inputs, grads = _input_rows(layer, x).double(), _output_rows(layer, grad).double()
            if block.bias is not None:
                inputs = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], 1)
            a, g = inputs.mT @ inputs, grads.mT @ grads
            block.inputs = a if block.inputs is None else block.inputs + a
            block.grads = g if block.grads is None else block.grads + g
            block.rows += len(grads)
            block.samples += len(x) if isinstance(layer, nn.Conv2d) else len(grads)

        output.register_hook(graded)  # type: ignore[no-untyped-call]

    return seen


def _input_rows(layer: nn.Module, x: Tensor) -> Tensor:
    if not isinstance(layer, nn.Conv2d):
        return x.reshape(-1, x.shape[-1])
    patches = nn.functional.unfold(
        x, layer.kernel_size, layer.dilation, layer.padding, layer.stride  # type: ignore[arg-type]
    )  # fmt: skip
    return patches.mT.flatten(0, 1)


def _output_rows(layer: nn.Module, grad: Tensor) -> Tensor:
    if isinstance(layer, nn.Conv2d):
        return grad.flatten(2).mT.flatten(0, 1)
    return grad.reshape(-1, grad.shape[-1])
