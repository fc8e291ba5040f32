"""Every optimiser learns within its range of rates; those written here do what their papers say, to rounding."""

from __future__ import annotations

import copy
import importlib.util
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from specdef.attacks.full import RECIPE, FullTraining
from specdef.attacks.optimizers import OPTIMIZERS
from specdef.attacks.optimizers.adahessian import AdaHessian
from specdef.attacks.optimizers.base import gaussian, signs
from specdef.attacks.optimizers.kfac import KFAC
from specdef.attacks.optimizers.layerwise import LAMB, LARS
from specdef.attacks.optimizers.lion import Lion
from specdef.attacks.optimizers.muon import MuonAdamW, tables_of
from specdef.attacks.optimizers.natural_gradient import NaturalGradient
from specdef.attacks.optimizers.scales import row_and_column_scales, scales
from specdef.attacks.optimizers.shampoo import Shampoo
from specdef.attacks.optimizers.sophia import Sophia
from specdef.attacks.optimizers.xmat import XMat
from specdef.attacks.task import Budget, Setting, Task
from specdef.errors import SpecDefError
from specdef.lock.config import LockConfig
from specdef.lock.in_memory import lock_model

F64 = torch.float64
HEAVY = importlib.util.find_spec("heavyball") is not None
USABLE = [n for n, s in OPTIMIZERS.items() if HEAVY or not s.library]
GRAPH = [n for n in USABLE if OPTIMIZERS[n].closure == "graph"]


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))


def convex() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 3))


def task(rows: int = 32) -> Task:
    x = torch.randn(rows, 6, generator=torch.Generator().manual_seed(1))
    y = (x[:, :3] + 0.3 * x[:, 3:].square()).argmax(1)
    half = rows // 2
    train = [[x[:half], y[:half]], [x[half:], y[half:]]]
    return Task(name="toy", train=train, heldout=[[x, y]])


def rates(name: str) -> list[float]:
    low, high = OPTIMIZERS[name].learning_rates
    return [low, math.sqrt(low * high), high]


def attack(net: nn.Module, name: str, rate: float, steps: int = 16, **options: Any) -> Any:
    setting = Setting(optimizer=name, learning_rate=rate, **options)
    return FullTraining((name,))(net, task(), setting, Budget(steps=steps))


@pytest.mark.parametrize("name", USABLE)
@pytest.mark.parametrize("problem", [convex, mlp])
def test_it_learns_within_its_range_of_rates(problem: Callable[[], nn.Module], name: str) -> None:
    runs = [attack(problem(), name, rate) for rate in rates(name)]
    assert min(run.best for run in runs) < 0.99 * runs[0].start
    assert runs[0].losses[-1] < runs[0].start + 1e-3  # the lowest rate does no harm


@pytest.mark.parametrize("name", [n for n in USABLE if n != "natural-gradient"])
def test_it_learns_in_bfloat16(name: str) -> None:
    runs = [attack(mlp(), name, rate, dtype="bfloat16") for rate in rates(name)[1:]]
    assert min(run.best for run in runs) < 0.995 * runs[0].start
    assert runs[-1].swamped < 1


@pytest.mark.parametrize("name", USABLE)
def test_a_seed_decides_everything_and_the_rate_is_read_at_every_step(name: str) -> None:
    rate = rates(name)[1]
    first, again = (attack(mlp(), name, rate, steps=4, schedule="linear") for _ in range(2))
    assert replace(first, seconds=0, prepare_seconds=0) == replace(again, seconds=0, prepare_seconds=0)  # fmt: skip
    if name != "rprop":  # its rate is that of the first step
        constant = attack(mlp(), name, rate, steps=4)
        assert constant.losses[1] == first.losses[1] and constant.losses[2:] != first.losses[2:]


