"""The from-scratch reference: a lock cannot do better than make an attacker start anew."""

from __future__ import annotations

import torch
from torch import nn

from specdef.attacks.attack import Attack, Prepared
from specdef.attacks.rebuild.twin import fresh_twin, why_no_twin
from specdef.attacks.task import Task


class Scratch(Attack):
    """Train a model of the same architecture with fresh weights; no attack, but what attacks are compared with."""

    name = "scratch"
    tier = 6
    cost = "that of full training"
    source = "the same architecture, data and budget without the model"
    summary = "train the same architecture from fresh weights"

    def applies(self, model: nn.Module) -> str:
        """Return why no fresh twin can be made, where none can."""
        return why_no_twin(model)

    def prepare(
        self, model: nn.Module, task: Task, *, original: nn.Module | None, generator: torch.Generator
    ) -> Prepared:  # fmt: skip
        """Draw every weight anew."""
        twin = fresh_twin(model, generator)
        return Prepared(model=twin, groups=[{"params": list(twin.parameters())}])
