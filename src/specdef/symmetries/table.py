"""The vocabulary of the family tables: which tensors produce and read a channel, written as data.

A `Family` lists, for one repeated layer, what produces and what reads every rescalable channel; `find_sites` fills in
layer and expert numbers and checks the result against a checkpoint. Names are module paths as `transformers` writes
them; lengths are the names of `Sizes`, so a table holds no arithmetic beyond sums.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from specdef.symmetries.site import Leg, Site, SiteKind, Uncovered

HOMOGENEOUS = frozenset({"relu", "leaky_relu", "linear"})
"""Names in transformers' ACT2FN of activations with f(s x) = s f(x) for every s > 0: all others break a relu site."""

Hook = Callable[
    [Mapping[str, Any], Mapping[str, tuple[int, ...]], str],
    tuple[tuple[Site, ...], tuple[Uncovered, ...]],
]
"""(config, shapes, prefix) -> (sites, uncovered), for networks that are no stack of equal layers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One tensor of a rule, and where the rule's channels lie in it: a `Leg` before its sizes are known.

    Args:
        tensor: Name below the layer; `{expert}` stands for the expert number.
        axis: Axis the channels run along, counting all axes.
        start: Names of sizes that add up to the position of channel 0.
        block: Name of the size of a block of neighbouring channels; empty means one block.
        pitch: Names of sizes that add up to the distance of consecutive blocks; empty means `block`.
        repeat: Name of the number of copies of each block; empty means 1.
        stacked: The first axis counts experts, and the rule takes one of them.
        optional: May be absent (a bias).
    """

    tensor: str
    axis: int
    start: tuple[str, ...] = ()
    block: str = ""
    pitch: tuple[str, ...] = ()
    repeat: str = ""
    stacked: bool = False
    optional: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """A site of one layer (of each expert, where `name` holds `{expert}`).

    Args:
        kind: Which symmetry; `relu` applies only when the activation is homogeneous.
        name: Module whose output is rescaled, below the layer.
        size: Name of the number of channels.
        producers: What writes the channels.
        consumers: Everything that reads them; each is the input of a linear map.
    """

    kind: SiteKind
    name: str
    size: str
    producers: tuple[Part, ...]
    consumers: tuple[Part, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """A part of a layer in one of its spellings or variants: dense or sparse, on disk or in memory.

    Args:
        anchor: Tensor whose presence selects this variant; `{expert}` stands for 0.
        rules: Its sites.
        closed: Linear weights no symmetry reaches, with the reason.
        inert: Further tensors it may hold, which no site touches (biases of the linears above go without saying).
    """

    anchor: str
    rules: tuple[Rule, ...] = ()
    closed: Mapping[str, str] = field(default_factory=dict)
    inert: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """The norm after the last layer and what reads it.

    The norm is a site only when the checkpoint holds a reader of it; without one, its output is the model's output.

    Args:
        norm: Module name, below the prefix.
        kind: `norm`, or `offset-norm` where the gain is 1 + weight.
        lm: Modules that map to the vocabulary and may share the embedding.
        others: Modules that replace them in classifiers and taggers.
        along: Modules that also read the norm, but alone do not make it a site (a pooler: the norm's output stays an
            output of the model).
        embedding: Module a tied head shares.
        tied: What a config without `tie_word_embeddings` means.
    """

    norm: str
    kind: SiteKind = "norm"
    lm: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    along: tuple[str, ...] = ()
    embedding: str = ""
    tied: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One or more `model_type`s with the same structure.

    Args:
        prefixes: What may stand before the names of the base model; the first that fits is used.
        layer: Spellings of the name of a layer, with `{layer}`.
        blocks: The parts of a layer; of each, one variant is present.
        head: The final norm and its readers.
        closed: Linear weights outside the layers that no symmetry reaches, with the reason.
        inert: Tensors outside the layers that no site touches: embeddings, buffers. Patterns of `fnmatch`.
        buffers: Endings of tensors that take no part in the function.
        defaults: Values of config keys that config.json may leave out.
        activation: Config keys that may name the activation.
        transposed: Endings of modules whose weights are stored (in, out).
        hook: Finds the sites instead of the tables above.
    """

    prefixes: tuple[str, ...]
    layer: tuple[str, ...] = ()
    blocks: tuple[tuple[Group, ...], ...] = ()
    head: Head | None = None
    closed: Mapping[str, str] = field(default_factory=dict)
    inert: tuple[str, ...] = ()
    buffers: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    activation: tuple[str, ...] = ("hidden_act", "activation_function", "hidden_activation")
    transposed: tuple[str, ...] = ()
    hook: Hook | None = None


def norm(module: str) -> tuple[Part, ...]:
    """Return gain and, where there is one, bias of a norm."""
    return (
        Part(tensor=f"{module}.weight", axis=0),
        Part(tensor=f"{module}.bias", axis=0, optional=True),
    )


def output(
    module: str, *start: str, block: str = "", pitch: tuple[str, ...] = ()
) -> tuple[Part, ...]:
    """Return the rows of a linear (out, in) and its bias, from the position that the sizes `start` add up to."""
    weight = Part(tensor=f"{module}.weight", axis=0, start=start, block=block, pitch=pitch)
    bias = Part(
        tensor=f"{module}.bias", axis=0, start=start, block=block, pitch=pitch, optional=True
    )
    return weight, bias


def reader(module: str, *, block: str = "", repeat: str = "") -> tuple[Part, ...]:
    """Return the input columns of a linear (out, in) or a convolution (out, in, …)."""
    return (Part(tensor=f"{module}.weight", axis=1, block=block, repeat=repeat),)


def conv1d_output(module: str, *start: str) -> tuple[Part, ...]:
    """Return the output columns of GPT-2's Conv1D, stored (in, out), and its bias."""
    return (
        Part(tensor=f"{module}.weight", axis=1, start=start),
        Part(tensor=f"{module}.bias", axis=0, start=start, optional=True),
    )


def conv1d_reader(module: str) -> tuple[Part, ...]:
    """Return the input rows of GPT-2's Conv1D, stored (in, out)."""
    return (Part(tensor=f"{module}.weight", axis=0),)


def sizes(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, int]:
    """Return the named lengths a table may use, read from a config.

    Args:
        config: config.json as a dict.
        defaults: The family's values for keys that it lacks.

    Returns:
        hidden: width of the residual stream. q, kv: rows of the query and of the key (or value) projection. head:
        width of a head. groups: query heads that read one key-value head. ffn: width of the MLP. expert_ffn: the same
        of an expert. experts, layers: their numbers.

    Raises:
        KeyError: If a key without a default is missing.

    >>> found = sizes({"n_embd": 8, "n_head": 2, "n_layer": 1}, {})
    >>> found["head"], found["kv"], found["groups"], found["ffn"]
    (4, 8, 1, 32)
    """

    def get(*keys: str, fallback: int | None = None) -> int:
        for key in keys:
            # A null is not a missing key: it asks for the derived value, whatever the family's default is.
            value = config[key] if key in config else defaults.get(key)
            if value is not None:
                return int(value)
        if fallback is None:
            raise KeyError(keys[0])
        return fallback

    hidden = get("hidden_size", "n_embd")
    heads = get("num_attention_heads", "n_head")
    kv_heads = get("num_key_value_heads", fallback=heads)
    head = get("head_dim", "attention_head_size", fallback=hidden // heads)
    ffn = get("intermediate_size", "n_inner", fallback=4 * hidden)
    return {
        "hidden": hidden,
        "head": head,
        "q": heads * head,
        "kv": kv_heads * head,
        "groups": heads // kv_heads,
        "ffn": ffn,
        "expert_ffn": get("moe_intermediate_size", fallback=ffn),
        "experts": get("num_local_experts", "num_experts", fallback=0),
        "layers": get("num_hidden_layers", "n_layer"),
    }


def leg(
    part: Part, size: str, lengths: Mapping[str, int], *, tensor: str, expert: int | None
) -> Leg:
    """Return the `Leg` of a part.

    Args:
        part: The part of the table.
        size: Name of the number of channels.
        lengths: From `sizes`.
        tensor: The full name.
        expert: Which expert, where the part is stacked.
    """
    return Leg(
        tensor=tensor,
        axis=part.axis,
        size=lengths[size],
        start=sum(lengths[name] for name in part.start),
        block=lengths[part.block] if part.block else 0,
        pitch=sum(lengths[name] for name in part.pitch),
        repeat=lengths[part.repeat] if part.repeat else 1,
        lead=(expert,) if part.stacked and expert is not None else (),
    )
