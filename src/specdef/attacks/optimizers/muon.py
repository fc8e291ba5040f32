"""Muon for weight matrices, AdamW for the rest, in one optimiser.

Jordan et al. 2024 (torch.optim.Muon); rates matched as in Liu et al. 2025, "Muon is Scalable for LLM Training", arXiv
2502.16982: the orthogonal update times 0.2 sqrt(max(rows, columns)) has the root mean square of an AdamW update, so one
learning rate serves both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from specdef.attacks.optimizers.base import Params, evaluated
from specdef.lock.embeddings import output_embeddings


class MuonAdamW(torch.optim.Optimizer):
    """Muon on matrices, AdamW on what is none.

    Args:
        params: Parameters or groups.
        lr: Learning rate of both.
        weight_decay: Decoupled, of both.
        tables: Matrices that AdamW takes all the same: embeddings and output layers, as Muon's authors advise.
    """

    def __init__(
        self,
        params: Params,
        *,
        lr: float,
        weight_decay: float = 0.0,
        tables: tuple[nn.Parameter, ...] = (),
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        aside = {id(p) for p in tables}

        def part(matrices: bool) -> list[dict[str, Any]]:
            return [
                {"params": [p for p in group["params"] if (p.ndim == 2 and id(p) not in aside) == matrices]}
                for group in self.param_groups
            ]  # fmt: skip

        options: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay}
        self.parts = (
            torch.optim.Muon(part(True), adjust_lr_fn="match_rms_adamw", **options),
            torch.optim.AdamW(part(False), **options),
        )
        for optimizer in self.parts:
            optimizer.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: Computes the loss and leaves gradients behind; None where they are there already.

        Returns:
            What the closure gave.
        """
        value = evaluated(closure)
        for optimizer in self.parts:
            for own, group in zip(optimizer.param_groups, self.param_groups, strict=True):
                own.update(lr=group["lr"], weight_decay=group["weight_decay"])
            optimizer.step()  # type: ignore[no-untyped-call]
        return value


def tables_of(model: nn.Module) -> tuple[nn.Parameter, ...]:
    """List the weights of embeddings, and of a transformers model's output layer.

    Args:
        model: Any module.

    Returns:
        Parameters; none twice only if none is tied.
    """
    modules = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    weights = [getattr(m, "weight", None) for m in (*modules, output_embeddings(model))]
    return tuple(w for w in weights if isinstance(w, nn.Parameter))
