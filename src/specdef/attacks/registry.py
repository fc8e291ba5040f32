"""Every attack by name, with its defaults, cheapest tier first."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from specdef.attacks.attack import Attack
from specdef.attacks.full import RECIPE, FullTraining
from specdef.attacks.optimizers import OPTIMIZERS
from specdef.attacks.partial.freeze import PATTERNS, TrainOnly
from specdef.attacks.partial.head import FreshHead
from specdef.attacks.partial.ia3 import IA3
from specdef.attacks.partial.lora import LoRA
from specdef.attacks.partial.prompt import PromptTuning
from specdef.attacks.rebuild.distil import Distil
from specdef.attacks.rebuild.scratch import Scratch
from specdef.attacks.structural import STRUCTURAL, BaseDiff
from specdef.errors import SpecDefError

_FULL = (RECIPE, *(FullTraining((name,)) for name in OPTIMIZERS))
_PARTIAL = (
    LoRA(), LoRA(targets="all"), LoRA(targets="all", dora=True), IA3(), PromptTuning(),
    *(TrainOnly(part) for part in PATTERNS), FreshHead("head"), FreshHead("all"),
)  # fmt: skip

ATTACKS: dict[str, Attack] = {
    attack.name: attack
    for attack in sorted((*_FULL, *_PARTIAL, *STRUCTURAL, Distil()), key=lambda a: a.tier)
}
"""Name -> attack; within a tier in the order they are tried."""

_ASKED: dict[str, Attack] = {"base-diff": BaseDiff(public=True)}
"""Attacks on what only some attackers have: whoever names one says that they do."""

REFERENCE = Scratch()
"""What attacks are compared with; no attack itself."""


def by_tier() -> dict[int, tuple[Attack, ...]]:
    """Return the attacks of every tier, 1 to 6."""
    tiers = sorted({attack.tier for attack in ATTACKS.values()})
    return {tier: tuple(a for a in ATTACKS.values() if a.tier == tier) for tier in tiers}


def find(names: Iterable[str]) -> tuple[Attack, ...]:
    """Look attacks up.

    Args:
        names: Keys of `ATTACKS`.

    Returns:
        The attacks, in the order asked for, each once; base-diff with the original public.

    Raises:
        SpecDefError: There is no such attack; names that come close are given.
    """
    found = {}
    for name in names:
        if name not in ATTACKS:
            close = difflib.get_close_matches(name, ATTACKS, n=3, cutoff=0.4)
            nearest = f"; nearest: {', '.join(close)}" if close else ""
            raise SpecDefError(f"no attack is called {name!r}{nearest}", hint="`specdef audit --list` names all.")  # fmt: skip
        found[name] = _ASKED.get(name, ATTACKS[name])
    return tuple(found.values())
