"""`specdef predict`: the numbers are the library's, a locked model is compared at the same target, mistakes come early."""

from __future__ import annotations

import math

import pytest
import torch

import specdef
from specdef.cli.analysis import DataOptions, load_workload
from specdef.cli.predict_report import Outcome, predict_report
from specdef.curvature.operators import HessianOperator
from specdef.rates.predict import predict_convergence
from specdef.rates.prediction import slowdown

SMALL = ("--batch-size", 2, "--num-batches", 2, "--length", 8, "--num-steps", 10)
KEYS = {
    "model", "locked", "data", "dtype", "task", "loss", "locked_loss", "target", "num_parameters", "optimizers",
    "num_matvecs", "num_losses", "seconds", "files",
}  # fmt: skip
NUMBERS = {
    "stable_learning_rate", "best_learning_rate", "steps_to_target", "steps_to_target_low", "steps_to_target_high",
    "trustworthy", "reason", "error_estimate", "stable_range", "lambda_max", "learning_rates", "steps", "settings",
}  # fmt: skip


@pytest.fixture(scope="module")
def pair(ready, tmp_path_factory):
    """A tiny llama and a locked form of it."""
    folder = tmp_path_factory.mktemp("predict") / "locked"
    specdef.lock_checkpoint(ready("llama"), folder, specdef.LockConfig.preset("convex", scale=2.0**10, min_scale=2.0))  # fmt: skip
    return ready("llama"), folder


@pytest.mark.parametrize("family", ["gpt2", "bert", "vit", "resnet"])
def test_every_kind_of_model(run, ready, data, family) -> None:
    result = run("predict", ready(family), "--data", data[family], *SMALL, "--optimizers", "gd,adamw", "--json")  # fmt: skip
    assert result.code == 0, result.err
    report = result.json
    assert report.keys() == KEYS
    assert report["optimizers"].keys() == {"gd", "adamw"}
    assert report["target"] == pytest.approx(0.1 * report["loss"])
    for row in report["optimizers"].values():
        assert row.keys() == NUMBERS | {"locked", "slowdown", "slowdown_low", "slowdown_high"}
        assert row["locked"] is row["slowdown"] is None
        assert row["stable_learning_rate"] > 0
        assert row["trustworthy"] is (not row["reason"])
    assert report["num_matvecs"] >= 20 and report["num_losses"] > 0


def test_a_locked_model_is_compared_at_the_same_target(run, pair) -> None:
    result = run("predict", *pair, "--data", "sotu", *SMALL, "--optimizers", "gd,nesterov", "--json", "--seed", 2)  # fmt: skip
    report = result.json
    assert report["dtype"] == "float64"
    assert report["locked_loss"] == pytest.approx(report["loss"], rel=1e-5)
    options = DataOptions(data="sotu", batch_size=2, num_batches=2, length=8, split=None, columns=None, task=None, seed=2)  # fmt: skip
    for name, row in report["optimizers"].items():
        found = []
        for folder in pair:
            work = load_workload(folder, options, dtype="float64", device="cpu")
            H = HessianOperator(work.loaded.model, work.batches, work.loss)
            found.append(predict_convergence(H, None, name, target=report["target"], num_steps=10, seed=2))  # fmt: skip
        for values, prediction in zip((row, row["locked"]), found, strict=True):
            assert values.keys() >= NUMBERS
            assert values["stable_learning_rate"] == pytest.approx(prediction.stable_learning_rate)
            assert values["best_learning_rate"] == pytest.approx(prediction.best_learning_rate)
            assert values["lambda_max"] == pytest.approx(prediction.lambda_max)
            assert (values["steps_to_target"] or math.inf) == prediction.steps_to_target
        ratio = slowdown(found[1], found[0])
        assert row["slowdown"] == pytest.approx(ratio.mid)
        assert row["slowdown_low"] == pytest.approx(ratio.low)
        assert row["locked"]["stable_learning_rate"] < 1e-2 * row["stable_learning_rate"]
    assert "LOCKED" in result.err and "slowdown" in result.err


def test_what_is_not_reached_is_null(run, ready, data) -> None:
    """JSON has no infinity; a script sees null, and the reason in words."""
    report = run(
        "predict", ready("bert"), "--data", data["bert"], *SMALL, "--optimizers", "gd", "--target", "1e9",
        "--max-steps", 2, "--json",
    ).json  # fmt: skip
    row = report["optimizers"]["gd"]
    assert row["steps_to_target"] is row["steps_to_target_high"] is None
    assert not row["trustworthy"] and "does not reach the target within 2 steps" in row["reason"]


