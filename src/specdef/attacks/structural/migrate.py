"""SmoothQuant-style migration: activation ranges are moved into the weights that read them, channel by channel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from specdef.attacks.attack import Attack, Prepared
from specdef.attacks.structural.edits import CONVOLUTIONS, everything, fitted, is_linear
from specdef.attacks.structural.sites import rescale, slices, symmetric_sites, without_sites
from specdef.attacks.task import Task
from specdef.curvature.losses import Batch, model_outputs
from specdef.lock.channels import position_table
from specdef.lock.in_memory import unique_tensors
from specdef.symmetries import Leg, Site

_KINDS = ("norm", "value", "gated", "relu", "batchnorm")


class Migrate(Attack):
    """Divide each channel by s = max|x|^strength / max|w|^(1 - strength), multiply its readers by it, then train.

    Differs from SmoothQuant in also taking value and gated sites, as AWQ does.

    Args:
        strength: SmoothQuant's alpha.
        batches: Training batches the ranges are measured on.
    """

    name = "migrate"
    tier = 5
    cost = "a few forward passes for the ranges, and a pass over the weights, once"
    source = "SmoothQuant, Xiao et al. 2023"
    summary = "move activation ranges into the weights as SmoothQuant does, then train all"

    def __init__(self, strength: float = 0.5, batches: int = 4) -> None:
        self.strength = strength
        self.batches = batches

    def applies(self, model: nn.Module) -> str:
        """Return why nothing can be migrated."""
        return without_sites(model, *_KINDS)

    def prepare(
        self, model: nn.Module, task: Task, *, original: nn.Module | None, generator: torch.Generator
    ) -> Prepared:  # fmt: skip
        """Measure ranges and migrate; the function changes by rounding alone."""
        sites = [
            site for site in symmetric_sites(model)
            if site.kind in _KINDS and all(_module(model, leg) is not None for leg in site.consumers)
        ]  # fmt: skip
        ranges = _ranges(model, sites, task.train[: self.batches])
        tensors = unique_tensors(model)
        # Backwards: a site also scales the rows of what an earlier one reads, and its lock would hide that one's.
        for site in reversed(sites):
            activation = torch.stack([
                ranges[leg][position_table(leg)].amax(1) for leg in site.consumers
            ]).amax(0)  # fmt: skip
            weight = torch.stack([
                slices(tensors[leg.tensor], leg).amax(1).cpu()[position_table(leg)].amax(1)
                for leg in site.consumers
            ]).amax(0)  # fmt: skip
            factor = activation**self.strength / weight ** (1 - self.strength)
            usable = (factor > 0) & factor.isfinite()
            rescale(tensors, site, 1 / torch.where(usable, factor, 1.0))
        return Prepared(model=model, groups=everything(model), notes=(f"migrated {len(sites)} sites",))  # fmt: skip


def _module(model: nn.Module, leg: Leg) -> nn.Module | None:
    """Return the plain layer that reads a channel; None where it is none (stacked experts)."""
    path, _, leaf = leg.tensor.rpartition(".")
    module = model.get_submodule(path)
    return module if leaf == "weight" and is_linear(module) else None


def _ranges(model: nn.Module, sites: Sequence[Site], batches: Sequence[Batch]) -> dict[Leg, Tensor]:
    """Return the largest |x| of every input position of every reader, float64."""
    ranges: dict[Leg, Tensor] = {}
    handles: list[Any] = []

    def watch(leg: Leg, module: nn.Module) -> None:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            axis = 1 if isinstance(module, CONVOLUTIONS) else -1
            seen = inputs[0].detach().double().abs().movedim(axis, 0).flatten(1).amax(1).cpu()
            ranges[leg] = torch.maximum(ranges.get(leg, seen), seen)

        handles.append(module.register_forward_pre_hook(hook))

    try:
        for site in sites:
            for leg in site.consumers:
                watch(leg, model.get_submodule(leg.tensor.rpartition(".")[0]))
        with torch.no_grad():
            for batch in batches:
                model_outputs(model, fitted(batch, model))
    finally:
        for handle in handles:
            handle.remove()
    return ranges
