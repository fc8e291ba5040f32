"""`specdef verify --data` and `--quantization`: what is measured beside hashes and outputs, and what counts as a finding."""

from __future__ import annotations

from pathlib import Path

import pytest

import specdef
from specdef.lock.config import LockConfig
from specdef.lock.quantization import formats

SMALL = ("--batch-size", 2, "--length", 8, "--num-batches", 1, "--dtype", "float32")


@pytest.fixture(scope="module")
def pair(ready, tmp_path_factory) -> tuple[Path, Path]:
    """A llama with a tokenizer, and its locked folder."""
    out = tmp_path_factory.mktemp("checks") / "locked"
    specdef.lock_checkpoint(ready("llama"), out, LockConfig(scale=2.0**20, schedule="convex"))
    return ready("llama"), out


def test_everything_is_measured(run, pair):
    result = run("verify", pair[1], "--original", pair[0], "--data", "sotu", *SMALL, "--quantization", "--json")  # fmt: skip
    assert result.code == 0, result.err
    values = result.json
    assert values["valid"] and not values["problems"]
    assert [d["dtype"] for d in values["ranges"]["dtypes"]] == ["float32", "bfloat16", "float16"]
    assert [d["fits"] for d in values["ranges"]["dtypes"]] == [True, True, False]
    (activations,) = values["activations"]
    assert activations["finite"] and activations["max_abs_logit_difference"] == 0.0
    assert {"module", "input", "output"} == activations["modules"][0].keys()
    cost = values["quantization"]
    assert {row["format"] for row in cost["formats"]} == {form.name for form in formats()[0]}
    assert {"relative_logit_error", "loss", "not_representable"} == cost["formats"][0]["locked"].keys()  # fmt: skip
    assert cost["loss"]["original"] == cost["loss"]["locked"]
    for words in ("fit float32 and bfloat16", "float16 breaks it", "activations in float32", "int8-tensor", "of room"):  # fmt: skip
        assert words in result.err


def test_without_data_only_ranges(run, pair):
    values = run("verify", pair[1], "--original", pair[0], "--dtype", "float32", "--json").json
    assert values["ranges"] and values["activations"] is None and values["quantization"] is None
    alone = run("verify", pair[1], "--json").json
    assert alone["valid"] and alone["ranges"] is None


def test_without_an_original_there_is_nothing_to_compare_with(run, pair):
    result = run("verify", pair[1], "--data", "sotu", *SMALL, "--json")
    assert result.code == 0 and result.json["ranges"] is None
    assert result.json["activations"][0]["max_abs_logit_difference"] is None


def test_another_dtype_than_the_stored_one_is_no_finding(run, pair):
    """The stored dtype is looked at in any case."""
    result = run("verify", pair[1], "--original", pair[0], "--data", "sotu", *SMALL[:-1], "float16", "--json")  # fmt: skip
    assert result.code == 0, result.err
    half, stored = result.json["activations"]
    assert (half["dtype"], stored["dtype"]) == ("float16", "float32")
    assert not half["finite"] and stored["finite"]


def test_an_overflow_in_the_stored_dtype_is_a_finding(run, ready, tmp_path):
    """Without calibration a lock does not see it."""
    model = specdef.load_model(ready("llama"))
    block = model.model.layers[0]
    block.post_attention_layernorm.weight.data.mul_(2.0**10)
    block.mlp.gate_proj.weight.data.mul_(2.0**60)
    block.mlp.down_proj.weight.data.mul_(2.0**-30)
    source = tmp_path / "model"
    model.save_pretrained(source)
    recipe = LockConfig(
        scale=2.0**60, schedule="convex", layers=(0,), target_modules=("down_proj",)
    )
    specdef.lock_checkpoint(source, tmp_path / "locked", recipe)
    # the tokenizer is that of another folder with the same vocabulary
    for file in ready("llama").glob("tokenizer*"):
        (source / file.name).write_bytes(file.read_bytes())
    result = run("verify", tmp_path / "locked", "--original", source, "--data", "sotu", *SMALL, "--json")  # fmt: skip
    assert result.code == 1
    assert not result.json["valid"]
    problem = result.json["problems"][-1]
    assert (
        "activations of model.layers.0.mlp" in problem
        and "float32, the dtype it is stored in" in problem
    )
    assert "NOT VALID" in result.err and problem in result.err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--quantization",), "--original MODEL and --data D"),
        (("--batch-size", 2), "--retain DATA or --data DATA"),
        (("--data", "sotu", "--eval-batches", 2), "--eval-batches is for --retain"),
        (("--data", "sotu", "--retain", "sotu"), "two calls"),
        (("--data", "none.txt"), "none.txt"),
        (("--data", "sotu", "--batch-size", 0), "batch_size must be at least 1"),
    ],
)
def test_mistakes(run, pair, options, words):
    length = ("--length", 8) if "sotu" in options or "none.txt" in options else ()
    result = run("verify", pair[1], *options, *length, "--json")
    assert result.code == 2 and words in result.err


def test_a_dry_run_says_where_the_lock_fits(run, pair, tmp_path):
    result = run(
        "lock",
        pair[0],
        tmp_path / "out",
        "--scale",
        2.0**20,
        "--schedule",
        "convex",
        "--dry-run",
        "--json",
    )
    fits = {entry["dtype"]: entry["fits"] for entry in result.json["ranges"]["dtypes"]}
    assert fits == {"float32": True, "bfloat16": True, "float16": False}
