"""What a tensor is for, read from its name and shape; which matrices can be locked; which names a selection takes.

`role` needs no table, so `specdef inspect` can describe a model of a family that has none. Names follow transformers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from specdef.symmetries.families import FAMILIES

Role = Literal[
    "embedding",
    "norm",
    "bias",
    "linear",
    "conv",
    "expert",
    "head",
    "router",
    "buffer",
    "other",
]

_BUFFER = re.compile(
    r"(running_mean|running_var|num_batches_tracked|inv_freq|position_ids|masked_bias|relative_position_index"
    r"|token_type_ids)$"
)
_NORM = re.compile(r"norm|^ln(_|\d|$)|^bn\d*$", re.IGNORECASE)
"""Searched in the last module of the name: LayerNorm, input_layernorm, ln_1, q_norm, normalization, bn1."""

_EMBEDDING = re.compile(
    r"(^|\.)(embed_tokens|embed_in|wte|wpe|word_embeddings|position_embeddings?|token_type_embeddings|rel_embeddings"
    r"|distance_embedding|embedding|cls_token|mask_token|shared)(\.weight)?$"
)
_HEAD = re.compile(
    r"(^|\.)(lm_head|embed_out|score|classifier(\.\d+)?|qa_outputs|output_projection|cls\.seq_relationship"
    r"|cls\.predictions\.decoder)\.weight$"
)
_ROUTER = re.compile(
    r"(^|\.)((mlp|block_sparse_moe|moe|feed_forward)\.gate|router(\.[a-z]+)?|shared_expert_gate)\.(weight|bias)$"
)
_EXPERT = re.compile(r"(^|\.)experts\.")
_BIAS = re.compile(r"(\.|_)(bias|beta)$")
_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks|block|stages)\.(\d+)(?:\.|$)")


def role(name: str, shape: Sequence[int], family: str | None = None) -> Role:
    """Return what a tensor is for.

    Args:
        name: Name in the checkpoint or in `state_dict()`.
        shape: Its shape.
        family: `model_type`, where known: the head and embedding named by its table are taken from there.

    Returns:
        The role. The biases of norms count as "norm", those of experts as "expert", those of all others as "bias".

    >>> role("model.layers.0.mlp.gate_proj.weight", (8, 4)), role("model.layers.0.mlp.gate.weight", (8, 4))
    ('linear', 'router')
    >>> role("h.0.attn.bias", (1, 1, 64, 64)), role("h.0.attn.c_attn.bias", (96,))
    ('buffer', 'bias')
    """
    table = FAMILIES[family].head if family in FAMILIES else None
    module = name.removesuffix(".weight")
    # Causal masks of older GPT checkpoints are called "bias" too, but have four axes.
    if _BUFFER.search(name) or (name.endswith(".bias") and len(shape) > 2):
        return "buffer"
    if _EXPERT.search(name):
        return "expert"
    if _ROUTER.search(name):
        return "router"
    if table is not None and len(shape) > 1:
        if any(module == m or module.endswith(f".{m}") for m in (*table.lm, *table.others)):
            return "head"
        if table.embedding and module.split(".")[-1] == table.embedding:
            return "embedding"
    if _NORM.search(name.split(".")[-2] if "." in name else ""):
        return "norm"
    if _BIAS.search(name):
        return "bias"
    if _EMBEDDING.search(name):
        return "embedding"
    if _HEAD.search(name):
        return "head"
    if name.endswith(".weight") and len(shape) == 2:
        return "linear"
    if name.endswith(".weight") and len(shape) in (3, 4, 5):
        return "conv"
    return "other"


def is_transposed(name: str, config: Mapping[str, Any]) -> bool:
    """Return whether a weight is stored (in, out), as GPT-2's Conv1D and GPT-OSS's experts are.

    Args:
        name: Name of the tensor or of its module.
        config: config.json as a dict.

    Returns:
        False for every family that has no table: (out, in) is the rule.

    >>> is_transposed("h.0.mlp.c_fc.weight", {"model_type": "gpt2"})
    True
    """
    family = FAMILIES.get(str(config.get("model_type")))
    module = module_name(name)
    return family is not None and any(
        module == m or module.endswith(f".{m}") for m in family.transposed
    )


def lockable_matrices(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> list[str]:
    """Return the weights of plain linear and 2-d convolution modules, in natural order.

    Embeddings, heads, routers, experts (stacked or not) and 1-d convolutions are left out: a method that puts a layer
    behind a module finds no plain module there, or one that is shared or decides which token or expert is taken.

    Args:
        config: config.json as a dict.
        shapes: Shape of each tensor, by name.

    Returns:
        Names, layer 2 before layer 10.
    """
    family = str(config.get("model_type"))
    names = [
        name
        for name, shape in shapes.items()
        if (role(name, shape, family), len(shape)) in (("linear", 2), ("conv", 4))
    ]
    return sorted(names, key=_natural)


def layer_index(name: str) -> int | None:
    """Return the number of the block that a tensor or module belongs to, None outside the blocks.

    Differs from peft's `layers_to_transform` in taking the first number after a container of layers, not the last, so
    that experts and convolutions keep the number of their block (of their stage in a ResNet).

    Args:
        name: Name of a tensor or module.

    Returns:
        The number, or None.

    >>> layer_index("model.layers.11.block_sparse_moe.experts.3.w1.weight"), layer_index("classifier.1.weight")
    (11, None)
    """
    found = _LAYER.search(name)
    return int(found.group(1)) if found else None


def matches(name: str, target_modules: str | Sequence[str] | None) -> bool:
    """Return whether a selection takes a tensor or module, by peft's rules.

    Args:
        name: Name of a tensor or module.
        target_modules: A list: each entry is a module's name or its end ("q_proj", "self_attn.q_proj"). A string: a
            regular expression for the whole module name. None: everything.

    Returns:
        Whether it is selected.

    Raises:
        ValueError: If the string is no regular expression.

    >>> matches("model.layers.0.mlp.up_proj.weight", ["up_proj"]), matches("model.layers.0.mlp.up_proj", r".*_proj")
    (True, True)
    >>> matches("model.layers.0.mlp.gate_up_proj", ["up_proj"])
    False
    """
    if target_modules is None:
        return True
    candidates = {name, module_name(name)}
    if isinstance(target_modules, str):
        try:
            pattern = re.compile(target_modules)
        except re.error as error:
            raise ValueError(
                f"target_modules must be a regular expression or a list of names, got {target_modules!r}: {error}."
            ) from None
        return any(pattern.fullmatch(c) for c in candidates)
    return any(c == t or c.endswith(f".{t}") for c in candidates for t in target_modules)


def module_name(name: str) -> str:
    """Return the module of a tensor: its name without ".weight" or ".bias".

    Args:
        name: Name of a tensor, or of a module, which stays as it is.

    Returns:
        The module's name.
    """
    return name.removesuffix(".weight").removesuffix(".bias")


def _natural(name: str) -> list[tuple[int, str]]:
    """Return a sort key that compares runs of digits as numbers."""
    return [(int(p), "") if p.isdigit() else (-1, p) for p in re.split(r"(\d+)", name)]
