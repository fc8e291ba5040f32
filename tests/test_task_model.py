"""Models with their tokenizers: which kind, locked or not, and errors for folders that are no such model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from specdef import LockConfig, lock_checkpoint
from specdef.cli.task_model import load_task_model
from specdef.data.batches import load_batches
from specdef.errors import CheckpointError
from specdef.models.tiny import save_tiny, tiny_inputs
from specdef.models.tiny_tokenizer import save_tiny_tokenizer

TASKS = {
    "llama": "causal-lm",
    "gpt2": "causal-lm",
    "bert": "sequence-classification",
    "vit": "image-classification",
    "resnet": "image-classification",
}


@pytest.fixture
def folder(tiny_folder, tmp_path):
    """Return a function that gives a tiny model's folder with a tokenizer, for a test to change."""

    def make(family: str, *, tokenizer: bool = True) -> Path:
        copy = Path(shutil.copytree(tiny_folder(family), tmp_path / family))
        return save_tiny_tokenizer(copy) if tokenizer else copy

    return make


@pytest.mark.parametrize("family", TASKS)
def test_the_kind_follows_from_the_architecture(folder, family) -> None:
    pictures = "image" in TASKS[family]
    loaded = load_task_model(folder(family, tokenizer=not pictures))
    assert loaded.task == TASKS[family] and not loaded.model.training
    assert (loaded.processor is None) is pictures
    assert next(loaded.model.parameters()).dtype == torch.float32
    wide = load_task_model(loaded.folder, dtype="float64", task=TASKS[family])
    assert next(wide.model.parameters()).dtype == torch.float64


def test_an_image_processor_is_loaded_without_torchvision(folder) -> None:
    path = folder("vit", tokenizer=False)
    settings = {"image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 16}}
    (path / "preprocessor_config.json").write_text(json.dumps(settings))
    processor = load_task_model(path).processor
    assert processor.size["height"] == 16


@pytest.mark.parametrize("method", ["absorbed", "compensated"])
def test_a_locked_folder_gives_the_same_outputs_and_batches(folder, tmp_path, method) -> None:
    source, locked = folder("llama"), tmp_path / "locked"
    options = {} if method == "absorbed" else {"scale": 100.0, "k": 4, "num_layers": 1}
    lock_checkpoint(source, locked, LockConfig(method=method, **options))
    one, other = load_task_model(source), load_task_model(locked)
    assert other.task == "causal-lm"
    inputs = tiny_inputs("llama")
    torch.testing.assert_close(
        other.model(**inputs).logits, one.model(**inputs).logits, rtol=1e-3, atol=1e-3
    )
    options = {"task": "causal-lm", "batch_size": 2, "num_batches": 1, "length": 16}
    [[a], [b]] = [load_batches("sotu", m.model.config, m.processor, **options) for m in (one, other)]  # fmt: skip
    assert torch.equal(a["input_ids"], b["input_ids"])


def test_a_locked_folder_borrows_the_originals_tokenizer(folder, tmp_path) -> None:
    source, locked = folder("llama", tokenizer=False), tmp_path / "locked"
    lock_checkpoint(source, locked)
    save_tiny_tokenizer(source)
    with pytest.raises(CheckpointError, match="no tokenizer"):
        load_task_model(locked)
    assert load_task_model(locked, original=source).processor.eos_token_id == 2


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_no_tokenizer_is_an_error_not_an_empty_one(folder, family) -> None:
    with pytest.raises(CheckpointError, match="no tokenizer") as caught:
        load_task_model(folder(family, tokenizer=False))
    assert "Copy the tokenizer" in caught.value.hint


@pytest.mark.parametrize("content", ["", "{", '{"version": "1.0"}'])
def test_a_damaged_tokenizer_is_named(folder, content) -> None:
    path = folder("gpt2")
    (path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match="the tokenizer cannot be loaded"):
        load_task_model(path)


def test_code_in_a_folder_is_not_run(folder) -> None:
    path = folder("llama")
    (path / "own.py").write_text("raise SystemExit('ran')")
    settings = json.loads((path / "tokenizer_config.json").read_text())
    settings |= {"auto_map": {"AutoTokenizer": ["own.Tokenizer", None]}, "tokenizer_class": "Tokenizer"}  # fmt: skip
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    try:
        load_task_model(path)
    except CheckpointError as error:
        assert "tokenizer" in str(error)


@pytest.mark.parametrize(
    ("change", "task", "message"),
    [
        ({"architectures": ["LlamaModel"]}, None, "LlamaModel, which is no model of a kind"),
        ({"architectures": None}, None, "no architecture and the model_type 'llama'"),
        ({}, "image-classification", "LlamaForCausalLM, which is no image-classification"),
        ({"architectures": None}, "image-classification", "no architecture"),
        ({"architectures": None, "model_type": "new"}, "causal-lm", "model_type 'new'"),
    ],
)
def test_folders_of_another_kind(folder, change, task, message) -> None:
    path = folder("llama")
    config = json.loads((path / "config.json").read_text()) | change
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message) as caught:
        load_task_model(path, task=task)
    assert caught.value.hint


def test_a_configuration_without_architecture_needs_the_task(folder) -> None:
    path = folder("llama")
    config = json.loads((path / "config.json").read_text())
    del config["architectures"]
    (path / "config.json").write_text(json.dumps(config))
    assert type(load_task_model(path, task="causal-lm").model).__name__ == "LlamaForCausalLM"
    with pytest.raises(CheckpointError, match="lacks 1 tensors"):
        load_task_model(path, task="sequence-classification")
    with pytest.raises(ValueError, match="task must be one of"):
        load_task_model(path, task="regression")


def test_no_model_folder(tmp_path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load_task_model(tmp_path)


def test_gpt_like_classifiers_learn_their_padding_token(tmp_path) -> None:
    from transformers import GPT2Config, GPT2ForSequenceClassification

    config = GPT2Config(n_embd=8, n_head=2, n_layer=1, n_positions=64, vocab_size=96, num_labels=2)
    GPT2ForSequenceClassification(config).save_pretrained(tmp_path)
    loaded = load_task_model(save_tiny_tokenizer(tmp_path))
    data = tmp_path / "a.jsonl"
    data.write_text("".join(json.dumps({"text": "x" * n, "label": n % 2}) + "\n" for n in (1, 5)))
    [batch] = load_batches(
        data, loaded.model.config, loaded.processor, task=loaded.task, batch_size=2, num_batches=1
    )
    assert loaded.model(**batch).loss.isfinite()


def test_tiny_tokenizer_covers_tiny_models(tmp_path) -> None:
    save_tiny("llama", tmp_path)
    loaded = load_task_model(save_tiny_tokenizer(tmp_path))
    text = "Call me Ishmael. Some years ago--never mind"
    assert loaded.processor.decode(loaded.processor(text)["input_ids"]) == text
    assert len(loaded.processor) <= loaded.model.config.vocab_size