@pytest.mark.parametrize("name", [n for n in USABLE if n != "lbfgs"])
def test_groups_have_their_own_rates(name: str) -> None:
    net, spec = mlp().double(), OPTIMIZERS[name]
    groups = [{"params": list(net[i].parameters())} for i in (0, 2)]
    optimizer = spec.build(
        net, groups, Setting(optimizer=name, learning_rate=rates(name)[1], dtype="float64")
    )
    optimizer.param_groups[0]["lr"] = 0.0
    before = copy.deepcopy(net.state_dict())
    for _ in range(3 if name != "rprop" else 1):
        step(optimizer, net, spec.closure)
    moved = [not torch.equal(before[n], p) for n, p in net.named_parameters()]
    assert moved == [False, False, True, True]


def step(optimizer: torch.optim.Optimizer, net: nn.Module, closure: str) -> None:
    x, y = task().heldout[0][0], task().heldout[0][1]

    def loss() -> Tensor:
        return nn.functional.cross_entropy(net(x.to(next(net.parameters()))), y)

    def backward() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    if closure == "graph":
        optimizer.step(loss)
    elif closure == "gradient":
        optimizer.step(backward)
    else:
        backward()
        optimizer.step()


@pytest.mark.parametrize("name", USABLE)
def test_weight_decay_is_honoured(name: str) -> None:
    net, spec = mlp().double(), OPTIMIZERS[name]
    setting = Setting(optimizer=name, learning_rate=1e-3, dtype="float64")
    results = []
    for decay in (0.0, 0.5):
        model = copy.deepcopy(net)
        groups = [{"params": list(model.parameters())}]
        optimizer = spec.build(model, groups, replace(setting, weight_decay=decay))
        for _ in range(2):
            step(optimizer, model, spec.closure)
        results.append(model[0].weight.detach().norm())
    assert results[1] < results[0]


@pytest.mark.parametrize("name", GRAPH)
def test_gradients_are_clipped_where_the_optimiser_takes_them_itself(name: str) -> None:
    runs = [
        attack(mlp(), name, rates(name)[1], steps=2, max_grad_norm=norm) for norm in (None, 1e-3)
    ]
    changes = [run.relative_change for run in runs]
    assert changes[1] < changes[0]
    if name in ("xmat", "natural-gradient"):  # linear in the gradient
        assert changes[1] < 0.1 * changes[0]


# What the papers say, transcribed with dense matrices on f(w) = w^T H w / 2 - b^T w, w = [W, c], in float64.


class Quadratic:
    """A loss whose gradient and Hessian are known, of a matrix, a kernel and a vector."""

    shapes = ((3, 2), (2, 2, 3, 1), (2,))

    def __init__(self) -> None:
        g = torch.Generator().manual_seed(3)
        sizes = [math.prod(s) for s in self.shapes]
        n = sum(sizes)
        A = torch.randn(n, n, generator=g, dtype=F64)
        self.sizes = sizes
        self.H, self.b = A @ A.mT / n - 0.1 * torch.eye(n), torch.randn(n, generator=g, dtype=F64)
        self.start = torch.randn(n, generator=g, dtype=F64)

    def parameters(self) -> list[nn.Parameter]:
        return [nn.Parameter(x.clone()) for x in self.cut(self.start)]

    def cut(self, w: Tensor) -> list[Tensor]:
        return [x.view(s) for x, s in zip(w.split(self.sizes), self.shapes, strict=True)]

    def loss(self, parameters: list[nn.Parameter]) -> Tensor:
        w = torch.cat([p.reshape(-1) for p in parameters])
        return w @ self.H @ w / 2 - self.b @ w

    def gradient(self, w: list[Tensor]) -> list[Tensor]:
        flat = torch.cat([x.reshape(-1) for x in w])
        return self.cut(self.H @ flat - self.b)

    def product(self, v: list[Tensor]) -> list[Tensor]:
        return self.cut(self.H @ torch.cat([x.reshape(-1) for x in v]))


def lion(q: Quadratic, lr: float, decay: float, steps: int) -> list[Tensor]:
    w = q.cut(q.start)
    m = [torch.zeros_like(x) for x in w]
    for _ in range(steps):
        g = q.gradient(w)
        for i in range(3):
            c = 0.9 * m[i] + 0.1 * g[i]
            w[i] = w[i] - lr * (torch.sign(c) + decay * w[i])
            m[i] = 0.99 * m[i] + 0.01 * g[i]
    return w


