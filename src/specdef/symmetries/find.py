"""Find every rescaling symmetry of a checkpoint from its config and the shapes of its tensors. Reads no weight.

The tables of `families` say what a layer of each family looks like. A checkpoint that does not match its table in every
tensor is not guessed at: a layer that holds an unknown tensor gets no site, a missing or misshapen tensor is an error.
An omitted reader would change the function, so silence is the safe answer.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

from specdef.errors import CheckpointError, SelectionError
from specdef.symmetries.families import FAMILIES
from specdef.symmetries.site import Leg, Site, SiteKind, Symmetries, Uncovered
from specdef.symmetries.table import HOMOGENEOUS, Family, Group, Head, Part, Rule, leg, sizes

Shapes = Mapping[str, tuple[int, ...]]


def find_sites(config: Mapping[str, Any], shapes: Shapes) -> Symmetries:
    """Return every rescaling symmetry of a checkpoint, and every linear input that none of them reaches.

    Cost: one pass over the names; no tensor is read.

    Args:
        config: config.json as a dict.
        shapes: Shape of each tensor in the checkpoint, by name: as on disk, or as in `state_dict()`.

    Returns:
        The sites in the order of the network, and the uncovered inputs; each linear input is in exactly one of them.

    Raises:
        SelectionError: If the model family has no table.
        CheckpointError: If a tensor of the table is missing or has another shape than the config says.

    >>> config = {"model_type": "bert", "hidden_size": 4, "num_attention_heads": 2, "num_hidden_layers": 1}
    >>> layer = "encoder.layer.0."
    >>> shapes = {f"{layer}attention.self.{n}.weight": (4, 4) for n in ("query", "key", "value")}
    >>> shapes |= {f"{layer}attention.output.dense.weight": (4, 4)}
    >>> shapes |= {f"{layer}intermediate.dense.weight": (16, 4), f"{layer}output.dense.weight": (4, 16)}
    >>> [(site.name, site.kind, site.size) for site in find_sites(config, shapes).sites]
    [('encoder.layer.0.attention.self.value', 'value', 4)]
    """
    name = str(config.get("model_type"))
    family = family_of(config)
    prefix, layer = _locate(name, family, shapes)
    if family.hook is not None:
        sites, uncovered = family.hook(config, shapes, prefix)
    else:
        sites, uncovered = _Stack(name, family, config, shapes, prefix, layer).run()
    for site in sites:
        for part, _ in site.legs():
            _check(part, shapes)
    return Symmetries(family=name, sites=sites, uncovered=uncovered)


def family_of(config: Mapping[str, Any]) -> Family:
    """Return the table of a config's `model_type`.

    Args:
        config: config.json as a dict.

    Returns:
        The table.

    Raises:
        SelectionError: If there is none.
    """
    name = str(config.get("model_type"))
    if name in FAMILIES:
        return FAMILIES[name]
    nearest = difflib.get_close_matches(name, FAMILIES, n=3, cutoff=0.4)
    close = f" Closest: {', '.join(nearest)}." if nearest else ""
    raise SelectionError(
        f"No symmetry table for model_type {name!r}; known: {', '.join(sorted(FAMILIES))}.{close}",
        nearest=nearest,
        hint="Add a table to src/specdef/symmetries/families/ as docs/adding_a_family.md describes.",
    )


def _locate(name: str, family: Family, shapes: Shapes) -> tuple[str, str]:
    """Return the prefix of the base model's names and the spelling of its layers."""
    for prefix in family.prefixes:
        for layer in family.layer:
            first = prefix + layer.format(layer=0)
            if any(tensor.startswith(first) for tensor in shapes):
                return prefix, prefix + layer
    expected = family.prefixes[0] + family.layer[0].format(layer=0)
    some = ", ".join(sorted(shapes)[:3]) or "none"
    raise CheckpointError(
        f"no tensor of the first layer of {name!r} found; expected names that start with {expected!r}, found {some}.",
        tensor=expected,
        hint="Check that config.json belongs to these weights, and that adapters are merged.",
    )


def _check(part: Leg, shapes: Shapes) -> None:
    """Raise CheckpointError unless `part` fits its tensor exactly."""
    if part.tensor not in shapes:
        raise CheckpointError(
            "missing: the table of this family expects it.",
            tensor=part.tensor,
            hint="Check that all shards are there and that config.json belongs to these weights.",
        )
    shape = tuple(shapes[part.tensor])
    fits = len(shape) > part.axis and shape[part.axis] == part.extent
    if not fits or any(i >= shape[a] for a, i in enumerate(part.lead)):
        lead = f" and more than {part.lead[0]} experts" if part.lead else ""
        raise CheckpointError(
            f"expected length {part.extent} along axis {part.axis}{lead}, found shape {shape}.",
            tensor=part.tensor,
            hint="Check that config.json belongs to these weights and that they are not quantised or sharded by rank.",
        )


