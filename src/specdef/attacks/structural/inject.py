"""Layer injection: a trainable identity behind every linear layer, the paper's limit of convergence-rate control."""

from __future__ import annotations

import torch
from torch import nn

from specdef.attacks.attack import Attack, Prepared
from specdef.attacks.partial.cost import relative_cost, step_work
from specdef.attacks.structural.edits import (
    Chain,
    everything,
    linear_modules,
    matrix_of,
    pointwise,
    replace_module,
)
from specdef.attacks.structural.merge import consecutive
from specdef.attacks.task import Task
from specdef.lock.compensated import Compensated, compensated_layers

_WIDEST = 4
"""Outputs per input up to which a layer gets an identity: behind a vocabulary head it would be larger than the model."""


class Inject(Attack):
    """Put an identity layer behind every linear layer (behind the pair, where one is inserted) and train those.

    Args:
        freeze: Whether the model's own parameters stay as they are; else they train too.
    """

    tier = 5
    cost = "a square matrix per layer, so parameters and FLOPs grow linearly with the model"
    source = "arXiv 2602.18868: restores fast convergence at a linear increase in model size"
    summary = "insert identity layers behind every linear layer and train them"

    def __init__(self, freeze: bool = True) -> None:
        self.name = "layer-injection" if freeze else "layer-injection-all"
        self.freeze = freeze

    def applies(self, model: nn.Module) -> str:
        """Return why nothing can be injected."""
        return "" if _targets(model) else "no plain linear layer to put another behind"

    def prepare(
        self, model: nn.Module, task: Task, *, original: nn.Module | None, generator: torch.Generator
    ) -> Prepared:  # fmt: skip
        """Inject; the function keeps every bit."""
        before = step_work(model)
        added: list[nn.Parameter] = []
        for path, (module, width) in _targets(model).items():
            base = module.bare() if isinstance(module, Compensated) else module
            identity = pointwise(torch.eye(width), None, base)
            replace_module(model, path, Chain(module, identity))
            added += identity.parameters()
        trained = added if self.freeze else everything(model)[0]["params"]
        return Prepared(
            model=model, groups=[{"params": trained}], relative_cost=relative_cost(model, trained, before),
            notes=(f"injected {len(added)} identity layers",),
        )  # fmt: skip


def _targets(model: nn.Module) -> dict[str, tuple[nn.Module, int]]:
    """Return the layers to put one behind, with their number of outputs, by path."""
    found: dict[str, tuple[nn.Module, int]] = {
        path: (pair, len(pair.compensation)) for path, pair in compensated_layers(model).items()
    }
    # Between the two layers of a pair an identity would see inputs of the size of W~, and have their curvature.
    inside = {first for first, _ in consecutive(model)}
    for path, module in linear_modules(model).items():
        if path in inside:
            continue
        rows, columns = matrix_of(module).shape
        if rows <= _WIDEST * columns:
            found[path] = module, rows
    return found
