"""Rates: recurrences against torch's own optimisers on planted quadratics, limits against spectral radii, K-FAC against dense."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from specdef.curvature.lanczos import lanczos
from specdef.curvature.linear import MatrixOperator
from specdef.curvature.losses import ClassificationLoss, LMLoss, MSELoss
from specdef.curvature.operators import EmpiricalFisherOperator, HessianOperator
from specdef.models.tiny import tiny_inputs, tiny_model
from specdef.rates.adaptive import AdaDelta, Adam, AdamW, RMSProp
from specdef.rates.kfac import KroneckerFactors, PreconditionedOperator
from specdef.rates.linear import (
    KFAC,
    SGD,
    GradientDescent,
    HeavyBall,
    LinearOptimizer,
    Nesterov,
    Optimizer,
)
from specdef.rates.measure import largest_stable_rate, train
from specdef.rates.optimizers import OPTIMIZERS, resolve
from specdef.rates.quadratic import (
    Quadratic,
    best_rate_for_steps,
    best_rate_for_target,
    decrease,
    share_travelled,
    steps_to_target,
)
from specdef.rates.stability import largest_step
from specdef.rates.surrogate import first_step, simulate, surrogate_of

F64 = torch.float64
LINEAR: list[LinearOptimizer] = [
    GradientDescent(),
    HeavyBall(),
    HeavyBall(beta=0.5),
    HeavyBall(beta=0.99),
    Nesterov(),
    Nesterov(beta=0.5),
]
ADAPTIVE: list[Optimizer] = [Adam(), AdamW(), RMSProp(), AdaDelta(), AdaDelta(rho=0.5, eps=1e-3)]
SPECTRA = {
    "decades": [1e-3, 1e-2, 0.1, 1.0, 3.0],
    "flat": [2.0, 2.0, 2.0],
    "with zero": [0.0, 1e-12, 0.5, 1.0],
    "saddle": [-0.05, -1e-9, 0.3, 1.0],
    "large": [1e8, 1e9, 3e9],
    "small": [1e-9, 2e-9],
}


def planted(spectrum: list[float], seed: int = 0) -> tuple[Tensor, Tensor]:
    """H with the given eigenvalues and Haar eigenvectors, and a random gradient."""
    generator = torch.Generator().manual_seed(seed)
    n = len(spectrum)
    Q = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=F64))[0]
    H = (Q * torch.tensor(spectrum, dtype=F64)) @ Q.T
    return (H + H.T) / 2, torch.randn(n, generator=generator, dtype=F64)


def model_of(H: Tensor, g: Tensor) -> Quadratic:
    return Quadratic.from_run(lanczos(MatrixOperator(H), g, len(g)))


def run(
    H: Tensor, g: Tensor, optimizer: Optimizer, rate: float, steps: int, start: float = 0.0
) -> list[float]:
    """Decreases of the loss when torch's optimiser runs on the quadratic itself."""
    theta = torch.full_like(g, start)
    method = optimizer.build([theta], rate)
    found = [0.0]
    for _ in range(steps):
        d = theta - start
        theta.grad = g + H @ d
        method.step()
        d = theta - start
        found.append(-float(g @ d + d @ H @ d / 2))
    return found


# --- the recurrences -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.03, 0.9, 1.2])
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("optimizer", LINEAR, ids=repr)
def test_curve_is_what_torch_does(optimizer: LinearOptimizer, spectrum: str, share: float) -> None:
    H, g = planted(SPECTRA[spectrum])
    rate = share * optimizer.stability_limit / max(SPECTRA[spectrum])
    seen = torch.tensor(run(H, g, optimizer, rate, 120), dtype=F64)
    told = decrease(model_of(H, g), optimizer, rate, torch.arange(121))[0]
    scale = seen.abs().cummax(0).values
    assert float(((told - seen).abs() / (scale + 1e-12 * scale[1])).max()) < 1e-7