class _Stack:
    """One pass over a checkpoint of stacked layers; `run` does the work, the rest are its phases."""

    def __init__(
        self,
        name: str,
        family: Family,
        config: Mapping[str, Any],
        shapes: Shapes,
        prefix: str,
        layer: str,
    ) -> None:
        self.name = name
        self.family = family
        self.config = config
        self.shapes = shapes
        self.prefix = prefix
        self.layer = layer
        self.sites: list[Site] = []
        self.closed: dict[str, str] = {}

    @property
    def activation(self) -> str:
        """Name of the MLP's activation."""
        for source in (self.config, self.family.defaults):
            for key in self.family.activation:
                if source.get(key) is not None:
                    return str(source[key])
        return "an unnamed activation"

    def run(self) -> tuple[tuple[Site, ...], tuple[Uncovered, ...]]:
        """Return the sites and the uncovered inputs."""
        lengths = self._lengths()
        rest = set(self.shapes)
        for index in range(lengths["layers"]):
            stem = self.layer.format(layer=index)
            members = {tensor for tensor in rest if tensor.startswith(stem)}
            rest -= members
            self._layer(index, stem, members, lengths)
        self._outside(rest, lengths)
        uncovered = tuple(Uncovered(tensor=t, reason=r) for t, r in self.closed.items())
        return tuple(self.sites), uncovered

    def _lengths(self) -> dict[str, int]:
        try:
            lengths = sizes(self.config, self.family.defaults)
        except KeyError as missing:
            raise CheckpointError(
                f"config.json of a {self.name!r} model lacks {missing}.",
                hint="Use the config.json that was saved with the weights.",
            ) from None
        except (ValueError, TypeError, ZeroDivisionError) as error:
            raise CheckpointError(
                f"config.json of a {self.name!r} model has sizes that cannot be ({error}).",
                hint="Use the config.json that was saved with the weights.",
            ) from None
        if any(lengths[name] < 1 for name in lengths if name != "experts"):
            raise CheckpointError(
                f"config.json of a {self.name!r} model has sizes that cannot be ({lengths}).",
                hint="Use the config.json that was saved with the weights.",
            )
        if lengths["groups"] * lengths["kv"] != lengths["q"]:
            raise CheckpointError(
                "num_attention_heads must be a multiple of num_key_value_heads in config.json.",
                hint="Use the config.json that was saved with the weights.",
            )
        return lengths

    def _layer(self, index: int, stem: str, members: set[str], lengths: dict[str, int]) -> None:
        groups = [self._variant(stem, variants) for variants in self.family.blocks]
        known = {stem + name for group in groups for name in _names(group, lengths)}
        strangers = sorted(
            t for t in members - known if not any(t.endswith(b) for b in self.family.buffers)
        )
        refused = self._stranger(strangers[0], "layer") if strangers else ""
        for tensor in strangers:
            if len(self.shapes[tensor]) > 1:
                self.closed[tensor] = refused
        for group in groups:
            for tensor, reason in group.closed.items():
                if stem + tensor in self.shapes:
                    self.closed[stem + tensor] = reason
            for rule in group.rules:
                reason = refused or self._refusal(rule)
                for site in _expand(rule, index, stem, lengths, self.shapes):
                    if reason:
                        present = [leg for leg in site.consumers if leg.tensor in self.shapes]
                        self.closed.update({leg.tensor: reason for leg in present})
                    else:
                        self.sites.append(site)

    def _variant(self, stem: str, variants: tuple[Group, ...]) -> Group:
        for group in variants:
            if stem + group.anchor.format(expert=0) in self.shapes:
                return group
        # Nothing fits: either strangers close the layer (quantised weights: qweight, _blocks, _scales), or a leg is missing.
        return variants[0]

    def _refusal(self, rule: Rule) -> str:
        if rule.kind == "relu" and self.activation not in HOMOGENEOUS:
            return f"{self.activation} has no rescaling symmetry"
        return ""

    def _stranger(self, tensor: str, place: str) -> str:
        return f"{tensor} is not in the table of {self.name}, so the readers of this {place} are unknown"

    def _outside(self, rest: set[str], lengths: dict[str, int]) -> None:
        """Close what the table says, find the final norm's readers, and name the tensors nobody knows."""
        family = self.family
        bare = {t: t.removeprefix(self.prefix) for t in sorted(rest)}
        strangers = []
        readers: dict[str, str] = {}
        for tensor, short in bare.items():
            module = short.removesuffix(".weight").removesuffix(".bias")
            head = family.head
            if head is not None and module in (*head.lm, *head.others, *head.along):
                if short.endswith(".weight"):
                    readers[tensor] = module
            elif short in family.closed:
                self.closed[tensor] = family.closed[short]
            elif not self._inert(short):
                strangers.append(tensor)
        if family.head is not None:
            self._final(family.head, readers, strangers, lengths)
        for tensor in strangers:
            if len(self.shapes[tensor]) > 1:
                self.closed.setdefault(tensor, f"not in the table of {self.name}")

    def _inert(self, short: str) -> bool:
        family = self.family
        if any(short.endswith(ending) for ending in family.buffers):
            return True
        if short.endswith(".bias") and f"{short.removesuffix('.bias')}.weight" in family.closed:
            return True
        norm = family.head.norm if family.head is not None else None
        if norm is not None and short in (f"{norm}.weight", f"{norm}.bias"):
            return True
        return any(fnmatchcase(short, pattern) for pattern in family.inert)

    def _final(
        self, head: Head, readers: dict[str, str], strangers: list[str], lengths: dict[str, int]
    ) -> None:
        tied = bool(self.config.get("tie_word_embeddings", head.tied)) and bool(head.lm)
        vocabulary = [t for t, module in readers.items() if module in head.lm]
        replaced = any(module in head.others for module in readers.values())
        embedding = f"{self.prefix}{head.embedding}.weight"
        # A classifier has no vocabulary head, so its config's default to tie means nothing.
        if tied and not replaced and not vocabulary and embedding in self.shapes:
            self.closed[embedding] = "also the output head (tied), so its columns are the embedding"
        elif strangers:
            self.closed.update(dict.fromkeys(readers, self._stranger(strangers[0], "norm")))
        elif tied and vocabulary:
            reason = "shares its weight with the embedding (tied), whose columns must stay"
            self.closed.update(dict.fromkeys(readers, reason))
        elif vocabulary or replaced:
            self.sites.append(self._final_site(head.norm, head.kind, list(readers), lengths))
            return
        reason = "reads the final norm, which is also an output of the model"
        for tensor in readers:
            self.closed.setdefault(tensor, reason)

    def _final_site(
        self, norm: str, kind: SiteKind, readers: list[str], lengths: dict[str, int]
    ) -> Site:
        size = lengths["hidden"]
        gains = [f"{self.prefix}{norm}.weight", f"{self.prefix}{norm}.bias"]
        return Site(
            name=f"{self.prefix}{norm}",
            kind=kind,
            layer=None,
            size=size,
            producers=tuple(
                Leg(tensor=t, axis=0, size=size)
                for t in gains
                if t in self.shapes or t.endswith(".weight")
            ),
            consumers=tuple(Leg(tensor=t, axis=1, size=size) for t in readers),
        )


