"""Tiny seeded random models of every family that has a symmetry table, for tests, demos and dry runs.

Everything a symmetry must carry along is random and far from its neutral value (biases not 0, norm gains not 1, batch
norm statistics not 0 and 1), so a leg that a table forgets changes the output.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
_GROUPED: dict[str, Any] = _TEXT | {
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_RESNET: dict[str, Any] = {"embedding_size": 8, "num_labels": 5}

# family -> (config class, head, settings). Heads are 12 wide where the family allows it: no product of other sizes.
_SPECS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": (
        "LlamaConfig",
        "CausalLM",
        _GROUPED | {"head_dim": 12, "attention_bias": True, "mlp_bias": True},
    ),
    "mistral": ("MistralConfig", "CausalLM", _GROUPED | {"head_dim": 12, "sliding_window": 8}),
    "qwen2": ("Qwen2Config", "CausalLM", _GROUPED),
    "qwen3": ("Qwen3Config", "CausalLM", _GROUPED | {"head_dim": 12, "attention_bias": True}),
    "gemma": ("GemmaConfig", "CausalLM", _GROUPED | {"head_dim": 12, "attention_bias": True}),
    "phi3": ("Phi3Config", "CausalLM", _GROUPED),
    "mixtral": (
        "MixtralConfig",
        "CausalLM",
        _GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        "CausalLM",
        # Layer 0 is dense, layer 1 sparse.
        _GROUPED
        | {
            "head_dim": 12,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "mlp_only_layers": [0],
            "attention_bias": True,
        },
    ),
    "gpt_oss": (
        "GptOssConfig",
        "CausalLM",
        # YaRN, the default, would need a longer context.
        _GROUPED
        | {
            "head_dim": 12,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 8,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    "gpt2": (
        "GPT2Config",
        "CausalLM",
        {
            "n_embd": 32,
            "n_head": 4,
            "n_layer": 2,
            "n_positions": 64,
            "vocab_size": 96,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "gpt_neox": ("GPTNeoXConfig", "CausalLM", _TEXT | {"bos_token_id": 1, "eos_token_id": 2}),
    "bert": ("BertConfig", "SequenceClassification", _TEXT | {"num_labels": 3}),
    "deberta-v2": (
        "DebertaV2Config",
        "SequenceClassification",
        # As DeBERTa-v3 sets them.
        _TEXT
        | {
            "num_labels": 3,
            "relative_attention": True,
            "position_buckets": 8,
            "max_relative_positions": 16,
            "pos_att_type": ["p2c", "c2p"],
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
            "position_biased_input": False,
            "type_vocab_size": 0,
        },
    ),
    "vit": (
        "ViTConfig",
        "ImageClassification",
        {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 16,
            "patch_size": 8,
            "num_labels": 5,
        },
    ),
    # The first stage of the basic net keeps the width of the stem, so the stem joins its stream.
    "resnet": (
        "ResNetConfig",
        "ImageClassification",
        _RESNET | {"layer_type": "basic", "hidden_sizes": [8, 16], "depths": [2, 2]},
    ),
    "resnet-bottleneck": (
        "ResNetConfig",
        "ImageClassification",
        _RESNET | {"layer_type": "bottleneck", "hidden_sizes": [16, 32], "depths": [2, 2]},
    ),
}

TINY_FAMILIES: tuple[str, ...] = tuple(_SPECS)
"""Names `tiny_model` takes: the `model_type`s with a table; "resnet-bottleneck" is a second shape of "resnet"."""


def tiny_model(
    family: str,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    tie: bool | None = None,
    **overrides: Any,
) -> nn.Module:
    """Return a random model of a family, in evaluation mode: causal LM, sequence or image classifier.

    Args:
        family: One of `TINY_FAMILIES`.
        seed: Seed of all its weights.
        dtype: Type of its weights; the values are drawn in float32 and rounded.
        tie: Whether the output head shares the embedding; None leaves it to the family.
        **overrides: Further settings of the transformers config.

    Returns:
        The model.

    Raises:
        ValueError: If the family is unknown.
    """
    import transformers

    config, head = _config(family, tie=tie, **overrides)
    # Building draws from the global generator; the caller's state must not move.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = getattr(transformers, f"AutoModelFor{head}").from_config(config)
    _randomise(model, torch.Generator().manual_seed(seed), offset=config.model_type == "gemma")
    return model.to(dtype).eval()


def tiny_inputs(family: str, seed: int = 0, batch: int = 2, length: int = 12) -> dict[str, Tensor]:
    """Return random arguments of the model's `forward`.

    Args:
        family: One of `TINY_FAMILIES`.
        seed: Seed of the inputs.
        batch: Number of examples.
        length: Tokens per example, at most 64; images are 16 x 16 for ViT and 32 x 32 for ResNet whatever it says.

    Returns:
        input_ids and attention_mask (batch, length), or pixel_values (batch, 3, side, side) in float32.

    Raises:
        ValueError: If the family is unknown.
    """
    generator = torch.Generator().manual_seed(seed)
    config, head = _config(family)
    if head == "ImageClassification":
        side = getattr(config, "image_size", 32)
        return {"pixel_values": torch.randn(batch, 3, side, side, generator=generator)}
    # Token 0 pads, 1 and 2 begin and end.
    tokens = torch.randint(3, config.vocab_size, (batch, length), generator=generator)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def save_tiny(
    family: str,
    folder: str | Path,
    *,
    shards: int | None = None,
    max_shard_size: int | str | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    tie: bool | None = None,
    **overrides: Any,
) -> Path:
    """Write a tiny model as an ordinary Hugging Face folder with safetensors.

    Args:
        family: One of `TINY_FAMILIES`.
        folder: Where to; created.
        shards: About how many files; None writes one.
        max_shard_size: Instead of `shards`: bytes, or a string such as "20KB".
        dtype: Type of the weights.
        seed: Seed of the weights.
        tie: Whether the output head shares the embedding; None leaves it to the family.
        **overrides: Further settings of the transformers config.

    Returns:
        The folder.

    Raises:
        ValueError: If the family is unknown, or both `shards` and `max_shard_size` are given.
    """
    if shards is not None and max_shard_size is not None:
        raise ValueError("shards and max_shard_size must not both be given.")
    model: Any = tiny_model(family, seed=seed, dtype=dtype, tie=tie, **overrides)
    if shards is not None:
        total = sum(p.numel() * p.element_size() for p in model.parameters())
        max_shard_size = math.ceil(total / shards)
    with _no_progress_bars():
        model.save_pretrained(folder, max_shard_size=max_shard_size or "50GB")
    return Path(folder)


def _config(family: str, *, tie: bool | None = None, **overrides: Any) -> tuple[Any, str]:
    """Return the config of a family and the name of its head."""
    import transformers

    if family not in _SPECS:
        raise ValueError(f"family must be one of {', '.join(TINY_FAMILIES)}, got {family!r}.")
    name, head, settings = _SPECS[family]
    tied = {} if tie is None else {"tie_word_embeddings": tie}
    return getattr(transformers, name)(**(settings | tied | overrides)), head


def _randomise(model: nn.Module, generator: torch.Generator, *, offset: bool) -> None:
    """Draw every weight anew, scaled by its fan-in, with all other tensors far from their neutral values."""

    def uniform(tensor: Tensor, low: float, high: float) -> None:
        tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)

    with torch.no_grad():
        for module in model.modules():
            is_norm = "norm" in type(module).__name__.lower()
            for name, tensor in module.named_parameters(recurse=False):
                if is_norm and name == "weight":
                    # Gemma's gain is 1 + weight.
                    uniform(tensor, -0.5, 0.5) if offset else uniform(tensor, 0.5, 1.5)
                elif tensor.ndim == 1 or name.endswith("bias"):
                    uniform(tensor, -0.5, 0.5)
                elif isinstance(module, nn.Embedding):
                    tensor.copy_(torch.randn(tensor.shape, generator=generator))
                else:
                    fan_in = tensor[0].numel() if tensor.ndim != 3 else tensor.shape[-1]
                    tensor.copy_(torch.randn(tensor.shape, generator=generator) / math.sqrt(fan_in))
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                assert module.running_mean is not None and module.running_var is not None
                uniform(module.running_mean, -0.5, 0.5)
                uniform(module.running_var, 0.5, 2.0)


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Switch transformers' progress bars off for a block, and back to what they were."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()
