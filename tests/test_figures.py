"""Figures 1 and 2: every part against something known, and both end to end in their small size."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

from specdef.experiments import figure1, figure2
from specdef.experiments.batched_adam import train
from specdef.experiments.record import claim, exponent, plain, write_record
from specdef.experiments.tiny_nets import (
    ARCHITECTURES,
    MLP,
    Conv,
    compensate,
    make_task,
    scale_top,
)

KEYS = {"command", "versions", "seeds", "seconds", "claims", "summary", "data"}


@pytest.mark.parametrize("spectrum", figure1.SPECTRA)
def test_the_quadratic_has_the_planted_spectrum_and_minimum(spectrum):
    H, target = figure1.quadratic(0, 1000.0, spectrum)
    values = np.linalg.eigvalsh(H)
    assert values[0] == pytest.approx(1) and values[-1] == pytest.approx(1000)
    assert H.shape == (figure1.FEATURES, figure1.FEATURES) and target.shape == (figure1.FEATURES,)


@pytest.mark.parametrize("method", figure1.methods(10.0))
def test_steps_of_one_eigenvalue_are_the_closed_form(method):
    """Both eigenvalues equal: gradient descent with rate 1/2 halves the error, so that the loss falls by 4 per step."""
    H, target = np.eye(2), np.array([3.0, -1.0])
    assert figure1.predict(H, target, 0.5, 0.0, False) == math.ceil(math.log(1e6, 4))
    rate, momentum, ahead = figure1.methods(4.0)[method]
    H = np.diag([1.0, 4.0])
    steps, _ = figure1.measure(H[None], target[None], rate, momentum, ahead)
    assert steps[0] == figure1.predict(H, target, rate, momentum, ahead)


def test_above_the_limit_nothing_is_reached():
    H, target = figure1.quadratic(0, 10.0, "stretched")
    steps, _ = figure1.measure(H[None], target[None], 2.02 / 10, 0.0, False, budget=10**5)
    assert steps[0] == -1


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_many_models_at_once_are_each_of_them(architecture):
    tasks = [make_task(architecture, seed) for seed in (0, 1)]
    names = [name for name, _ in tasks[0].model.named_parameters()]
    stacked = {n: torch.stack([t.model.get_parameter(n).detach() for t in tasks]) for n in names}
    inputs = torch.stack([t.inputs for t in tasks])
    outputs = torch.func.functional_call(tasks[0].model, stacked, (inputs,))
    for task, output in zip(tasks, outputs, strict=True):
        torch.testing.assert_close(output, task.model(task.inputs))


def test_the_convolution_is_that_of_torch():
    torch.manual_seed(0)
    conv, x = Conv(2, 3), torch.randn(5, 2, 4, dtype=torch.float64)
    torch.testing.assert_close(conv(x), nn.functional.conv1d(x, conv.weight, padding=1))


def test_adam_on_many_models_is_that_of_torch():
    task, steps, rates = make_task("transformer", 0), 30, (1e-2, 1e-1)
    lowest = []
    for rate in rates:
        model = make_task("transformer", 0).model
        optimizer = torch.optim.Adam(model.parameters(), lr=rate)
        losses = []
        for _ in range(steps + 1):
            loss = (model(task.inputs) - task.targets).square().mean()
            losses.append(float(loss.detach()))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        lowest.append(min(losses))
    weights = {n: torch.stack([p.detach()] * 2) for n, p in task.model.named_parameters()}
    arguments = {
        "inputs": torch.stack([task.inputs] * 2),
        "targets": torch.stack([task.targets] * 2),
        "learning_rate": torch.tensor(rates, dtype=torch.float64),
        "budget": steps,
    }
    never = torch.full((2,), -math.inf, dtype=torch.float64)
    found = train(task.model, weights, goal=never, **arguments)
    assert found.lowest.tolist() == pytest.approx(lowest, rel=1e-9)
    assert found.steps.tolist() == [-1, -1] and not found.diverged.any()
    # a goal that one reaches at once and the other never: the second runs on alone, unchanged
    goal = torch.tensor([math.inf, -math.inf], dtype=torch.float64)
    alone = train(task.model, weights, goal=goal, **arguments)
    assert alone.steps.tolist() == [0, -1]
    assert float(alone.lowest[1]) == pytest.approx(lowest[1], rel=1e-9)


def test_frozen_weights_stay_and_overflow_is_seen():
    task = make_task("mlp", 0)
    weights = {n: p.detach()[None] for n, p in task.model.named_parameters()}
    arguments = {
        "inputs": task.inputs[None], "targets": task.targets[None], "budget": 5,
        "goal": torch.tensor([-math.inf], dtype=torch.float64),
    }  # fmt: skip
    slow = torch.tensor([1e-2], dtype=torch.float64)
    still = train(task.model, weights, learning_rate=slow, frozen=list(weights)[:-1], **arguments)
    free = train(task.model, weights, learning_rate=slow, **arguments)
    assert float(free.lowest) < float(still.lowest)
    wild = torch.tensor([1e200], dtype=torch.float64)
    assert train(task.model, weights, learning_rate=wild, **arguments).diverged.all()


def test_scaling_moves_the_top_singular_values_only():
    weight = make_task("cnn", 0).model.get_parameter("conv.1.weight").detach()
    before, after = (torch.linalg.svdvals(w.flatten(1)) for w in (weight, scale_top(weight, 100, k=2)))  # fmt: skip
    torch.testing.assert_close(after, torch.cat([100 * before[:2], before[2:]]))


def test_the_compensated_net_has_the_same_function():
    task = make_task("mlp", 0)
    assert isinstance(task.model, MLP)
    lock = compensate(task.model, 1e3)
    torch.testing.assert_close(lock(task.inputs), task.model(task.inputs), rtol=1e-9, atol=1e-9)
    top, before = (torch.linalg.matrix_norm(m.layers[-1].weight.detach(), 2) for m in (lock, task.model))  # fmt: skip
    assert float(top) == pytest.approx(1e3 * float(before))


def test_records_hold_no_infinite_number(tmp_path):
    assert plain({"a": [math.inf, 1.0], "b": (math.nan,)}) == {"a": [None, 1.0], "b": [None]}
    assert claim("x", True, n=1) == {"claim": "x", "held": True, "numbers": {"n": 1}}
    assert math.isnan(exponent([1.0], [1.0]))
    write_record(tmp_path / "new", "name", {"x": math.inf, "claims": [], "seconds": 1.0}, Figure())
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == [
        "name.json",
        "name.md",
        "name.png",
    ]


def check(record, folder, name):
    assert set(record) >= KEYS
    stored = json.loads((folder / f"{name}.json").read_text())
    assert stored["claims"] == plain(record["claims"]) and stored["versions"]["torch"]
    assert (folder / f"{name}.png").stat().st_size > 20_000
    assert len(record["summary"]) == len(record["claims"])
    assert not list(folder.glob(".*"))
    return {entry["claim"]: entry["held"] for entry in record["claims"]}


def test_figure_1_small(tmp_path):
    said = []
    held = check(figure1.run(tmp_path, size="smoke", progress=said.append), tmp_path, "figure1")
    assert len(said) == 3
    # the printed rate is the one that fails, at kappa = 10
    assert [text for text, yes in held.items() if not yes] == [t for t in held if "section 2's rate" in t]  # fmt: skip
    stored = json.loads((tmp_path / "figure1.json").read_text())
    assert all(row["measured"] == row["predicted"] for row in stored["data"]["rows"])


@pytest.mark.slow
def test_figure_2_small(tmp_path):
    held = check(figure2.run(tmp_path, seeds=(0,), size="smoke"), tmp_path, "figure2")
    expected = {
        "The bounds hold": True, "Theorem 2.1 says something": False, "lambda_max grows as scale^2": True,
        "Remark A.3's bound grows": False, "lambda_max can be raised through any": False,
        "The A.B.C formula as noted": False, "Compensated form": True, "Scaling one singular value slows": True,
        "The best bound through a weight": True,
    }  # fmt: skip
    for start, want in expected.items():
        (found,) = [yes for text, yes in held.items() if text.startswith(start)]
        assert found == want, start


def test_a_record_is_read_back_as_it_was(tmp_path):
    from matplotlib.figure import Figure

    from specdef.experiments.record import write_record

    record = {"claims": [], "seconds": 2.0, "table": ["| a  | [0.5] |", "two  spaces"], "runs": [[1.0, "x", None], [2.0, "y\n", 3]], "none": []}  # fmt: skip
    write_record(tmp_path, "r", record, Figure())
    text = (tmp_path / "r.json").read_text()
    assert json.loads(text) == record and '[ 1.0, "x", null ]' in text