@settings(max_examples=60, deadline=None)
@given(
    spectrum=st.lists(st.floats(-0.2, 10), min_size=1, max_size=6),
    share=st.floats(0.01, 1.5),
    index=st.integers(0, len(LINEAR) - 1),
    seed=st.integers(0, 99),
)
def test_curve_for_any_spectrum(spectrum: list[float], share: float, index: int, seed: int) -> None:
    H, g = planted(spectrum, seed)
    optimizer = LINEAR[index]
    rate = share * optimizer.stability_limit / max(*spectrum, 1.0, 0.0)
    seen = torch.tensor(run(H, g, optimizer, rate, 40), dtype=F64)
    told = decrease(model_of(H, g), optimizer, rate, torch.arange(41))[0]
    scale = seen.abs().cummax(0).values + 1e-9 * float(g @ g) * rate
    assert float(((told - seen).abs() / scale)[1:].max()) < 1e-6


def test_gradient_descent_is_the_closed_form() -> None:
    node, w = torch.tensor([0.2, 1.0, 3.0], dtype=F64), torch.tensor([0.5, 0.3, 0.2], dtype=F64)
    t = torch.tensor([0, 1, 7, 1000])
    told = decrease(Quadratic(nodes=node, weights=w, gradient_norm=2.0), GradientDescent(), 0.4, t)[
        0
    ]
    exact = (w * 4 / (2 * node) * (1 - (1 - 0.4 * node) ** (2 * t[:, None]))).sum(1)
    assert torch.allclose(told, exact, rtol=1e-12, atol=0)


@pytest.mark.parametrize("node", [0.0, 1e-18, -1e-18, 1e-300])
def test_flat_directions_fall_linearly(node: float) -> None:
    model = Quadratic(nodes=torch.tensor([node], dtype=F64), weights=torch.ones(1, dtype=F64), gradient_norm=3.0)  # fmt: skip
    told = decrease(model, GradientDescent(), 0.1, torch.tensor([1, 10, 10**6]))
    assert torch.allclose(told, torch.tensor([[0.9, 9.0, 9e5]], dtype=F64), rtol=1e-9)


@pytest.mark.parametrize("optimizer", LINEAR, ids=repr)
def test_divergence_is_infinite_and_never_nan(optimizer: LinearOptimizer) -> None:
    one = torch.ones(1, dtype=F64)
    steps = torch.tensor([10, 10**4, 10**9])
    rising = decrease(Quadratic(nodes=one, weights=one, gradient_norm=1.0), optimizer, 10.0, steps)
    falling = decrease(Quadratic(nodes=-one, weights=one, gradient_norm=1.0), optimizer, 10.0, steps)  # fmt: skip
    both = Quadratic(nodes=torch.tensor([-1.0, 1.0], dtype=F64), weights=torch.full((2,), 0.5, dtype=F64), gradient_norm=1.0)  # fmt: skip
    assert float(rising[0, -1]) == -math.inf and float(falling[0, -1]) == math.inf
    assert float(decrease(both, optimizer, 10.0, steps)[0, -1]) == -math.inf
    assert not bool((rising.isnan() | falling.isnan()).any())


def test_a_direction_of_weight_zero_is_not_entered() -> None:
    model = Quadratic(nodes=torch.tensor([1.0, 1e6], dtype=F64), weights=torch.tensor([1.0, 0.0], dtype=F64), gradient_norm=1.0)  # fmt: skip
    assert float(decrease(model, GradientDescent(), 1.0, 10**6)) == pytest.approx(0.5)


# --- stability -------------------------------------------------------------------------------------------------------


def radius(matrix: Tensor) -> float:
    return float(torch.linalg.eigvals(matrix).abs().max())


@settings(max_examples=40, deadline=None)
@given(beta=st.floats(0.01, 0.99))
def test_limits_are_where_the_spectral_radius_is_one(beta: float) -> None:
    for optimizer in (GradientDescent(), HeavyBall(beta=beta), Nesterov(beta=beta)):
        inside, outside = (
            optimizer.transition(torch.tensor(optimizer.stability_limit * share, dtype=F64))[:2, :2]
            for share in (0.999, 1.001)
        )
        assert radius(inside) < 1 < radius(outside), optimizer
    adam = Adam(beta1=beta)
    radii = []
    for share in (0.999, 1.001):
        h = adam.stability_limit * share
        radii.append(radius(torch.tensor([[1 - (1 - beta) * h, beta], [-(1 - beta) * h, beta]], dtype=F64)))  # fmt: skip
    assert radii[0] < 1 < radii[1]


