"""The alignment loss and the sensitive subspace against dense float64 matrices."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.autograd.functional import hessian, jacobian

import specdef
from planted import gaussian
from specdef.curvature.losses import ClassificationLoss, MSELoss
from specdef.fragility.alignment import AlignmentLoss, kl_terms
from specdef.fragility.law import QuarticLaw
from specdef.fragility.path import QuadraticPath
from specdef.fragility.subspace import leading_subspace
from specdef.fragility.task import Metric

DOUBLE = torch.float64


def softmax_model(classes=4, features=5, samples=7, seed=0):
    net = nn.Linear(features, classes, bias=False, dtype=DOUBLE)
    with torch.no_grad():
        net.weight.copy_(gaussian(classes * features, seed).view(classes, features))
    X = gaussian(samples * features, seed + 1).view(samples, features)
    return net, X, torch.arange(samples) % classes


def softmax_fisher(net, X):
    """1/N sum_i (diag p - p p^T) (x) x x^T, written down."""
    p = torch.softmax(X @ net.weight.detach().T, -1)
    blocks = [torch.kron(q.diag() - torch.outer(q, q), torch.outer(x, x)) for q, x in zip(p, X, strict=True)]  # fmt: skip
    return sum(blocks) / len(X)


def test_softmax_fisher_subspace():
    net, X, y = softmax_model()
    F = softmax_fisher(net, X)
    values, vectors = torch.linalg.eigh(F)
    found = specdef.fisher_subspace(net, [(X, y)], ClassificationLoss(), energy=0.8)
    top = values.flip(0)[: found.rank]
    assert torch.allclose(found.values, top, rtol=1e-6)
    U, V = found.vectors, vectors.flip(1)[:, : found.rank].T
    assert torch.allclose(U.T @ U, V.T @ V, atol=1e-5)
    assert abs(found.trace - float(F.trace())) <= 4 * found.trace_error + 1e-9
    assert float(top.sum()) >= 0.8 * found.trace > float(top[:-1].sum())
    assert found.energy == pytest.approx(float(top.sum() / found.trace), rel=1e-9)


def test_kl_is_the_fisher_form_to_third_order():
    net, X, y = softmax_model()
    F = softmax_fisher(net, X)
    A = AlignmentLoss(
        specdef.GGNOperator(net, [(X[:3], y[:3]), (X[3:], y[3:])], ClassificationLoss())
    )
    d = gaussian(20, 5)
    errors = [A(s * d) / float(s * d @ F @ (s * d) / 2) - 1 for s in (1e-2, 1e-4, 1e-6)]
    assert abs(errors[0]) < 0.05 and abs(errors[1]) < 5e-4 and abs(errors[2]) < 1e-5
    assert errors[0] / errors[1] == pytest.approx(
        100, rel=0.05
    )  # the error is of first order in |d|
    assert A(torch.zeros(20)) == 0.0


def test_kl_terms_are_the_divergence():
    z, w = gaussian(12, 1).view(3, 4), 30 * gaussian(12, 2).view(3, 4)
    p, q = torch.log_softmax(z, -1), torch.log_softmax(z + w, -1)
    assert torch.allclose(kl_terms(z, z + w), (p.exp() * (p - q)).sum(-1), rtol=1e-12)
    # Tiny and shifted by a constant: as exact as where it is large.
    small = kl_terms(z, z + 1e-7 * w + 3.0)
    assert torch.allclose(small, kl_terms(z, z + 1e-4 * w) * 1e-6, rtol=5e-3)


def test_mse_alignment_is_the_mean_squared_output():
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    X = gaussian(18).view(6, 3)
    A = AlignmentLoss(specdef.GGNOperator(net, [(X, torch.zeros(6, 2, dtype=DOUBLE))], MSELoss()))
    d = gaussian(A.operator.shape[0], 1) * 0.1
    before = net(X).detach()
    moved = nn.utils.parameters_to_vector(net.parameters()).detach() + d
    nn.utils.vector_to_parameters(moved, net.parameters())
    assert A(torch.zeros_like(d)) == 0
    nn.utils.vector_to_parameters(moved - d, net.parameters())
    assert A(d) == pytest.approx(float((_at(net, moved, X) - before).square().mean()), rel=1e-12)


def _at(net, vector, X):
    slices, start = {}, 0
    for name, p in net.named_parameters():
        slices[name] = vector[start : start + p.numel()].view_as(p)
        start += p.numel()
    return torch.func.functional_call(net, slices, (X,)).detach()


def test_labels_that_do_not_count_do_not_count():
    net, X, y = softmax_model()
    masked = torch.where(torch.arange(7) < 4, y, -100)
    A = AlignmentLoss(specdef.GGNOperator(net, [(X, masked)], ClassificationLoss()))
    B = AlignmentLoss(specdef.GGNOperator(net, [(X[:4], y[:4])], ClassificationLoss()))
    d = gaussian(20, 5)
    assert A(d) == pytest.approx(B(d), rel=1e-12) and A(d) > 0


def test_the_rounding_floor_is_that_of_the_type():
    net, X, y = softmax_model()
    double = AlignmentLoss(specdef.GGNOperator(net, [(X, y)], ClassificationLoss()))
    single = AlignmentLoss(specdef.GGNOperator(net.float(), [(X.float(), y)], ClassificationLoss()))
    assert 0 < double.rounding_floor() < 1e-28 and 1e-16 < single.rounding_floor() < 1e-11


def small_net():
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    with torch.no_grad():
        for i, p in enumerate(net.parameters()):
            p.copy_(gaussian(p.numel(), 10 + i).view_as(p) * 0.6)
    aligned = (gaussian(40, 20).view(10, 4), torch.arange(10) % 3)
    task = (gaussian(48, 21).view(12, 4), torch.arange(12) % 3)
    return net, aligned, task


def naive_matrices(net, aligned, task):
    """Dense Fisher matrices, gradient and Hessian, by autograd on the plain definition."""
    theta = nn.utils.parameters_to_vector(net.parameters()).detach()

    def logits(t, X):
        parts, start = {}, 0
        for name, p in net.named_parameters():
            parts[name] = t[start : start + p.numel()].view_as(p)
            start += p.numel()
        return torch.func.functional_call(net, parts, (X,))

    def task_loss(t):
        return nn.functional.cross_entropy(logits(t, task[0]), task[1])

    X, y = aligned
    J = jacobian(lambda t: logits(t, X), theta)
    p = torch.softmax(logits(theta, X), -1)
    ggn = sum(j.T @ (q.diag() - torch.outer(q, q)) @ j for j, q in zip(J, p, strict=True)) / len(X)
    rows = jacobian(lambda t: nn.functional.cross_entropy(logits(t, X), y, reduction="none"), theta)
    empirical = rows.T @ rows / len(X)
    g = jacobian(task_loss, theta)
    H = hessian(task_loss, theta)
    return {"ggn": ggn.detach(), "empirical": empirical.detach()}, g.detach(), H.detach()


@pytest.mark.parametrize("fisher", ["ggn", "empirical"])
def test_gamma_and_the_law_by_the_paper(fisher):
    """|F^(1/2) P H g| with a dense root and projector, and the law from gamma, a and b as written down."""
    net, aligned, task = small_net()
    F, g, H = naive_matrices(net, aligned, task)
    report = specdef.fragility(
        net, [aligned], [task], learning_rate=1e-3, steps=20, fisher=fisher, max_rank=5, energy=1.0
    )
    values, vectors = torch.linalg.eigh(F[fisher])
    d = report.rank
    assert d == 5 and torch.allclose(report.subspace.values, values.flip(0)[:d], rtol=1e-4)
    V = vectors.flip(1)[:, :d]
    P = V @ V.T
    root = vectors @ values.clamp(min=0).sqrt().diag() @ vectors.T
    gamma = float((root @ P @ H @ g).norm())
    assert report.gamma == pytest.approx(gamma, rel=0.01)
    assert report.initial_overlap == pytest.approx(float((P @ g).norm() / g.norm()), rel=0.01)
    a, b = float((root @ P @ g).norm() ** 2), float((root @ P @ g) @ (root @ P @ H @ g))
    for n, value in zip(report.forecast.steps, report.forecast.taylor, strict=True):
        t, half = 1e-3 * n, 1e-6 * n * (n - 1) / 2
        assert value == pytest.approx(
            (t**2 * a - 2 * t * half * b + half**2 * gamma**2) / 2, rel=0.02
        )
    # The forecast through the whole matrix takes the exact one, whatever the subspace is made of.
    path = [torch.zeros_like(g)]
    for _ in range(20):
        path.append(path[-1] - 1e-3 * (g + H @ path[-1]))
    dense = [float(path[n] @ F["ggn"] @ path[n] / 2) for n in report.forecast.steps]
    assert report.forecast.alignment == pytest.approx(dense, rel=1e-6)


def test_rows_count_once_in_the_empirical_matrix():
    net, aligned, _ = small_net()
    X, y = aligned
    split = [(X[:3], y[:3]), (X[3:], y[3:])]
    one = specdef.fisher_subspace(net, [aligned], ClassificationLoss(), fisher="empirical")
    two = specdef.fisher_subspace(net, split, ClassificationLoss(), fisher="empirical")
    assert torch.allclose(one.values, two.values, rtol=1e-6)


def test_subspace_of_a_metric_is_that_of_the_scaled_matrix():
    net, aligned, _ = small_net()
    operator = specdef.GGNOperator(net, [aligned], ClassificationLoss())
    p = (
        torch.rand(operator.shape[0], generator=torch.Generator().manual_seed(3), dtype=DOUBLE)
        + 0.5
    )
    found = specdef.fisher_subspace(net, [aligned], ClassificationLoss(), metric=p)
    F = p.rsqrt()[:, None] * operator.to_dense() * p.rsqrt()
    assert torch.allclose(found.values, torch.linalg.eigvalsh(F).flip(0)[: found.rank], rtol=1e-5)
    d = gaussian(len(p), 4)
    c = found.vectors @ (p.sqrt() * d)
    assert torch.allclose(found.coordinates(d), c)
    assert found.alignment(d) == pytest.approx(float(found.values @ c**2) / 2)
    assert found.length(d) == pytest.approx(float((p.sqrt() * d).norm()))


def test_a_small_overlap_survives_a_large_eigenvalue_in_float32():
    """The law's first term is 1e-10 of what the largest eigenvalue could make: a plain product would lose it in rounding."""
    n = 50
    U = torch.linalg.qr(gaussian(n * n).view(n, n))[0].T
    F = (U[:1].T @ U[:1]) * 1e6 + torch.eye(n, dtype=DOUBLE) * 1e-6
    g = (U[1] + 1e-5 * U[0]).float()
    H = specdef.MatrixOperator(torch.eye(n) * 0.1)
    Fisher = specdef.MatrixOperator(F.float())
    path = QuadraticPath(H, g, 2)
    found = leading_subspace(
        Fisher, Metric(), energy=0.9, max_rank=1, seed=0, fisher="ggn", parameters=()
    )
    law = QuarticLaw.of(found, path)
    assert law.a == pytest.approx(1e6 * 1e-10, rel=0.2) and math.isfinite(law.gamma)


def test_other_losses_and_arguments_are_refused():
    net, aligned, _ = small_net()
    with pytest.raises(ValueError, match="energy"):
        specdef.fisher_subspace(net, [aligned], ClassificationLoss(), energy=0)
    with pytest.raises(ValueError, match="max_rank"):
        specdef.fisher_subspace(net, [aligned], ClassificationLoss(), max_rank=0)