def test_slowdown_of_a_locked_model_that_never_arrives(ready) -> None:
    from specdef.curvature.linear import MatrixOperator

    H = MatrixOperator(torch.diag(torch.tensor([4.0, 1.0], dtype=torch.float64)))
    steep = MatrixOperator(1e6 * H.matrix)
    outcomes = [
        Outcome(
            task="causal-lm", loss=1.0, target=0.6, num_parameters=2, curves={},
            predictions={"gd": predict_convergence(operator, torch.ones(2), "gd", target=0.6, max_steps=100)},
        )
        for operator in (H, steep)
    ]  # fmt: skip
    row = predict_report(*outcomes)["optimizers"]["gd"]
    assert row["slowdown"] == math.inf and 1 < row["steps_to_target"] < 10
    assert row["locked"]["steps_to_target"] is None


def test_rates_given_are_the_rates_used(run, ready, data) -> None:
    report = run(
        "predict", ready("bert"), "--data", data["bert"], *SMALL, "--optimizers", "gd", "--learning-rates",
        "1e-3,1e-2", "--json",
    ).json  # fmt: skip
    row = report["optimizers"]["gd"]
    assert row["learning_rates"] == [1e-3, 1e-2] and len(row["steps"]) == 2
    assert row["best_learning_rate"] in (1e-3, 1e-2)
    assert row["steps"][1] < row["steps"][0]


def test_parameters_restrict_what_moves(run, ready, data) -> None:
    arguments = ("predict", ready("bert"), "--data", data["bert"], *SMALL, "--optimizers", "gd", "--json")  # fmt: skip
    whole, head = run(*arguments).json, run(*arguments, "--parameters", "classifier").json
    assert head["num_parameters"] == 99 < whole["num_parameters"]
    assert head["optimizers"]["gd"]["lambda_max"] < whole["optimizers"]["gd"]["lambda_max"] * 1.001


def test_the_plot_and_the_table(run, pair, tmp_path, tree) -> None:
    path = tmp_path / "plot.png"
    result = run("predict", *pair, "--data", "sotu", *SMALL, "--optimizers", "gd,adamw", "--plot", path)  # fmt: skip
    assert (result.code, result.out) == (0, "")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert all(text in result.err for text in ("stable rate", "MODEL", "LOCKED", str(path)))
    before = tree()
    again = run("predict", *pair, "--data", "sotu", *SMALL, "--plot", path)
    assert again.code == 2 and "already exists" in again.err
    assert tree() == before


def test_options_come_from_toml_too(run, ready, data, tmp_path) -> None:
    config = tmp_path / "p.toml"
    config.write_text('[predict]\noptimizers = ["gd"]\nbatch-size = 2\nnum-batches = 1\nnum-steps = 5\nlearning-rates = [0.001]\n')  # fmt: skip
    report = run("predict", ready("bert"), "--data", data["bert"], "--config", config, "--json").json  # fmt: skip
    assert report["optimizers"].keys() == {"gd"}
    assert report["optimizers"]["gd"]["learning_rates"] == [1e-3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "none.csv"], "no such file or folder"),
        (["--data", "sotu", "--optimizers", "sdg"], "optimizer must be one of"),
        (["--data", "sotu", "--optimizers", ","], "--optimizers needs"),
        (["--data", "sotu", "--target", "-1"], "--target must be positive"),
        (["--data", "sotu", "--target", "nan"], "--target must be positive"),
        (["--data", "sotu", "--learning-rates", "fast"], "--learning-rates takes"),
        (["--data", "sotu", "--learning-rates", "0"], "--learning-rates takes"),
        (["--data", "sotu", "--num-steps", "0"], "--num-steps"),
        (["--data", "sotu", "--parameters", "nothing"], "no floating parameter fits"),
        (["--data", "sotu", "--dtype", "bfloat16"], "bfloat16"),
        (["--optimizers", "gd"], "--data"),
        (["none", "--data", "sotu"], "none"),
        (["n" * 300, "--data", "sotu"], "does not exist"),
    ],
)
def test_mistakes(run, ready, tmp_path, tree, monkeypatch, arguments, message) -> None:
    monkeypatch.chdir(tmp_path)
    before = tree()
    result = run("predict", ready("llama"), *arguments, "--plot", tmp_path / "p.png", "--json")
    assert result.code == 2
    assert message in result.err
    assert tree() == before


def test_a_loss_that_is_no_number_is_named(run, ready, copy) -> None:
    from safetensors.torch import load_file, save_file

    folder = copy(ready("llama"))
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][0] = math.nan
    save_file(tensors, path, metadata={"format": "pt"})
    result = run("predict", folder, "--data", "sotu", *SMALL, "--json")
    assert result.code == 2 and "the loss on this data is nan" in result.json["error"]