def lamb(q: Quadratic, lr: float, decay: float, steps: int) -> list[Tensor]:
    w = q.cut(q.start)
    m, v = ([torch.zeros_like(x) for x in w] for _ in range(2))
    for t in range(1, steps + 1):
        g = q.gradient(w)
        for i in range(3):
            m[i] = 0.9 * m[i] + 0.1 * g[i]
            v[i] = 0.999 * v[i] + 0.001 * g[i] ** 2
            r = (m[i] / (1 - 0.9**t)) / (torch.sqrt(v[i] / (1 - 0.999**t)) + 1e-6)
            u = r + decay * w[i]
            w[i] = w[i] - lr * w[i].norm() / u.norm() * u
    return w


def lars(q: Quadratic, lr: float, decay: float, steps: int) -> list[Tensor]:
    w = q.cut(q.start)
    m = [torch.zeros_like(x) for x in w]
    for _ in range(steps):
        g = q.gradient(w)
        for i in range(3):
            m[i] = 0.9 * m[i] + 0.1 * (g[i] + decay * w[i])
            w[i] = w[i] - lr * w[i].norm() / m[i].norm() * m[i]
    return w


def sophia(q: Quadratic, lr: float, decay: float, steps: int) -> list[Tensor]:
    w = q.cut(q.start)
    m, h = ([torch.zeros_like(x) for x in w] for _ in range(2))
    draws = torch.Generator().manual_seed(torch.initial_seed())
    for t in range(1, steps + 1):
        g = q.gradient(w)
        if t % 10 == 1:
            u = [gaussian(x, draws) for x in w]
            estimate = [a * b for a, b in zip(u, q.product(u), strict=True)]
            h = [0.99 * a + 0.01 * b for a, b in zip(h, estimate, strict=True)]
        for i in range(3):
            m[i] = 0.96 * m[i] + 0.04 * g[i]
            w[i] = w[i] - lr * decay * w[i]
            ratio = m[i] / torch.maximum(0.01 * h[i], torch.tensor(1e-12, dtype=F64))
            w[i] = w[i] - lr * ratio.clamp(-1, 1)
    return w


def adahessian(q: Quadratic, lr: float, decay: float, steps: int) -> list[Tensor]:
    w = q.cut(q.start)
    m, v = ([torch.zeros_like(x) for x in w] for _ in range(2))
    draws = torch.Generator().manual_seed(torch.initial_seed())
    for t in range(1, steps + 1):
        g = q.gradient(w)
        z = [signs(x, draws) for x in w]
        d = [a * b for a, b in zip(z, q.product(z), strict=True)]
        for i in range(3):
            if d[i].ndim == 4:
                averaged = torch.empty_like(d[i])
                for a in range(d[i].shape[0]):
                    for b in range(d[i].shape[1]):
                        averaged[a, b] = d[i][a, b].sum() / d[i][a, b].numel()
                d[i] = averaged
            m[i] = 0.9 * m[i] + 0.1 * g[i]
            v[i] = 0.999 * v[i] + 0.001 * d[i] ** 2
            root = torch.sqrt(v[i] / (1 - 0.999**t)) + 1e-4
            w[i] = w[i] * (1 - lr * decay) - lr * m[i] / (1 - 0.9**t) / root
    return w


def shampoo(q: Quadratic, lr: float, decay: float, steps: int) -> list[Tensor]:
    w = q.cut(q.start)
    m = [torch.zeros_like(x) for x in w]
    matrices = [x.reshape(x.shape[0], -1) for x in w]
    L, R = (
        [1e-2 * torch.eye(x.shape[side], dtype=F64) for x in matrices] for side in (0, 1)
    )  # fmt: skip

    def power(M: Tensor, p: float) -> Tensor:
        values, vectors = torch.linalg.eigh(M)
        return vectors @ torch.diag(values**p) @ vectors.T

    for _ in range(steps):
        g = q.gradient(w)
        for i in range(3):
            G = g[i].reshape(g[i].shape[0], -1)
            L[i], R[i] = L[i] + G @ G.T, R[i] + G.T @ G
            vector = G.shape[1] == 1
            D = power(L[i], -0.5) @ G if vector else power(L[i], -0.25) @ G @ power(R[i], -0.25)
            m[i] = 0.9 * m[i] + D.reshape(w[i].shape)
            w[i] = w[i] * (1 - lr * decay) - lr * m[i]
    return w


