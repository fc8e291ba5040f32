"""Fold norm gains into the linear layers that read them, so that every gain is 1."""

from __future__ import annotations

import torch
from torch import nn

from specdef.attacks.attack import Attack, Prepared
from specdef.attacks.structural.edits import everything
from specdef.attacks.structural.sites import rescale, symmetric_sites, without_sites
from specdef.attacks.task import Task
from specdef.lock.in_memory import unique_tensors

_KINDS = ("norm", "offset-norm", "batchnorm")


class FoldNorms(Attack):
    """Move every norm's gain into its readers, then train everything; the function changes by rounding alone."""

    name = "fold-norms"
    tier = 5
    cost = "a pass over the weights, once"
    source = "as in SliceGPT (Ashkboos et al. 2024) and QuaRot (2024)"
    summary = "fold norm gains into the linear layers behind them, then train all"

    def applies(self, model: nn.Module) -> str:
        """Return why there is nothing to fold."""
        return without_sites(model, *_KINDS)

    def prepare(
        self, model: nn.Module, task: Task, *, original: nn.Module | None, generator: torch.Generator
    ) -> Prepared:  # fmt: skip
        """Fold, then train everything."""
        folded = fold_norms(model)
        return Prepared(
            model=model, groups=everything(model), notes=(f"folded the gains of {folded} norms",)
        )


def fold_norms(model: nn.Module) -> int:
    """Fold the gains of a model in place: they become 1, or -1 where a ReLU follows a negative one.

    Args:
        model: A model with norms that only linear layers read.

    Returns:
        Number of norms.
    """
    tensors = unique_tensors(model)
    sites = [site for site in symmetric_sites(model) if site.kind in _KINDS]
    for site in sites:
        weight = tensors[site.producers[0].tensor].detach()
        gain = weight.double().cpu() + (site.kind == "offset-norm")
        gain = torch.where(gain == 0, 1.0, gain.abs())
        # 1 + weight is scaled by hand: the legs of such a site name the weight.
        scaled = (weight.double().cpu() + 1) / gain - 1
        rescale(tensors, site, 1 / gain)
        if site.kind == "offset-norm":
            weight.copy_(scaled)
    return len(sites)
