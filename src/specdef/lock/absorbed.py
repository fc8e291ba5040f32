"""The absorbed lock: scales of powers of two, absorbed along the network's own symmetries (DESIGN.md, FACTS 3).

The covering design (`specdef.lock.covering`) does this, and on a second channel the reverse; the others this alone.
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
from specdef.lock.covering import Side, covering
from specdef.lock.plan import LockPlan, SiteRecord
from specdef.lock.ranges import planned_ranges
from specdef.lock.schedule import exponents
from specdef.spectral.summary import sigma_max
from specdef.spectral.views import as_matrix
from specdef.symmetries import find_sites, matches
from specdef.symmetries.roles import layer_index
from specdef.symmetries.site import Leg, Site, Symmetries
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
    symmetries: Symmetries | None = None,
) -> LockPlan:
    """Choose a channel and an exponent for every site.

    Cost: reads a sample of every tensor at a site, nothing else; memory bounded by the sample.

    Args:
        source: The model.
        config: The recipe.
        scores: Site name to (size,) score of each channel, from calibration; None chooses from the weights alone.
        banned: Pairs of site and channel to avoid.
        symmetries: Of a model no table knows; None looks them up.

    Returns:
        The plan.

    Raises:
        SelectionError: No table for the family, nothing selected, or no channel of a site has room.
    """
    symmetries = symmetries or find_sites(source.config, source.shapes)
    sites = select_sites(symmetries.sites, config)
    channels = Channels(source)
    largest = scores is None or config.channel == "most-active"
    taken: set[tuple[str, int]] = set(banned)

    def pick(site: Site, side: Side, exponent: float) -> tuple[float, int] | None:
        """Return score and index of the best free channel that has room for 2^exponent."""
        writers = side == "writers"
        usable = channels.usable(site, -exponent if writers else exponent)
        for name, channel in taken:
            if name == site.name:
                usable[channel] = False
        if writers:
            # One number, or one row, gives an attacker little: what counts is how soon it wrecks the model.
            score = channels.reach(site).double()
            if scores is not None:
                # Behind a ReLU that never opened nothing explodes, however far it would reach.
                score[~scores[site.name].isfinite()] = math.inf
        else:
            score = (channels.activity(site) if scores is None else scores[site.name]).double()
        usable &= score.isfinite()
        if not usable.any():
            return None
        if largest or writers:
            channel = int(torch.where(usable, score, -math.inf).argmax())
        else:
            channel = int(torch.where(usable, score, math.inf).argmin())
        return float(score[channel]), channel

    wanted: list[tuple[Site, Side, int]]
    if config.schedule == "covering":
        wanted = covering(sites, config)
    else:
        first = {site.name: pick(site, "readers", math.log2(config.bottom)) for site in sites}
        ordered = [site for site in sites if first[site.name] is not None]
        # The first sites get the highest exponents; ties stay in the model's order.
        if scores is None and config.channel == "least-useful":
            ordered.sort(key=_data_free_rank)
        else:
            sign = -1 if config.channel == "most-active" else 1
            ordered.sort(key=lambda site: sign * (first[site.name] or (math.inf,))[0])
        wanted = [(s, "readers", e) for e, s in zip(exponents(len(ordered), config), ordered, strict=True)]  # fmt: skip
    chosen: list[tuple[int, float, Site, Side, int]] = []
    # Readers choose first: for them it matters which channel an attacker can make use of.
    for site, side, exponent in sorted(wanted, key=lambda item: item[1]):
        if (found := pick(site, side, exponent)) is not None:
            chosen.append((exponent, found[0], site, side, found[1]))
            taken.add((site.name, found[1]))
    chosen.sort(key=lambda item: -item[0])
    read = {item[2].name for item in chosen if item[3] == "readers"}
    if 2 * len(read) < len(sites):  # what is left would be a lock in name only
        raise SelectionError(
            f"only {len(read)} of {len(sites)} selected sites have an active channel with exponent room",
            hint="Use a smaller scale, or a checkpoint in bfloat16 or float32 (float16 has hardly any room).",
        )
    scalings: dict[str, list[ScaleEdit]] = {}
    slices: dict[str, float] = {}
    growth: dict[str, dict[int, int]] = {}
    for exponent, _, site, side, _ in chosen:
        for leg, sign in site.legs():
            if (sign > 0) == (side == "readers"):
                axes = growth.setdefault(leg.tensor, {})
                axes[leg.axis] = max(axes.get(leg.axis, 0), exponent)
    records = []
    for exponent, score_value, site, side, channel in chosen:
        up = exponent if side == "readers" else -exponent
        for grown in [leg for leg, sign in site.legs() if sign * up > 0][:1]:
            rms = float(channels.statistics(grown).rms[channel]) * 2.0**exponent
            crossed = max((2.0**e for axis, e in growth[grown.tensor].items() if axis != grown.axis), default=1.0)  # fmt: skip
            size = rms * max(_slice_length(source, grown) ** 0.5, crossed)
            slices[grown.tensor] = max(slices.get(grown.tensor, 0.0), size)
        for leg, sign in site.legs():
            for position in leg.positions(channel):
                edit = ScaleEdit(
                    axis=leg.axis, position=position, exponent=sign * up, lead=leg.lead
                )
                scalings.setdefault(leg.tensor, []).append(edit)
        explosive = site.consumers if side == "readers" else site.producers
        records.append(
            SiteRecord(
                name=site.name, kind=site.kind, layer=site.layer, scale=2.0**up, channel=channel, side=side,
                covers=tuple(dict.fromkeys(leg.tensor for leg in explosive)), score=score_value,
            )
        )  # fmt: skip
    before, after = _sigma_max(source, scalings, slices)
    uncovered = {item.tensor: item.reason for item in symmetries.uncovered}
    for site in symmetries.sites:
        if site.name not in read:
            reason = _why_left_out(site, selected=site in sites)
            uncovered |= {leg.tensor: reason for leg in site.consumers}
    covered = {name for record in records if record.side == "readers" for name in record.covers}
    uncovered = {name: reason for name, reason in uncovered.items() if name not in covered}
    ranges = planned_ranges(source, scalings)
    return LockPlan(
        method="absorbed",
        sites=tuple(records),
        scalings={name: tuple(edits) for name, edits in scalings.items()},
        uncovered=uncovered,
        notes=(*ranges.warnings(), *_coverage(uncovered)),
        ranges=ranges,
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
    at most 0.14), and none compares between sites. What can be had without data is the order of sites that calibration
    finds, which matters more; within a site the loudest channel measured best of those tried.
    """
    return _KIND_RANK[site.kind], -(site.layer if site.layer is not None else 1 << 30)