def test_limits_by_number() -> None:
    assert HeavyBall().stability_limit == pytest.approx(3.8)
    assert Nesterov().stability_limit == pytest.approx(3.8 / 2.8)
    assert Adam().stability_limit == pytest.approx(38)
    assert KFAC().stability_limit == 2


# --- noise -----------------------------------------------------------------------------------------------------------


def test_noise_costs_what_it_costs_on_average() -> None:
    """4000 noisy runs on one eigenvalue: their mean lies within four standard errors."""
    node, rate, noise, steps = 1.5, 0.6, 0.8, 25
    one = torch.ones(1, dtype=F64)
    told = decrease(Quadratic(nodes=node * one, weights=one, gradient_norm=1.0), SGD(noise=noise), rate, torch.arange(steps + 1))[0]  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    d = torch.zeros(4000, dtype=F64)
    for step in range(steps + 1):
        fall = -(d + node * d**2 / 2)
        error = float(fall.std()) / math.sqrt(len(d)) + 1e-12
        assert abs(float(fall.mean() - told[step])) < 4 * error
        d -= rate * (1 + node * d + math.sqrt(noise) * torch.randn(len(d), generator=generator, dtype=F64))  # fmt: skip
    still = decrease(
        Quadratic(nodes=node * one, weights=one, gradient_norm=1.0), SGD(), rate, steps
    )
    assert float(told[-1]) < float(still)


# --- steps and best rates --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", LINEAR, ids=repr)
def test_steps_are_the_observed_ones(optimizer: LinearOptimizer) -> None:
    H, g = planted([1e-3, 1e-2, 0.1, 1.0, 3.0], seed=3)
    model = model_of(H, g)
    for share in (0.05, 0.5, 0.95):
        rate = share * optimizer.stability_limit / 3
        curve = run(H, g, optimizer, rate, 4000)
        for part in (0.01, 0.3, 0.7):
            target = part * model.reachable
            seen = next((t for t, value in enumerate(curve) if value >= target), math.inf)
            told = float(steps_to_target(model, optimizer, rate, target, max_steps=4000))
            assert told == seen or abs(told - seen) <= 1


def test_steps_beyond_the_budget_or_the_minimum_are_infinite() -> None:
    H, g = planted([0.01, 1.0])
    model = model_of(H, g)
    assert math.isinf(float(steps_to_target(model, GradientDescent(), 1.0, 1.01 * model.reachable)))
    slow = steps_to_target(model, GradientDescent(), torch.tensor([1.0, 1e-6]), 0.9 * model.reachable, max_steps=2000)  # fmt: skip
    assert math.isfinite(float(slow[0])) and math.isinf(float(slow[1]))


@pytest.mark.parametrize("optimizer", LINEAR[:5], ids=repr)
def test_no_rate_of_a_fine_grid_beats_the_best(optimizer: LinearOptimizer) -> None:
    H, g = planted([0.01, 0.1, 1.0, 2.0], seed=5)
    model, largest = model_of(H, g), optimizer.stability_limit / 2
    grid = largest * torch.linspace(1e-3, 0.999, 400, dtype=F64)
    _, gain = best_rate_for_steps(model, optimizer, 20, largest)
    assert gain >= float(decrease(model, optimizer, grid, 20).max()) * (1 - 1e-3)
    target = 0.8 * model.reachable
    rate, steps = best_rate_for_target(model, optimizer, target, largest)
    assert steps <= float(steps_to_target(model, optimizer, grid, target).min()) + 1
    assert float(steps_to_target(model, optimizer, rate, target)) == steps


def test_best_rate_of_two_eigenvalues_is_the_textbooks() -> None:
    """Minimax over many steps: 2 / (smallest + largest), Polyak 1964."""
    nodes = torch.tensor([0.1, 1.0], dtype=F64)
    model = Quadratic(nodes=nodes, weights=nodes / 1.1, gradient_norm=1.0)
    rate, _ = best_rate_for_steps(model, GradientDescent(), 30, 2.0)
    assert rate == pytest.approx(2 / 1.1, rel=0.02)


