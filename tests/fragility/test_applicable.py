"""When the forecast says of itself that it does not apply, with the reason; bad input; what a diagnosis leaves alone."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

import specdef
from planted import gaussian
from specdef.errors import SelectionError, SpecDefError
from specdef.rates.adaptive import AdamW

from .toys import DOUBLE, linear, regression


def has(report, words: str) -> bool:
    return not report.applicable and any(words in reason for reason in report.reasons)


def test_a_learning_rate_beyond_stability():
    report = regression().diagnose(2.5, 30, observe=True)  # lambda_max = 1
    assert has(report, "beyond the stability limit 2")
    assert report.verdict.startswith("Not applicable")
    assert report.forecast.time_to_threshold.steps is None
    json.dumps(report.to_dict(), allow_nan=False)


def test_a_rate_so_large_that_nothing_is_finite():
    report = regression().diagnose(1e9, 400, observe=True)
    assert has(report, "beyond the stability limit") and has(report, "nothing is finite")
    assert report.observed.status == "diverged"
    json.dumps(report.to_dict(), allow_nan=False)


@pytest.mark.parametrize(("rate", "applies"), [(0.4, True), (0.8, False)])
def test_large_steps(rate, applies):
    report = regression().diagnose(rate, 10)
    assert has(report, "The steps are large") is not applies


def test_momentum_has_its_own_limit():
    toy = regression()
    assert has(toy.diagnose(3.9, 10, optimizer="heavy_ball"), "beyond the stability limit 3.8")
    assert not has(toy.diagnose(3.7, 10, optimizer="heavy_ball"), "beyond")


def noisy(size: float, num_batches: int = 6):
    """Batches whose gradients differ by opposite shifts within the subspace, and whose mean is the toy's task."""
    toy = regression()
    X, y = toy.task[0]
    shifts = gaussian(num_batches * len(y), 9).view(num_batches, len(y), 1)
    shifts = size * (shifts - shifts.mean(0))
    return toy, [(X, y + shift) for shift in shifts]


def test_noise_of_cycled_batches():
    toy, batches = noisy(5.0)
    report = toy.diagnose(1e-3, 20, task=batches, batches="cycled", observe=True)
    assert has(report, "noise of single batches")
    quiet = toy.diagnose(1e-3, 20, task=batches, batches="full")
    assert quiet.applicable and max(quiet.forecast.stochastic) == 0


def test_the_expected_noise_is_the_mean_over_orders():
    """k batches into a pass, in random order: lr^2 / 2 k (B - k) / (B - 1) tr F C, against the mean of many orders."""
    toy, batches = noisy(3.0, 4)
    rate = 1e-3
    report = toy.diagnose(rate, 6, task=batches, batches="cycled")
    n = len(toy.g)
    gradients = [2 / n * X.T @ (X @ toy.model.weight.detach()[0] - y[:, 0]) for X, y in batches]
    mean = sum(gradients) / 4
    generator = torch.Generator().manual_seed(0)
    for k, expected in ((1, report.forecast.stochastic[0]), (2, report.forecast.stochastic[1])):
        found = []
        for _ in range(400):
            chosen = torch.randperm(4, generator=generator)[:k].tolist()
            found.append(float(toy.alignment(rate * sum(gradients[i] - mean for i in chosen))))
        assert expected == pytest.approx(sum(found) / 400, rel=0.1)
    assert report.forecast.stochastic[3] == 0  # after a whole pass every batch has been seen alike


def test_cycled_batches_of_unequal_size_are_followed():
    """One pass adds up to the mean of the batches' own means, whatever their sizes."""
    toy = regression(overlap=0.5)
    X, y = toy.task[0]
    batches = [(X[:4], y[:4]), (X[4:], y[4:])]
    report = toy.diagnose(1e-4, 40, task=batches, batches="cycled", observe=True)
    even = [i for i, n in enumerate(report.observed.steps) if n % 2 == 0 and n >= 10]
    for i in even:
        assert report.observed.alignment[i] == pytest.approx(report.forecast.alignment[i], rel=0.02)


class Saturating(nn.Module):
    """A linear model whose output saturates: quadratic models hold nearby only."""

    def __init__(self, weight):
        super().__init__()
        self.inner = linear(weight)

    def forward(self, x):
        return torch.tanh(self.inner(x))


def test_a_saturating_model():
    X = gaussian(60, 1).view(12, 5)
    net = Saturating(0.1 * gaussian(5, 2))
    aligned = [(X, torch.zeros(12, 1, dtype=DOUBLE))]
    task = [(X, 3 * torch.sign(X[:, :1]))]  # a target that the output never reaches
    near = specdef.fragility(net, aligned, task, learning_rate=1e-3, steps=20, observe=True)
    assert near.applicable and near.observed.band_coverage > 0.9
    far = specdef.fragility(net, aligned, task, learning_rate=5e-2, steps=400, observe=True)
    assert not far.applicable
    assert has(far, "not quadratic that far") or has(far, "more than a factor of 2")
    assert far.forecast.valid_steps < 400


def test_adam_whose_metric_does_not_stay():
    toy = regression()
    report = toy.diagnose(0.2, 40, optimizer="adam")
    assert has(report, "preconditioner of adam does not stay")


def test_weight_decay_that_the_forecast_leaves_out():
    toy = regression()
    strong = toy.diagnose(1e-4, 10, optimizer=AdamW(weight_decay=10.0))
    assert has(strong, "weight decay of 10")
    assert not any("decay" in r for r in toy.diagnose(1e-4, 10, optimizer=AdamW(weight_decay=1e-4)).reasons)  # fmt: skip


