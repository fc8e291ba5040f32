"""The MNIST lock and the deformation benchmark, both in their small size: what they say is right, not how fast it was."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch

from specdef.experiments import deformation
from specdef.experiments.deformation_measure import places, trained
from specdef.models.tiny import tiny_model

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "deformation.py"


def small(monkeypatch, **changes):
    values = {name: getattr(deformation.SIZES["smoke"], name) for name in deformation.Settings.__slots__}  # fmt: skip
    settings = deformation.Settings(**(values | changes))
    monkeypatch.setitem(deformation.SIZES, "smoke", settings)
    return settings


def test_mnist_small(tmp_path):
    said = []
    record = deformation.run(tmp_path, size="smoke", seeds=(0,), progress=said.append)
    stored = json.loads((tmp_path / "deformation.json").read_text())
    assert stored["claims"] == record["claims"] and stored["settings"]["rows"] == 1280
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deformation.json", "deformation.md", "deformation.png"]  # fmt: skip
    assert any("held-out accuracy" in line for line in said)
    (row,) = record["data"]["rows"]
    assert row["test"]["rows"] == 500 and row["test"]["accuracy_before"] > 0.7
    assert row["test"]["accuracy_after"] > row["test"]["accuracy_before"] - 0.1
    assert row["training"]["accuracy"] == row["test"]["accuracy_before"]
    assert row["growth"]["matrices"] == len(row["matrices"]) == 7
    assert row["growth"]["min"] > 1.2
    for matrix in row["matrices"]:
        assert matrix["growth"] == pytest.approx(matrix["after"] / matrix["before"])
    assert row["sigma_max"]["after"] == max(matrix["after"] for matrix in row["matrices"])
    assert row["lock"]["cost_ratio"] > 1 and row["lock"]["steps"] == row["history"][-1]["step"]
    held = {claim["claim"]: claim["held"] for claim in record["claims"]}
    assert [yes for text, yes in held.items() if "tenfold" in text or "that grows" in text] == [False] * 2  # fmt: skip


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch):
    """Seed 0 is finished, Ctrl-C comes in the middle of seed 1's lock; the record is that of a run in one go."""
    small(monkeypatch, rows=320, epochs=1, retain_rows=640, lock_epochs=1, heldout_rows=64, test_rows=250)  # fmt: skip

    def say(line):
        if line.startswith("seed 1: step 10 "):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        deformation.run(tmp_path / "a", size="smoke", seeds=(0, 1), progress=say)
    partial = tmp_path / "a" / "deformation.partial.json"
    assert list(json.loads(partial.read_text())["seeds"]) == ["0"]
    assert (tmp_path / "a" / "deformation.seed1.checkpoint.safetensors").exists()
    said = []
    record = deformation.run(tmp_path / "a", size="smoke", seeds=(0, 1), progress=said.append)
    assert said[0] == "seed 0: done before" and any(line.startswith("seed 1: step 11 of 20") for line in said)  # fmt: skip
    assert not any(line.startswith("seed 1: step 10 ") for line in said)
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["deformation.json", "deformation.md", "deformation.png"]  # fmt: skip
    whole = deformation.run(tmp_path / "b", size="smoke", seeds=(0, 1))
    for found, expected in zip(record["data"]["rows"], whole["data"]["rows"], strict=True):
        assert found["matrices"] == expected["matrices"] and found["test"] == expected["test"]


def test_seeds_of_other_settings_are_not_taken(tmp_path):
    partial = tmp_path / "deformation.partial.json"
    partial.write_text(json.dumps({"versions": {}, "settings": {}, "seeds": {"0": {}}}))
    known = {"versions": {}, "settings": {"rows": 1}}
    assert deformation._finished(partial, known) == {}
    assert deformation._finished(partial, {"versions": {}, "settings": {}}) == {"0": {}}
    partial.write_text("{")
    assert deformation._finished(partial, known) == {}


def test_a_model_is_trained_once(tmp_path, monkeypatch):
    settings = small(monkeypatch, rows=64, epochs=1)
    with places(settings) as (data, _):
        folder, record = trained(data, tmp_path, settings, 0, lambda _: None)
        weights = (folder / "model.safetensors").stat().st_mtime_ns
        assert trained(data, tmp_path, settings, 0, lambda _: None) == (folder, record)
        assert (folder / "model.safetensors").stat().st_mtime_ns == weights
        (folder / "training.json").unlink()  # as an interrupted run leaves it
        assert trained(data, tmp_path, settings, 0, lambda _: None)[1]["seed"] == 0
        assert (folder / "model.safetensors").stat().st_mtime_ns != weights


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("deformation_benchmark", BENCHMARK)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_benchmark_small(benchmark, tmp_path):
    out = tmp_path / "record.json"
    record = benchmark.main(["--smoke", "--out", str(out)])
    assert json.loads(out.read_text()) == record
    assert list(record["cases"]) == list(benchmark.SMOKE)
    for case in record["cases"].values():
        cost, accuracy = case["cost"], case["accuracy"]
        assert (
            cost["relative_error_of_the_gradient"] < 0.05
        )  # the error of a value is about its square
        assert {n: len(s) for n, s in cost["all_seconds"].items()} == {"plain": 4, "ours": 4, "naive": 2}  # fmt: skip
        assert accuracy["steps"] == 10 and accuracy["steps_above_asked"] == 0
        assert accuracy["largest_relative_error"] <= benchmark.ASKED_ERROR
        assert accuracy["sigma_max"][1] != accuracy["sigma_max"][0]
    # another part joins the record
    benchmark.main(["--case", "tiny-llama", "--part", "accuracy", "--accuracy-steps", "2", "--out", str(out)])  # fmt: skip
    stored = json.loads(out.read_text())["cases"]
    assert stored["tiny-llama"]["accuracy"]["steps"] == 2 and "cost" in stored["tiny-llama"]
    assert stored["tiny-resnet"] == record["cases"]["tiny-resnet"]


def test_the_naive_step_is_ours(benchmark):
    """One step of each from the same start ends in the same weights: they differ in how the gradient is had, no more."""
    case = benchmark.CASES["tiny-resnet"]
    models = [tiny_model("resnet") for _ in range(3)]
    batches = case.batches(models[0], 2, False)
    kinds = (benchmark.Run, benchmark.Naive, benchmark.Plain)
    for kind, model in zip(kinds, models, strict=True):
        benchmark.step(benchmark.start(kind, model, case, batches), 0)
    ours, naive, plain = ([p.detach() for p in model.parameters()] for model in models)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(ours, naive, strict=True))
    assert not all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(ours, plain, strict=True))  # fmt: skip


def test_a_wrong_value_is_noticed(benchmark):
    matrix = torch.diag(torch.tensor([1.0, 3.0, 2.0]))
    for double in (True, False):
        assert benchmark.value_error(matrix, torch.tensor([3.0, 2.0]), double) < 1e-6
        assert benchmark.value_error(matrix, torch.tensor([3.0, 1.9]), double) == pytest.approx(0.05)  # fmt: skip
    stack = torch.stack([matrix, 2 * matrix[:, [1, 0, 2]]])
    assert benchmark.value_error(stack, torch.tensor([[3.0], [6.0]]), True) < 1e-6
