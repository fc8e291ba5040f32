"""Weights trained in other units: W = a V b with V trained, the step size per row and column for every optimiser.

A step on V moves W by (a b)^2 times the gradient under gradient descent, and by a b times the sign of it under Adam: dividing
learning rates by the right power is the optimiser's own business then.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.utils import parametrize


class Units(nn.Module):
    """V to W = V times the factors, one after the other.

    Args:
        *factors: Powers of two that broadcast to the weight.
    """

    def __init__(self, *factors: Tensor) -> None:
        super().__init__()
        for number, factor in enumerate(factors):
            self.register_buffer(f"factor{number}", factor)

    def forward(self, values: Tensor) -> Tensor:
        """Return W."""
        for factor in self.buffers():
            values = values * factor
        return values

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return the V of a W."""
        for factor in self.buffers():
            weight = weight / factor
        return weight


def reparametrise(module: nn.Module, name: str, *factors: Tensor) -> None:
    """Train a parameter in other units.

    Args:
        module: Its owner, changed in place; the parameter keeps its value, and its name when it is read.
        name: The parameter's name in it.
        *factors: Powers of two that broadcast to it.
    """
    weight = module.get_parameter(name)
    units = Units(*(factor.to(weight) for factor in factors))
    parametrize.register_parametrization(module, name, units)