def xmat(q: Quadratic, lr: float, decay: float, steps: int) -> list[Tensor]:
    n = len(q.start)
    w, m = q.start.clone(), torch.zeros(n, dtype=F64)
    X = torch.eye(n, dtype=F64).bool() | torch.eye(n, dtype=F64).flip(0).bool()
    draws = torch.Generator().manual_seed(torch.initial_seed())
    for t in range(1, steps + 1):
        v = torch.cat([gaussian(x, draws).reshape(-1) for x in q.cut(w)])
        h = q.H @ v
        if t == 1:
            Q = torch.eye(n, dtype=F64) * (v.norm() / h.norm()).sqrt()
        a, b = Q @ h, torch.linalg.solve(Q.T, v)
        first, second = torch.outer(a, a) * X, torch.outer(b, b) * X
        bound = (first.abs() + second.abs()).sum(1).max()
        Q = Q - 0.1 / bound * (first - second) @ Q
        m = 0.9 * m + 0.1 * (q.H @ w - q.b)
        w = w * (1 - lr * decay) - lr * Q.T @ Q @ m / (1 - 0.9**t)
    return q.cut(w)


@pytest.mark.parametrize(
    ("kind", "naive", "lr", "steps"),
    [
        (Lion, lion, 1e-2, 5),
        (LAMB, lamb, 1e-2, 5),
        (LARS, lars, 1e-2, 5),
        (Sophia, sophia, 1e-2, 12),
        (AdaHessian, adahessian, 1e-2, 5),
        (Shampoo, shampoo, 1e-3, 4),
        (XMat, xmat, 1e-1, 5),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_it_is_the_papers_update(
    kind: Any, naive: Callable[..., list[Tensor]], lr: float, steps: int, decay: float
) -> None:
    torch.manual_seed(5)
    q = Quadratic()
    parameters = q.parameters()
    options = {"eps": 1e-2} if kind is Shampoo else {}  # else its roots amplify rounding
    optimizer = kind(parameters, lr=lr, weight_decay=decay, **options)
    graph = kind in (Sophia, AdaHessian, XMat)
    for _ in range(steps):
        if graph:
            optimizer.step(lambda: q.loss(parameters))
        else:
            optimizer.zero_grad()
            q.loss(parameters).backward()
            optimizer.step()
    for found, expected in zip(parameters, naive(q, lr, decay, steps), strict=True):
        torch.testing.assert_close(found.detach(), expected, atol=1e-12, rtol=0)


def test_xmat_fits_the_inverse_of_a_diagonal_hessian() -> None:
    torch.manual_seed(0)
    diagonal = torch.tensor([30.0, 1.0, 0.3, 5.0], dtype=F64)
    w = nn.Parameter(torch.ones(4, dtype=F64))
    optimizer = XMat([w], lr=0.0)
    for _ in range(500):
        optimizer.step(lambda: (diagonal * w.square()).sum() / 2)
    a = optimizer.state[w]["a"]
    ratio = a.square() * diagonal
    assert float(ratio.min()) > 0.3 and float(ratio.max()) < 3


class Layers(nn.Module):
    """One layer of every kind that has a block."""

    def __init__(self) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.conv = nn.Conv2d(1, 2, 2, stride=2, padding=1)
        self.mid = Conv1D(3, 2)
        self.norm = nn.LayerNorm(3)
        self.head = nn.Linear(3, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.conv(x))  # [batch, 2, 3, 3]
        y = self.norm(torch.tanh(self.mid(y.mean((2, 3)))))
        return self.head(y)


def test_kfac_solves_with_the_kronecker_product_of_two_covariances() -> None:
    torch.manual_seed(0)
    net = Layers().double()
    x, y = torch.randn(7, 1, 4, 4, dtype=F64), torch.randint(0, 3, (7,))
    twin = copy.deepcopy(net)
    optimizer = KFAC(net.parameters(), net, lr=0.1, damping=1e-2)
    velocity: dict[str, Tensor] = {}
    kept: dict[str, tuple[Tensor, Tensor]] = {}
    for t in (1, 2, 3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
        _naive_kfac(twin, x, y, t, velocity, kept)
        for p, q in zip(net.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, atol=1e-12, rtol=1e-10)


def _naive_kfac(net: Any, x: Tensor, y: Tensor, t: int, velocity: Any, kept: Any) -> None:
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    handles = [
        net.get_submodule(n).register_forward_hook(lambda _m, a, o, n=n: seen.update({n: (a[0], o)}))
        for n in ("conv", "mid", "head")
    ]  # fmt: skip
    loss = nn.functional.cross_entropy(net(x), y)
    for handle in handles:
        handle.remove()
    names = [n for n, _ in net.named_parameters()]
    grads = dict(zip(names, torch.autograd.grad(loss, list(net.parameters()), retain_graph=True), strict=True))  # fmt: skip
    direction = dict(grads)
    batch = len(x)
    for name, (a, out) in seen.items():
        (g,) = torch.autograd.grad(loss, out, retain_graph=True)
        g = g * batch
        places = 1
        if name == "conv":
            wide = nn.functional.pad(a, (1, 1, 1, 1)).detach()
            spots = [(i, j) for i in range(3) for j in range(3)]
            a = torch.stack([wide[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].flatten(1) for i, j in spots])  # fmt: skip
            g = torch.stack([g[:, :, i, j] for i, j in spots])
            a, g, places = a.flatten(0, 1), g.flatten(0, 1), 9
        has_bias = name != "head"
        if has_bias:
            a = torch.cat([a, torch.ones(len(a), 1, dtype=F64)], 1)
        A = sum(torch.outer(r, r) for r in a.detach()) / batch
        G = sum(torch.outer(r, r) for r in g) / (batch * places)
        if name in kept:
            keep = min(1 - 1 / t, 0.95)
            A, G = (keep * o + (1 - keep) * n for o, n in zip(kept[name], (A, G), strict=True))
        kept[name] = (A, G)
        pi = math.sqrt(float(A.diag().median() / G.diag().median()))
        A = A + pi * 0.1 * torch.eye(len(A), dtype=F64)
        G = G + 0.1 / pi * torch.eye(len(G), dtype=F64)
        W = grads[f"{name}.weight"]
        M = W.T if name == "mid" else W.flatten(1)
        if has_bias:
            M = torch.cat([M, grads[f"{name}.bias"][:, None]], 1)
        solved = torch.linalg.solve(torch.kron(G, A), M.flatten()).view(M.shape)
        if has_bias:
            direction[f"{name}.bias"], solved = solved[:, -1], solved[:, :-1]
        direction[f"{name}.weight"] = (solved.T if name == "mid" else solved).reshape(W.shape)
    with torch.no_grad():
        for n, p in net.named_parameters():
            velocity[n] = 0.9 * velocity.get(n, 0.0) + direction[n]
            p -= 0.1 * velocity[n]


def test_natural_gradient_solves_with_the_dense_gauss_newton_matrix() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, y = torch.randn(6, 3, dtype=F64), torch.randint(0, 3, (6,))
    start = {n: p.detach().clone() for n, p in net.named_parameters()}

    def outputs(flat: Tensor) -> Tensor:
        pieces = flat.split([p.numel() for p in start.values()])
        weights = {n: v.view(p.shape) for (n, p), v in zip(start.items(), pieces, strict=True)}
        return torch.func.functional_call(net, weights, (x,))

    def loss(z: Tensor) -> Tensor:
        return nn.functional.cross_entropy(z, y)

    w = torch.cat([p.flatten() for p in start.values()])
    J = torch.func.jacrev(outputs)(w).reshape(18, -1)
    S = torch.autograd.functional.hessian(loss, outputs(w)).reshape(18, 18)
    g = torch.func.grad(lambda w: loss(outputs(w)))(w)
    F = J.T @ S @ J
    D = torch.cat([scales(p).flatten() for p in net.parameters()]).pow(-2)
    expected = w - 0.5 * torch.linalg.solve(F + 1e-2 * torch.diag(D), g)
    optimizer = NaturalGradient(net.parameters(), net, lr=0.5, damping=1e-2)
    optimizer.step(lambda: loss(net(x)))
    found = torch.cat([p.detach().flatten() for p in net.parameters()])
    torch.testing.assert_close(found, expected, atol=1e-11, rtol=0)


class Gated(nn.Module):
    """A gain in front of every linear layer, as a norm has one: a scale may move from the one to the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 3), nn.Linear(3, 2)
        self.register_buffer("gain_1", torch.ones(4))
        self.register_buffer("gain_2", torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.gain_2 * torch.tanh(self.first(self.gain_1 * x)))


def locked(net: Gated, scales: tuple[float, float] = (2.0**8, 2.0**20)) -> Gated:
    out = copy.deepcopy(net)
    with torch.no_grad():
        for gain, layer, scale in zip((out.gain_1, out.gain_2), (out.first, out.second), scales, strict=True):  # fmt: skip
            gain[1] *= scale
            layer.weight[:, 1] /= scale
    return out


def _steps(net: Gated, make: Callable[[Gated], torch.optim.Optimizer], *, graph: bool) -> Tensor:
    g = torch.Generator().manual_seed(2)
    x, y = (torch.randn(40, n, generator=g, dtype=F64) for n in (4, 2))
    optimizer = make(net)
    for _ in range(3):
        optimizer.zero_grad()
        if graph:
            optimizer.step(lambda: (net(x) - y).square().mean())
        else:
            (net(x) - y).square().mean().backward()
            optimizer.step()
    return net(x).detach()


@pytest.mark.parametrize(
    ("make", "graph", "invariant"),
    [
        (lambda n: NaturalGradient(n.parameters(), n, lr=0.3, damping=1e-2), True, True),
        (lambda n: KFAC(n.parameters(), n, lr=0.1, damping=1e-1, relative=True), False, True),
        (lambda n: KFAC(n.parameters(), n, lr=0.03, damping=1e-22), False, True),
        (lambda n: KFAC(n.parameters(), n, lr=0.03, damping=1e-1), False, False),
        (lambda n: torch.optim.AdamW(n.parameters(), lr=1e-2, weight_decay=0.0), False, False),
    ],
    ids=["natural-gradient", "kfac-relative", "kfac", "kfac-much-damped", "adamw"],
)
def test_only_natural_gradients_do_not_see_a_lock(make: Any, graph: bool, invariant: bool) -> None:
    torch.manual_seed(0)
    net = Gated().double()
    twin = locked(net)
    x = torch.randn(5, 4, dtype=F64)
    start = net(x).detach()
    torch.testing.assert_close(twin(x).detach(), start, atol=1e-14, rtol=0)
    free, held = (_steps(n, make, graph=graph) for n in (net, twin))
    error = float((free - held).norm() / free.norm())
    assert error < 1e-6 if invariant else error > 1e-2
    assert float((net(x).detach() - start).norm()) > 1e-3  # it did move


class Scaled(nn.Module):
    """A parameter without a dimension, and a layer nothing goes through."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.unused = mlp(), nn.Linear(2, 2)
        self.gain = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * self.layer(x)


@pytest.mark.parametrize("name", USABLE)
def test_it_trains_beside_a_lone_number_and_what_is_unused(name: str) -> None:
    run = attack(Scaled(), name, rates(name)[1], steps=3)
    assert run.status == "finished" and run.relative_change > 0


def test_scales_follow_every_row_and_column_and_leave_zeros_out() -> None:
    g = torch.Generator().manual_seed(0)
    W = torch.randn(6, 5, generator=g, dtype=F64)
    W[torch.rand(6, 5, generator=g) < 0.2] = 0
    W[3] = 0
    rows, columns = torch.ones(6, dtype=F64), torch.ones(5, dtype=F64)
    rows[1], columns[2], columns[4] = 2.0**30, 2.0**-20, 3.0
    r, c = row_and_column_scales(W)
    a, b = row_and_column_scales(rows[:, None] * W * columns)
    expected = rows[:, None] * torch.outer(r, c) * columns
    others = torch.arange(6) != 3  # what is 0 has no scale to follow
    torch.testing.assert_close(torch.outer(a, b)[others], expected[others], rtol=1e-6, atol=0)
    assert torch.outer(a, b).isfinite().all() and torch.equal(scales(torch.zeros(2, 3)), torch.ones(2, 3))  # fmt: skip


@pytest.mark.parametrize(
    ("name", "rate", "rows", "steps"),
    [
        ("kfac-relative", 0.03, 64, 60),
        ("adahessian", 0.03, 64, 60),
        ("natural-gradient", 0.3, 8, 12),
    ],
)
def test_it_learns_where_a_net_is_sure_of_wrong_answers(name: str, rate: float, rows: int, steps: int) -> None:  # fmt: skip
    net, hard = sure_of_wrong_answers(rows)
    run = FullTraining((name,))(net, hard, Setting(optimizer=name, learning_rate=rate), Budget(steps=steps))  # fmt: skip
    assert run.start > 8 and run.best < run.start / 4


def sure_of_wrong_answers(rows: int) -> tuple[nn.Module, Task]:
    """A net trained until it is sure, and other labels for its inputs, some of which are hardly ever on."""
    g = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 4))  # fmt: skip
    x = torch.rand(256, 16, generator=g)
    x[:, 8:] *= torch.rand(256, 8, generator=g) < 0.03
    y = x[:, :4].argmax(1)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    other = (y + 1) % 4
    batches = [list(b) for b in zip(x.split(rows), other.split(rows), strict=True)]
    return net.eval(), Task(name="other labels", train=batches, heldout=[[x, other]])


def test_muon_takes_the_matrices_and_adamw_the_rest() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3))
    optimizer = MuonAdamW(net.parameters(), lr=1e-2, tables=tables_of(net))
    before = copy.deepcopy(net.state_dict())
    net(torch.arange(5)).square().sum().backward()
    optimizer.step()
    step_0, step_1 = (before[f"{i}.weight"] - net[i].weight.detach() for i in (0, 1))
    torch.testing.assert_close(step_0.abs(), torch.full((5, 4), 1e-2), atol=1e-4, rtol=0)
    singular = torch.linalg.svdvals(step_1) / (1e-2 * 0.2 * 2)
    assert bool((singular > 0.5).all()) and bool((singular < 1.5).all())
    assert {"momentum_buffer", "exp_avg"} <= {k for s in optimizer.state.values() for k in s}


