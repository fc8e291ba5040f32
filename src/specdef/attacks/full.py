"""Train every parameter: the attack without edits, one instance per optimiser, and the usual recipe."""

from __future__ import annotations

import torch
from torch import nn

from specdef.attacks.attack import Attack, Prepared
from specdef.attacks.optimizers import OPTIMIZERS
from specdef.attacks.task import Task


class FullTraining(Attack):
    """Every parameter trains, with one of some optimisers.

    Args:
        optimizers: Names in the table of optimisers; all of one tier.
        learning_rates: The only rates tried; None sweeps them from where training diverges to where nothing moves.
        tier: None takes the optimisers'.
        name: None makes one of the optimisers'.

    Raises:
        ValueError: No optimiser, one that is not in the table, or several tiers.
    """

    def __init__(
        self,
        optimizers: tuple[str, ...] = ("adamw",),
        *,
        learning_rates: tuple[float, ...] | None = None,
        tier: int | None = None,
        name: str | None = None,
    ) -> None:
        unknown = [n for n in optimizers if n not in OPTIMIZERS]
        if unknown or not optimizers:
            raise ValueError(f"optimizers must be names among {sorted(OPTIMIZERS)}, got {unknown}.")
        specs = [OPTIMIZERS[n] for n in optimizers]
        tiers = {spec.tier for spec in specs}
        if tier is None and len(tiers) > 1:
            raise ValueError(f"optimizers must be of one tier, got tiers {sorted(tiers)}.")
        self.name = name or f"full-{'-'.join(optimizers)}"
        self.tier = min(tiers) if tier is None else tier
        self.source = "; ".join(spec.source for spec in specs)
        rates = "all rates" if learning_rates is None else f"rates {', '.join(f'{r:g}' for r in learning_rates)}"  # fmt: skip
        self.summary = f"every parameter trains with {', '.join(optimizers)}, {rates}"
        self.optimizers = optimizers
        self.learning_rates = learning_rates

    def applies(self, model: nn.Module) -> str:
        """Say whether an optimiser's library is missing, or the model too large for it.

        Args:
            model: The model.

        Returns:
            The reasons, where no optimiser is left; empty otherwise.
        """
        size = sum(p.numel() for p in model.parameters())
        reasons = [OPTIMIZERS[name].unusable(size) for name in self.optimizers]
        return "; ".join(reasons) if all(reasons) else ""

    def prepare(
        self,
        model: nn.Module,
        task: Task,
        *,
        original: nn.Module | None,
        generator: torch.Generator,
    ) -> Prepared:
        """Take every parameter, in one group.

        Args:
            model: Left as it is.
            task: Not looked at.
            original: Not looked at.
            generator: Not used.

        Returns:
            The model.
        """
        return Prepared(model=model, groups=[{"params": list(model.parameters())}])


RECIPE = FullTraining(learning_rates=(5e-5, 1e-4), tier=1, name="recipe")
"""The common recipe of fine-tuning: AdamW at its usual rates, and no sweep."""
