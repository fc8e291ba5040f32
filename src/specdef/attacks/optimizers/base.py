"""What the optimisers written here share: one loop over parameters, and for those that need it the Hessian's products."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

Params = Iterable[Any]
"""Parameters, or groups of them, as torch's optimisers take them."""


class PerTensor(torch.optim.Optimizer, ABC):
    """A method that looks at one tensor at a time.

    Args:
        params: Parameters or groups.
        lr: Learning rate; read from the group at every step.
        weight_decay: Decoupled: w <- (1 - lr weight_decay) w before the update.
        **options: Further defaults of the groups.
    """

    def __init__(
        self, params: Params, *, lr: float, weight_decay: float = 0.0, **options: Any
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, **options})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: Computes the loss and leaves gradients behind; None where they are there already.

        Returns:
            What the closure gave.
        """
        value = evaluated(closure)
        self._apply()
        return value

    def _apply(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._decay(parameter, group)
                    self.update(parameter, wide(parameter.grad), self.state[parameter], group)

    def _decay(self, parameter: Tensor, group: dict[str, Any]) -> None:
        decay(parameter, group)

    @abstractmethod
    def update(
        self, parameter: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        """Change a parameter in place.

        Args:
            parameter: Any floating type.
            grad: Its gradient, in float32 or float64.
            state: What was kept of it; empty at first.
            group: Its group.
        """


class PerTensorCurved(PerTensor):
    """A method that looks at one tensor at a time and at the Hessian's product with random vectors.

    Args:
        params: Parameters or groups.
        lr: Learning rate.
        weight_decay: Decoupled.
        max_grad_norm: Norm gradients are clipped to, all together; None does not clip.
        every: Steps from one product to the next.
        **options: Further defaults of the groups.
    """

    def __init__(
        self,
        params: Params,
        *,
        lr: float,
        weight_decay: float = 0.0,
        max_grad_norm: float | None = None,
        every: int = 1,
        **options: Any,
    ) -> None:
        super().__init__(params, lr=lr, weight_decay=weight_decay, **options)
        self.max_grad_norm, self.every, self.count = max_grad_norm, every, 0
        self.generator = torch.Generator().manual_seed(torch.initial_seed())

    @abstractmethod
    def draw(self, parameter: Tensor) -> Tensor:
        """Return a random vector shaped like a parameter."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: Returns the loss with its graph.

        Returns:
            The loss.
        """
        parameters = [p for group in self.param_groups for p in group["params"]]
        due = self.count % self.every == 0
        probes = [self.draw(p) for p in parameters] if due else None
        value, products = differentiate(closure, parameters, probes)
        if probes is not None:
            for parameter, probe, product in zip(parameters, probes, products, strict=True):
                self.state[parameter].update(probe=wide(probe), product=wide(product))
        if self.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)
        self._apply()
        self.count += 1
        return value


def decay(parameter: Tensor, group: dict[str, Any]) -> None:
    """Decay a parameter, decoupled from its gradient: w <- (1 - lr weight_decay) w, by its group's numbers."""
    if group["weight_decay"]:
        parameter.mul_(1 - group["lr"] * group["weight_decay"])


def evaluated(closure: Callable[[], Any] | None) -> Any:
    """Return what a closure gives, run with gradients whatever the caller's mode; None without one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def differentiate(
    closure: Callable[[], Any] | None, parameters: Sequence[Tensor], probes: list[Tensor] | None
) -> tuple[Tensor, list[Tensor]]:
    """Leave the gradients of a loss behind in `grad`, and return the Hessian's product with a vector.

    Args:
        closure: Returns the loss with its graph.
        parameters: What to differentiate by.
        probes: The vector, cut as the parameters are; None saves the second derivative.

    Returns:
        The loss, and the product, cut as the parameters are; zeros where the loss is linear, nothing without probes.

    Raises:
        ValueError: There is no closure.
    """
    if closure is None:
        raise ValueError("step needs a closure that returns the loss with its graph.")
    # torch's fused attention has no second derivative on a CPU.
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        value = closure()
        grads = torch.autograd.grad(
            value, parameters, create_graph=probes is not None, allow_unused=True
        )
        products: list[Tensor] = []
        if probes is not None:
            curved = [(g, v) for g, v in zip(grads, probes, strict=True) if g is not None and g.requires_grad]  # fmt: skip
            found: Sequence[Tensor | None] = [None] * len(parameters)
            if curved:
                outputs, vectors = zip(*curved, strict=True)
                found = torch.autograd.grad(outputs, parameters, vectors, allow_unused=True)
            products = [torch.zeros_like(p) if h is None else h for p, h in zip(parameters, found, strict=True)]  # fmt: skip
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = None if grad is None else grad.detach()
    return value.detach(), products


def wide(x: Tensor) -> Tensor:
    """Return a tensor in float64 if it is, otherwise in float32: bfloat16 is too coarse for running averages."""
    return x if x.dtype == torch.float64 else x.float()


def gaussian(like: Tensor, generator: torch.Generator) -> Tensor:
    """Draw standard normal numbers shaped like a tensor; the same on every device."""
    return torch.randn(like.shape, generator=generator).to(like)


def signs(like: Tensor, generator: torch.Generator) -> Tensor:
    """Draw -1 and 1 with even chances, shaped like a tensor; the same on every device."""
    return (2 * torch.randint(0, 2, like.shape, generator=generator) - 1).to(like)
