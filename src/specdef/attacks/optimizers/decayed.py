"""Torch's optimisers that know no weight decay, with it: L-BFGS and Rprop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from specdef.attacks.optimizers.base import Params, decay
from specdef.errors import SpecDefError


class LBFGS(torch.optim.LBFGS):
    """L-BFGS with a strong Wolfe line search, a few iterations on every batch (Liu & Nocedal 1989).

    Curvature pairs outlive a batch. Differences of gradients are then between batches once in `max_iter` iterations.

    Args:
        params: Parameters or one group.
        lr: Where a line search begins.
        weight_decay: Decoupled.
        max_iter: Iterations per step.
        history_size: Curvature pairs kept.

    Raises:
        SpecDefError: There are several groups.
    """

    def __init__(
        self,
        params: Params,
        *,
        lr: float,
        weight_decay: float = 0.0,
        max_iter: int = 4,
        history_size: int = 10,
    ) -> None:
        given = list(params)
        if len(given) > 1 and isinstance(given[0], dict):
            raise SpecDefError(
                "L-BFGS sees all parameters as one vector and takes one group",
                hint="Use another optimiser where parts have their own rate.",
            )
        super().__init__(
            given, lr=lr, max_iter=max_iter, history_size=history_size, tolerance_grad=0.0,
            tolerance_change=0.0, line_search_fn="strong_wolfe",
        )  # fmt: skip
        self.param_groups[0]["weight_decay"] = weight_decay

    def step(self, closure: Callable[[], Any]) -> Any:  # type: ignore[override]
        """Take a few iterations.

        Args:
            closure: Computes the loss and leaves gradients behind.

        Returns:
            The loss before them.
        """
        _decay(self)
        return super().step(closure)  # type: ignore[no-untyped-call]


class Rprop(torch.optim.Rprop):
    """Rprop, every number with its own step whatever the size of its gradient (Riedmiller & Braun 1993).

    Differs from torch's in the smallest step, which is not 1e-6: on a locked model that can be too large.

    Args:
        params: Parameters or groups.
        lr: The first step of every number.
        weight_decay: Decoupled.
    """

    def __init__(self, params: Params, *, lr: float, weight_decay: float = 0.0) -> None:
        super().__init__(params, lr=lr, step_sizes=(0.0, 50.0))
        for group in self.param_groups:
            group.setdefault("weight_decay", weight_decay)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: Computes the loss and leaves gradients behind; None where they are there already.

        Returns:
            What the closure gave.
        """
        _decay(self)
        return super().step(closure)


@torch.no_grad()
def _decay(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            decay(parameter, group)
