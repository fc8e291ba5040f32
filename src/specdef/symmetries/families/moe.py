"""Mixtures of experts: Mixtral, Qwen3-MoE, GPT-OSS. Attention is Llama's; the norm before the experts feeds the router too.

On disk Mixtral and Qwen3-MoE keep one linear per expert; in memory transformers 5 stacks them into (experts, 2 ffn,
hidden) and (experts, hidden, ffn), gate above up. GPT-OSS stacks on disk as well, (experts, in, out), gate and up
interleaved.
"""

from __future__ import annotations

from dataclasses import replace

from specdef.symmetries.families.llama import LLAMA, attention, gated_mlp
from specdef.symmetries.table import Group, Part, Rule, norm, output, reader


def _experts(router: str, *linears: str, up: str, down: str) -> tuple[Rule, ...]:
    """Return the rules of experts that are kept as one linear each."""
    readers = tuple(part for module in linears for part in reader(module))
    return (
        Rule(
            kind="norm",
            name="post_attention_layernorm",
            size="hidden",
            producers=norm("post_attention_layernorm"),
            consumers=reader(router) + readers,
        ),
        Rule(
            kind="gated", name=up, size="expert_ffn", producers=output(up), consumers=reader(down)
        ),
    )


STACKED = Group(
    anchor="mlp.experts.gate_up_proj",
    rules=(
        Rule(
            kind="norm",
            name="post_attention_layernorm",
            size="hidden",
            producers=norm("post_attention_layernorm"),
            # One leg takes the columns of all experts at once.
            consumers=(*reader("mlp.gate"), Part(tensor="mlp.experts.gate_up_proj", axis=2)),
        ),
        Rule(
            kind="gated",
            name="mlp.experts.{expert}.up_proj",
            size="expert_ffn",
            producers=(
                Part(
                    tensor="mlp.experts.gate_up_proj", axis=1, start=("expert_ffn",), stacked=True
                ),
            ),
            consumers=(Part(tensor="mlp.experts.down_proj", axis=2, stacked=True),),
        ),
    ),
)

MIXTRAL = replace(
    LLAMA,
    blocks=(
        (attention(),),
        (
            Group(
                anchor="block_sparse_moe.experts.{expert}.w1.weight",
                rules=_experts(
                    "block_sparse_moe.gate",
                    "block_sparse_moe.experts.{expert}.w1",
                    "block_sparse_moe.experts.{expert}.w3",
                    up="block_sparse_moe.experts.{expert}.w3",
                    down="block_sparse_moe.experts.{expert}.w2",
                ),
            ),
            STACKED,
        ),
    ),
    defaults={"num_key_value_heads": 8, "num_local_experts": 8},
)

QWEN3_MOE = replace(
    LLAMA,
    blocks=(
        (attention(),),
        (
            Group(
                anchor="mlp.experts.{expert}.gate_proj.weight",
                rules=_experts(
                    "mlp.gate",
                    "mlp.experts.{expert}.gate_proj",
                    "mlp.experts.{expert}.up_proj",
                    up="mlp.experts.{expert}.up_proj",
                    down="mlp.experts.{expert}.down_proj",
                ),
            ),
            STACKED,
            gated_mlp(),
        ),
    ),
    defaults={"num_key_value_heads": 4, "num_experts": 128, "moe_intermediate_size": 768},
)

GPT_OSS = replace(
    LLAMA,
    blocks=(
        (replace(attention(), inert=("self_attn.sinks",)),),
        (
            Group(
                anchor="mlp.experts.gate_up_proj",
                rules=(
                    Rule(
                        kind="norm",
                        name="post_attention_layernorm",
                        size="hidden",
                        producers=norm("post_attention_layernorm"),
                        consumers=(
                            *reader("mlp.router"),
                            Part(tensor="mlp.experts.gate_up_proj", axis=1),
                        ),
                    ),
                ),
                closed={
                    "mlp.experts.down_proj": "the gated unit clamps its input and adds 1 to it, so it does not scale"
                },
                inert=("mlp.experts.gate_up_proj_bias", "mlp.experts.down_proj_bias"),
            ),
        ),
    ),
    defaults={"num_key_value_heads": 8, "num_local_experts": 128, "head_dim": 64},
    transposed=("experts.gate_up_proj", "experts.down_proj"),
)

FAMILIES = {"mixtral": MIXTRAL, "qwen3_moe": QWEN3_MOE, "gpt_oss": GPT_OSS}
