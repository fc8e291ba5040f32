"""Full-batch Adam on many copies of a small network at once, each with its own data, learning rate and goal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """Adam on many copies of a network.

    Args:
        steps: Per model, the first step at which the loss was at most its target; -1 where it was not within the budget.
        lowest: Per model, the lowest loss seen while it ran.
        diverged: Per model, whether the loss became infinite or undefined.
    """

    steps: Tensor
    lowest: Tensor
    diverged: Tensor


def train(
    model: nn.Module,
    params: Mapping[str, Tensor],
    inputs: Tensor,
    targets: Tensor,
    *,
    learning_rate: Tensor,
    goal: Tensor,
    budget: int,
    frozen: Sequence[str] = (),
) -> Trained:
    """Train every model with full-batch Adam (betas 0.9 and 0.999, eps 1e-8) until its loss reaches its goal.

    Args:
        model: Gives the function.
        params: `[models, ...]` per parameter.
        inputs: `[models, samples, ...]`.
        targets: `[models, samples, ...]`.
        learning_rate: `[models]`.
        goal: `[models]`, losses; -inf runs the whole budget.
        budget: Steps.
        frozen: Parameters that stay.

    Returns:
        Steps, lowest losses and divergences.
    """
    count = len(learning_rate)
    live = torch.arange(count)
    steps = torch.full((count,), -1)
    lowest = torch.full((count,), torch.inf, dtype=torch.float64)
    diverged = torch.zeros(count, dtype=torch.bool)
    now = {name: p.clone() for name, p in params.items()}
    names = [name for name in now if name not in frozen]
    moments = [[torch.zeros_like(now[name]) for name in names] for _ in range(2)]
    for step in range(budget + 1):
        leaves = [now[name].requires_grad_() for name in names]
        output = functional_call(model, now, (inputs,))
        losses = (output - targets).square().flatten(1).mean(1)
        values = losses.detach().double()
        lowest[live] = torch.minimum(lowest[live], values.nan_to_num(torch.inf, torch.inf))
        done, lost = values <= goal[live], ~values.isfinite()
        steps[live[done]], diverged[live[lost]] = step, True
        if bool((done | lost).all()) or step == budget:
            break
        gradients = torch.autograd.grad(losses.sum(), leaves)
        keep = ~(done | lost)
        for i, name in enumerate(names):
            m, v = moments[0][i], moments[1][i]
            m.lerp_(gradients[i], 0.1)
            v.lerp_(gradients[i].square(), 0.001)
            rate = learning_rate[live].to(m).view(-1, *(1,) * (m.ndim - 1)) / (
                1 - 0.9 ** (step + 1)
            )
            now[name] = leaves[i].detach() - rate * m / (
                (v / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
            )
        if not bool(keep.all()):
            live, inputs, targets = live[keep], inputs[keep], targets[keep]
            now = {name: p.detach()[keep] for name, p in now.items()}
            moments = [[t[keep] for t in moment] for moment in moments]
    return Trained(steps=steps, lowest=lowest, diverged=diverged)
