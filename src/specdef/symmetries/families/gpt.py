"""GPT-2 and GPT-NeoX (Pythia): pre-norm decoders with layer norms, a plain MLP and one fused attention projection.

GPT-2 stores its linears as Conv1D, (in, out). GPT-NeoX interleaves query, key and value head by head. Its parallel
residual has two norms on the same stream, each with its own readers, so both are sites either way.
"""

from __future__ import annotations

from specdef.symmetries.families.llama import HEADS
from specdef.symmetries.table import (
    Family,
    Group,
    Head,
    Rule,
    conv1d_output,
    conv1d_reader,
    norm,
    output,
    reader,
)

GPT2 = Family(
    prefixes=("transformer.", ""),
    layer=("h.{layer}.",),
    blocks=(
        (
            Group(
                anchor="attn.c_attn.weight",
                rules=(
                    Rule(
                        kind="norm",
                        name="ln_1",
                        size="hidden",
                        producers=norm("ln_1"),
                        consumers=conv1d_reader("attn.c_attn"),
                    ),
                    Rule(
                        kind="value",
                        name="attn.c_attn",
                        size="hidden",
                        producers=conv1d_output("attn.c_attn", "hidden", "hidden"),
                        consumers=conv1d_reader("attn.c_proj"),
                    ),
                ),
                inert=("attn.bias", "attn.masked_bias"),  # causal masks of older checkpoints
            ),
        ),
        (
            Group(
                anchor="mlp.c_fc.weight",
                rules=(
                    Rule(
                        kind="norm",
                        name="ln_2",
                        size="hidden",
                        producers=norm("ln_2"),
                        consumers=conv1d_reader("mlp.c_fc"),
                    ),
                    Rule(
                        kind="relu",
                        name="mlp.c_fc",
                        size="ffn",
                        producers=conv1d_output("mlp.c_fc"),
                        consumers=conv1d_reader("mlp.c_proj"),
                    ),
                ),
            ),
        ),
    ),
    head=Head(norm="ln_f", lm=("lm_head",), others=HEADS, embedding="wte", tied=True),
    inert=("wte.weight", "wpe.weight"),
    defaults={"activation_function": "gelu_new"},
    transposed=("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
)

GPT_NEOX = Family(
    prefixes=("gpt_neox.", ""),
    layer=("layers.{layer}.",),
    blocks=(
        (
            Group(
                anchor="attention.query_key_value.weight",
                rules=(
                    Rule(
                        kind="norm",
                        name="input_layernorm",
                        size="hidden",
                        producers=norm("input_layernorm"),
                        consumers=reader("attention.query_key_value"),
                    ),
                    Rule(
                        kind="value",
                        name="attention.query_key_value",
                        size="kv",
                        # Rows: for each head its query, its key, its value.
                        producers=output(
                            "attention.query_key_value",
                            "head",
                            "head",
                            block="head",
                            pitch=("head", "head", "head"),
                        ),
                        consumers=reader("attention.dense"),
                    ),
                ),
                inert=(
                    "attention.bias",
                    "attention.masked_bias",
                    "attention.rotary_emb.inv_freq",
                ),
            ),
        ),
        (
            Group(
                anchor="mlp.dense_h_to_4h.weight",
                rules=(
                    Rule(
                        kind="norm",
                        name="post_attention_layernorm",
                        size="hidden",
                        producers=norm("post_attention_layernorm"),
                        consumers=reader("mlp.dense_h_to_4h"),
                    ),
                    Rule(
                        kind="relu",
                        name="mlp.dense_h_to_4h",
                        size="ffn",
                        producers=output("mlp.dense_h_to_4h"),
                        consumers=reader("mlp.dense_4h_to_h"),
                    ),
                ),
            ),
        ),
    ),
    # "embed_out" on disk, "lm_head" in memory.
    head=Head(
        norm="final_layer_norm", lm=("embed_out", "lm_head"), others=HEADS, embedding="embed_in"
    ),
    inert=("embed_in.weight",),
    buffers=("rotary_emb.inv_freq",),
    defaults={"hidden_act": "gelu", "intermediate_size": 24576},
)

FAMILIES = {"gpt2": GPT2, "gpt_neox": GPT_NEOX}
