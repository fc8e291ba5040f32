"""Exact damped natural gradient in the space of the outputs, for small nets: Amari 1998; Ren & Goldfarb 2019, arXiv 1906.02353."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from specdef.attacks.optimizers.base import Params, decay
from specdef.attacks.optimizers.scales import scales
from specdef.errors import SpecDefError

LARGEST = 1 << 17
"""Parameters up to which it is meant to be used."""

OUTPUTS = 4096
"""Numbers a batch may put out: a dense matrix of that size is solved in every step."""

ENTRIES = 1 << 27
"""Numbers of the largest tensor's Jacobian: 1 GiB in float64."""


class NaturalGradient(torch.optim.Optimizer):
    """w <- w - lr (F + l D)^-1 g, F = J^T S J, J the outputs' Jacobian, S the loss's Hessian by the outputs, g = J^T u.

    F is the Gauss-Newton matrix: for cross-entropy the Fisher matrix. D is diagonal: 1 over the square of every weight's scale
    at the first step (that of its row times that of its column; a vector's 0 stays), so that scales of channels, taken back by
    another layer, change neither the path nor the rounding. (So does the diagonal of F, but that all but vanishes with F where
    a net is sure of wrong answers, and steps have no bound.) By (F + l D)^-1 J^T = D^-1 J^T (S K + l I)^-1 with
    K = J D^-1 J^T a system as large as the outputs is solved, in float64; J is only there one tensor at a time. Of bfloat16
    weights S is too coarse, and steps go astray.

    Args:
        params: Parameters or groups.
        model: Whose outputs the loss is a function of.
        lr: Learning rate; 1 is the Gauss-Newton step.
        weight_decay: Decoupled.
        damping: l.
        max_grad_norm: Norm g is clipped to.

    Raises:
        SpecDefError: There are too many parameters.
    """

    def __init__(
        self,
        params: Params,
        model: nn.Module,
        *,
        lr: float,
        weight_decay: float = 0.0,
        damping: float = 1e-2,
        max_grad_norm: float | None = None,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.damping, self.max_grad_norm = damping, max_grad_norm
        count = sum(p.numel() for group in self.param_groups for p in group["params"])
        if count > LARGEST:
            raise _too_large(f"{count} parameters are more than {LARGEST}")
        self.outputs: Tensor | None = None
        model.register_forward_hook(self._keep)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: Returns the loss with its graph.

        Returns:
            The loss.

        Raises:
            ValueError: There is no closure.
            SpecDefError: The batch has too many outputs.
        """
        if closure is None:
            raise ValueError("step needs a closure that returns the loss with its graph.")
        parameters = [p for group in self.param_groups for p in group["params"]]
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            value = closure()
            outputs = self.outputs
            assert outputs is not None
            largest = max(p.numel() for p in parameters)
            if outputs.numel() > OUTPUTS or outputs.numel() * largest > ENTRIES:
                raise _too_large(f"a batch puts out {outputs.numel()} numbers")
            u, S = _output_derivatives(value, outputs)
        K, inverses = torch.zeros_like(S), []
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["scales"] = scales(parameter)
            inverses.append(state["scales"].double().square())
            J = _jacobian(outputs, parameter)
            K += (J * inverses[-1].reshape(-1)) @ J.mT
        grads = _pull_back(outputs, u, parameters)
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad
        factor = 1.0
        if self.max_grad_norm is not None:
            factor = min(1.0, self.max_grad_norm / float(nn.utils.get_total_norm(grads)))
        system = S @ K
        system.diagonal().add_(self.damping)
        pulled = _pull_back(outputs, torch.linalg.solve(system, u), parameters)
        directions = iter(p * d for p, d in zip(pulled, inverses, strict=True))
        self.outputs = None
        for group in self.param_groups:
            for parameter in group["params"]:
                decay(parameter, group)
                parameter.sub_(next(directions), alpha=group["lr"] * factor)
        return value.detach()

    def _keep(self, model: nn.Module, args: Any, output: Any) -> None:
        if torch.is_grad_enabled():
            out = getattr(output, "logits", output)
            self.outputs = out[0] if isinstance(out, tuple) else out


def _output_derivatives(value: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor]:
    """Return gradient `[R]` and Hessian `[R, R]` of a loss by the outputs, in float64."""
    (u,) = torch.autograd.grad(value, outputs, create_graph=True)
    flat = u.reshape(-1)
    # One by one: the closed form of cross-entropy has no rule for batches of vectors.
    rows = [torch.autograd.grad(x, outputs, retain_graph=True)[0].reshape(-1) for x in flat]
    return flat.detach().double(), torch.stack(rows).double()


def _jacobian(outputs: Tensor, parameter: Tensor) -> Tensor:
    eye = torch.eye(outputs.numel()).to(outputs)
    with torch.enable_grad():
        (J,) = torch.autograd.grad(
            outputs.reshape(-1), parameter, eye, retain_graph=True, is_grads_batched=True, allow_unused=True,
        )  # fmt: skip
    if J is None:  # the outputs do not depend on it
        return torch.zeros(len(eye), parameter.numel(), dtype=torch.float64, device=eye.device)
    return J.reshape(len(eye), -1).double()


def _pull_back(outputs: Tensor, vector: Tensor, parameters: list[Tensor]) -> tuple[Tensor, ...]:
    """Return J^T times a vector, cut as the parameters are."""
    return torch.autograd.grad(
        outputs, parameters, vector.view(outputs.shape).to(outputs), retain_graph=True,
        allow_unused=True, materialize_grads=True,
    )  # fmt: skip


def _too_large(found: str) -> SpecDefError:
    return SpecDefError(
        f"the exact natural gradient is for small nets: {found}",
        hint="Use kfac-1e-3, which takes one layer at a time, or smaller batches.",
    )
