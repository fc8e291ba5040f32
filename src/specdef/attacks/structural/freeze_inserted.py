"""Freeze inserted layers: with C held still the curvature is the unlocked model's at every scale."""

from __future__ import annotations

import torch
from torch import nn

from specdef.attacks.attack import Attack, Prepared
from specdef.attacks.partial.cost import relative_cost, step_work
from specdef.attacks.structural.edits import everything, expand_inserted
from specdef.attacks.structural.merge import consecutive, square_one, without_inserted
from specdef.attacks.task import Task


class FreezeInserted(Attack):
    """Train everything but the inserted layers."""

    name = "freeze-inserted"
    tier = 3
    cost = "that of full training, less the gradients of the inserted layers"
    source = "no paper; C carries all the curvature a compensated lock adds"
    summary = "train everything but the inserted square layers"

    def applies(self, model: nn.Module) -> str:
        """Return why there is nothing to freeze."""
        return without_inserted(model)

    def prepare(
        self, model: nn.Module, task: Task, *, original: nn.Module | None, generator: torch.Generator
    ) -> Prepared:  # fmt: skip
        """Leave the weights of inserted layers out; a model without any trains as a whole."""
        before = step_work(model)
        expand_inserted(model)
        frozen = {square_one(model, pair) for pair in consecutive(model)}
        held = {id(model.get_submodule(path).get_parameter("weight")) for path in frozen}
        trained = [p for p in everything(model)[0]["params"] if id(p) not in held]
        return Prepared(
            model=model, groups=[{"params": trained}], relative_cost=relative_cost(model, trained, before),
            notes=(f"froze {len(frozen)} inserted layers",),
        )  # fmt: skip
