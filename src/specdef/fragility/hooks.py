"""What acts around every step of a PyTorch optimiser: attached by its hooks, detached again, also as a context manager."""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch.optim import Optimizer

from specdef.errors import SpecDefError

Hook = TypeVar("Hook", bound="StepHook")


class StepHook(ABC):
    """Something that is called before and after every step of an optimiser."""

    def __init__(self) -> None:
        self._handles: list[Any] = []

    def attach(self: Hook, optimizer: Optimizer) -> Hook:
        """Act around every step of an optimiser until `detach` or the end of a `with` block.

        Args:
            optimizer: Of any kind; a wrapper such as accelerate's is looked through.

        Returns:
            Itself, for `with guard.attach(optimizer):`.

        Raises:
            SpecDefError: It is attached already, or does not fit the optimiser.
        """
        if self._handles:
            raise SpecDefError(
                f"this {type(self).__name__} is attached to an optimiser already",
                hint="Call detach() first.",
            )
        while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
            optimizer = inner
        self._check(optimizer)
        self._handles = [
            optimizer.register_step_pre_hook(self._pre),
            optimizer.register_step_post_hook(self._post),
        ]
        return self

    def detach(self) -> None:
        """Act no longer; nothing happens where it is not attached."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self: Hook) -> Hook:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.detach()

    def _check(self, optimizer: Optimizer) -> None:  # noqa: B027
        """Raise SpecDefError where the optimiser does not fit."""

    @abstractmethod
    def _before_step(self) -> None:
        """Act on gradients; recording is off."""

    def _after_step(self, learning_rate: float) -> None:  # noqa: B027
        """Act on weights; recording is off."""

    @torch.no_grad()
    def _pre(self, optimizer: Optimizer, *_: Any) -> None:
        self._before_step()

    @torch.no_grad()
    def _post(self, optimizer: Optimizer, *_: Any) -> None:
        # Adafactor sets its own rate, and carries None
        rate = optimizer.param_groups[0].get("lr")
        self._after_step(1.0 if rate is None else float(rate))