def test_kfac_relative_does_not_see_a_lock_of_a_language_model(tiny_folder: Callable[..., Path]) -> None:  # fmt: skip
    from transformers import AutoModelForCausalLM

    net = AutoModelForCausalLM.from_pretrained(tiny_folder("llama"))
    held = copy.deepcopy(net)
    lock_model(held, LockConfig(method="absorbed"))  # norms' gains too, which are in no block
    tokens = torch.arange(32).view(2, 16) % net.config.vocab_size
    batch = [{"input_ids": tokens, "labels": tokens}]
    losses = [
        FullTraining(("kfac-relative",))(
            model,
            Task(name="count", train=batch, heldout=batch),
            Setting(optimizer="kfac-relative", learning_rate=1.0),
            Budget(steps=4),
        ).losses
        for model in (net, held)
    ]
    assert losses[0][-1] < losses[0][0] - 0.01
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


@pytest.mark.parametrize("error", [AttributeError, NotImplementedError])
def test_muon_takes_a_model_that_refuses_to_name_its_tables(error: type[Exception]) -> None:
    class Refuses(nn.Linear):
        def get_output_embeddings(self) -> nn.Module:
            raise error

    assert tables_of(Refuses(2, 2)) == ()


def test_a_shared_layer_has_one_block_and_a_large_one_none() -> None:
    layer = nn.Linear(4, 4)
    net = nn.Sequential(layer, nn.Tanh(), layer, nn.Linear(4, 9))
    optimizer = KFAC(net.parameters(), net, lr=0.1, max_size=8)
    assert [block.layer for block in optimizer.blocks] == [layer]
    net(torch.randn(5, 4)).square().mean().backward()
    assert optimizer.blocks[0].rows == 10
    optimizer.zero_grad()
    assert optimizer.blocks[0].inputs is None


