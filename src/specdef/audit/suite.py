"""Named, versioned suites of attacks, as data: which attacks, what a run may cost, how many seeds."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from specdef.attacks.attack import Attack
from specdef.attacks.task import Budget
from specdef.errors import SpecDefError

Changes = Mapping[str, Any]
"""Fields of `Setting` that differ from its defaults."""

_USUAL: Changes = MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """A suite.

    Args:
        name: Version and size; results of suites with other names are not compared.
        attacks: Names in the registry; empty takes all of it.
        variants: Recipes besides the usual one, each for one attack: (attack, name of the recipe, fields of `Setting`).
        budget: What a run may cost.
        seeds: Seeds per side.
        max_trials: Runs per sweep at most.
        whole_sweeps: Every seed searches for both ends; otherwise the first does, and the others search around its best.
        refine: Sweeps go to half and quarter decades around the best; otherwise they stay with whole decades.
        stride: Decades between rates below an optimiser's ordinary range, until a sweep knows where it matters.
    """

    name: str
    attacks: tuple[str, ...] = ()
    variants: tuple[tuple[str, str, Changes], ...] = ()
    budget: Budget = field(default_factory=Budget)
    seeds: int = 3
    max_trials: int = 60
    whole_sweeps: bool = False
    refine: bool = True
    stride: int = 3


_VARIANTS: tuple[tuple[str, str, Changes], ...] = (
    ("full-adamw", "clipped", {"max_grad_norm": 1.0}),
    ("full-adamw", "cosine", {"schedule": "cosine", "warmup": 0.1}),
    ("full-adamw", "linear", {"schedule": "linear"}),
    ("full-adamw", "half-batch", {"batch_fraction": 0.5}),
    ("full-adamw", "bfloat16", {"dtype": "bfloat16"}),
    ("full-momentum", "clipped", {"max_grad_norm": 1.0}),
)

SUITES: dict[str, Suite] = {
    suite.name: suite
    for suite in (
        # Minutes: what falls to the simplest attack of each tier, the ways in that cost next to nothing and one representative
        # of every other tier, at whole decades of the rate. A lock it does not break may still fall to finer rates.
        Suite(
            name="2026.1-quick",
            attacks=(
                "recipe", "full-adamw", "lora", "only-head", "full-sophia", "merge", "freeze-inserted",
                "rebalance",
            ),
            budget=Budget(steps=4, evaluations=2), seeds=1, max_trials=24, refine=False,
        ),
        Suite(name="2026.1", variants=_VARIANTS[:1], budget=Budget(steps=20, evaluations=10)),
        Suite(
            name="2026.1-full", variants=_VARIANTS, budget=Budget(steps=200, evaluations=20), seeds=5, whole_sweeps=True, stride=1,
        ),
    )
}  # fmt: skip


LATEST = {"quick": "2026.1-quick", "standard": "2026.1", "full": "2026.1-full"}
"""Short names of the newest suites; reports name the version."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One cell to be filled.

    Args:
        attack: The attack.
        optimizer: Name of the optimiser.
        tier: Threat tier.
        name: The attack's, and that of the recipe where it is not the usual one.
        changes: Fields of `Setting`.
    """

    attack: Attack
    optimizer: str
    tier: int
    name: str
    changes: Changes = field(default_factory=lambda: _USUAL)


def find_suite(name: str | Suite) -> Suite:
    """Look a suite up.

    Args:
        name: Key of `SUITES` or of `LATEST`; a suite stays what it is.

    Returns:
        The suite.

    Raises:
        SpecDefError: There is no such suite.
    """
    if isinstance(name, Suite):
        return name
    full = LATEST.get(name, name)
    if full not in SUITES:
        close = difflib.get_close_matches(name, SUITES, n=1, cutoff=0)
        raise SpecDefError(f"no suite is called {name!r}; nearest: {close[0]}", hint=f"Suites: {', '.join((*SUITES, *LATEST))}.")  # fmt: skip
    return SUITES[full]


def entries(
    suite: Suite, attacks: Iterable[str | Attack] | None = None, tiers: Iterable[int] = range(1, 7)
) -> list[Entry]:
    """List the cells of an audit, the cheapest tier first.

    Args:
        suite: The suite.
        attacks: Attacks, or their names in the registry, instead of the suite's. Those of the registry keep the suite's recipes.
        tiers: Tiers to keep.

    Returns:
        One entry for every attack, optimiser and recipe.
    """
    from specdef.attacks.registry import ATTACKS, find

    if attacks is None:
        chosen: Sequence[Attack] = find(suite.attacks) if suite.attacks else tuple(ATTACKS.values())
    else:
        chosen = [a if isinstance(a, Attack) else find([a])[0] for a in attacks]
    wanted = frozenset(tiers)
    listed = [
        Entry(attack=attack, optimizer=optimizer, tier=attack.tier, name=attack.name)
        for attack in chosen
        for optimizer in attack.optimizers
    ]
    usual = {attack.name: attack for attack in chosen if ATTACKS.get(attack.name) is attack}
    listed += [
        Entry(attack=usual[n], optimizer=optimizer, tier=usual[n].tier, name=f"{n}, {recipe}", changes=changes)
        for n, recipe, changes in suite.variants
        if n in usual
        for optimizer in usual[n].optimizers
    ]  # fmt: skip
    return sorted((entry for entry in listed if entry.tier in wanted), key=lambda e: e.tier)


def with_key(suite: Suite, attacks: Iterable[str | Attack] | None, key: str | Path) -> list[Attack]:
    """Run the attack that needs a lock's key with it.

    Args:
        suite: The suite.
        attacks: Attacks, or their names, instead of the suite's.
        key: The key's file.

    Returns:
        The attacks; known-scale, with the key, is the last.

    Raises:
        SpecDefError: The key cannot be read.
    """
    from specdef.attacks.registry import ATTACKS, find
    from specdef.attacks.structural.known_scale import KnownScale
    from specdef.lock.key import load_key

    known = KnownScale(load_key(key))
    chosen = (suite.attacks or ATTACKS) if attacks is None else attacks
    found = [a if isinstance(a, Attack) else find([a])[0] for a in chosen]
    return [*(a for a in found if a.name != known.name), known]
