"""Factor expansion: every matrix becomes a product of k, whose singular values are the k-th roots of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from specdef.attacks.attack import Attack, Prepared
from specdef.attacks.partial.cost import relative_cost, step_work
from specdef.attacks.structural.edits import (
    CONVOLUTIONS,
    Chain,
    bias_of,
    everything,
    linear_modules,
    matrix_of,
    pointwise,
    replace_module,
)
from specdef.attacks.structural.merge import merge_inserted
from specdef.attacks.task import Task
from specdef.lock.compensated import compensated_layers


class Factor(Attack):
    """Write W = U S V^T as (U S^(1/k)) S^(1/k) … (S^(1/k) V^T) and train all factors.

    A singular value of `scale` times its size becomes k of scale^(1/k); the size of the model grows linearly with k. Layers in
    a row are one product, of which the factors are taken: an inserted layer between them would still see inputs, and have a
    curvature, of the size of W~ however that is written.

    Args:
        factors: Number of factors k.

    Raises:
        ValueError: There are fewer than two.
    """

    name = "factor-expansion"
    tier = 5
    cost = "a singular value decomposition per matrix, once; parameters and FLOPs of the matrices about times the number of factors"
    source = "arXiv 2602.18868's limit, in the construction of its replication"
    summary = "write every matrix as a product of balanced factors, then train all of them"

    def __init__(self, factors: int = 2) -> None:
        if factors < 2:
            raise ValueError(f"factors must be at least 2, got {factors}.")
        self.factors = factors

    def applies(self, model: nn.Module) -> str:
        """Return why nothing can be expanded."""
        found = linear_modules(model) or compensated_layers(model)
        return "" if found else "no plain linear layer to expand"

    def prepare(
        self, model: nn.Module, task: Task, *, original: nn.Module | None, generator: torch.Generator
    ) -> Prepared:  # fmt: skip
        """Expand, then train everything; the function changes by rounding alone."""
        before = step_work(model)
        merged = merge_inserted(model)
        layers = linear_modules(model)
        for path, module in layers.items():
            replace_module(model, path, Chain(*self._expand(module)))
        groups = everything(model)
        notes = [f"expanded {len(layers)} layers into {self.factors} factors each"]
        if merged:
            notes.insert(0, f"multiplied {merged} inserted layers in")
        return Prepared(
            model=model, groups=groups, relative_cost=relative_cost(model, groups[0]["params"], before),
            notes=tuple(notes),
        )  # fmt: skip

    def _expand(self, module: nn.Module) -> list[nn.Module]:
        left, values, right = torch.linalg.svd(matrix_of(module).double(), full_matrices=False)
        root = values ** (1 / self.factors)
        first = _first(root[:, None] * right, module)
        middle = [pointwise(torch.diag(root), None, module) for _ in range(self.factors - 2)]
        return [first, *middle, pointwise(left * root, bias_of(module), module)]


def _first(matrix: Tensor, module: nn.Module) -> nn.Module:
    """Return the factor next to the input; of a convolution it keeps kernel, stride and padding."""
    if not isinstance(module, CONVOLUTIONS):
        return pointwise(matrix, None, module)
    kind: Any = type(module)
    layer: Any = nn.utils.skip_init(  # type: ignore[no-untyped-call]
        kind, module.in_channels, len(matrix), module.kernel_size, stride=module.stride, padding=module.padding,
        dilation=module.dilation, padding_mode=module.padding_mode, bias=False,
        device=str(module.weight.device), dtype=module.weight.dtype,
    )  # fmt: skip
    with torch.no_grad():
        layer.weight.copy_(matrix.reshape(layer.weight.shape))
    out: nn.Module = layer
    return out
