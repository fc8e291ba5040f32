"""Encoders: BERT and DeBERTa-v2/v3 (post-norm), ViT (pre-norm).

In a post-norm layer the norm's output is also the residual stream, so its gain cannot be undone by its readers; value
-> output projection is what is left. ViT has all sites of a pre-norm network. All three gain a site in the MLP when
the activation is a ReLU.
"""

from __future__ import annotations

from specdef.symmetries.table import Family, Group, Head, Rule, norm, output, reader

POST_NORM = "post-norm: what it reads is also the residual stream"
POOLED = "reads the encoder's output, which a model without this head returns"
HEAD = (
    "reads the pooler, whose activation has no rescaling symmetry, or the encoder's output itself"
)
PIXELS = "reads the input pixels"


def _post_norm(query: str, key: str, value: str, **more: str) -> tuple[tuple[Group, ...], ...]:
    """Return the layer of BERT under DeBERTa's or its own names."""
    inner = "attention.self."
    return (
        (
            Group(
                anchor=f"{inner}{value}.weight",
                rules=(
                    Rule(
                        kind="value",
                        name=f"{inner}{value}",
                        size="kv",
                        producers=output(f"{inner}{value}"),
                        consumers=reader("attention.output.dense"),
                    ),
                ),
                closed={f"{inner}{name}.weight": POST_NORM for name in (query, key, value)}
                | {f"{inner}{name}.weight": reason for name, reason in more.items()},
                inert=(*_layer_norm("attention.output"), f"{inner}distance_embedding.weight"),
            ),
        ),
        (
            Group(
                anchor="intermediate.dense.weight",
                rules=(_mlp("intermediate.dense", "output.dense"),),
                closed={"intermediate.dense.weight": POST_NORM},
                inert=_layer_norm("output"),
            ),
        ),
    )


def _layer_norm(module: str) -> tuple[str, ...]:
    """Return the tensors of a LayerNorm in its new and its old spelling."""
    return tuple(f"{module}.LayerNorm.{leaf}" for leaf in ("weight", "bias", "gamma", "beta"))


def _mlp(first: str, second: str) -> Rule:
    return Rule(
        kind="relu", name=first, size="ffn", producers=output(first), consumers=reader(second)
    )


_HEADS = {
    "pooler.dense.weight": POOLED,
    "classifier.weight": HEAD,
    "qa_outputs.weight": POOLED,
    "cls.seq_relationship.weight": HEAD,
    "cls.predictions.transform.dense.weight": POOLED,
    "cls.predictions.decoder.weight": "usually shares the embedding; the table leaves it alone",
    "lm_predictions.lm_head.dense.weight": POOLED,
}
_HEADS_INERT = (
    "cls.predictions.bias",
    "cls.predictions.transform.LayerNorm.*",
    "lm_predictions.lm_head.*",
)

BERT = Family(
    prefixes=("bert.", ""),
    layer=("encoder.layer.{layer}.",),
    blocks=_post_norm("query", "key", "value"),
    closed=_HEADS,
    inert=("embeddings.*", *_HEADS_INERT),
    defaults={"hidden_act": "gelu"},
)

DEBERTA_V2 = Family(
    prefixes=("deberta.", ""),
    layer=("encoder.layer.{layer}.",),
    blocks=_post_norm(
        "query_proj",
        "key_proj",
        "value_proj",
        pos_key_proj="reads the embedding of relative positions",
        pos_query_proj="reads the embedding of relative positions",
    ),
    closed=_HEADS
    | {
        "embeddings.embed_proj.weight": "reads the sum of the embeddings",
        "encoder.conv.conv.weight": "reads the normed embeddings, which are also the residual stream",
    },
    inert=(
        "embeddings.word_embeddings.weight",
        "embeddings.position_embeddings.weight",
        "embeddings.token_type_embeddings.weight",
        "embeddings.position_ids",
        "embeddings.LayerNorm.*",
        "encoder.rel_embeddings.weight",
        "encoder.LayerNorm.*",
        "encoder.conv.LayerNorm.*",
        *_HEADS_INERT,
    ),
    defaults={"hidden_act": "gelu"},
)


def _pre_norm(
    first: str, query: str, key: str, value: str, out: str, second: str, up: str, down: str
) -> tuple[Group, Group]:
    """Return the two halves of a ViT layer under one of its two namings."""
    return (
        Group(
            anchor=f"{query}.weight",
            rules=(
                Rule(
                    kind="norm",
                    name=first,
                    size="hidden",
                    producers=norm(first),
                    consumers=reader(query) + reader(key) + reader(value),
                ),
                Rule(
                    kind="value",
                    name=value,
                    size="kv",
                    producers=output(value),
                    consumers=reader(out),
                ),
            ),
        ),
        Group(
            anchor=f"{up}.weight",
            rules=(
                Rule(
                    kind="norm",
                    name=second,
                    size="hidden",
                    producers=norm(second),
                    consumers=reader(up),
                ),
                _mlp(up, down),
            ),
        ),
    )


_DISK = _pre_norm(
    "layernorm_before",
    "attention.attention.query",
    "attention.attention.key",
    "attention.attention.value",
    "attention.output.dense",
    "layernorm_after",
    "intermediate.dense",
    "output.dense",
)
_MEMORY = _pre_norm(
    "layernorm_before",
    "attention.q_proj",
    "attention.k_proj",
    "attention.v_proj",
    "attention.o_proj",
    "layernorm_after",
    "mlp.fc1",
    "mlp.fc2",
)

VIT = Family(
    prefixes=("vit.", ""),
    layer=("encoder.layer.{layer}.", "layers.{layer}."),
    blocks=((_DISK[0], _MEMORY[0]), (_DISK[1], _MEMORY[1])),
    head=Head(norm="layernorm", others=("classifier", "decoder.0"), along=("pooler.dense",)),
    closed={"embeddings.patch_embeddings.projection.weight": PIXELS},
    inert=("embeddings.cls_token", "embeddings.mask_token", "embeddings.position_embeddings"),
    defaults={"hidden_act": "gelu"},
)

FAMILIES = {"bert": BERT, "deberta-v2": DEBERTA_V2, "vit": VIT}
