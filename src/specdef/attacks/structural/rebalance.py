"""Re-balance symmetric pairs: every channel's readers get the size of the site's median channel, by powers of two."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from specdef.attacks.attack import Attack, Prepared
from specdef.attacks.structural.edits import everything
from specdef.attacks.structural.sites import (
    deviation,
    has_room,
    rescale,
    symmetric_sites,
    without_sites,
)
from specdef.attacks.task import Task
from specdef.lock.in_memory import unique_tensors
from specdef.symmetries import Site

_EXACT = ("norm", "value", "gated", "relu", "batchnorm", "stream")


class Rebalance(Attack):
    """Rescale every channel of every symmetric site, without a key and without data; the function keeps every bit.

    The readers are judged, not the ratio of both sides: a gain may be small because its channel is not used, and raising
    it would make that channel as explosive as a lock does.
    """

    name = "rebalance"
    tier = 5
    cost = "a pass over the weights, once: seconds, no data"
    source = "path rescaling: Path-SGD (Neyshabur et al. 2015), ENorm (Stock et al. 2019)"
    summary = (
        "equalise channels along the network's own symmetries, blind and exact, then train all"
    )

    def applies(self, model: nn.Module) -> str:
        """Return why there is nothing to re-balance."""
        return without_sites(model, *_EXACT)

    def prepare(
        self, model: nn.Module, task: Task, *, original: nn.Module | None, generator: torch.Generator
    ) -> Prepared:  # fmt: skip
        """Re-balance, then train everything."""
        changed = rebalance(model)
        return Prepared(
            model=model, groups=everything(model), notes=(f"rescaled {changed} channels",)
        )


def rebalance(model: nn.Module) -> int:
    """Re-balance a model in place.

    Args:
        model: A model with symmetric sites.

    Returns:
        Number of channels that were rescaled.
    """
    tensors = unique_tensors(model)
    changed = 0
    for site in symmetric_sites(model):
        if site.kind in _EXACT:
            exponents = _exponents(tensors, site)
            exponents[~has_room(tensors, site, exponents)] = 0
            changed += int((exponents != 0).sum())
            if bool(exponents.any()):
                rescale(tensors, site, torch.exp2(exponents))
    return changed


def _exponents(tensors: dict[str, Tensor], site: Site) -> Tensor:
    """Return (size,) by how many octaves the producers are to be scaled: what the readers lack."""
    octaves = torch.stack([deviation(tensors[leg.tensor], leg) for leg in site.consumers])
    return octaves.nanmean(0).nan_to_num(nan=0.0).round()
