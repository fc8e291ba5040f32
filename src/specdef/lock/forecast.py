"""What a lock is going to cost an attacker, worked out before it is written: progress per step at the best learning rate.

An optimiser steps along s: the gradient g itself, or its signs (Adam, Lion, and what else makes all entries move alike). To second order
a step of rate lr changes the loss by -lr g.s + lr^2/2 s.G s, with G the generalised Gauss-Newton matrix, so at the best
rate it falls by (g.s)^2 / (2 s.G s). A lock changes no loss and no g.s of a given move; it changes which move the optimiser makes:
of a slice that is stored times 2^-e, a step of signs moves the original by 2^e as much, and a gradient step by 4^e as much. So the
progress on the locked model is that of the original along other directions, and no locked model is needed to know it.

Where a lock has gaps, the sum is that of the highest slices alone: their uselessness is what this measures. It is a forecast of
one step; that many steps do not add up to more is measured by attacks (docs/results/).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from specdef.curvature.losses import Batch, Loss
from specdef.curvature.operators import GGNOperator
from specdef.errors import SpecDefError
from specdef.lock.deformation.retain import task_loss
from specdef.lock.names import NameMap
from specdef.symmetries.roles import layer_index
from specdef.weights.edit import ScaleEdit, total_exponents

Step = Literal["sign", "gradient"]
"""sign: every entry moves alike (Adam, Lion, Muon, nearly); gradient: in proportion to its gradient (SGD with momentum or without)."""

POWER: Mapping[Step, int] = {"sign": 1, "gradient": 2}
"""Octaves a slice's step grows by, per octave of its scale."""

LAST = 4
"""Blocks that count as the last ones."""

ATTENTION = re.compile(r"attn|attention")


@dataclass(frozen=True, slots=True, kw_only=True)
class Expectation:
    """What one kind of attacker is expected to be slowed by.

    Args:
        part: What is trained.
        step: How it steps.
        exponent: The highest exponent in that part: all that is not scaled moves at most 2^-(exponent) of its own best rate.
        slowdown: Progress per step at the best rate, of the original over that of the locked model.
    """

    part: str
    step: Step
    exponent: int
    slowdown: float

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)


def natural_parts(shapes: Mapping[str, Sequence[int]]) -> dict[str, list[str]]:
    """Return the parts of a network people train alone, by the names of its tensors.

    Args:
        shapes: Shape of every parameter by name.

    Returns:
        Part to names; parts without a tensor are left out.

    >>> natural_parts({"embed.weight": (9, 4), "h.0.attn.q.weight": (4, 4), "h.0.norm.weight": (4,), "h.0.up.weight": (8, 4)})
    {'all': ['embed.weight', 'h.0.attn.q.weight', 'h.0.norm.weight', 'h.0.up.weight'], 'linear layers': ['h.0.attn.q.weight', 'h.0.up.weight'], 'attention': ['h.0.attn.q.weight'], 'other linear layers': ['h.0.up.weight'], 'norms and biases': ['h.0.norm.weight'], 'last blocks': ['h.0.attn.q.weight', 'h.0.norm.weight', 'h.0.up.weight']}
    """
    linear = [n for n, s in shapes.items() if len(s) > 1 and "embed" not in n and not n.endswith(("wte.weight", "wpe.weight"))]  # fmt: skip
    layer = {n: index for n in shapes if (index := layer_index(n)) is not None}
    last = max(layer.values(), default=0) - LAST
    parts = {
        "all": list(shapes),
        "linear layers": linear,
        "attention": [n for n in linear if ATTENTION.search(n)],
        "other linear layers": [n for n in linear if n in layer and not ATTENTION.search(n)],
        "norms and biases": [n for n, s in shapes.items() if len(s) == 1],
        "last blocks": [n for n in shapes if n in layer and layer[n] > last],
    }
    return {part: names for part, names in parts.items() if names}


def exponents_of(
    shapes: Mapping[str, Sequence[int]], scalings: Mapping[str, Iterable[ScaleEdit]]
) -> dict[str, Tensor]:
    """Return e for every entry that a lock stores times 2^-e, as tensors that broadcast.

    Args:
        shapes: Shape of every tensor by name.
        scalings: The lock's edits, of `LockPlan`.

    Returns:
        Name to exponents, of the tensor's own shape.
    """
    return {name: -total_exponents(shapes[name], edits).float() for name, edits in scalings.items()}


