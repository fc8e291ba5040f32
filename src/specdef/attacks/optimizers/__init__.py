"""Every optimiser an attacker may take, by name: where it comes from, its tier, where a sweep of its rates begins."""

from specdef.attacks.optimizers.spec import OptimizerSpec as OptimizerSpec
from specdef.attacks.optimizers.table import OPTIMIZERS as OPTIMIZERS