def test_a_large_net_gets_no_natural_gradient() -> None:
    net = nn.Linear(400, 400)
    attacker = FullTraining(("natural-gradient",))
    assert "at most 131072" in attacker.applies(net)
    with pytest.raises(SpecDefError, match="small nets"):
        NaturalGradient(net.parameters(), net, lr=1.0)
    small = nn.Linear(20, 100)
    assert not attacker.applies(small)
    with pytest.raises(SpecDefError, match="puts out 5000"):
        optimizer = NaturalGradient(small.parameters(), small, lr=1.0)
        optimizer.step(lambda: small(torch.randn(50, 20)).square().mean())


def test_one_parameter_vector_has_one_group() -> None:
    net = mlp()
    groups = [{"params": list(net[i].parameters())} for i in (0, 2)]
    with pytest.raises(SpecDefError, match="one group"):
        OPTIMIZERS["lbfgs"].build(net, groups, Setting(optimizer="lbfgs"))


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "heavyball", None)
    groups = [{"params": list(mlp().parameters())}]
    with pytest.raises(SpecDefError) as caught:
        OPTIMIZERS["soap"].build(mlp(), groups, Setting(optimizer="soap"))
    assert "specdef[attacks]" in caught.value.hint
    monkeypatch.delitem(sys.modules, "heavyball")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "specdef[attacks]" in FullTraining(("soap",)).applies(mlp())
    assert not FullTraining(("muon", "soap")).applies(mlp())


