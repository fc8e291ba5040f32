"""`--layers`, `--target-modules`, `--calibration` and `--dry-run`."""

from __future__ import annotations

import pytest


def covered(result):
    return {name for site in result.json["sites"] for name in site["covers"]}


def test_dry_run_writes_nothing_and_tells_the_plan(run, locked, tmp_path):
    plan = run("lock", locked.source, tmp_path / "out", "--dry-run", "--json")
    assert plan.code == 0
    assert not list(tmp_path.iterdir())
    assert "nothing was written" in plan.err
    lock = run("lock", locked.source, tmp_path / "out", "--json").json
    for key in (
        "method",
        "sites",
        "tensors_total",
        "tensors_changed",
        "sigma_max_before",
        "sigma_max_after",
    ):
        assert plan.json[key] == lock[key]
    assert plan.json["bytes_written"] == (
        tmp_path / "out" / "model.safetensors"
    ).stat().st_size - header_bytes(tmp_path)


def header_bytes(tmp_path):
    with (tmp_path / "out" / "model.safetensors").open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


@pytest.mark.parametrize("method", ["compensated", "scaled"])
def test_dry_run_of_other_methods(run, locked, tmp_path, method):
    result = run(
        "lock",
        locked.source,
        tmp_path / "out",
        "--dry-run",
        "--json",
        "--method",
        method,
        "--scale",
        "100",
        "--k",
        "2",
    )
    assert result.json["sites"][0]["k"] == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", ["absorbed", "compensated"])
def test_layers(run, locked, tmp_path, method):
    result = run(
        "lock",
        locked.source,
        tmp_path / "out",
        "--dry-run",
        "--json",
        "--method",
        method,
        "--scale",
        "64",
        "--layers",
        "1",
    )
    assert {site["layer"] for site in result.json["sites"]} == {1}


def test_target_modules_as_names(run, locked, tmp_path):
    options = ["--dry-run", "--json", "--method", "compensated", "--scale", "64", "--k", "2"]
    result = run(
        "lock", locked.source, tmp_path / "out", *options, "--target-modules", "q_proj, mlp.up_proj"
    )
    assert {name.split(".")[-2] for name in covered(result)} == {"q_proj", "up_proj"}


def test_target_modules_as_an_expression(run, locked, tmp_path):
    options = ["--dry-run", "--json", "--method", "compensated", "--scale", "64", "--k", "2"]
    result = run(
        "lock",
        locked.source,
        tmp_path / "out",
        *options,
        "--target-modules",
        r".*layers\.1\..*(q|k)_proj",
    )
    assert covered(result) == {f"model.layers.1.self_attn.{x}_proj.weight" for x in "qk"}


def test_target_modules_of_absorbed_select_the_sites_they_take_part_in(run, locked, tmp_path):
    result = run(
        "lock",
        locked.source,
        tmp_path / "out",
        "--dry-run",
        "--json",
        "--target-modules",
        "down_proj",
    )
    assert {site["kind"] for site in result.json["sites"]} == {"gated"}


@pytest.mark.parametrize("verb", ["lock", "inspect"])
@pytest.mark.parametrize("pattern", ["q_prj", "up_proj,q_prj"])
def test_a_name_that_is_not_there_is_refused_with_the_nearest(run, locked, tmp_path, verb, pattern):
    """Also when the other names are there: a typing error would leave a module unlocked in silence."""
    rest = [tmp_path / "out"] if verb == "lock" else []
    result = run(verb, locked.source, *rest, "--target-modules", pattern, "--json")
    assert result.code == 2
    assert result.json["type"] == "SelectionError"
    assert "'q_prj'" in result.json["error"] and "q_proj" in result.json["error"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("verb", ["lock", "inspect"])
@pytest.mark.parametrize("layers", ["2", "0-7"])
def test_a_block_that_is_not_there_is_refused_with_the_range(run, locked, tmp_path, verb, layers):
    rest = [tmp_path / "out"] if verb == "lock" else []
    result = run(verb, locked.source, *rest, "--layers", layers)
    assert result.code == 2
    assert "no block 2" in result.err and "0 to 1" in result.err
    assert not list(tmp_path.iterdir())


def test_a_module_without_a_site_is_refused(run, locked, tmp_path):
    result = run("lock", locked.source, tmp_path / "out", "--target-modules", "embed_tokens")
    assert result.code == 2
    assert "select none of" in result.err and "  -> " in result.err


def test_calibration_needs_a_tokenizer(run, locked, tmp_path, tree):
    text = tmp_path / "text.txt"
    text.write_text("a word " * 5000)
    for options in ([], ["--dry-run"]):
        result = run("lock", locked.source, tmp_path / "out", "--calibration", text, *options)
        assert result.code == 2
        assert "has no tokenizer to calibrate with" in result.err
        assert result.err.rstrip().splitlines()[-1].startswith("  -> Leave --calibration out")
    assert tree() == {"text.txt"}


@pytest.fixture
def with_tokenizer(locked, copy):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    folder = copy(locked.source, "with-tokenizer")
    tokenizer = Tokenizer(WordLevel({f"w{i}": i for i in range(96)}, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder)
    return folder


def test_calibration_on_a_text(run, with_tokenizer, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{(i * i) % 89}" for i in range(4200)))
    lock = run("lock", with_tokenizer, tmp_path / "out", "--calibration", text, "--json")
    assert lock.code == 0, lock.err
    assert lock.json["selection"] == "calibrated"
    assert lock.json["outputs_identical"] is True
    plain = run("lock", with_tokenizer, tmp_path / "plain", "--json").json
    assert plain["selection"] == "data-free"
    assert plain["lock_id"] != lock.json["lock_id"]
    result = run("unlock", tmp_path / "out", tmp_path / "back", "--key", lock.json["key"], "--json")
    assert result.json["sha256_equal"] is True


@pytest.mark.parametrize("text", ["short", "missing"])
def test_calibration_text_that_cannot_be_used(run, with_tokenizer, tmp_path, text):
    path = tmp_path / f"{text}.txt"
    if text == "short":
        path.write_text("w1 w2 w3")
    result = run("lock", with_tokenizer, tmp_path / "out", "--calibration", path)
    assert result.code == 2
    assert result.err.rstrip().splitlines()[-1].startswith("  -> ")
    assert not (tmp_path / "out").exists()
