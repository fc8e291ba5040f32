"""Optimisers of the library heavyball (extra `attacks`): PSGD Kron, SOAP and KL-Shampoo."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import nn

from specdef.attacks.optimizers.spec import Build
from specdef.attacks.task import Setting
from specdef.errors import SpecDefError


def heavyball(kind: str, *factors: str) -> Build:
    """Return what builds one of heavyball's optimisers.

    Args:
        kind: Name of its class.
        *factors: Further arguments of it that name a type of its state.

    Returns:
        For a row of the table. What it builds runs without torch.compile, whose code takes longer to make than a short run,
        leaves gradients where they are, and keeps its state in float32 (float64 for float64 weights). Parameters without
        a dimension, which some of its classes cannot take, stay as they are.
    """

    def build(
        model: nn.Module, groups: list[dict[str, Any]], setting: Setting
    ) -> torch.optim.Optimizer:
        try:
            library = importlib.import_module("heavyball")
        except ImportError as error:
            raise SpecDefError(
                f"optimiser {setting.optimizer} needs the library heavyball",
                hint='Install the extra: pip install "specdef[attacks]".',
            ) from error
        library.utils.compile_mode = None
        dtype = "float64" if setting.dtype == "float64" else "float32"
        types = dict.fromkeys(("storage_dtype", *factors), dtype)
        groups = [{**g, "params": [p for p in g["params"] if p.ndim]} for g in groups]
        optimizer: torch.optim.Optimizer = getattr(library, kind)(
            groups, lr=setting.learning_rate, weight_decay=setting.weight_decay, **types
        )  # fmt: skip
        optimizer.consume_grad = False  # type: ignore[attr-defined]
        optimizer.register_step_pre_hook(_accept_rates)
        return optimizer

    return build


def _accept_rates(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Take the groups' rates for those of the step before: heavyball warns where they differ, and uses them all the same."""
    for group in optimizer.param_groups:
        group["base_lr"] = group["lr"]