def _sigma_max(
    source: TensorSource, scalings: Mapping[str, list[ScaleEdit]], slices: Mapping[str, float]
) -> tuple[float, float]:
    """Return the largest singular value, before and after, of the matrix where it is largest after.

    Which matrix that is, is read off the norm of its largest scaled slice, or the size of the entry where that crosses another: lower
    bounds of its sigma_max that are sharp for large scales; only this one matrix is decomposed. A norm's gain counts as the diagonal matrix it is.
    """
    top = max(slices, key=lambda name: slices[name])
    tensor = source.read(top)
    before = None if source.config and tensor.ndim == 3 else _largest(tensor)
    for edit in scalings[top]:
        edit.apply(tensor, name=top)
    if before is not None:
        return before, _largest(tensor)
    # Of stacked experts, the one with the largest entry. (Only a plain module may have convolutions of three axes.)
    expert = int(torch.linalg.vector_norm(tensor.flatten(1), ord=math.inf, dim=1).argmax())
    return _largest(source.read(top)[expert]), _largest(tensor[expert])


def _largest(tensor: Tensor) -> float:
    """Return sigma_max of a matrix, or of the diagonal matrix a vector stands for."""
    if tensor.ndim == 1:
        return float(tensor.abs().max())
    # in units of its largest entry: squares of large scales do not fit float32
    peak = float(tensor.abs().max()) or 1.0
    matrix = (tensor.flatten(1) if tensor.ndim == 3 else as_matrix(tensor)).float() / peak
    # |row| <= sigma_max <= |W|_F: once one row outweighs all others the two agree, and nothing need be iterated.
    row = float(torch.linalg.vector_norm(matrix, dim=1).max())
    if float(torch.linalg.vector_norm(matrix)) <= (1 + _SIGMA_TOLERANCE) * row:
        return peak * row
    return peak * sigma_max(matrix, tol=_SIGMA_TOLERANCE)[0]


def _slice_length(source: TensorSource, leg: Leg) -> int:
    shape = source.shapes[leg.tensor]
    return math.prod(shape[len(leg.lead) :]) // shape[leg.axis]


def _why_left_out(site: Site, *, selected: bool) -> str:
    if selected:
        return "no channel is active and has room for the scale"
    if site.kind == "offset-norm":
        return "norm gain is 1 + weight: scaling it rounds, so bit identity is not available"
    return "not selected"


def _coverage(uncovered: Mapping[str, str]) -> tuple[str, ...]:
    """Say what would cover the linear inputs this lock does not reach: heads and inputs of a model left aside, where there are any."""
    inside = [name for name in uncovered if layer_index(name) is not None]
    if not inside:
        return ()
    modules = sorted({name.removesuffix(".weight").rpartition(".")[2] for name in inside})
    return (
        f"{len(inside)} linear inputs inside the blocks are not reached, and whoever trains these alone does not meet the lock. A lock by "
        "training underneath reaches them: specdef lock MODEL A --method deformation --retain DATA --target-modules "
        f"{','.join(modules)}; then specdef lock A OUT.",
    )