# --- adaptive methods ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ADAPTIVE, ids=repr)
def test_full_rank_model_runs_as_the_quadratic_does(optimizer: Optimizer) -> None:
    H, g = planted([0.01, 0.1, 0.5, 1.0, 2.0, 4.0], seed=7)
    model = surrogate_of(MatrixOperator(H), g, g.abs() + 1e-8, 6)
    for rate in (1e-3, 1e-1):
        changes, displacement = simulate(model, optimizer, rate, 30, weights=torch.ones(6, dtype=F64))  # fmt: skip
        seen = run(H, g, optimizer, rate, 30, start=1.0)
        assert changes == pytest.approx([-value for value in seen[1:]], rel=1e-6, abs=1e-12)
        assert model.change(displacement) == changes[-1]


def test_low_rank_model_is_exact_along_the_first_step() -> None:
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(50, 50, generator=generator, dtype=F64)
    H, g = A @ A.T / 50, torch.randn(50, generator=generator, dtype=F64)
    model = surrogate_of(MatrixOperator(H), g, g.abs() + 1e-8, 4)
    step = first_step(Adam(), g)
    assert torch.allclose(step, -g.sign(), atol=1e-6)
    assert model.change(step) == pytest.approx(float(g @ step + step @ H @ step / 2), rel=1e-6)


def test_a_run_on_the_model_stops_at_the_target() -> None:
    H, g = planted([0.5, 1.0])
    model = surrogate_of(MatrixOperator(H), g, g.abs() + 1e-8, 2)
    changes, _ = simulate(model, Adam(), 0.01, 500, target=0.1)
    assert len(changes) < 500 and changes[-1] <= -0.1 < changes[-2]


@pytest.mark.parametrize("optimizer", [Adam(), RMSProp(), AdaDelta()], ids=repr)
def test_preconditioner_is_the_first_step(optimizer: Adam | RMSProp | AdaDelta) -> None:
    g = torch.tensor([3.0, -1e-3, 0.2], dtype=F64)
    step = first_step(optimizer, g)
    assert torch.allclose(-g / optimizer.preconditioner(g), step, rtol=1e-4)


@pytest.mark.parametrize("guess", [1e-6, 0.7, 1e6])
def test_line_search_finds_the_crossing(guess: float) -> None:
    assert 1.8 < largest_step(lambda rate: rate**2 - 2 * rate, guess) <= 2


def test_line_search_says_when_there_is_none() -> None:
    assert largest_step(lambda rate: -rate, 1.0) == math.inf
    assert largest_step(lambda rate: rate, 1.0) == 0.0


# --- K-FAC -----------------------------------------------------------------------------------------------------------