def expected_slowdowns(
    model: nn.Module,
    batches: Sequence[Batch],
    scalings: Mapping[str, Iterable[ScaleEdit]],
    *,
    parts: Mapping[str, Collection[str]] | None = None,
    steps: Collection[Step] = ("sign", "gradient"),
    loss: Loss | None = None,
) -> list[Expectation]:
    """Forecast the slowdown of every part and kind of step.

    Cost: one gradient, and two products with G per part and kind of step; memory of G's graph on one batch.

    Args:
        model: The original.
        batches: What the attacker would train on, or a stand-in.
        scalings: Tensor name to edits, of a `LockPlan`; names as in the checkpoint.
        parts: Part to names of parameters; None takes `natural_parts`.
        steps: Kinds of steps.
        loss: None takes what suits the model.

    Returns:
        One entry for each part and kind of step.

    Raises:
        SpecDefError: There are no batches.
    """
    if not batches:
        raise SpecDefError(
            "no batches to forecast with", hint="Give a text that is long enough, or none at all."
        )
    names = NameMap(model)
    own = {id(p): name for name, p in model.named_parameters()}
    shapes = {name: p.shape for name, p in model.named_parameters()}
    edits = {own[id(names.tensor(name))]: list(e) for name, e in scalings.items() if id(names.tensor(name)) in own}  # fmt: skip
    exponents = exponents_of(shapes, edits)
    parts = natural_parts(shapes) if parts is None else parts
    found: list[Expectation] = []
    was = {p: p.requires_grad for p in model.parameters()}
    try:
        for p in was:
            p.requires_grad_(True)
        G = GGNOperator(model, batches, task_loss(model, batches[0], loss), list(shapes))
        g = G.gradient()
        e = torch.cat([exponents.get(n, torch.zeros(())).expand(s).flatten() for n, s in shapes.items()])  # fmt: skip
        e = e.to(g.device, g.dtype)
        for part, names_inside in parts.items():
            members = set(names_inside)
            inside = torch.cat([torch.full((s.numel(),), n in members) for n, s in shapes.items()]).to(g.device)  # fmt: skip
            top = e[inside].max()
            for step in steps:
                power = POWER[step]
                move = torch.where(inside, g.sign() if step == "sign" else g, 0)
                # Only ratios matter: the highest exponent is taken out, and what underflows is nothing.
                locked = progress(G, g, move * torch.exp2(power * (e - top).clamp_max(0)))
                slowdown = progress(G, g, move) / locked if locked > 0 else float("inf")
                found.append(
                    Expectation(part=part, step=step, exponent=int(top), slowdown=slowdown)
                )
    finally:
        for p, flag in was.items():
            p.requires_grad_(flag)
    return found


def tier_lines(expected: Sequence[Expectation], exponent: int) -> list[str]:
    """Say what is expected of each tier of attackers, those a lock along symmetries cannot hold included.

    Args:
        expected: Of `expected_slowdowns`; empty where there was no data.
        exponent: The highest exponent of the lock.

    Returns:
        One line per tier.
    """

    def times(found: Expectation) -> str:
        kind = "signs (AdamW, Lion)" if found.step == "sign" else "gradients (SGD)"
        return f"{found.slowdown:.3g} times less progress per step with {kind}"

    full = [e for e in expected if e.part == "all"]
    weakest = min((e for e in expected if e.part != "all"), key=lambda e: e.slowdown, default=None)
    unknown = "not forecast without calibration text"
    return [
        f"tier 1 (default): training at the usual rates diverges: the largest stable one falls by about 2^{exponent}",
        f"tier 2 (tuned): {'; '.join(map(times, full)) or unknown}",
        f"tier 3 (partial): {f'the weakest part is {weakest.part}: {times(weakest)}' if weakest else unknown}; prompts, IA3 and embeddings do not meet the lock",
        "tier 4 (preconditioned): K-FAC and natural gradient do not depend on scales: no slowdown",
        "tier 5 (structural): none after re-balancing, which takes seconds",
        "tier 6 (rebuild): none: the outputs are the original's",
    ]  # fmt: skip


def progress(G: GGNOperator, g: Tensor, s: Tensor) -> float:
    """Return (g.s)^2 / (2 s.G s): how far the best step along s brings the loss down, to second order.

    Args:
        G: The generalised Gauss-Newton matrix.
        g: (n,) gradient.
        s: (n,) direction, of any length.

    Returns:
        Nats; 0 where s is 0 or flat.
    """
    s = s / torch.linalg.vector_norm(s).clamp_min(torch.finfo(s.dtype).tiny)
    curvature = float(s.double() @ (G @ s).double())
    gain = float(g.double() @ s.double())
    return gain**2 / (2 * curvature) if curvature > 0 else 0.0
