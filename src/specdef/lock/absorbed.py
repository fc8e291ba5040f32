"""The absorbed lock: scales of powers of two, absorbed along the network's own symmetries (DESIGN.md, FACTS 3).

At a site of scale s, one channel c of the activation x is multiplied by s where it is produced and divided by s where it
is read. The function keeps every bit; the gradient with respect to the reading column grows by s and the column itself
shrinks by s, so the loss is s^2 times as curved there: every optimiser that takes one step size for all entries must
take the one this column allows. Trained at learning rate lr, the site behaves as the unlocked one at lr * s.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from specdef.errors import SelectionError
from specdef.lock.config import LockConfig
from specdef.lock.plan import LockPlan, SiteRecord
from specdef.lock.schedule import exponents
from specdef.spectral.topk import sigma_max
from specdef.spectral.views import as_matrix
from specdef.symmetries import find_sites, matches
from specdef.symmetries.site import Leg, Site
from specdef.weights.edit import ScaleEdit
from specdef.weights.source import TensorSource

Banned = Collection[tuple[str, int]]
"""(site name, channel) pairs that were found not to fit."""


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
        scores: Site name to (size,) score of each channel, from calibration; None takes `data_free_scores`.
        banned: Pairs of site and channel to avoid.

    Returns:
        The plan.

    Raises:
        SelectionError: No table for the family, nothing selected, or no channel of a site has room.
    """
    symmetries = find_sites(source.config, source.shapes)
    exact = [site for site in symmetries.sites if site.kind != "offset-norm"]
    sites = select_sites(exact, config)
    chosen: list[tuple[float, Site, int]] = []
    skipped: dict[str, str] = {}
    for site in sites:
        usable = _usable(source, site, math.log2(config.bottom))
        for name, channel in banned:
            if name == site.name:
                usable[channel] = False
        if not usable.any():
            skipped[site.name] = (
                f"no channel can be scaled by 2^{math.log2(config.bottom):.0f} exactly"
            )
            continue
        score = (
            scores[site.name]
            if scores is not None
            else data_free_scores(source, site, config.channel)
        )
        score = score.to(torch.float64)
        if config.channel == "least-useful":
            channel = int(torch.where(usable, score, math.inf).argmin())
        else:
            channel = int(torch.where(usable, score, -math.inf).argmax())
        chosen.append((float(score[channel]), site, channel))
    if not chosen:
        raise SelectionError(
            f"none of the {len(sites)} selected sites has a channel with exponent room",
            hint="Use a smaller scale, or a checkpoint in bfloat16 or float32 (float16 has hardly any room).",
        )
    # The least useful sites get the highest exponents; ties (equal scores) stay in the model's order.
    chosen.sort(key=lambda item: item[0] if config.channel == "least-useful" else -item[0])
    scalings: dict[str, list[ScaleEdit]] = {}
    records = []
    tops: dict[str, tuple[float, ScaleEdit]] = {}
    for exponent, (score_value, site, channel) in zip(
        exponents(len(chosen), config), chosen, strict=True
    ):
        for leg, sign in site.legs():
            for position in leg.positions(channel):
                edit = ScaleEdit(
                    axis=leg.axis, position=position, exponent=sign * exponent, lead=leg.lead
                )
                scalings.setdefault(leg.tensor, []).append(edit)
                if sign > 0:
                    tops[leg.tensor] = max(
                        tops.get(leg.tensor, (0.0, edit)),
                        (float(exponent), edit),
                        key=lambda t: t[0],
                    )
        records.append(
            SiteRecord(
                name=site.name, kind=site.kind, layer=site.layer, scale=2.0**exponent, channel=channel,
                covers=tuple(dict.fromkeys(leg.tensor for leg in site.consumers)), usefulness=score_value,
            )
        )  # fmt: skip
    before, after = _sigma_max(source, scalings)
    uncovered = {item.tensor: item.reason for item in symmetries.uncovered}
    taken = {record.name for record in records}
    for site in symmetries.sites:
        if site.name not in taken:
            reason = skipped.get(site.name, _why_left_out(site))
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