def test_kfac_of_one_sample_is_the_empirical_fisher() -> None:
    """With one term every block is the outer product of a Kronecker product: the factors are exact."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2, bias=False)).double()
    data = [(torch.randn(1, 4, dtype=F64), torch.tensor([1]))]
    H = HessianOperator(net, data, ClassificationLoss())
    exact = EmpiricalFisherOperator(net, data, ClassificationLoss()).to_dense()
    exact[:15, 15:] = exact[15:, :15] = 0
    factors = KroneckerFactors(H, 1e-2)
    eye = torch.eye(21, dtype=F64)
    found = torch.stack([factors.power(1.0, e) for e in eye])
    assert factors.num_layers == 2
    assert float((found - exact - 1e-2 * eye).abs().max()) < 1e-8


def test_kfac_factors_are_the_papers() -> None:
    """Linear and convolutional blocks against kron(G, A) from explicit loops over samples and positions."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Conv2d(2, 3, 2, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(27, 4)).double()  # fmt: skip
    x, y = torch.randn(5, 2, 4, 4, dtype=F64), torch.randint(0, 4, (5,))
    H = HessianOperator(net, [(x[:2], y[:2]), (x[2:], y[2:])], ClassificationLoss())
    A, G, rows = torch.zeros(9, 9, dtype=F64), torch.zeros(3, 3, dtype=F64), 0
    for i in range(5):
        hidden = net[0](x[i : i + 1]).detach().requires_grad_()
        nn.functional.cross_entropy(net[1:](hidden), y[i : i + 1]).backward()
        padded = nn.functional.pad(x[i], (1, 1, 1, 1))
        for r in range(3):
            for c in range(3):
                a = torch.cat([padded[:, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2].reshape(-1), torch.ones(1, dtype=F64)])  # fmt: skip
                g = hidden.grad[0, :, r, c]
                A, G, rows = A + torch.outer(a, a), G + torch.outer(g, g), rows + 1
    block = torch.kron(G / 5, A / rows)
    v = torch.randn(H.shape[0], generator=torch.Generator().manual_seed(0), dtype=F64)
    M = torch.cat([v[:24].view(3, 8), v[24:27, None]], 1)
    exact = (block @ M.reshape(-1) + 1e-3 * M.reshape(-1)).view(3, 9)
    found = KroneckerFactors(H, 1e-3).power(1.0, v)
    assert torch.allclose(found[:24].view(3, 8), exact[:, :8], rtol=1e-9, atol=1e-12)
    assert torch.allclose(found[24:27], exact[:, 8], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_kfac_powers_compose_on_language_models(family: str) -> None:
    model = tiny_model(family).double()
    batch = tiny_inputs(family)
    H = HessianOperator(model, [batch | {"labels": batch["input_ids"]}], LMLoss())
    factors = KroneckerFactors(H, 1e-2)
    v = torch.randn(H.shape[0], generator=torch.Generator().manual_seed(0), dtype=F64)
    again = factors.power(-1.0, factors.power(0.5, factors.power(0.5, v)))
    assert factors.num_layers >= 8
    assert torch.allclose(again, v, atol=1e-9)
    outside = H.slices[next(name for name in H.slices if "norm" in name or "ln_" in name)]
    assert torch.equal(factors.power(-1.0, v)[outside], v[outside])
    assert not any(module._forward_hooks for module in model.modules())


def test_kfac_does_not_see_a_rescaling() -> None:
    """Scaling a channel by 2^8 moves lambda_max by 2^12 and more; that of the preconditioned matrix by a few per cent."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    locked = copy.deepcopy(net)
    with torch.no_grad():
        locked[0].weight[1] /= 2.0**8
        locked[0].bias[1] /= 2.0**8
        locked[2].weight[:, 1] *= 2.0**8
    data = [(torch.randn(40, 6, dtype=F64), torch.randint(0, 3, (40,)))]
    plain, seen = [], []
    for model in (net, locked):
        H = HessianOperator(model, data, ClassificationLoss())
        plain.append(float(torch.linalg.eigvalsh(H.to_dense())[-1]))
        P = PreconditionedOperator(H, KroneckerFactors(H, 1e-8)).to_dense()
        seen.append(float(torch.linalg.eigvalsh((P + P.T) / 2)[-1]))
    assert plain[1] > 2**12 * plain[0]
    assert seen[1] == pytest.approx(seen[0], rel=0.05)


# --- the measuring side ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def regression() -> HessianOperator:
    """Linear regression: its loss is a quadratic, exactly."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(30, 5, generator=generator, dtype=F64) * torch.tensor([3.0, 1, 0.5, 0.2, 0.1])
    y = torch.randn(30, 2, generator=generator, dtype=F64)
    net = nn.Linear(5, 2).double()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return HessianOperator(net, [(x[:10], y[:10]), (x[10:], y[10:])], MSELoss())


@pytest.mark.parametrize("optimizer", [GradientDescent(), HeavyBall(), Nesterov()], ids=repr)
def test_measured_stable_rate_is_the_quadratics(
    regression: HessianOperator, optimizer: LinearOptimizer
) -> None:
    """Found from below and from above; with momentum a run may pass its start on the way before it converges."""
    exact = optimizer.stability_limit / float(torch.linalg.eigvalsh(regression.to_dense())[-1])
    model = Quadratic.from_run(lanczos(regression, regression.gradient(), regression.shape[0]))
    for guess in (exact / 300, 50 * exact):
        found = largest_stable_rate(regression, optimizer, guess, num_steps=100, ratio=1.05)
        assert found.rate < exact and found.failed / found.rate <= 1.05
        for rate, holds in ((found.rate, True), (found.failed, False)):
            lowest = float(decrease(model, optimizer, rate, torch.arange(101)).min())
            assert (lowest >= -1e-9) == holds
        assert found.num_gradients > found.num_runs
        if isinstance(optimizer, GradientDescent):
            assert found.failed > 0.95 * exact


def test_smooth_is_stricter_than_bounded(regression: HessianOperator) -> None:
    rates = [
        largest_stable_rate(regression, HeavyBall(), 0.1, criterion=kind, tolerance=0.01).rate
        for kind in ("smooth", "bounded")
    ]
    assert 0 < rates[0] <= rates[1]


def test_training_leaves_the_model_and_meets_the_target(regression: HessianOperator) -> None:
    before = copy.deepcopy(regression.model.state_dict())
    done = train(regression, "gd", 1e-2, 50, target=0.3)
    assert all(torch.equal(value, before[name]) for name, value in regression.model.state_dict().items())  # fmt: skip
    steps = done.steps_to(0.3)
    assert steps == len(done.losses) - 1 and done.losses[int(steps) - 1] > done.losses[0] - 0.3
    assert math.isinf(done.steps_to(1e9))


def test_training_is_torchs(regression: HessianOperator) -> None:
    net = copy.deepcopy(regression.model)
    method = torch.optim.AdamW(net.parameters(), lr=0.05)
    x, y = (torch.cat(parts) for parts in zip(*regression.batches, strict=True))
    seen = []
    for _ in range(20):
        method.zero_grad()
        loss = nn.functional.mse_loss(net(x), y)
        seen.append(float(loss.detach()))
        loss.backward()
        method.step()
    assert list(train(regression, "adamw", 0.05, 19).losses) == pytest.approx(seen, rel=1e-9)


# --- bad arguments ---------------------------------------------------------------------------------------------------


def test_names() -> None:
    assert {"gd", "sgd", "heavy_ball", "nesterov", "adam", "adamw", "adadelta", "kfac"} <= set(OPTIMIZERS)  # fmt: skip
    assert all(resolve(name).name == name for name in OPTIMIZERS)
    assert resolve(HeavyBall(beta=0.5)).to_dict() == {"name": "heavy_ball", "beta": 0.5}
    with pytest.raises(ValueError, match="must be one of gd, sgd"):
        resolve("adagrad")


@pytest.mark.parametrize(
    "make",
    [
        lambda: HeavyBall(beta=1.0),
        lambda: Nesterov(beta=0.0),
        lambda: SGD(noise=-1.0),
        lambda: Adam(beta1=1.0),
        lambda: AdamW(eps=-1e-8),
        lambda: RMSProp(alpha=-0.1),
        lambda: AdaDelta(eps=0.0),
        lambda: KFAC(damping=0.0),
    ],
)
def test_settings_out_of_range(make) -> None:
    with pytest.raises(ValueError, match="must"):
        make()


def test_bad_arguments_of_the_quadratic() -> None:
    one = torch.ones(1, dtype=F64)
    model = Quadratic(nodes=one, weights=one, gradient_norm=1.0)
    for call in (
        lambda: Quadratic(nodes=one, weights=torch.ones(2, dtype=F64), gradient_norm=1.0),
        lambda: Quadratic(nodes=one, weights=-one, gradient_norm=1.0),
        lambda: Quadratic(nodes=one, weights=one, gradient_norm=0.0),
        lambda: decrease(model, GradientDescent(), -1.0, 1),
        lambda: decrease(model, GradientDescent(), math.inf, 1),
        lambda: decrease(model, GradientDescent(), 1.0, -1),
        lambda: steps_to_target(model, GradientDescent(), 1.0, 0.0),
        lambda: steps_to_target(model, GradientDescent(), 1.0, 1.0, max_steps=0),
        lambda: best_rate_for_steps(model, GradientDescent(), 5, math.inf),
    ):
        with pytest.raises(ValueError):
            call()
    assert share_travelled(GradientDescent(), torch.zeros(2, dtype=F64), 3).tolist() == [
        pytest.approx([3.0, 3.0])
    ]


def test_bad_arguments_of_the_measurement(regression: HessianOperator) -> None:
    with pytest.raises(ValueError, match="guess"):
        largest_stable_rate(regression, "gd", 0.0)
