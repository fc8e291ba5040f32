"""Texts and token batches: what is packaged, determinism, disjoint windows, and errors that name the place."""

from __future__ import annotations

import hashlib
from importlib import resources
from pathlib import Path

import pytest
import torch

from specdef.data.texts import TEXTS, load_text, read_texts, token_batches
from specdef.errors import SpecDefError

END = 256


class ByteTokenizer:
    """One token per byte, so that windows can be read back."""

    def __init__(self, eos_token_id: int | None = END) -> None:
        self.eos_token_id = eos_token_id

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}


def rows(batches: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    return torch.cat([batch["input_ids"] for batch in batches])


# --- packaged texts


@pytest.mark.parametrize("name", TEXTS)
def test_packaged_text_is_the_one_its_readme_names(name: str) -> None:
    text = load_text(name)
    readme = (resources.files("specdef.data") / "files" / "README.md").read_text(encoding="utf-8")
    assert hashlib.sha256(text.encode()).hexdigest() in readme
    assert 40_000 < len(text.encode()) < 60_000


def test_unknown_text_lists_the_known_ones() -> None:
    with pytest.raises(SpecDefError, match="'genesis'") as caught:
        load_text("genesis")
    assert all(name in caught.value.hint for name in TEXTS)


# --- batches


def test_batches_have_the_shapes_and_fields_a_causal_model_takes() -> None:
    batches = token_batches(
        load_text("sotu"), ByteTokenizer(), batch_size=3, length=16, num_batches=4, seed=0
    )
    assert len(batches) == 4
    for batch in batches:
        assert set(batch) == {"input_ids", "attention_mask", "labels"}
        assert all(v.shape == (3, 16) and v.dtype == torch.int64 for v in batch.values())
        assert torch.equal(batch["labels"], batch["input_ids"])
        assert batch["labels"].data_ptr() != batch["input_ids"].data_ptr()
        assert batch["attention_mask"].all()


def test_windows_are_disjoint_pieces_of_the_text() -> None:
    text = "".join(chr(97 + i // 26) + chr(97 + i % 26) for i in range(26 * 26))
    drawn = rows(
        token_batches(text, ByteTokenizer(), batch_size=4, length=8, num_batches=42, seed=3)
    )
    pieces = [bytes(row.tolist()).decode() for row in drawn]
    assert len(set(pieces)) == len(pieces) == 168
    assert all(text.index(piece) % 8 == 0 for piece in pieces)


def test_seed_decides_the_draw_and_the_global_state_does_not() -> None:
    def draw(seed: int) -> torch.Tensor:
        return rows(
            token_batches(
                load_text("moby-dick"),
                ByteTokenizer(),
                batch_size=2,
                length=32,
                num_batches=5,
                seed=seed,
            )
        )

    first = draw(7)
    state = torch.get_rng_state()
    torch.rand(1)
    torch.set_rng_state(state)
    again = draw(7)
    assert torch.equal(first, again)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(first, draw(8))


def test_documents_are_each_ended_by_the_end_token() -> None:
    [batch] = token_batches(
        ["abc", "de"], ByteTokenizer(), batch_size=1, length=7, num_batches=1, seed=0
    )
    assert batch["input_ids"].tolist() == [[97, 98, 99, END, 100, 101, END]]
    [batch] = token_batches(
        ["abc", "de"], ByteTokenizer(None), batch_size=1, length=5, num_batches=1, seed=0
    )
    assert batch["input_ids"].tolist() == [[97, 98, 99, 100, 101]]


def test_path_and_text_give_the_same_batches(tmp_path: Path) -> None:
    text = load_text("sotu")
    path = tmp_path / "a.txt"
    path.write_text(text, encoding="utf-8")
    args = {"batch_size": 2, "length": 16, "num_batches": 2, "seed": 1}
    from_path = token_batches(path, ByteTokenizer(), **args)
    assert torch.equal(rows(from_path), rows(token_batches(text, ByteTokenizer(), **args)))


def test_a_hugging_face_tokenizer_serves(capfd: pytest.CaptureFixture[str]) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<end>", model_max_length=64
    )
    [batch] = token_batches(
        load_text("sotu"), tokenizer, batch_size=8, length=64, num_batches=1, seed=0
    )
    piece = tokenizer.decode(batch["input_ids"][0])
    assert piece in load_text("sotu")
    # A text longer than the context is no mistake here; transformers would log one.
    assert "sequence length" not in capfd.readouterr().err
    [batch] = token_batches("ab", tokenizer, batch_size=1, length=3, num_batches=1, seed=0)
    assert batch["input_ids"][0, -1] == tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("short", "shorter windows"),
        ("long enough for one batch", "at most 1 batches"),
        ("corpus.txt", "pathlib.Path"),
    ],
)
def test_too_short_a_text_is_refused_with_the_counts(text: str, hint: str) -> None:
    with pytest.raises(SpecDefError, match=rf"its {len(text) + 1} tokens") as caught:
        token_batches(text, ByteTokenizer(), batch_size=2, length=8, num_batches=9, seed=0)
    assert hint in caught.value.hint


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"length": 1}, {"num_batches": -1}])
def test_counts_out_of_range_are_argument_mistakes(wrong: dict[str, int]) -> None:
    args = {"batch_size": 1, "length": 2, "num_batches": 1} | wrong
    [(name, value)] = wrong.items()
    with pytest.raises(ValueError, match=rf"{name} must be at least \d, got {value}"):
        token_batches("some text", ByteTokenizer(), **args, seed=0)


# --- files


def test_txt_is_one_document_and_jsonl_one_per_line(tmp_path: Path) -> None:
    txt = tmp_path / "a.txt"
    txt.write_bytes(b"\xef\xbb\xbfone\n\ntwo\n")
    assert read_texts(txt) == ["one\n\ntwo\n"]
    jsonl = tmp_path / "a.jsonl"
    # U+2028 ends a line for str.splitlines, and not in this format.
    jsonl.write_text('{"text": "a\u2028b", "id": 1}\n\n{"text": "c"}\r\n', encoding="utf-8")
    assert read_texts(str(jsonl)) == ["a\u2028b", "c"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "there is no such file"),
        ("empty.txt", b" \n", "holds no text"),
        ("empty.jsonl", b"\n\n", "holds no text"),
        ("table.csv", b"a,b", r"not from \.csv"),
        ("noname", b"a", "without a suffix"),
        ("latin.txt", b"one\ntwo\ncaf\xe9\n", "line 3: byte 0xe9 is not UTF-8"),
        ("latin.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', "line 2: byte 0xe9"),
        ("bom.txt", b"\xef\xbb\xbfone\n\xff", "line 2: byte 0xff"),
        ("broken.jsonl", b'{"text": "a"}\n\n{"text": \n', "line 3: not JSON"),
        ("field.jsonl", b'{"txt": "a"}\n', 'line 1: no string under "text"'),
        ("number.jsonl", b'{"text": "a"}\n{"text": 3}\n', "line 2: no string"),
        ("list.jsonl", b'["a"]\n', "line 1: no string"),
    ],
)
def test_unusable_files_are_refused_where_they_are_wrong(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SpecDefError, match=message) as caught:
        read_texts(path)
    assert str(path) in str(caught.value)
    assert caught.value.hint


def test_a_folder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "x.txt"
    folder.mkdir()
    with pytest.raises(SpecDefError, match="directory"):
        read_texts(folder)
