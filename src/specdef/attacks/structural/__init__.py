"""Structural attacks: they edit the weights first, then train, and say what the edit costs."""

from __future__ import annotations

from specdef.attacks.attack import Attack
from specdef.attacks.structural.base_diff import BaseDiff
from specdef.attacks.structural.clip_spectrum import ClipSpectrum
from specdef.attacks.structural.column_rates import ColumnRates
from specdef.attacks.structural.factor import Factor
from specdef.attacks.structural.fold_norms import FoldNorms
from specdef.attacks.structural.freeze_inserted import FreezeInserted
from specdef.attacks.structural.inject import Inject
from specdef.attacks.structural.known_scale import KnownScale
from specdef.attacks.structural.merge import Merge
from specdef.attacks.structural.migrate import Migrate
from specdef.attacks.structural.quantise import Quantise
from specdef.attacks.structural.rebalance import Rebalance
from specdef.attacks.structural.rebalance_clip import RebalanceClip

STRUCTURAL: tuple[Attack, ...] = (
    Merge(), FreezeInserted(), Rebalance(), FoldNorms(), Migrate(), ColumnRates(), KnownScale(), ClipSpectrum(),
    RebalanceClip(), Inject(), Inject(freeze=False), Factor(), Quantise(8), Quantise(4), Quantise(4, group=128), BaseDiff(),
)  # fmt: skip
"""With their defaults, the cheapest first."""

__all__ = [
    "STRUCTURAL", "BaseDiff", "ClipSpectrum", "ColumnRates", "Factor", "FoldNorms", "FreezeInserted", "Inject", "KnownScale",
    "Merge", "Migrate", "Quantise", "Rebalance", "RebalanceClip",
]  # fmt: skip
