"""Calibration: scores are the formula's, takes channels that are alive, and leaves the model as it found it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import specdef
from specdef.attacks.structural.sites import rescale
from specdef.errors import SpecDefError
from specdef.lock.calibrate import calibrated_scores
from specdef.lock.in_memory import unique_tensors
from specdef.lock.sequential import find_symmetries
from specdef.models.tiny import tiny_inputs, tiny_model

BATCHES = [
    tiny_inputs("resnet", seed=seed) | {"labels": torch.tensor([seed, 1])} for seed in range(2)
]


def test_a_channel_that_is_never_active_is_not_taken():
    """Its gradient is 0, so it looks most useless; but scaling it locks nothing."""
    model = tiny_model("resnet")
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.bias[2] = -100.0  # a dead ReLU
    certificate = specdef.lock_model(model, calibration=BATCHES).certificate
    sites = [site for site in certificate.sites if site["kind"] == "batchnorm"]
    assert sites and all(site["channel"] != 2 and site["score"] > 0 for site in sites)


def test_the_model_keeps_its_mode_and_its_statistics():
    model = tiny_model("resnet").train()
    before = {name: value.clone() for name, value in model.named_buffers()}
    specdef.lock_model(model, calibration=BATCHES)
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())
    assert all(module.training for module in model.modules())


def perceptron():
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 3)).eval()  # fmt: skip


def convolutions():
    with torch.random.fork_rng([]):
        torch.manual_seed(1)
        return nn.Sequential(
            nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 2), nn.ReLU(), nn.Conv2d(5, 4, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        ).eval()  # fmt: skip


def pairs(shape, classes, num=3):
    generator = torch.Generator().manual_seed(2)
    return [
        (torch.randn(4, *shape, generator=generator), torch.randint(classes, (4,), generator=generator))
        for _ in range(num)
    ]  # fmt: skip


def naive(model, site, batches):
    """|sum_t d_t x_tc| / sqrt(sum_t |d_t|^2 x_tc^2), every sample and every channel by itself, in float64."""
    model = copy.deepcopy(model).double()
    (leg,) = site.consumers
    reader = model.get_submodule(leg.tensor.rpartition(".")[0])
    seen = {}
    reader.register_forward_hook(lambda _, x, out: seen.update(x=x[0], out=out))
    gradient = torch.zeros(site.size, dtype=torch.float64)
    curvature = torch.zeros_like(gradient)
    for x, y in batches:
        loss = nn.functional.cross_entropy(model(x.double()), y)
        weight, d = torch.autograd.grad(loss, [reader.weight, seen["out"]])
        for c in range(site.size):
            gradient[c] += weight[:, c].square().sum()
            for t in range(len(x)):
                curvature[c] += d[t].square().sum() * seen["x"][t, c].detach().square().sum()
    return (gradient / curvature).sqrt()


@pytest.mark.parametrize(
    ("model", "batches"),
    [(perceptron(), pairs((5,), 3)), (convolutions(), pairs((2, 7, 7), 4))],
    ids=["linear", "convolution"],
)
def test_the_score_is_gradient_per_root_of_curvature(model, batches):
    sites = find_symmetries(model, unique_tensors(model)).sites
    scores = calibrated_scores(model, sites, batches)
    assert len(scores) == len(sites) == 2
    for site in sites:
        alive = naive(model, site, batches)
        found = scores[site.name].double()
        assert bool((found.isinf() == alive.isnan()).all())
        assert float(found[found.isfinite()].max()) > 1.05 * float(found.min())
        torch.testing.assert_close(found[found.isfinite()], alive[~alive.isnan()], rtol=1e-5, atol=0)  # fmt: skip


def test_one_token_that_counts_for_all_scores_one():
    """A column whose gradient comes from a single token has no noise to be divided by."""
    model = perceptron()
    (site, *_) = find_symmetries(model, unique_tensors(model)).sites
    ((x, y),) = pairs((5,), 3, num=1)
    scores = calibrated_scores(model, [site], [(x[:1], y[:1])])[site.name]
    torch.testing.assert_close(scores[scores.isfinite()], torch.ones(int(scores.isfinite().sum())))


@pytest.mark.parametrize("exponent", [-20, -3, 8, 30])
def test_the_score_does_not_depend_on_a_channels_scale(exponent):
    model, batches = convolutions(), pairs((2, 7, 7), 4)
    sites = find_symmetries(model, unique_tensors(model)).sites
    before = calibrated_scores(model, sites, batches)
    factors = torch.ones(sites[0].size, dtype=torch.float64)
    factors[3] = 2.0**exponent
    rescale(unique_tensors(model), sites[0], factors)
    after = calibrated_scores(model, sites, batches)
    for site in sites:
        torch.testing.assert_close(after[site.name], before[site.name], rtol=1e-5, atol=0)


def test_there_must_be_batches():
    model = perceptron()
    sites = find_symmetries(model, unique_tensors(model)).sites
    with pytest.raises(SpecDefError, match="no calibration batches"):
        calibrated_scores(model, sites, [])