def test_weight_decay_is_in_the_run():
    """The run on the displacement is torch's own on the weights."""
    toy = regression()
    report = toy.diagnose(1e-2, 12, optimizer=AdamW(weight_decay=0.3), observe=True)
    net = copy.deepcopy(toy.model)
    method = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0.3)
    for _ in range(12):
        method.zero_grad()
        (net(toy.task[0][0]) - toy.task[0][1]).square().mean().backward()
        method.step()
    d = (net.weight - toy.model.weight).detach()[0]
    assert report.observed.alignment[-1] == pytest.approx(float(toy.alignment(d)), rel=1e-9)


def test_an_unresolved_subspace_says_so():
    report = regression().diagnose(1e-3, 10, energy=1.0, max_rank=2)
    assert not report.conditions[0].holds and report.conditions[0].value > 0.1


# --- bad input ---------------------------------------------------------------------------------------------------------


def test_nan_weights():
    toy = regression()
    with torch.no_grad():
        toy.model.weight[0, 0] = float("nan")
    with pytest.raises(SpecDefError, match="task is NaN") as caught:
        toy.diagnose(1e-3, 10)
    assert caught.value.hint


def test_no_term_that_counts():
    net = nn.Linear(3, 2)
    good = (
        torch.randn(4, 3, generator=torch.Generator().manual_seed(0)),
        torch.tensor([0, 1, 0, 1]),
    )
    empty = (good[0], torch.full((4,), -100))
    with pytest.raises(SpecDefError, match=r"aligned data: .*no term"):
        specdef.fragility(net, [empty], [good], learning_rate=0.1)
    with pytest.raises(SpecDefError, match=r"task data: .*no term"):
        specdef.fragility(net, [good], [empty], learning_rate=0.1)
    with pytest.raises(SpecDefError, match="aligned data: there is no data"):
        specdef.fragility(net, [], [good], learning_rate=0.1)
    with pytest.raises(SpecDefError, match="task data: there is no data"):
        specdef.fragility(net, [good], [], learning_rate=0.1)


def test_no_gradient_and_no_fisher():
    toy = regression()
    X, _ = toy.task[0]
    done = [(X, toy.model(X).detach())]
    with pytest.raises(SpecDefError, match="gradient of the fine-tuning task is zero"):
        toy.diagnose(1e-3, 10, task=done)
    blind = [(torch.zeros_like(X), torch.zeros(len(X), 1, dtype=DOUBLE))]
    with pytest.raises(SpecDefError, match="Fisher matrix of the aligned data is zero"):
        specdef.fragility(toy.model, blind, toy.task, learning_rate=1e-3)


def test_memory_is_refused_before_it_is_taken():
    toy = regression()
    with pytest.raises(SpecDefError, match="20 parameters") as caught:
        toy.diagnose(1e-3, 10, memory_limit=1000)
    assert "--parameters" in caught.value.hint and "--max-rank" in caught.value.hint
    small = toy.diagnose(1e-3, 10, memory_limit=10_500)
    assert small.gamma == pytest.approx(toy.diagnose(1e-3, 10).gamma, rel=1e-6)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"steps": 1}, "steps"),
        ({"optimizer": "rmsprop"}, "optimizer must be one of sgd"),
        ({"optimizer": "nope"}, "optimizer"),
        ({"threshold": -1.0}, "threshold"),
        ({"krylov_steps": 1}, "krylov_steps"),
        ({"energy": 2.0}, "energy"),
        ({"max_rank": 0}, "max_rank"),
    ],
)
def test_arguments_out_of_range(options, match):
    toy = regression()
    with pytest.raises(ValueError, match=match):
        specdef.fragility(toy.model, toy.aligned, toy.task, **({"learning_rate": 1e-3} | options))


def test_parameters_that_are_not_there():
    toy = regression()
    with pytest.raises(SelectionError):
        toy.diagnose(1e-3, 10, params=["nothing"])


# --- what it leaves alone ------------------------------------------------------------------------------------------------


def test_the_model_is_unchanged_to_the_bit():
    toy = regression()
    toy.model.train()
    before = copy.deepcopy(toy.model.state_dict())
    state = torch.random.get_rng_state()
    toy.diagnose(1e-2, 20, optimizer="adamw", observe=True)
    assert all(torch.equal(before[name], value) for name, value in toy.model.state_dict().items())
    assert toy.model.training and toy.model.weight.grad is None and toy.model.weight.requires_grad
    assert torch.equal(state, torch.random.get_rng_state())


def test_the_same_seed_gives_the_same_report():
    def run(seed):
        found = regression().diagnose(1e-2, 20, seed=seed, observe=True).to_dict()
        found["cost"].pop("seconds")
        found["observed"].pop("seconds")
        return found

    assert run(1) == run(1)
    assert run(1)["gamma"] == pytest.approx(run(2)["gamma"], rel=1e-6)


def test_half_precision_is_computed_in_float32():
    toy = regression()
    net = copy.deepcopy(toy.model).bfloat16()
    report = specdef.fragility(
        net, toy.aligned, toy.task, learning_rate=1e-3, steps=10, krylov_steps=20
    )
    exact = specdef.fragility(copy.deepcopy(net).double(), toy.aligned, toy.task, learning_rate=1e-3, steps=10, krylov_steps=20)  # fmt: skip
    assert report.dtype == "float32" and net.weight.dtype == torch.bfloat16
    assert report.gamma == pytest.approx(exact.gamma, rel=1e-3)
