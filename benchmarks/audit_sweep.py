"""What the search for learning rates costs beside the full grid, and whether it finds the same best.

    python benchmarks/audit_sweep.py --out benchmarks/results/audit_sweep.json

An MLP trained on digits is fine-tuned to permuted digits, unlocked and locked (one channel per hidden layer scaled along the
ReLU's symmetry, 2^8 and 2^40), by several optimisers. The search walks by decades to both ends, refines, and gives runs up; the
grid runs every half decade between the same ends to the end. "The same best" is a loss within 2 % of the control's gain of the
grid's, or below it. A few minutes on one core.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from pathlib import Path

import optuna
import torch
from sklearn.datasets import load_digits
from torch import nn

from specdef.attacks.full import FullTraining
from specdef.attacks.optimizers import OPTIMIZERS
from specdef.attacks.run import Run
from specdef.attacks.task import Budget, Setting, Task
from specdef.audit.baseline import measure_baseline
from specdef.audit.grid import PER_DECADE, Sweep, index_of, rate_at
from specdef.audit.study import run_study

METHODS = ("sgd", "momentum", "adamw", "rmsprop", "adagrad", "adadelta", "lion", "muon")
TOLERANCE = 0.02


def digits() -> tuple[nn.Module, Task]:
    """Return an MLP trained on digits, and the task of digits with permuted pixels and labels."""
    data = load_digits()
    x = torch.tensor(data.data, dtype=torch.float32) / 16
    y = torch.tensor(data.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[:1400]), y[:1400]).backward()
        optimizer.step()
    pixels = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    labels = torch.randperm(10, generator=torch.Generator().manual_seed(2))
    px, py = x[:, pixels], labels[y]
    train = [[px[i : i + 64], py[i : i + 64]] for i in range(0, 1400, 64)]
    return model.eval(), Task(
        name="permuted digits", train=train, heldout=[[px[1400:], py[1400:]]], retain=[[x[1400:], y[1400:]]]
    )  # fmt: skip


def lock(model: nn.Module, x: torch.Tensor, exponents: tuple[int, ...] = (8, 40)) -> nn.Module:
    """Scale each hidden layer's least active channel by a power of two, and take it back in the next layer."""
    locked = copy.deepcopy(model)
    with torch.no_grad():
        for layer, exponent in zip((0, 2), exponents, strict=True):
            activity = locked[: layer + 2](x).mean(0)
            activity[activity == 0] = torch.inf  # a dead channel is no lock
            channel = int(activity.argmin())
            locked[layer].weight[channel] *= 2.0**exponent
            locked[layer].bias[channel] *= 2.0**exponent
            locked[layer + 2].weight[:, channel] /= 2.0**exponent
    return locked


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/audit_sweep.json"))
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, task = digits()
    steps = options.epochs * len(task.train)
    budget = Budget(steps=steps, evaluations=20)
    models = {"unlocked": model, "locked": lock(model, task.train[0][0])}
    baseline = measure_baseline(models["locked"], model, task)
    rows = []
    gains: dict[str, float] = {}
    for name in options.methods:
        attack = FullTraining((name,))
        low, high = OPTIMIZERS[name].learning_rates
        for side, victim in models.items():

            def execute(
                rate: float,
                watch: Callable[[int, float], None] | None = None,
                victim: nn.Module = victim,
                attack: FullTraining = attack,
                name: str = name,
            ) -> Run:
                setting = Setting(optimizer=name, learning_rate=rate)
                return attack(victim, task, setting, budget, watch=watch)

            began = time.perf_counter()
            found = run_study(
                optuna.storages.InMemoryStorage(), f"{name} {side}", Sweep(low=low, high=high, gain=gains.get(name)),
                execute, start=baseline.start, initial=max(baseline.original, baseline.locked), steps=steps,
            )  # fmt: skip
            seconds = time.perf_counter() - began
            ends = [index_of(run.setting.learning_rate) for run in found.runs]
            grid = [execute(rate_at(i)) for i in range(min(ends), max(ends) + 1, PER_DECADE // 2)]
            best = min(grid, key=lambda run: run.best)
            gains.setdefault(name, baseline.start - found.best.best)
            rows.append(
                {
                    "optimizer": name, "side": side, "lowest_rate": rate_at(min(ends)), "highest_rate": rate_at(max(ends)),
                    "search_runs": len(found.runs), "search_steps": found.steps_run, "grid_runs": len(grid),
                    "grid_steps": len(grid) * steps, "share_of_steps": found.steps_run / (len(grid) * steps),
                    "share_of_steps_grid_really_took": found.steps_run / sum(run.steps[-1] for run in grid),
                    "search_best": found.best.best, "search_rate": found.best.setting.learning_rate,
                    "grid_best": best.best, "grid_rate": best.setting.learning_rate,
                    "search_accuracy": max(found.best.accuracies), "grid_accuracy": max(best.accuracies),
                    "same_best": found.best.best <= best.best + TOLERANCE * gains[name], "search_seconds": seconds,
                    "runs": [[r.setting.learning_rate, r.status, r.steps[-1], r.best] for r in found.runs],
                }
            )  # fmt: skip
            row = rows[-1]
            print(
                f"{name:9} {side:8} {row['share_of_steps']:.0%} of the grid's steps; best {row['search_best']:.4f} at "
                f"{row['search_rate']:g}, grid {row['grid_best']:.4f} at {row['grid_rate']:g}",
                flush=True,
            )
    total = sum(r["search_steps"] for r in rows) / sum(r["grid_steps"] for r in rows)
    report = {
        "share_of_steps": total, "largest_share": max(r["share_of_steps"] for r in rows),
        "same_best": sum(r["same_best"] for r in rows), "sweeps": len(rows), "steps_per_run": steps,
        "start": baseline.original, "constant_guess": baseline.chance, "rows": rows, "torch": torch.__version__,
    }  # fmt: skip
    print(f"{total:.0%} in all; the same best in {report['same_best']} of {len(rows)}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
