"""Models and callers that once gave wrong numbers or an unclear error: each against plain autograd or a twin model."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from specdef.curvature.losses import ClassificationLoss, MSELoss
from specdef.curvature.operators import (
    CurvatureOperator,
    EmpiricalFisherOperator,
    GGNOperator,
    HessianOperator,
)
from specdef.errors import SecondOrderError, SpecDefError, StaleGraphError

OPERATORS: tuple[type[CurvatureOperator], ...] = (HessianOperator, GGNOperator, EmpiricalFisherOperator)  # fmt: skip


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X, Y = rand(6, 5), torch.tensor([0, 2, 1, 1, 0, 2])


class Net(nn.Module):
    """Two layers that a given function uses as it likes."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 5).double(), nn.Linear(5, 3).double()
        with torch.no_grad():
            for i, p in enumerate(self.parameters()):
                p.copy_(rand(*p.shape, seed=i) / 2)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def plain(net: nn.Module, x: Tensor) -> Tensor:
    return net.b(functional.silu(net.a(x)))


def finite_difference(operator: CurvatureOperator, v: Tensor, step: float = 1e-5) -> Tensor:
    return (operator.gradient_at(step * v) - operator.gradient_at(-step * v)) / (2 * step)


# --- numbers


def its_own_gradient(net: nn.Module, x: Tensor) -> Tensor:
    with torch.enable_grad():
        z = x.detach().requires_grad_()
        h = net.b(torch.tanh(net.a(z)))
        (slope,) = torch.autograd.grad(h.sum(), z, create_graph=True)
    return h + slope[:, :3]


def row_weight(net: nn.Module, x: Tensor) -> Tensor:
    return net.b(torch.tanh(functional.linear(x, net.a.bias))[:, None] * torch.ones(5).to(x))


def mapped(net: nn.Module, x: Tensor) -> Tensor:
    return net.b(torch.func.vmap(lambda row: functional.silu(net.a(row)))(x))


def mapped_gradient(net: nn.Module, x: Tensor) -> Tensor:
    return net.b(torch.func.vmap(torch.func.grad(lambda row: torch.tanh(net.a(row)).sum()))(x))


def tangent(net: nn.Module, x: Tensor) -> Tensor:
    return net.b(torch.func.jvp(lambda z: torch.tanh(net.a(z)), (x,), (x,))[1])


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # jvp imports it
@pytest.mark.parametrize(
    "function", [plain, its_own_gradient, row_weight, mapped, mapped_gradient, tangent]
)
@pytest.mark.parametrize("kind", [HessianOperator, GGNOperator])
def test_models_that_use_autograd_themselves(
    kind: type[CurvatureOperator], function: Callable[[Any, Tensor], Tensor]
) -> None:
    net = Net(function)
    operator = kind(net, [(X, Y)], ClassificationLoss())
    unfused = kind(net, [(X, Y)], ClassificationLoss())
    unfused._target.knows = lambda weight: False  # type: ignore[method-assign]
    v = rand(operator.shape[0], seed=7)
    torch.testing.assert_close(operator @ v, unfused @ v)
    if kind is HessianOperator:
        torch.testing.assert_close(operator @ v, finite_difference(operator, v), rtol=1e-6, atol=1e-8)  # fmt: skip


def test_weight_norm_has_a_symmetric_hessian() -> None:
    net = Net(plain)
    torch.nn.utils.parametrizations.weight_norm(
        net.a
    )  # torch's second derivative of it is wrong on the CPU
    operator = HessianOperator(net, [(X, Y)], ClassificationLoss())
    dense = operator.to_dense()
    torch.testing.assert_close(dense, dense.T)
    v = rand(operator.shape[0], seed=7)
    torch.testing.assert_close(operator @ v, finite_difference(operator, v), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    "surroundings",
    [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", dtype=torch.bfloat16)],
    ids=["no_grad", "inference_mode", "autocast"],
)
@pytest.mark.parametrize("kind", OPERATORS)
def test_the_callers_modes_change_nothing(
    kind: type[CurvatureOperator], surroundings: Callable[[], AbstractContextManager[Any]]
) -> None:
    net = Net(plain).float()
    outside, inside = (kind(net, [(X, Y)], ClassificationLoss()) for _ in range(2))
    v = rand(outside.shape[0], seed=7).float()
    with surroundings():
        product, slope, loss = inside @ v, inside.gradient(), inside.loss()
        again = inside @ v
    for value in (product, again, inside @ v):
        assert torch.equal(value.clone(), outside @ v)
    assert torch.equal(slope.clone(), outside.gradient()) and loss == outside.loss()


def test_shapes_of_squared_errors() -> None:
    targets = rand(6, 3, seed=3)
    expected = EmpiricalFisherOperator(Net(plain), [(X, targets)], MSELoss()).to_dense()
    lifted = Net(lambda net, x: plain(net, x)[:, None])
    found = EmpiricalFisherOperator(lifted, [(X, targets)], MSELoss()).to_dense()
    torch.testing.assert_close(found, expected)
    with pytest.raises(SpecDefError, match="do not match"):
        HessianOperator(Net(plain), [(X, targets.T.contiguous())], MSELoss()).loss()


def test_a_broken_product_leaves_nothing_behind() -> None:
    operator = HessianOperator(Net(plain), [(X, Y), (2 * X, Y)], ClassificationLoss())
    v = rand(operator.shape[0], seed=7)
    expected = operator @ v
    product = operator._product

    def interrupted(graph: Any, vector: Tensor, *, keep: bool) -> Any:
        if graph is operator._graphs[1]:
            raise KeyboardInterrupt
        return product(graph, vector, keep=keep)

    operator._product = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        operator @ v
    assert operator._target.flat is None
    operator._product = product  # type: ignore[method-assign]
    assert torch.equal(operator @ v, expected)


# --- what is refused


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", OPERATORS)
def test_checkpointed_activations_are_refused(
    kind: type[CurvatureOperator], reentrant: bool
) -> None:
    def function(net: nn.Module, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_() if reentrant else x
        return net.b(checkpoint(lambda z: functional.silu(net.a(z)), x, use_reentrant=reentrant))

    operator = kind(Net(function), [(X, Y)], ClassificationLoss())
    v = rand(operator.shape[0], seed=7)
    # Its recomputation would take the model's own weights, whatever the displacement.
    for use in (lambda: operator @ v, operator.gradient, lambda: operator.gradient_at(v)):
        with pytest.raises(SecondOrderError, match="checkpoints its activations") as caught:
            use()
        assert "gradient_checkpointing_disable" in caught.value.hint


def test_parameters_that_are_gone_or_reshaped() -> None:
    def twice(net: nn.Module, x: Tensor) -> Tensor:
        return plain(net, net.c(x))

    for change in ("tied", "reshaped"):
        net = Net(twice)
        net.c = nn.Linear(5, 5).double()
        operator = HessianOperator(net, [(X, Y)], ClassificationLoss())
        if change == "tied":
            net.c.weight = net.a.weight
        else:
            net.c = nn.Linear(5, 4).double()
        with pytest.raises(StaleGraphError, match="changed"):
            operator.loss()
        with pytest.raises(StaleGraphError, match="gone, tied to another, or has another shape"):
            operator.refresh()
