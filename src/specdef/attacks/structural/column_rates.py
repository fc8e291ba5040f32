"""A step size per column and row, from their size alone: no symmetry need be known, and no key."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from specdef.attacks.attack import Attack, Prepared
from specdef.attacks.structural.edits import everything, is_transposed, linear_modules
from specdef.attacks.structural.reparametrise import reparametrise
from specdef.attacks.structural.sites import deviation
from specdef.attacks.task import Task
from specdef.symmetries import Leg


class ColumnRates(Attack):
    """Train every weight in units of its rows and columns.

    A reparametrisation, not a gradient hook: it scales the step of an adaptive optimiser too, where a hook would be undone
    by its normalisation. Under gradient descent the rate of a column is that of the others times (its size over the median
    one)^2. Gains of norms are measured against their median. A bias goes with the row, or the gain, beside it: it may be 0,
    and then its own size says nothing.
    """

    name = "column-rates"
    tier = 5
    cost = "a pass over the weights, once"
    source = "diagonal preconditioning by weight size; LARS (You et al. 2017) per column"
    summary = "a learning rate per row and column, in proportion to the square of its size"

    def applies(self, model: nn.Module) -> str:
        """Return why no layer has columns."""
        return "" if linear_modules(model) else "no plain linear layer"

    def prepare(
        self, model: nn.Module, task: Task, *, original: nn.Module | None, generator: torch.Generator
    ) -> Prepared:  # fmt: skip
        """Change the units, then train everything; the function keeps every bit."""
        changed = 0
        for module in linear_modules(model).values():
            weight = module.get_parameter("weight")
            writes = 1 if is_transposed(module) else 0
            units = {axis: _units(weight, axis) for axis in (0, 1)}
            changed += _change_units(module, "weight", *units.values())
            changed += _change_units(module, "bias", units[writes].flatten())
        for module in _norms(model):
            units_of_gains = _units(module.get_parameter("weight"), 0)
            for name in ("weight", "bias"):
                changed += _change_units(module, name, units_of_gains)
        return Prepared(
            model=model, groups=everything(model), notes=(f"{changed} tensors got other units",)
        )


def _change_units(module: nn.Module, name: str, *factors: Tensor) -> int:
    """Train a parameter in other units; return 0 where it is missing, or all its units are 1."""
    other = [factor for factor in factors if bool((factor != 1).any())]
    if not other or not isinstance(module._parameters.get(name), Tensor):
        return 0
    reparametrise(module, name, *other)
    return 1


def _units(weight: Tensor, axis: int) -> Tensor:
    """Return the power of two nearest to the size of each slice over the median one, ready to broadcast."""
    leg = Leg(tensor="weight", axis=axis, size=weight.shape[axis])
    octaves = deviation(weight, leg).nan_to_num(nan=0.0).round().clamp(-120, 120)
    shape = [1] * weight.ndim
    shape[axis] = -1
    return torch.exp2(octaves).view(shape)


def _norms(model: nn.Module) -> list[nn.Module]:
    """List modules with one gain per channel."""
    return [
        module
        for module in model.modules()
        if isinstance(gain := module._parameters.get("weight"), Tensor) and gain.ndim == 1
    ]
