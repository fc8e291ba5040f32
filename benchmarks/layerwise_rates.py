"""Why optimisers whose rates are relative to the weights get past a staggered lock: through the layer in front of its top site.

    python benchmarks/layerwise_rates.py --out benchmarks/results/layerwise_rates.json

A lock multiplies the weights that produce a scaled channel and divides those that read it. LAMB's rate for a layer grows with the norm of its
weights; where the readers of the highest site allow only tiny rates, the layer in front of it, whose norm the lock has raised
by as much, still gets an ordinary one. On the toy net (digits, permuted pixels), best held-out accuracy over half decades of the
rate: LAMB on all layers, on all but that one, on that one alone; AdamW on all, and on that layer alone of the unlocked net. Two minutes.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from statistics import fmean

import torch
from torch import nn

from specdef.attacks.attack import Attack, Prepared
from specdef.attacks.task import Budget, Setting, Task
from specdef.experiments.toy_locks_setup import LOCKS, Net, locked, problem

LOCK = "staggered 2^8..2^40, least active"
RATES = {
    "lamb": tuple(float(f"{10 ** (-k / 2):.3g}") for k in range(2, 26)),
    "adamw": tuple(float(f"{10 ** (-k / 2):.3g}") for k in range(2, 34)),
}


class OnlyLayers(Attack):
    """Train some layers."""

    name, tier, source, summary = "only-layers", 3, "", ""

    def __init__(self, layers: frozenset[str]) -> None:
        self.layers = layers

    def prepare(
        self, model: nn.Module, task: Task, *, original: nn.Module | None, generator: torch.Generator
    ) -> Prepared:  # fmt: skip
        """Take the layers' parameters."""
        chosen = [p for n, p in model.named_parameters() if n.partition(".")[0] in self.layers]
        return Prepared(model=model, groups=[{"params": chosen}])


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/layerwise_rates.json"))
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    net = Net()
    steps = net.epochs * math.ceil(net.rows / net.batch_size)
    budget = Budget(steps=steps, evaluations=11)
    rows = []
    for seed in range(options.seeds):
        original, task = problem(net, seed)
        victim = locked(original, task, LOCKS[LOCK])
        norms = {
            n.partition(".")[0]: float(p.detach().norm())
            for n, p in victim.named_parameters()
            if p.ndim > 1
        }
        front = max(norms, key=lambda name: norms[name])
        every, alone = frozenset(norms), frozenset({front})

        def best(model: nn.Module, layers: frozenset[str], optimizer: str, task: Task = task) -> float:  # fmt: skip
            attack = OnlyLayers(layers)
            settings = [Setting(optimizer=optimizer, learning_rate=r) for r in RATES[optimizer]]
            runs = [attack(model, task, setting, budget) for setting in settings]
            return max(max(a for a in run.accuracies if not math.isnan(a)) for run in runs)

        rows.append(
            {
                "seed": seed, "layer_in_front": front, "norms": norms,
                "lamb": best(victim, every, "lamb"), "lamb_without_it": best(victim, every - alone, "lamb"),
                "lamb_on_it_alone": best(victim, alone, "lamb"), "adamw": best(victim, every, "adamw"),
                "adamw_on_it_alone_unlocked": best(original, alone, "adamw"),
            }
        )  # fmt: skip
        print({name: value for name, value in rows[-1].items() if name != "norms"}, flush=True)
    names = [name for name, value in rows[0].items() if isinstance(value, float)]
    means = {name: round(fmean(float(str(row[name])) for row in rows), 4) for name in names}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(
        json.dumps({"lock": LOCK, "rates": RATES, "steps": steps, "means": means, "rows": rows, "torch": torch.__version__}, indent=1)
        + "\n"
    )  # fmt: skip
    print(means)


if __name__ == "__main__":
    main()
