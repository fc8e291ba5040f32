"""Llama and the decoders built like it: Mistral, Qwen2, Qwen3, Gemma, Phi-3. Pre-norm, gated MLP, grouped heads.

Per layer: input norm -> q, k, v; value -> output projection; second norm -> gate, up; up -> down, whatever the
activation on the gate. The norms that Qwen3 puts on queries and keys come after the projections and change nothing.
"""

from __future__ import annotations

from dataclasses import replace

from specdef.symmetries.site import SiteKind
from specdef.symmetries.table import Family, Group, Head, Rule, norm, output, reader

HEADS = ("score", "classifier", "qa_outputs")
"""Modules that `transformers` puts on a decoder in place of the language-model head."""

ATTENTION_INERT = (
    "self_attn.q_norm.weight",
    "self_attn.k_norm.weight",
    "self_attn.rotary_emb.inv_freq",
)


def attention(kind: SiteKind = "norm") -> Group:
    """Return the attention half of a layer with separate projections."""
    return Group(
        anchor="self_attn.q_proj.weight",
        rules=(
            Rule(
                kind=kind,
                name="input_layernorm",
                size="hidden",
                producers=norm("input_layernorm"),
                consumers=reader("self_attn.q_proj")
                + reader("self_attn.k_proj")
                + reader("self_attn.v_proj"),
            ),
            Rule(
                kind="value",
                name="self_attn.v_proj",
                size="kv",
                producers=output("self_attn.v_proj"),
                consumers=reader("self_attn.o_proj", block="head", repeat="groups"),
            ),
        ),
        inert=ATTENTION_INERT,
    )


def gated_mlp(kind: SiteKind = "norm") -> Group:
    """Return the gated MLP half of a layer."""
    return Group(
        anchor="mlp.gate_proj.weight",
        rules=(
            Rule(
                kind=kind,
                name="post_attention_layernorm",
                size="hidden",
                producers=norm("post_attention_layernorm"),
                consumers=reader("mlp.gate_proj") + reader("mlp.up_proj"),
            ),
            Rule(
                kind="gated",
                name="mlp.up_proj",
                size="ffn",
                producers=output("mlp.up_proj"),
                consumers=reader("mlp.down_proj"),
            ),
        ),
    )


LLAMA = Family(
    # Question answering calls the base model "transformer".
    prefixes=("model.", "transformer.", ""),
    layer=("layers.{layer}.",),
    blocks=((attention(),), (gated_mlp(),)),
    head=Head(norm="norm", lm=("lm_head",), others=HEADS, embedding="embed_tokens"),
    inert=("embed_tokens.weight",),
    buffers=("rotary_emb.inv_freq",),
)

GEMMA = replace(
    LLAMA,
    blocks=((attention("offset-norm"),), (gated_mlp("offset-norm"),)),
    head=Head(
        norm="norm",
        kind="offset-norm",
        lm=("lm_head",),
        others=HEADS,
        embedding="embed_tokens",
        tied=True,
    ),
    defaults={"head_dim": 256, "num_key_value_heads": 16},
)

PHI3 = replace(
    LLAMA,
    blocks=(
        (
            Group(
                anchor="self_attn.qkv_proj.weight",
                rules=(
                    Rule(
                        kind="norm",
                        name="input_layernorm",
                        size="hidden",
                        producers=norm("input_layernorm"),
                        consumers=reader("self_attn.qkv_proj"),
                    ),
                    Rule(
                        kind="value",
                        name="self_attn.qkv_proj",
                        size="kv",
                        # Rows: queries, keys, values.
                        producers=output("self_attn.qkv_proj", "q", "kv"),
                        consumers=reader("self_attn.o_proj", block="head", repeat="groups"),
                    ),
                ),
                inert=ATTENTION_INERT,
            ),
        ),
        (
            Group(
                anchor="mlp.gate_up_proj.weight",
                rules=(
                    Rule(
                        kind="norm",
                        name="post_attention_layernorm",
                        size="hidden",
                        producers=norm("post_attention_layernorm"),
                        consumers=reader("mlp.gate_up_proj"),
                    ),
                    Rule(
                        kind="gated",
                        name="mlp.gate_up_proj",
                        size="ffn",
                        producers=output("mlp.gate_up_proj", "ffn"),  # rows: gate, up
                        consumers=reader("mlp.down_proj"),
                    ),
                ),
            ),
        ),
    ),
)

FAMILIES = {
    "llama": LLAMA,
    "mistral": replace(LLAMA, defaults={"num_key_value_heads": 8}),
    "qwen2": replace(LLAMA, defaults={"num_key_value_heads": 32}),
    "qwen3": replace(LLAMA, defaults={"num_key_value_heads": 32, "head_dim": 128}),
    "gemma": GEMMA,
    "phi3": PHI3,
}
