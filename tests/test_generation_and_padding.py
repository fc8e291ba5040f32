"""Bit identity where a model is used: generation with a cache, padding on either side, each attention kernel, training mode."""

from __future__ import annotations

import pytest
import torch

import specdef
from specdef.models.tiny import tiny_inputs

PADDED = 5


@pytest.fixture
def pair(tiny_folder, tmp_path):
    """Return a function from (family, dtype) to the original and the locked model."""

    def make(family, dtype=torch.float32):
        source = tiny_folder(family, dtype)
        specdef.lock_checkpoint(source, tmp_path / "locked", specdef.LockConfig())
        return specdef.load_model(source), specdef.load_model(tmp_path / "locked")

    return make


def padded(family, side):
    inputs = tiny_inputs(family, seed=3)
    hole = slice(None, PADDED) if side == "left" else slice(-PADDED, None)
    inputs["attention_mask"][0, hole] = 0
    return inputs


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma", "phi3", "qwen3_moe", "gpt2", "gpt_neox"])
def test_outputs_and_generated_text(family, dtype, attention, pair):
    models = pair(family, dtype)
    for model in models:
        model.set_attn_implementation(attention)
    for side in ("left", "right"):
        with torch.no_grad():
            first, second = (model(**padded(family, side)).logits for model in models)
        assert torch.equal(first, second), side
    first, second = (
        model.generate(
            **padded(family, "left"), max_new_tokens=10, do_sample=False, use_cache=True,
            output_logits=True, return_dict_in_generate=True, pad_token_id=0,
        )
        for model in models
    )  # fmt: skip
    assert torch.equal(first.sequences, second.sequences)
    assert all(torch.equal(a, b) for a, b in zip(first.logits, second.logits, strict=True))


@pytest.mark.parametrize("family", ["resnet", "resnet-bottleneck"])
def test_batch_norm_in_training_mode(family, pair):
    """The scale sits behind the statistics, so they move alike."""
    models = [model.train() for model in pair(family)]
    for seed in range(3):
        with torch.no_grad():
            first, second = (model(**tiny_inputs(family, seed=seed)).logits for model in models)
        assert torch.equal(first, second)
    first, second = (model.state_dict() for model in models)
    moved = [name for name in first if "running" in name]
    assert moved and all(torch.equal(first[name], second[name]) for name in moved)
