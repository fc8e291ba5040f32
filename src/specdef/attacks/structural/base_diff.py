"""Base difference: where the original is public, the lock is what differs from it, and is left out."""

from __future__ import annotations

import copy

import torch
from torch import nn

from specdef.attacks.attack import Attack, Prepared
from specdef.attacks.structural.edits import everything
from specdef.attacks.task import Task
from specdef.errors import SpecDefError
from specdef.lock.in_memory import unique_tensors


class BaseDiff(Attack):
    """Start from the original: full recovery, and the reason why a lock protects nothing that is public unlocked.

    Args:
        public: Whether attackers have the original; an audit has it in any case, so it must be said.
    """

    name = "base-diff"
    tier = 5
    cost = "a download; then that of plain training"
    source = "no paper: the download of the original"
    summary = "start from the public original instead of the locked model (asked for by name alone)"

    def __init__(self, public: bool = False) -> None:
        self.public = public

    def applies(self, model: nn.Module) -> str:
        """Return that the original is not public."""
        return (
            ""
            if self.public
            else "nobody said that the original is public: ask for base-diff by name"
        )

    def prepare(
        self, model: nn.Module, task: Task, *, original: nn.Module | None, generator: torch.Generator
    ) -> Prepared:  # fmt: skip
        """Take the original, in the precision and on the device of the locked model.

        Args:
            model: The locked model.
            task: Not used.
            original: Where to start from.
            generator: Not used.

        Returns:
            A copy of the original, all of it to be trained.

        Raises:
            SpecDefError: There is no original.
        """
        if original is None:
            raise SpecDefError(
                "base-diff needs the original model",
                hint="Give it, or leave the attack out: it asks what a public original is worth.",
            )
        like = next(p for p in model.parameters() if p.is_floating_point())
        start = copy.deepcopy(original).eval().to(device=like.device, dtype=like.dtype)
        public, own = unique_tensors(start), unique_tensors(model)
        same = sum(
            name in own and own[name].shape == tensor.shape and bool(torch.equal(own[name], tensor))
            for name, tensor in public.items()
        )
        note = f"{len(public) - same} of {len(public)} tensors of the original differ in the locked model"
        return Prepared(model=start, groups=everything(start), notes=(note,))
