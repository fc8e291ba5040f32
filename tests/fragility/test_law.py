"""The constant of the law: gamma bends the path, and the sensitive subspace turns as the weights move."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev

import specdef
from planted import gaussian, planted
from specdef.curvature.losses import ClassificationLoss, MSELoss
from specdef.fragility.acceleration import output_acceleration
from specdef.fragility.alignment import AlignmentLoss
from specdef.fragility.law import QuarticLaw
from specdef.fragility.path import QuadraticPath
from specdef.fragility.subspace import leading_subspace
from specdef.fragility.task import Metric

from .toys import DOUBLE, linear, regression


class Setting:
    """A tanh network, the outputs as a function of a flat vector, and a task given by g and H alone."""

    def __init__(self, loss, outputs: int, *, orthogonal: bool = True, metric: Metric | None = None, dtype=DOUBLE) -> None:  # fmt: skip
        self.metric = metric = metric or Metric()
        self.net = nn.Sequential(nn.Linear(4, 12), nn.Tanh(), nn.Linear(12, outputs)).to(dtype)
        self.names = [name for name, _ in self.net.named_parameters()]
        n = sum(p.numel() for p in self.net.parameters())
        self.theta = 0.5 * gaussian(n, 1)
        with torch.no_grad():
            nn.utils.vector_to_parameters(self.theta.to(dtype), self.net.parameters())
        self.theta = nn.utils.parameters_to_vector(self.net.parameters()).detach().double()
        self.x = gaussian(12, 2).view(3, 4)
        y = torch.zeros(3, outputs) if isinstance(loss, MSELoss) else torch.arange(3) % outputs
        batches = [(self.x.to(dtype), y.to(dtype) if y.is_floating_point() else y)]
        self.operator = specdef.GGNOperator(self.net, batches, loss)
        self.alignment = AlignmentLoss(self.operator)
        self.J = jacrev(self.outputs)(self.theta)
        g = gaussian(n, 3)
        if orthogonal:
            Q = torch.linalg.qr(metric.scale(self.J).T)[0]
            g = g - Q @ (Q.T @ g)
        self.g, self.H = g, planted(torch.linspace(0.0, 2.0, n, dtype=DOUBLE), 4)  # in the metric
        self.fisher = metric.operator(self.operator)
        self.path = QuadraticPath(specdef.MatrixOperator(self.H.to(dtype)), g.to(dtype), 6)

    def outputs(self, theta):
        shapes = [p.shape for p in self.net.parameters()]
        parts = theta.split([shape.numel() for shape in shapes])
        weights = {k: v.view(s) for k, v, s in zip(self.names, parts, shapes, strict=True)}
        return functional_call(self.net, weights, (self.x.to(theta),)).reshape(-1)

    def oracle(self, B) -> float:
        v = self.metric.scale(self.g)
        turning = jacrev(lambda u: jacrev(self.outputs)(u) @ v)(self.theta) @ v
        w = self.J @ self.metric.scale(self.H @ self.g) + turning
        return math.sqrt(float(w @ B @ w))

    def measured(self) -> tuple[float, float]:
        Q = self.path.basis
        matrix = torch.stack([Q @ (self.fisher @ q) for q in Q]).double()
        floor, before = self.alignment.rounding_floor(), self.alignment.num_losses
        found = output_acceleration(
            self.alignment, self.path, self.metric, matrix=matrix, floor=floor, horizon=1.0,
            largest=float(specdef.top_eigenvalues(self.fisher, 1).values[0]),
        )  # fmt: skip
        assert self.alignment.num_losses == before + 4
        return found


def cross_entropy_hessian(setting, classes):
    p = torch.softmax(setting.outputs(setting.theta).view(-1, classes), -1)
    return torch.block_diag(*[q.diag() - torch.outer(q, q) for q in p]) / len(p)


def test_the_true_alignment_loss_has_the_whole_constant():
    """Along the exact linear flow A(t) / t^4 is |J H g + f''(g, g)|_B^2 / 8; gamma^2 / 8 is a small part of it."""
    setting = Setting(MSELoss(), 2)
    found, error = setting.measured()
    rank = 6
    M = leading_subspace(setting.operator, Metric(), energy=1.0, max_rank=rank, seed=0, fisher="ggn", parameters=())  # fmt: skip
    law = QuarticLaw.of(M, setting.path)
    assert law.overlap < 1e-10 and M.rank == rank
    t = 1e-3
    values, V = torch.linalg.eigh(setting.H)
    flown = torch.where(values.abs() > 1e-12, -torch.expm1(-t * values) / values, t)
    constant = setting.alignment(-V @ (flown * (V.T @ setting.g))) / t**4
    assert found**2 / 8 == pytest.approx(constant, rel=0.01)
    assert error < 1e-3 * found
    assert law.gamma**2 / 8 < constant / 10


@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32])
@pytest.mark.parametrize("orthogonal", [True, False])
def test_dense_oracle(dtype, orthogonal):
    """Both losses, with the gradient in the subspace or not, and in a metric; off by no more than is stated."""
    n = 4 * 12 + 12 + 12 * 3 + 3
    metric = Metric.of((0.2 + gaussian(n, 7).abs()).to(dtype))
    double = Metric(root=metric.root.double(), inverse_root=metric.inverse_root.double())
    for loss in (MSELoss(), ClassificationLoss()):
        setting = Setting(loss, 3, orthogonal=orthogonal, metric=double, dtype=dtype)
        squared = isinstance(loss, MSELoss)
        B = 2 / 9 * torch.eye(9, dtype=DOUBLE) if squared else cross_entropy_hessian(setting, 3)
        truth = setting.oracle(B)
        setting.metric = metric
        setting.fisher = metric.operator(setting.operator)
        found, error = setting.measured()
        assert abs(found - truth) <= error < (1e-5 if dtype == DOUBLE else 0.05) * truth


@pytest.mark.parametrize("size", [0.0, 1e-8, 1e8])
def test_outputs_of_any_size(size):
    """Neither an output layer of zeros nor outputs that drown in rounding are taken for an acceleration of nothing."""
    toy = regression()
    w, (X, _), (A, y) = size * toy.model.weight.detach()[0], toy.task[0], toy.aligned[0]
    task = [(X, (X @ w - torch.linalg.solve(X.T, toy.g * 10))[:, None])]
    for dtype in (DOUBLE, torch.float32):
        data = [[(a.to(dtype), b.to(dtype)) for a, b in batches] for batches in ([(A, y)], task)]
        report = specdef.fragility(linear(w).to(dtype), *data, learning_rate=1e-3, steps=10)
        truth = float((toy.values @ (toy.U @ (toy.H @ toy.g)) ** 2).sqrt())
        assert abs(report.acceleration - truth) <= report.acceleration_error
        if size < 1 or dtype == DOUBLE:
            assert report.acceleration_error < 0.05 * truth


def test_linear_outputs_have_gamma_alone():
    """f'' = 0, and the subspace is all of F: the acceleration is gamma. Of a part of it, it is more."""
    report = regression().diagnose(1e-3, 20)
    assert report.acceleration == pytest.approx(report.gamma, rel=1e-6)
    assert report.acceleration_error < 1e-3 * report.gamma
    part = regression().diagnose(1e-3, 20, max_rank=2)
    assert part.acceleration == pytest.approx(report.acceleration, rel=1e-6)
    assert part.gamma < part.acceleration
    values = report.to_dict()
    assert values["acceleration"] == report.acceleration
    assert values["acceleration_error"] == report.acceleration_error
