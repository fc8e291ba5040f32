"""Small nets, tasks and toy locks for the tests of the audit. Run as a script it is one worker on one study."""

from __future__ import annotations

import copy
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from specdef.attacks.run import Pruned, Run
from specdef.attacks.task import Setting, Task
from specdef.audit.grid import Sweep

INPUTS, HIDDEN, CLASSES = 12, 24, 4


def problem(*, retain: bool = True, seed: int = 0) -> tuple[nn.Module, Task]:
    """Return an MLP trained on one labelling of random points, and the task of another."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(320, INPUTS, generator=generator)
    own = (x @ torch.randn(INPUTS, CLASSES, generator=generator)).argmax(1)
    new = (x @ torch.randn(INPUTS, CLASSES, generator=generator)).argmax(1)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = mlp()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(60):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), own).backward()
            optimizer.step()
    train = [[x[i : i + 32], new[i : i + 32]] for i in range(0, 256, 32)]
    kept = [[x[256:], own[256:]]] if retain else []
    return model.eval(), Task(name="toy", train=train, heldout=[[x[256:], new[256:]]], retain=kept)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(INPUTS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CLASSES))


def rescaled(model: nn.Module, scale: float = 1e4) -> nn.Module:
    """Scale the first layer, and take it back in the second: the function stays, the conditioning does not."""
    locked = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in (locked[0].weight, locked[0].bias):
            tensor *= scale
        locked[2].weight /= scale
    return locked


def uniform(model: nn.Module, scale: float = 300.0) -> nn.Module:
    """Scale all singular values of every layer, and divide the outputs: the function stays, and so does the conditioning."""
    locked = copy.deepcopy(model)
    with torch.no_grad():
        locked[0].weight *= scale
        locked[0].bias *= scale
        locked[2].weight *= scale
        locked[2].bias *= scale**2
    return nn.Sequential(*locked, Divide(scale**2))


class Divide(nn.Module):
    """Outputs over a constant."""

    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = by

    def forward(self, x: Tensor) -> Tensor:
        return x / self.by


def exploding(model: nn.Module) -> nn.Module:
    """Return a model of the same outputs whose gradients are not finite."""
    return nn.Sequential(copy.deepcopy(model), Explode())


def damaged(model: nn.Module) -> nn.Module:
    """Return the model with weights that are noise."""
    broken = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in broken.parameters():
            parameter.copy_(
                torch.randn(parameter.shape, generator=torch.Generator().manual_seed(9))
            )
    return broken


class Explode(nn.Module):
    """The identity, with a gradient that is not a number."""

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            x.register_hook(lambda g: g * torch.nan)
        return x


Landscape = Callable[[float], Mapping[str, Any]]
"""Rate to fields of `Tried`."""


def run_at(
    rate: float,
    losses: tuple[float, ...],
    *,
    status: Any = "finished",
    seed: int = 0,
    steps: tuple[int, ...] | None = None,
    **fields: Any,
) -> Run:
    """Return a run by hand."""
    return Run(
        attack="toy", setting=Setting(learning_rate=rate), seed=seed, steps=steps or tuple(range(len(losses))),
        losses=losses, accuracies=(float("nan"),) * len(losses), status=status,
        **{"relative_change": 0.1, **fields},
    )  # fmt: skip


def bowl_run(rate: float, watch: Callable[[int, float], None], *, pause: float = 0.0) -> Run:
    """Train nothing: losses of a smooth bowl around 1e-3 that diverges above 1e-2."""
    import math

    losses, steps = [1.0], [0]
    final = 1 - 0.9 * math.exp(-((math.log10(rate) + 3) ** 2)) if rate <= 1e-2 else math.inf
    status = "finished" if rate <= 1e-2 else "diverged"
    for step in range(1, 5):
        time.sleep(pause)
        loss = 1 + (final - 1) * step / 4
        losses.append(loss)
        steps.append(step)
        if not math.isfinite(loss):
            break
        try:
            watch(step, loss)
        except Pruned:
            status = "pruned"
            break
    return run_at(rate, tuple(losses), status=status, steps=tuple(steps))


SWEEP = Sweep(low=1e-5, high=1e-2)


def worker(storage: str, log: str, pause: float) -> None:
    """Work on one study until it ends, writing every rate down as its run begins."""
    from specdef.audit.study import run_study
    from specdef.audit.workers import Watchman

    def execute(rate: float, watch: Callable[[int, float], None]) -> Run:
        with Path(log).open("a") as file:
            file.write(f"{rate!r}\n")
        return bowl_run(rate, watch, pause=pause)

    run_study(
        storage, "study", SWEEP, execute, start=1.0, initial=1.0, steps=4, watchman=Watchman(orphan=3.0)
    )  # fmt: skip


if __name__ == "__main__":
    worker(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
