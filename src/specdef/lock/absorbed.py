"""The absorbed lock: scales of powers of two, absorbed along the network's own symmetries (DESIGN.md, FACTS 3).

At a site of scale s, one channel c of the activation x is multiplied by s where it is produced and divided by s where it
is read. The function keeps every bit; the gradient with respect to the reading column grows by s and the column itself
shrinks by s, so the loss is s^2 times as curved there: every optimiser that takes one step size for all entries must
take the one this column allows. Trained at learning rate lr, the site behaves as the unlocked one at lr * s.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from specdef.errors import SelectionError
from specdef.lock.channels import Channels
from specdef.lock.config import LockConfig
from specdef.lock.plan import LockPlan, SiteRecord
from specdef.lock.schedule import exponents
from specdef.spectral.summary import sigma_max
from specdef.spectral.views import as_matrix
from specdef.symmetries import find_sites, matches
from specdef.symmetries.site import Leg, Site
from specdef.weights.edit import ScaleEdit
from specdef.weights.source import TensorSource

Banned = Collection[tuple[str, int]]
"""(site name, channel) pairs that were found not to fit."""

_SIGMA_TOLERANCE = 1e-3
"""Relative residual of the sigma_max in the certificate, which is read to three digits."""


def plan_absorbed(
    source: TensorSource,
    config: LockConfig,
    *,
    scores: Mapping[str, Tensor] | None = None,
    banned: Banned = (),
) -> LockPlan:
    """Choose a channel and an exponent for every site.

    Cost: reads a sample of every tensor at a site, nothing else; memory bounded by the sample.

    Args:
        source: The model.
        config: The recipe.
        scores: Site name to (size,) score of each channel, from calibration; None chooses from the weights alone.
        banned: Pairs of site and channel to avoid.

    Returns:
        The plan.

    Raises:
        SelectionError: No table for the family, nothing selected, or no channel of a site has room.
    """
    symmetries = find_sites(source.config, source.shapes)
    sites = select_sites(symmetries.sites, config)
    channels = Channels(source)
    largest = scores is None or config.channel == "most-active"

    def pick(site: Site, exponent: float) -> tuple[float, int] | None:
        """Return score and index of the best channel that has room for 2^exponent."""
        usable = channels.usable(site, exponent)
        for name, channel in banned:
            if name == site.name:
                usable[channel] = False
        score = (channels.activity(site) if scores is None else scores[site.name]).double()
        usable &= score.isfinite()
        if not usable.any():
            return None
        if largest:
            channel = int(torch.where(usable, score, -math.inf).argmax())
        else:
            channel = int(torch.where(usable, score, math.inf).argmin())
        return float(score[channel]), channel

    first = {site.name: pick(site, math.log2(config.bottom)) for site in sites}
    ordered = [site for site in sites if first[site.name] is not None]
    # The first sites get the highest exponents; ties stay in the model's order.
    if scores is None and config.channel == "least-useful":
        ordered.sort(key=_data_free_rank)
    else:
        sign = -1 if config.channel == "most-active" else 1
        ordered.sort(key=lambda site: sign * (first[site.name] or (math.inf,))[0])
    chosen: list[tuple[int, float, Site, int]] = []
    for exponent, site in zip(exponents(len(ordered), config), ordered, strict=True):
        if (found := pick(site, exponent)) is not None:
            chosen.append((exponent, found[0], site, found[1]))
    if 2 * len(chosen) < len(sites):  # what is left would be a lock in name only
        raise SelectionError(
            f"only {len(chosen)} of {len(sites)} selected sites have an active channel with exponent room",
            hint="Use a smaller scale, or a checkpoint in bfloat16 or float32 (float16 has hardly any room).",
        )
    scalings: dict[str, list[ScaleEdit]] = {}
    slices: dict[str, float] = {}
    records = []
    for exponent, score_value, site, channel in chosen:
        producer = site.producers[0]
        norm = (
            float(channels.statistics(producer).rms[channel])
            * _slice_length(source, producer) ** 0.5
        )
        slices[producer.tensor] = max(slices.get(producer.tensor, 0.0), norm * 2.0**exponent)
        for leg, sign in site.legs():
            for position in leg.positions(channel):
                edit = ScaleEdit(
                    axis=leg.axis, position=position, exponent=sign * exponent, lead=leg.lead
                )
                scalings.setdefault(leg.tensor, []).append(edit)
        records.append(
            SiteRecord(
                name=site.name, kind=site.kind, layer=site.layer, scale=2.0**exponent, channel=channel,
                covers=tuple(dict.fromkeys(leg.tensor for leg in site.consumers)), score=score_value,
            )
        )  # fmt: skip
    before, after = _sigma_max(source, scalings, slices)
    uncovered = {item.tensor: item.reason for item in symmetries.uncovered}
    taken = {record.name for record in records}
    for site in symmetries.sites:
        if site.name not in taken:
            reason = _why_left_out(site, selected=site in sites)
            uncovered |= {leg.tensor: reason for leg in site.consumers}
    covered = {name for record in records for name in record.covers}
    uncovered = {name: reason for name, reason in uncovered.items() if name not in covered}
    return LockPlan(
        method="absorbed",
        sites=tuple(records),
        scalings={name: tuple(edits) for name, edits in scalings.items()},
        uncovered=uncovered,
        notes=_notes(source, scalings),
        sigma_max_before=before,
        sigma_max_after=after,
    )


def select_sites(sites: Sequence[Site], config: LockConfig) -> list[Site]:
    """Keep the exact sites that `layers` and `target_modules` ask for.

    Args:
        sites: All sites; those that would round (a gain of 1 + weight) are left out.
        config: The recipe.

    Returns:
        Those in the chosen layers of which a producer or a consumer is a target module.

    Raises:
        SelectionError: Nothing is left.
    """
    exact = [site for site in sites if site.kind != "offset-norm"]
    kept = [site for site in exact if config.layers is None or site.layer in config.layers]
    if config.target_modules is not None:
        kept = [
            site for site in kept
            if any(matches(leg.tensor, config.target_modules) for leg, _ in site.legs())
        ]  # fmt: skip
    if not kept:
        raise SelectionError(
            f"layers={config.layers}, target_modules={config.target_modules} select none of {len(exact)} sites",
            nearest=[site.name for site in exact[:5]],
            hint="`specdef inspect MODEL` lists the sites.",
        )
    return kept


_KIND_RANK = {"gated": 0, "relu": 0, "batchnorm": 0, "value": 1, "stream": 1, "norm": 2}


def _data_free_rank(site: Site) -> tuple[int, int]:
    """Return the data-free order of sites: what is read inside a block before what a norm spreads, late before early.

    No statistic of the weights ranks channels as the calibrated score does (dev/LOG.md, 2026-11-22: mean rank correlation
    at most 0.21), and none compares between sites. What can be had without data is the order of sites that calibration
    finds, which matters more; within a site the loudest channel measured best of those tried.
    """
    return _KIND_RANK[site.kind], -(site.layer if site.layer is not None else 1 << 30)


def _sigma_max(
    source: TensorSource, scalings: Mapping[str, list[ScaleEdit]], slices: Mapping[str, float]
) -> tuple[float, float]:
    """Return the largest singular value, before and after, of the matrix where it is largest after.

    Which matrix that is, is read off the norm of its largest scaled slice, a lower bound of its sigma_max that is sharp
    for large scales; only this one matrix is decomposed. A norm's gain counts as the diagonal matrix it is.
    """
    top = max(slices, key=lambda name: slices[name])
    tensor = source.read(top)
    lead = max(scalings[top], key=lambda e: e.exponent).lead
    before = _largest(tensor[lead])
    for edit in scalings[top]:
        edit.apply(tensor, name=top)
    return before, _largest(tensor[lead])


def _largest(tensor: Tensor) -> float:
    """Return sigma_max of a matrix, or of the diagonal matrix a vector stands for."""
    if tensor.ndim == 1:
        return float(tensor.abs().max())
    matrix = as_matrix(tensor).float()
    # |row| <= sigma_max <= |W|_F: once one row outweighs all others the two agree, and nothing need be iterated.
    row = float(torch.linalg.vector_norm(matrix, dim=1).max())
    if float(torch.linalg.vector_norm(matrix)) <= (1 + _SIGMA_TOLERANCE) * row:
        return row
    return sigma_max(matrix, tol=_SIGMA_TOLERANCE)[0]


def _slice_length(source: TensorSource, leg: Leg) -> int:
    shape = source.shapes[leg.tensor]
    return math.prod(shape[len(leg.lead) :]) // shape[leg.axis]


def _why_left_out(site: Site, *, selected: bool) -> str:
    if selected:
        return "no channel is active and has room for the scale"
    if site.kind == "offset-norm":
        return "norm gain is 1 + weight: scaling it rounds, so bit identity is not available"
    return "not selected"


def _notes(source: TensorSource, scalings: Mapping[str, list[ScaleEdit]]) -> tuple[str, ...]:
    highest = max(edit.exponent for edits in scalings.values() for edit in edits)
    notes = []
    if highest > 14:
        notes.append(
            "Loading the locked model in float16 breaks it: scales above 2^14 leave that dtype's range. "
            "bfloat16 and float32 are bit-identical."
        )
    if highest > 60:
        notes.append(
            "Scales above 2^60 overflow Adam's second moment in float32, which freezes the scaled column and would "
            "unlock the rest."
        )
    return tuple(notes)
