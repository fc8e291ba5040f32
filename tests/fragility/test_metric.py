"""The optimiser's metric: Adam in theta is gradient descent in P^(1/2) theta."""

from __future__ import annotations

import pytest
import torch

import specdef
from planted import gaussian
from specdef.fragility.law import QuarticLaw
from specdef.fragility.path import QuadraticPath, clocks, share
from specdef.fragility.subspace import leading_subspace
from specdef.fragility.task import Metric, TaskLoss
from specdef.rates.adaptive import Adam
from specdef.rates.linear import GradientDescent, HeavyBall, Nesterov

from .toys import DOUBLE, linear, regression


def reparametrised(toy, root):
    """The same function of phi = root * theta: every input is divided by root."""
    weight = toy.model.weight.detach()[0]
    return (
        linear(root * weight),
        [(X / root, y) for X, y in toy.aligned],
        [(X / root, y) for X, y in toy.task],
    )


def test_adam_is_descent_in_its_own_coordinates():
    toy = regression()
    found = toy.diagnose(1e-4, 30, optimizer=Adam(beta1=0.0, eps=1e-3))
    root = (toy.g.abs() + 1e-3).sqrt()
    assert torch.allclose(found.subspace.metric, root, rtol=1e-9)
    net, aligned, task = reparametrised(toy, root)
    plain = specdef.fragility(net, aligned, task, learning_rate=1e-4, steps=30, krylov_steps=20)
    for name in ("gamma", "initial_overlap", "gradient_norm", "lambda_min", "gamma_quantile"):
        assert getattr(found, name) == pytest.approx(getattr(plain, name), rel=1e-6), name
    for curve in ("alignment", "taylor", "in_subspace", "quartic"):
        assert getattr(found.forecast, curve) == pytest.approx(
            getattr(plain.forecast, curve), rel=1e-6
        )
    assert found.forecast.onset_steps == pytest.approx(plain.forecast.onset_steps, rel=1e-6)


def test_a_metric_of_ones_is_none():
    toy = regression(overlap=0.3)
    n = len(toy.g)
    H, F = specdef.MatrixOperator(toy.H), specdef.MatrixOperator(toy.F)
    laws = []
    for metric in (Metric(), Metric.of(torch.ones(n, dtype=DOUBLE))):
        path = QuadraticPath(metric.operator(H), metric.scale(toy.g), n)
        M = leading_subspace(F, metric, energy=1.0, max_rank=3, seed=0, fisher="ggn", parameters=())
        laws.append(QuarticLaw.of(M, path))
    for name in ("a", "b", "gamma", "overlap", "coupling_norm"):
        assert getattr(laws[0], name) == pytest.approx(getattr(laws[1], name), rel=1e-12)


def test_the_size_of_the_task_loss_does_not_matter_to_adam():
    toy = regression()
    X, y = toy.task[0]
    theta = toy.model.weight.detach()[0]
    # The residual and the inputs grow by 10 each: the loss, its gradient and its Hessian by 100.
    larger = [(10 * X, 10 * y)]
    assert torch.allclose(10 * y[:, 0] - 10 * X @ theta, 10 * (y[:, 0] - X @ theta))
    options = {"optimizer": Adam(eps=1e-15)}
    one, other = toy.diagnose(1e-4, 30, **options), toy.diagnose(1e-4, 30, task=larger, **options)
    assert one.gamma == pytest.approx(other.gamma, rel=1e-6)
    assert one.forecast.alignment == pytest.approx(other.forecast.alignment, rel=1e-6)


def test_adam_is_followed_while_its_metric_stays():
    toy = regression()
    report = toy.diagnose(1e-4, 60, optimizer="adam", observe=True)
    assert report.applicable and report.forecast.model_error.gradient_change < 0.05
    late = report.observed.alignment[-1] / report.forecast.alignment[-1]
    assert late == pytest.approx(1, abs=0.2)
    # How far the preconditioner moves is measured, and is most of what the band is made of.
    assert report.forecast.model_error.metric > report.forecast.model_error.path
    assert (
        report.observed.band_coverage > 0.9
        and report.forecast.high[-1] < 2 * report.forecast.alignment[-1]
    )


def test_a_coordinate_without_a_gradient_does_not_move():
    """Inputs that are zero in the task alone: Adam leaves their weights, and the subspace has no part in them."""
    toy = regression(overlap=0.3)
    X, y = toy.task[0]
    blind = [(torch.cat([X[:, :-2], torch.zeros(len(X), 2, dtype=DOUBLE)], 1), y)]
    report = toy.diagnose(1e-3, 10, task=blind, optimizer="adam", observe=True)
    assert float(report.subspace.vectors[:, -2:].abs().max()) == 0
    assert report.initial_overlap > 0 and report.observed.status == "completed"


def test_the_metric_of_cycled_batches_is_the_root_mean_square():
    toy = regression()
    X, y = toy.task[0]
    batches = [(X[:10], y[:10]), (X[10:], y[10:])]
    task = TaskLoss(
        toy.model, batches, specdef.MSELoss(), None, mode="cycled", dtype=DOUBLE, memory_limit=None
    )
    g, metric = task.gradient_and_metric(Adam())
    parts = [specdef.HessianOperator(toy.model, [b], specdef.MSELoss()).gradient() for b in batches]
    p = (sum(part**2 for part in parts) / 2).sqrt() + 1e-8
    assert torch.allclose(metric.root**2, p, rtol=1e-9)
    assert torch.allclose(g, sum(parts) / 2)
    v = gaussian(20, 3)
    dense = [specdef.HessianOperator(toy.model, [b], specdef.MSELoss()) @ v for b in batches]
    assert torch.allclose(task @ v, sum(dense) / 2)


@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_adams_path_with_its_metric_held(beta):
    """A transcription on one eigenvalue, past the step from which the bias correction is left out."""
    h, psi, m = 0.3, 0.0, 0.0
    expected = {}
    for t in range(1, 401):
        m = beta * m + (1 - beta) * (1 - h * psi)
        psi += m / (1 - beta**t)
        expected[t] = psi
    steps = [1, 2, 5, 30, 262, 263, 400]
    found = share(Adam(beta1=beta), torch.tensor([h], dtype=DOUBLE), steps)[:, 0]
    assert found.tolist() == pytest.approx([expected[t] for t in steps], rel=1e-10)


@pytest.mark.parametrize(
    "optimizer", [GradientDescent(), HeavyBall(), Nesterov(), Adam()], ids=lambda o: o.name
)
def test_clocks_are_the_first_two_orders(optimizer):
    """s and r from two tiny rates, against the run itself."""
    steps = [1, 2, 7, 40]
    s, r = clocks(optimizer, steps)
    h = torch.tensor([0.0, 1e-7], dtype=DOUBLE)
    psi = share(optimizer, h, steps)
    assert torch.allclose(s, psi[:, 0]) and s[0] >= 1 - 1e-9
    assert torch.allclose((psi[:, 0] - psi[:, 1]) / 1e-7, r, rtol=1e-4, atol=1e-6)
    assert r[0] == 0