def select_sites(sites: list[Site], config: LockConfig) -> list[Site]:
    """Keep the sites that `layers` and `target_modules` ask for.

    Args:
        sites: All exact sites.
        config: The recipe.

    Returns:
        Those in the chosen layers of which a producer or a consumer is a target module.

    Raises:
        SelectionError: Nothing is left.
    """
    kept = [site for site in sites if config.layers is None or site.layer in config.layers]
    if config.target_modules is not None:
        kept = [
            site for site in kept
            if any(matches(leg.tensor, config.target_modules) for leg, _ in site.legs())
        ]  # fmt: skip
    if not kept:
        raise SelectionError(
            f"layers={config.layers}, target_modules={config.target_modules} select none of {len(sites)} sites",
            patterns=config.target_modules or (),
            nearest=[site.name for site in sites[:5]],
            hint="`specdef inspect MODEL` lists the sites.",
        )
    return kept


def data_free_scores(source: TensorSource, site: Site, channel: str) -> Tensor:
    """Score the channels of a site from the weights alone.

    most-active: the rms of what produces the channel, |gain_c| or |W_producer[c, :]|.
    least-useful: the rms of what reads it times the same, |W_consumer[:, c]| |W_producer[c, :]|: what the channel
    carries, which no rescaling changes. It stands in for the calibrated score (gradient per unit of activation);
    dev/LOG.md holds the rank correlation of the two.

    Args:
        source: The model.
        site: The site.
        channel: "least-useful" or "most-active".

    Returns:
        (size,) float32 scores.
    """
    produced = torch.stack([_rms(source, leg) for leg in site.producers[:1]]).amax(0)
    if channel == "most-active":
        return produced
    squares = torch.stack([_rms(source, leg).square() for leg in site.consumers])
    return squares.sum(0).sqrt() * produced


def _rms(source: TensorSource, leg: Leg) -> Tensor:
    """Return (size,): root mean square of the slice of every channel."""
    lines = source.lines(leg.tensor, leg.axis, leg.lead).float()
    return _gather(lines.square().mean(1), leg).sqrt()


def _gather(values: Tensor, leg: Leg) -> Tensor:
    """Average per-position values over the positions of each channel."""
    index = torch.tensor([leg.positions(channel) for channel in range(leg.size)])
    return values[index].mean(1)


def _usable(source: TensorSource, site: Site, exponent: float) -> Tensor:
    """Say which channels are alive and have room for 2^exponent, judged from the sampled lines."""
    # A channel that nothing writes or nothing reads is not explosive: scaling it locks nothing.
    usable = torch.ones(site.size, dtype=torch.bool)
    for leg, sign in site.legs():
        if sign > 0 and leg.tensor.endswith("bias"):
            continue
        lines = source.lines(leg.tensor, leg.axis, leg.lead)
        info = torch.finfo(lines.dtype)
        size = lines.abs().double()
        alive = (size > 0).any(1)
        scaled = size * 2.0 ** (sign * exponent)
        fits = (
            (size == 0) | ((scaled >= info.tiny) & (scaled <= info.max) & (size >= info.tiny))
        ).all(1)
        index = torch.tensor([leg.positions(channel) for channel in range(leg.size)])
        usable &= fits[index].all(1) & alive[index].any(1)
    return usable


def _sigma_max(
    source: TensorSource, scalings: Mapping[str, list[ScaleEdit]]
) -> tuple[float, float]:
    """Return the largest singular value, before and after, of the matrix where it is largest after.

    Which matrix that is, is read off the largest scaled slice, a lower bound of its sigma_max that is sharp for large
    scales; only this one matrix is decomposed. A norm's gain counts as the diagonal matrix it is.
    """
    best, top = 0.0, ""
    for name, edits in scalings.items():
        edit = max(edits, key=lambda e: e.exponent)
        if edit.exponent <= 0 or name.endswith("bias"):
            continue
        lines = source.lines(name, edit.axis, edit.lead)[edit.position].double()
        per_line = source.shapes[name]
        length = math.prod(per_line[len(edit.lead) :]) // per_line[edit.axis]
        bound = float(lines.square().mean().sqrt()) * math.sqrt(length) * 2.0**edit.exponent
        if bound > best:
            best, top = bound, name
    if not top:
        return float("nan"), float("nan")
    tensor = source.read(top)
    before = _largest(tensor, scalings[top])
    for edit in scalings[top]:
        edit.apply(tensor, name=top)
    return before, _largest(tensor, scalings[top])


def _largest(tensor: Tensor, edits: list[ScaleEdit]) -> float:
    if tensor.ndim == 1:
        return float(tensor.abs().max())
    top = max(edits, key=lambda e: e.exponent)
    return sigma_max(as_matrix(tensor[top.lead]).double())[0]


def _why_left_out(site: Site) -> str:
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
