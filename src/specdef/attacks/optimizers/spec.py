"""One optimiser of an attacker: its source, its tier, and how it is built."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from specdef.attacks.task import Setting

Build = Callable[[nn.Module, list[dict[str, Any]], Setting], torch.optim.Optimizer]
"""Model, parameter groups and setting to an optimiser."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerSpec:
    """An optimiser an attacker may take.

    Args:
        name: Unique.
        tier: 2 for first-order methods, 4 for preconditioned and second-order ones.
        source: Paper or library.
        learning_rates: Where a sweep on an ordinary model begins: lowest and highest rate.
        build: Makes it, at the setting's rate.
        closure: What its step is given: nothing; "gradient", a closure that leaves gradients behind; "graph", one whose
            loss the optimiser differentiates itself, twice.
        relative_cost: Gradients a step costs, estimated; linear algebra on the weights is left out.
        library: What it needs besides torch; in the extra `attacks`.
        largest: Parameters it can train; None sets no limit.
    """

    name: str
    tier: int
    source: str
    learning_rates: tuple[float, float]
    build: Build
    closure: Literal["", "gradient", "graph"] = ""
    relative_cost: float = 1.0
    library: str = ""
    largest: int | None = None

    def unusable(self, parameters: int) -> str:
        """Return why it cannot be used; empty where it can.

        Args:
            parameters: Numbers that are to be trained.

        Returns:
            A reason for people.
        """
        if self.library and importlib.util.find_spec(self.library) is None:
            return f"{self.name} needs {self.library}: pip install 'specdef[attacks]'"
        if self.largest is not None and parameters > self.largest:
            return f"{self.name} is for at most {self.largest} parameters, not {parameters}"
        return ""
