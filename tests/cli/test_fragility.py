"""`specdef fragility`: the numbers are the library's, pages hold them, a finding has an exit code, mistakes come early."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

import specdef
from specdef.cli.analysis import DataOptions
from specdef.cli.fragility_run import insert_lora, prepare, task_names
from specdef.models.tiny import tiny_model

SMALL = (
    "--batch-size", 2, "--num-batches", 1, "--aligned-batches", 1, "--length", 32, "--max-rank", 2, "--steps", 8,
    "--parameters", "model.layers.1.mlp",
)  # fmt: skip
QUICK = ("--learning-rate", 1e-4, *SMALL)
CONTRACT = {"rank", "lambda_min", "initial_overlap", "gamma", "forecast", "observed", "exponent"}


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> dict[str, Path]:
    """Aligned rows, a task, and rows without an answer."""
    folder = tmp_path_factory.mktemp("rows")
    made = {
        "aligned": [{"prompt": f"say {i}", "completion": "no"} for i in range(4)],
        "task": [{"text": "abc def ghi " * 20}],
        "empty": [{"prompt": f"say {i}", "completion": " "} for i in range(4)],
    }
    for name, lines in made.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    return {name: folder / f"{name}.jsonl" for name in made}


def test_the_numbers_are_the_librarys(run, ready, rows) -> None:
    result = run("fragility", ready("llama"), "--aligned", rows["aligned"], "--task", rows["task"], *QUICK, "--json")  # fmt: skip
    assert result.code == 0, result.err
    found = result.json
    assert found.keys() >= CONTRACT
    options = {"batch_size": 2, "num_batches": 1, "length": 32, "split": None, "columns": None, "task": None, "seed": 0}  # fmt: skip
    work = prepare(
        ready("llama"), DataOptions(data=str(rows["aligned"]), **options), [DataOptions(data=str(rows["task"]), **options)],
        params=("model.layers.1.mlp",), lora=None, dtype="float32", device="cpu", quiet=True,
    )  # fmt: skip
    report = specdef.fragility(
        work.model, work.aligned, work.tasks["task.jsonl"], loss=work.loss, params=work.params, learning_rate=1e-4, steps=8,
        max_rank=2,
    )  # fmt: skip
    for name in ("rank", "lambda_min", "initial_overlap", "gamma", "gradient_norm"):
        assert found[name] == pytest.approx(getattr(report, name), rel=1e-4), name
    assert found["forecast"]["alignment"] == pytest.approx(report.forecast.alignment, rel=1e-3)
    assert found["observed"] is found["exponent"] is found["ranking"] is None
    assert found["parameters"]["count"] == sum(
        p.numel() for n, p in work.model.named_parameters() if n.startswith("model.layers.1.mlp")
    )
    assert (found["task"], found["aligned"]) == ("task.jsonl", "aligned.jsonl")
    assert found["findings"] == {"task.jsonl": ""} and found["learning_rate_given"]
    # names of data, and no paths of this machine
    assert str(rows["task"].parent) not in result.out


def test_an_observed_run_its_pages_and_the_finding(run, ready, rows, tmp_path) -> None:
    out = tmp_path / "new" / "out"
    result = run(
        "fragility", ready("llama"), "--aligned", rows["aligned"], "--task", rows["task"], *SMALL, "--learning-rate", 0.3,
        "--observe", "--out", out, "--json", "--threshold", 1e-6,
    )  # fmt: skip
    assert result.code == 1, result.err
    found = result.json
    assert found["observed"]["alignment"][-1] > 1e-6
    assert "was seen above 1e-06" in found["findings"]["task.jsonl"]
    names = {
        "fragility.html",
        "fragility.md",
        "fragility.json",
        "forecast.png",
        "spectrum.png",
        "drift.png",
    }
    assert (
        {path.name for path in out.iterdir()}
        == names
        == {Path(file).name for file in found["files"]}
    )
    assert json.loads((out / "fragility.json").read_text()) == {n: v for n, v in found.items() if n != "files"}  # fmt: skip
    for page in ("fragility.html", "fragility.md"):
        text = (out / page).read_text()
        for value in (found["gamma"], found["initial_overlap"], found["observed"]["alignment"][-1]):
            assert f"{value:.3g}" in text, (page, value)
    assert f"{found['gamma']:.3g}" in result.err and "finding: " in result.err


def test_without_a_rate_a_tenth_of_the_stable_one_is_taken(run, ready, rows) -> None:
    result = run("fragility", ready("llama"), "--aligned", rows["aligned"], "--task", rows["task"], *SMALL, "--json")  # fmt: skip
    found = result.json
    assert not found["learning_rate_given"]
    assert found["learning_rate"] == pytest.approx(0.2 / found["forecast"]["lambda_max"], rel=0.05)
    assert "no --learning-rate was given" in result.err


def test_several_tasks_are_ranked(run, ready, rows, tmp_path) -> None:
    result = run(
        "fragility", ready("llama"), "--aligned", rows["aligned"], "--task", rows["task"], "--task", "arithmetic", *QUICK,
        "--observe", "--json", "--out", tmp_path / "out",
    )  # fmt: skip
    assert result.code == 0, result.err
    found = result.json
    assert {report["task"] for report in found["reports"]} == {"task.jsonl", "arithmetic"}
    last = {r["task"]: r["forecast"]["alignment"][-1] for r in found["reports"]}
    order = [task["task"] for task in found["ranking"]["tasks"]]
    assert order == sorted(last, key=lambda name: -last[name]) and found["task"] == order[0]
    seen = {r["task"]: r["observed"]["alignment"][-1] for r in found["reports"]}
    assert found["ranking"]["spearman"] == pytest.approx(1.0 if seen[order[0]] > seen[order[1]] else -1.0)  # fmt: skip
    assert found["ranking"]["p_value"] is None
    assert f"1. {order[0]}" in result.err
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {
        "tasks.png", *(f"{kind}-{i}.png" for kind in ("forecast", "spectrum", "drift") for i in (1, 2)),
    }  # fmt: skip


def test_adapters_alone_move(run, ready, rows) -> None:
    arguments = (
        "fragility",
        ready("llama"),
        "--aligned",
        rows["aligned"],
        "--task",
        rows["task"],
        *QUICK[:-2],
    )
    result = run(*arguments, "--lora", 2, "--optimizer", "adamw", "--json")
    assert result.code in (0, 1), result.err
    found = result.json
    model = tiny_model("llama")
    insert_lora(model, 2, seed=0)
    moving = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert found["parameters"]["count"] == sum(p.numel() for p in moving.values())
    assert moving and all("lora_" in name for name in moving)
    assert found["optimizer"]["name"] == "adamw" and found["lora"] == 2


def test_adapters_follow_the_seed_and_leave_the_global_state() -> None:
    def weights(seed: int) -> torch.Tensor:
        model = tiny_model("llama")
        insert_lora(model, 2, seed=seed)
        return torch.cat([p.flatten() for n, p in model.named_parameters() if "lora_A" in n])

    before = torch.get_rng_state()
    assert torch.equal(weights(1), weights(1)) and not torch.equal(weights(1), weights(2))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_dry_run_computes_nothing(run, ready, rows, tmp_path, tree, monkeypatch) -> None:
    from specdef.curvature.operators import HessianOperator

    def broken(*_: object) -> None:
        raise AssertionError("a product in a dry run")

    monkeypatch.setattr(HessianOperator, "_matvec", broken)
    before = tree()
    result = run(
        "fragility", ready("llama"), "--aligned", rows["aligned"], "--task", "sotu", *SMALL, "--dry-run", "--json", "--observe",
        "--out", tmp_path / "out",
    )  # fmt: skip
    assert result.code == 0, result.err
    found = result.json
    assert found["dry_run"] and found["tasks"] == ["sotu"]
    count = found["parameters"]["count"]
    assert found["memory_bytes"] > 20 * 4 * count
    assert found["terms"] == {"aligned": 2 * 3, "sotu": 2 * 31}
    assert found["training_gradients"] == 8 and found["hessian_products"] > 0
    assert tree() == before


@pytest.mark.parametrize("aligned", ["builtin", "declines", "formats"])
def test_stand_ins_are_at_hand(run, ready, aligned) -> None:
    result = run("fragility", ready("llama"), "--aligned", aligned, "--task", "python", *QUICK, "--length", 64, "--dry-run", "--json")  # fmt: skip
    assert result.code == 0, result.err
    assert result.json["terms"]["aligned"] > 4


def test_a_list_of_tasks_comes_from_toml(run, ready, rows, tmp_path) -> None:
    config = tmp_path / "f.toml"
    config.write_text('[fragility]\ntask = ["sotu", "moby-dick"]\nlength = 16\nbatch-size = 2\n')
    arguments = ("fragility", ready("llama"), "--aligned", rows["aligned"], "--config", config, "--dry-run", "--json", "--aligned-batches", 1)  # fmt: skip
    assert run(*arguments).json["tasks"] == ["sotu", "moby-dick"]
    config.write_text('[fragility]\ntask = "sotu"\nlength = 16\nbatch-size = 2\n')
    assert run(*arguments).json["tasks"] == ["sotu"]
    assert run(*arguments, "--task", "python").json["tasks"] == ["python"]


def test_tasks_with_the_same_last_part_keep_their_paths() -> None:
    assert task_names(["a/x.jsonl", "b/x.jsonl", "c/y.jsonl"]) == ["a/x.jsonl", "b/x.jsonl", "y.jsonl"]  # fmt: skip
    with pytest.raises(ValueError, match="twice"):
        task_names(["sotu", "sotu"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "none.jsonl"], "none.jsonl: there is no such file"),
        (["--optimizer", "lion"], "--optimizer must be one of sgd, heavy_ball, adamw"),
        (["--learning-rate", "0"], "--learning-rate must be positive"),
        (["--learning-rate", "nan"], "--learning-rate must be positive"),
        (["--threshold", "-1"], "--threshold must be positive"),
        (["--steps", "1"], "--steps must be at least 2"),
        (["--max-rank", "0"], "--max-rank must be at least 1"),
        (["--energy", "1.5"], "--energy must be in (0, 1]"),
        (["--lora", "0", "--parameters", ""], "--lora must be at least 1"),
        (["--lora", "2"], "leave --parameters out"),
        (["--parameters", "nothing"], "no floating parameter fits"),
        (["--aligned", "sotu"], "--task names the aligned data itself"),
        (["--task", "sotu"], "the same data twice"),
        (["--chat"], "no chat template"),
        (["--length", "1000"], "the model reads at most 64"),
        (["--batch-size", "9"], "4 examples, 9 were asked for"),
        (["--aligned-columns", "text=body"], "no column 'body'"),
    ],
)
def test_mistakes(run, ready, rows, tmp_path, tree, monkeypatch, arguments, message) -> None:
    monkeypatch.chdir(tmp_path)
    before = tree()
    result = run(
        "fragility", ready("llama"), "--aligned", rows["aligned"], "--task", "sotu", *QUICK, "--out", tmp_path / "out", "--json",
        *arguments,
    )  # fmt: skip
    assert result.code == 2
    assert message in result.json["error"] + result.json["hint"]
    assert tree() == before


def test_empty_answers_and_existing_output_are_refused(run, ready, rows, tmp_path, tree) -> None:
    arguments = ("fragility", ready("llama"), "--task", "sotu", *QUICK, "--json", "--out", tmp_path)
    (tmp_path / "kept").write_text("x")
    before = tree()
    result = run(*arguments, "--aligned", rows["aligned"])
    assert result.code == 2 and "already exists" in result.json["error"]
    result = run(*arguments[:-1], tmp_path / "out", "--aligned", rows["empty"])
    assert result.code == 2 and 'the text under "completion" is empty' in result.json["error"]
    assert "line " in result.json["error"]
    assert tree() == before


def test_weights_that_are_no_numbers_are_named(run, ready, rows, copy) -> None:
    from safetensors.torch import load_file, save_file

    folder = copy(ready("llama"))
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][0] = math.nan
    save_file(tensors, path, metadata={"format": "pt"})
    result = run("fragility", folder, "--aligned", rows["aligned"], "--task", "sotu", *QUICK, "--json")  # fmt: skip
    assert result.code == 2
    assert "nan" in result.json["error"].lower() and result.json["hint"]
