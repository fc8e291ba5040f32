"""Merge inserted layers: two linear layers in a row are one, so C W~ goes back into the matrix beside it."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import nn

from specdef.attacks.attack import Attack, Prepared
from specdef.attacks.partial.cost import relative_cost, step_work
from specdef.attacks.structural.edits import (
    CONVOLUTIONS,
    bias_of,
    everything,
    expand_inserted,
    is_linear,
    is_transposed,
    matrix_of,
    replace_module,
)
from specdef.attacks.task import Task
from specdef.lock.compensated import compensated_layers

_SAME = 0.01
"""Relative difference up to which a module is taken for the product of its two layers; bfloat16 rounds that much."""


class Merge(Attack):
    """Merge every inserted layer into its neighbour, then train everything."""

    name = "merge"
    tier = 5
    cost = "a matrix product per inserted layer, once; it removes parameters"
    source = "conceded for compensated layers in arXiv 2602.18868"
    summary = (
        "merge inserted layers (two linear layers in a row, one of them square), then train all"
    )

    def applies(self, model: nn.Module) -> str:
        """Return why there is nothing to merge."""
        return without_inserted(model)

    def prepare(
        self, model: nn.Module, task: Task, *, original: nn.Module | None, generator: torch.Generator
    ) -> Prepared:  # fmt: skip
        """Merge; a model without inserted layers stays as it is."""
        before = step_work(model)
        merged = merge_inserted(model)
        groups = everything(model)
        return Prepared(
            model=model, groups=groups, relative_cost=relative_cost(model, groups[0]["params"], before),
            notes=(f"merged {merged} inserted layers",),
        )  # fmt: skip


def without_inserted(model: nn.Module) -> str:
    """Say why a model has no inserted layer; empty where it has, or seems to."""
    found = bool(compensated_layers(model)) or bool(consecutive(model))
    return "" if found else "no inserted layer: nowhere do two linear layers follow each other"


def consecutive(model: nn.Module) -> list[tuple[str, str]]:
    """List paths of linear layers that follow each other with nothing between, one of them square.

    Looked for in `nn.Sequential`, and in modules of two layers that do what those two do.

    Args:
        model: Any module; pairs of our own lock as `expand_inserted` writes them.

    Returns:
        (first, second) in the order of the model.
    """
    found = []
    for path, parent in model.named_modules():
        children = [
            (f"{path}.{name}" if path else name, child)
            for name, child in parent.named_children()
            if not isinstance(child, nn.Identity)
        ]
        for (a, first), (b, second) in pairwise(children):
            if _fit(first, second) and (
                isinstance(parent, nn.Sequential)
                or (len(children) == 2 and _is_product(parent, first, second))
            ):
                found.append((a, b))
    return found


def square_one(model: nn.Module, pair: tuple[str, str]) -> str:
    """Return the path of the inserted layer of a pair: the second, unless only the first is square."""
    second = matrix_of(model.get_submodule(pair[1]))
    return pair[1] if second.shape[0] == second.shape[1] else pair[0]


def merge_inserted(model: nn.Module) -> int:
    """Merge all pairs, in place.

    Args:
        model: Any module, in evaluation mode.

    Returns:
        Number of layers that are gone.
    """
    expand_inserted(model)
    merged = 0
    while pairs := consecutive(model):
        for pair in pairs:
            if isinstance(model.get_submodule(pair[0]), nn.Identity):
                continue  # the end of a longer chain, taken up in the next round
            _merge(model, pair)
            merged += 1
    return merged


def _merge(model: nn.Module, pair: tuple[str, str]) -> None:
    gone = square_one(model, pair)
    first, second = (model.get_submodule(path) for path in pair)
    kept: Any = model.get_submodule(pair[0] if gone == pair[1] else pair[1])
    outer = matrix_of(second).double()
    matrix = outer @ matrix_of(first).double()
    bias = bias_of(second)
    if (inner := bias_of(first)) is not None:
        bias = outer @ inner.double() + (0 if bias is None else bias)
    with torch.no_grad():
        stored = matrix.T if is_transposed(kept) else matrix
        kept.weight.copy_(stored.reshape(kept.weight.shape))
        if bias is not None:
            kept.bias = nn.Parameter(bias.to(kept.weight.dtype))
    replace_module(model, gone, nn.Identity())


def _is_product(parent: nn.Module, first: nn.Module, second: nn.Module) -> bool:
    """Tell whether a module gives on random input what its two layers in a row give."""
    weight = first.get_parameter("weight")
    columns = weight.shape[0] if is_transposed(first) else weight.shape[1]
    sides = (7,) * (weight.ndim - 2)
    probe = torch.randn(2, columns, *sides, generator=torch.Generator().manual_seed(0)).to(weight)
    try:
        with torch.no_grad():
            expected, seen = second(first(probe)), parent(probe)
            return bool((seen - expected).norm() <= _SAME * expected.norm())
    except Exception:  # a module with other arguments: whatever it raises, it is no pair
        return False


def _fit(first: nn.Module, second: nn.Module) -> bool:
    if not (is_linear(first) and is_linear(second)):
        return False
    a, b = matrix_of(first), matrix_of(second)
    if isinstance(first, CONVOLUTIONS) or isinstance(second, CONVOLUTIONS):
        # Only what acts point by point merges into the convolution before it.
        state: Any = second
        point = type(first) is type(second) and all(x == 1 for x in (*state.kernel_size, *state.stride))  # fmt: skip
        return point and state.padding in ((0,) * len(state.kernel_size), "valid") and b.shape[0] == b.shape[1] == a.shape[0]  # fmt: skip
    return b.shape[1] == a.shape[0] and (b.shape[0] == b.shape[1] or a.shape[0] == a.shape[1])