@pytest.mark.parametrize(
    "name",
    [
        *(n for n in GRAPH if n != "natural-gradient"),
        "kfac-1e-3",
        "kfac-relative",
        "muon",
        "shampoo",
        "lbfgs",
    ],
)
def test_it_trains_a_language_model(tiny_folder: Callable[..., Path], name: str) -> None:
    from transformers import AutoModelForCausalLM

    net = AutoModelForCausalLM.from_pretrained(tiny_folder("llama"))
    tokens = torch.arange(32).view(2, 16) % net.config.vocab_size
    batch = [{"input_ids": tokens, "labels": tokens}]
    runs = [
        FullTraining((name,))(
            net,
            Task(name="count", train=batch, heldout=batch),
            Setting(optimizer=name, learning_rate=rate),
            Budget(steps=4),
        )
        for rate in rates(name)
    ]
    assert min(run.best for run in runs) < runs[0].start - 1e-3


def test_full_training_names_itself_and_refuses_nonsense() -> None:
    assert (FullTraining().name, FullTraining().tier) == ("full-adamw", 2)
    assert (RECIPE.name, RECIPE.tier, RECIPE.learning_rates) == ("recipe", 1, (5e-5, 1e-4))
    assert "optimizers=('adam', 'sgd')" in repr(FullTraining(("adam", "sgd")))
    with pytest.raises(ValueError, match="names among"):
        FullTraining(("adamm",))
    with pytest.raises(ValueError, match="one tier"):
        FullTraining(("adamw", "muon"))


def test_names_tiers_and_ranges() -> None:
    for name, spec in OPTIMIZERS.items():
        assert name == spec.name and spec.tier in (2, 4) and spec.source
        assert 0 < spec.learning_rates[0] < spec.learning_rates[1]
