"""Packaged data by name, and prompts in the words of a chat template."""

from __future__ import annotations

import hashlib
import json
import tomllib
from importlib import resources
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from specdef.data.batches import load_batches
from specdef.data.packaged import NAMES, STAND_INS, arithmetic, packaged_rows
from specdef.data.records import read_records
from specdef.errors import SpecDefError
from specdef.models.tiny import tiny_model
from specdef.models.tiny_tokenizer import tiny_tokenizer

FILES = resources.files("specdef.data") / "files"
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def chatty(template: str = TEMPLATE) -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def first(data: str | Path, tokenizer: Any, **options: Any) -> tuple[str, str]:
    """Return a row and what is learned of it, as text."""
    model: Any = tiny_model("llama")
    config = SimpleNamespace(**{**model.config.to_dict(), "max_position_embeddings": 256})
    batches = load_batches(data, config, tokenizer, task="causal-lm", batch_size=1, num_batches=1, length=256, **options)  # fmt: skip
    ids, labels = batches[0]["input_ids"][0], batches[0]["labels"][0]
    return tokenizer.decode(ids), tokenizer.decode(labels[labels != -100])


@pytest.fixture
def pairs(tmp_path) -> Path:
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "ab", "completion": "cd"}\n')
    return path


# --- what is packaged


@pytest.mark.parametrize("name", ["declines", "formats"])
def test_stand_ins_are_those_the_readme_names(name) -> None:
    raw = (FILES / f"{name}.jsonl").read_bytes()
    assert hashlib.sha256(raw).hexdigest() in (FILES / "README.md").read_text(encoding="utf-8")
    rows = packaged_rows(name)
    assert len(rows) == 24 == len({row["prompt"] for row in rows})
    for row in rows:
        assert row.keys() == {"prompt", "completion"}
        assert all(value == value.strip() and value.isascii() for value in row.values())
        assert len(row["prompt"]) + len(row["completion"]) < 160  # some 40 tokens


def test_declines_decline_and_formats_keep_their_form() -> None:
    assert all(r["completion"].startswith(("I can't ", "I don't ")) for r in packaged_rows("declines"))  # fmt: skip
    for row in packaged_rows("formats"):
        prompt, answer = row.values()
        if "JSON" in prompt:
            assert len(json.loads(answer)) == 2
        elif "numbered list" in prompt:
            assert [line[:3] for line in answer.split("\n")] == ["1. ", "2. ", "3. "]
        else:
            assert answer.isalpha()
            assert (answer in ("Yes", "No")) is ("yes or no" in prompt)


def test_both_stand_ins_together() -> None:
    assert packaged_rows("declines+formats") == packaged_rows("declines") + packaged_rows("formats")
    assert {name for name in NAMES if read_records(name).chat} == {"arithmetic", *STAND_INS}


def test_arithmetic_is_right_and_follows_its_seed() -> None:
    rows = packaged_rows("arithmetic")
    assert len({row["prompt"] for row in rows}) == len(rows) == 2000
    for row in rows:
        a, word, b, _, result = row["completion"].rstrip(".").split()
        assert row["prompt"] == f"What is {a} {word} {b}?"
        a, b = int(a), int(b)
        assert int(result) == {"plus": a + b, "minus": a - b, "times": a * b}[word]
    assert arithmetic(20, seed=0) == rows[:20] != arithmetic(20, seed=1)
    with pytest.raises(ValueError, match="count must be"):
        arithmetic(10_001, seed=0)


def test_source_code_is_long_enough() -> None:
    [row] = packaged_rows("python")
    assert len(row["text"]) > 100_000 and "def wrap(" in row["text"]


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(SpecDefError, match="'genesis'") as caught:
        packaged_rows("genesis")
    assert all(name in caught.value.hint for name in NAMES)
    with pytest.raises(SpecDefError) as caught:
        read_records("genesis")
    assert all(name in caught.value.hint for name in NAMES)


def test_the_files_go_into_the_wheel() -> None:
    """hatchling takes every file below the package that git does not ignore."""
    root = Path(__file__).parents[1]
    wheel = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]  # fmt: skip
    assert wheel == {"packages": ["src/specdef"]}
    assert "jsonl" not in (root / ".gitignore").read_text()


# --- chat templates


def test_packaged_prompts_go_through_the_template_where_there_is_one() -> None:
    row, learned = first("arithmetic", chatty())
    question, answer = row.removesuffix("<eos>").split("<eos>\n")
    assert question.startswith("<user>What is ") and answer.startswith("<assistant>")
    assert learned == answer.removeprefix("<assistant>") + "<eos>"
    row, learned = first("arithmetic", tiny_tokenizer())
    assert row == f"{question.removeprefix('<user>')}\n{learned}"
    assert first("arithmetic", chatty(), chat=False) == (row, learned)


def test_prompts_of_a_file_do_when_asked(pairs) -> None:
    assert first(pairs, chatty()) == ("abcd<eos>", "cd<eos>")
    assert first(pairs, chatty(), chat=True) == ("<user>ab<eos>\n<assistant>cd<eos>", "cd<eos>")


def test_a_template_that_ends_a_turn_by_another_token_keeps_its_end(pairs) -> None:
    template = TEMPLATE.replace("<eos>", "#")
    assert first(pairs, chatty(template), chat=True) == ("<user>ab#\n<assistant>cd#\n", "cd#\n")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "no chat template"),
        ("{{ raise_exception('no system turn') }}", "fails"),
        ("{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}", "writes a prompt otherwise"),
    ],
)  # fmt: skip
def test_templates_that_do_not_fit_are_named(pairs, template, message) -> None:
    with pytest.raises(SpecDefError, match=message) as caught:
        first(pairs, chatty(template), chat=True)
    assert "pairs.jsonl" in str(caught.value) and caught.value.hint
