"""Known-scale preconditioning: an attacker with the key divides gradients by the squares of its scales."""

from __future__ import annotations

import statistics

import torch
from torch import Tensor, nn

from specdef.attacks.attack import Attack, Prepared
from specdef.attacks.structural.edits import everything
from specdef.attacks.structural.reparametrise import reparametrise
from specdef.attacks.structural.sites import deviation
from specdef.attacks.task import Task
from specdef.errors import SpecDefError
from specdef.lock.key import Key
from specdef.lock.names import NameMap
from specdef.symmetries import Leg

_ENOUGH = 64
"""Scalings looked at to tell whether a model is locked by a key."""


class KnownScale(Attack):
    """Train the unlocked weights inside the locked model: W~ = scale V, V trained.

    Under gradient descent that divides the gradient by scale^2, under any optimiser it is the run of the unlocked model: the
    bound of what any preconditioner of this form can reach. A model that is not locked by the key trains as it is.

    Args:
        key: Key of an absorbed lock; None and the attack does not apply.
    """

    name = "known-scale"
    tier = 5
    cost = "the key; a pass over the weights, once"
    source = "the lock's own key"
    summary = "divide gradients by the squares of the key's scales (needs the key)"

    def __init__(self, key: Key | None = None) -> None:
        self._key = key

    def applies(self, model: nn.Module) -> str:
        """Return why the key is of no use."""
        if self._key is None:
            return "no key was given"
        if not self._key.scalings:
            return f"a key of a lock by {self._key.method} has no scales of single channels"
        try:
            locked = _locked_by(model, self._key)
        except SpecDefError as error:
            return str(error)
        return "" if locked else "the model is not locked by this key"

    def prepare(
        self, model: nn.Module, task: Task, *, original: nn.Module | None, generator: torch.Generator
    ) -> Prepared:  # fmt: skip
        """Change the units of every scaled tensor, then train everything; the function keeps every bit."""
        changed = 0
        if self._key is not None and _locked_by(model, self._key):
            names = NameMap(model)
            for name, edits in self._key.scalings.items():
                path, _, leaf = names.name(name).rpartition(".")
                units = torch.ones_like(names.tensor(name), dtype=torch.float32, device="cpu")
                for edit in edits:
                    edit.apply(units, name=name)
                reparametrise(model.get_submodule(path), leaf, units)
                changed += 1
        return Prepared(
            model=model, groups=everything(model), notes=(f"{changed} tensors got other units",)
        )


def _locked_by(model: nn.Module, key: Key) -> bool:
    """Tell whether the scaled slices stand out by about their exponents."""
    names = NameMap(model)
    edits = [(name, edit) for name, own in key.scalings.items() for edit in own]
    shares = []
    for name, edit in edits[:: max(1, len(edits) // _ENOUGH)]:
        tensor: Tensor = names.tensor(name)
        leg = Leg(tensor=name, axis=edit.axis, size=tensor.shape[edit.axis], lead=edit.lead)
        shares.append(float(deviation(tensor, leg)[edit.position]) / edit.exponent)
    return statistics.median(shares) > 0.5