def _names(group: Group, lengths: Mapping[str, int]) -> Iterator[str]:
    """Yield every name, below the layer, that a layer may hold for this group."""
    for rule in group.rules:
        for part in (*rule.producers, *rule.consumers):
            yield from _siblings(part.tensor, lengths)
    for tensor in group.closed:
        yield from _siblings(tensor, lengths)
    yield from group.inert


def _siblings(pattern: str, lengths: Mapping[str, int]) -> Iterator[str]:
    """Yield the names of a pattern, one per expert, each with its bias."""
    experts = range(lengths["experts"]) if "{expert}" in pattern else range(1)
    for expert in experts:
        tensor = pattern.format(expert=expert)
        yield tensor
        if tensor.endswith(".weight"):
            yield f"{tensor.removesuffix('.weight')}.bias"


def _expand(
    rule: Rule, index: int, stem: str, lengths: Mapping[str, int], shapes: Shapes
) -> Iterator[Site]:
    """Yield the sites of a rule in one layer: one, or one per expert."""
    experts: list[int | None] = (
        list(range(lengths["experts"])) if "{expert}" in rule.name else [None]
    )

    def legs(parts: tuple[Part, ...], expert: int | None) -> Iterator[Leg]:
        for part in parts:
            # A rule of the whole layer takes such a part from every expert.
            every = "{expert}" in part.tensor and expert is None
            for e in range(lengths["experts"]) if every else [expert]:
                tensor = stem + part.tensor.format(expert=e)
                if tensor in shapes or not part.optional:
                    yield leg(part, rule.size, lengths, tensor=tensor, expert=e)

    for expert in experts:
        yield Site(
            name=stem + rule.name.format(expert=expert),
            kind=rule.kind,
            layer=index,
            size=lengths[rule.size],
            producers=tuple(legs(rule.producers, expert)),
            consumers=tuple(legs(rule.consumers, expert)),
        )
