"""Kronecker-factored curvature of linear and convolutional layers, as a preconditioner.

Block of a layer y = W a (a with 1 appended where there is a bias): F = A (x) G with A the mean of a a^T over all rows and
G = (1/N) sum of g g^T, g the gradient of a term's own loss with respect to y (Martens & Grosse 2015, arXiv 1503.05671;
for convolutions Grosse & Martens 2016, arXiv 1602.01407, where a row is a patch). Gradients are those of the given
labels (the empirical Fisher), as in the implementations in use. Damping is added to the eigenvalues of the block, which
needs no splitting between the factors. Parameters of other layers keep the plain gradient: their P is 1.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from specdef.curvature.base import CurvatureOperator
from specdef.curvature.linear import SymmetricOperator


@dataclass(frozen=True, slots=True, kw_only=True)
class _Block:
    """One layer: where its weight and bias lie, and the eigenvectors of its factors.

    Args:
        weight: Slice of the weight in the flat vector.
        bias: Slice of the bias; None without one, or where it is not among the parameters.
        transposed: The weight is stored `[in, out]`.
        inputs: Eigenvectors of A `[k, k]`, columns.
        outputs: Eigenvectors of G `[r, r]`, columns.
        values: Eigenvalues of the block `[r, k]`, without damping.
    """

    weight: slice
    bias: slice | None
    transposed: bool
    inputs: Tensor
    outputs: Tensor
    values: Tensor


@final
class KroneckerFactors:
    """P = blockwise (A (x) G) + damping, and 1 for parameters of other layers.

    Args:
        operator: Model, data and loss; parameters it leaves out are left out here.
        damping: Added to every eigenvalue of a block.

    `uncovered` names the matrices without a block: of embeddings, and of layers of other kinds.
    """

    def __init__(self, operator: CurvatureOperator, damping: float) -> None:
        self.damping = damping
        self._blocks = [_block(operator, *found) for found in _moments(operator)]
        covered = {block.weight.start for block in self._blocks}
        self.uncovered = [
            name for name, p in operator.parameters.items()
            if p.ndim > 1 and operator.slices[name].start not in covered
        ]  # fmt: skip

    @property
    def num_layers(self) -> int:
        """Layers with a block of their own."""
        return len(self._blocks)

    def power(self, exponent: float, v: Tensor) -> Tensor:
        """Return P^exponent v.

        Args:
            exponent: -1 for the step, -1/2 for the symmetric form of the preconditioned curvature.
            v: `[n]`.

        Returns:
            `[n]`.
        """
        result = v.clone()
        for block in self._blocks:
            r, k = block.values.shape
            M = v[block.weight]
            M = (
                M.view(k if block.bias is None else k - 1, r).T
                if block.transposed
                else M.view(r, -1)
            )
            if block.bias is not None:
                M = torch.cat([M, v[block.bias][:, None]], 1)
            scale = (block.values + self.damping) ** exponent
            M = block.outputs @ (scale * (block.outputs.T @ M @ block.inputs)) @ block.inputs.T
            if block.bias is not None:
                result[block.bias] = M[:, -1]
                M = M[:, :-1]
            result[block.weight] = (M.T if block.transposed else M).reshape(-1)
        return result


@final
class PreconditionedOperator(SymmetricOperator):
    """P^-1/2 A P^-1/2 for P in Kronecker blocks: the matrix whose spectrum the preconditioned method sees.

    Args:
        operator: A.
        factors: P.
    """

    def __init__(self, operator: SymmetricOperator, factors: KroneckerFactors) -> None:
        super().__init__(operator.shape[0], dtype=operator.dtype, device=operator.device)
        self.operator, self.factors = operator, factors

    def _matvec(self, v: Tensor) -> Tensor:
        return self.factors.power(-0.5, self.operator @ self.factors.power(-0.5, v))


def _moments(operator: CurvatureOperator) -> list[tuple[str, nn.Module, Tensor, Tensor]]:
    """Return (name, layer, A, G) of every layer, from one pass over the data."""
    layers = {
        name: module
        for name, module in operator.model.named_modules()
        if f"{name}.weight".lstrip(".") in operator.parameters and _is_layer(module)
    }
    sums: dict[str, dict[str, Tensor]] = {name: {} for name in layers}
    rows = dict.fromkeys(layers, 0)
    with ExitStack() as stack:
        for name, module in layers.items():
            with_bias = f"{name}.bias".lstrip(".") in operator.parameters
            handle = module.register_forward_hook(_collect(sums[name], rows, name, with_bias))
            stack.callback(handle.remove)
        operator.gradient()
    return [
        (name, layers[name], found["A"] / rows[name], found["G"] / operator.num_terms)
        for name, found in sums.items()
        if "G" in found  # a layer that ran and that the loss depends on
    ]


def _collect(
    into: dict[str, Tensor], rows: dict[str, int], name: str, with_bias: bool
) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        with torch.no_grad():
            a = _patches(module, inputs[0].detach())
            if with_bias:
                a = torch.cat([a, a.new_ones(len(a), 1)], 1)
            into["A"] = into.get("A", 0) + a.T @ a
        rows[name] += len(a)

        def backward(gradient: Tensor) -> None:
            g = gradient.movedim(1, -1) if isinstance(module, nn.Conv2d) else gradient
            g = g.reshape(-1, g.shape[-1])
            into["G"] = into.get("G", 0) + g.T @ g

        output.register_hook(backward)

    return hook


def _patches(module: nn.Module, x: Tensor) -> Tensor:
    """Return a layer's inputs as rows: for a convolution, one patch per position of the output."""
    if not isinstance(module, nn.Conv2d):
        return x.reshape(-1, x.shape[-1])
    assert not isinstance(module.padding, str)
    patches = nn.functional.unfold(
        x, module.kernel_size, module.dilation, module.padding, module.stride
    )
    return patches.movedim(1, -1).reshape(-1, patches.shape[1])


def _block(
    operator: CurvatureOperator, name: str, module: nn.Module, A: Tensor, G: Tensor
) -> _Block:
    # float64: the factors of a locked layer span more digits than float32 has.
    a, inputs = torch.linalg.eigh(A.double())
    g, outputs = torch.linalg.eigh(G.double())
    bias = f"{name}.bias".lstrip(".")
    return _Block(
        weight=operator.slices[f"{name}.weight".lstrip(".")],
        bias=operator.slices.get(bias),
        transposed=_is_transposed(module),
        inputs=inputs.to(operator.dtype),
        outputs=outputs.to(operator.dtype),
        values=(g.clamp(min=0)[:, None] * a.clamp(min=0)).to(operator.dtype),
    )


def _is_layer(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):
        # Grouped convolutions have a block per group, and other paddings are not what unfold does.
        return module.groups == 1 and not isinstance(module.padding, str) and module.padding_mode == "zeros"  # fmt: skip
    return isinstance(module, nn.Linear) or _is_transposed(module)


def _is_transposed(module: nn.Module) -> bool:
    """Say whether it is the linear layer of GPT-2, which stores its weight `[in, out]`."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")
