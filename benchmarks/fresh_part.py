"""What training a part gains when the part holds fresh weights: no lock of that part can hold longer than that.

    python benchmarks/fresh_part.py --out benchmarks/results/fresh_part.json

The ResNet-18 of `specdef reproduce max-lock-resnet` (digits), taught Fashion-MNIST by AdamW in its last stage alone, as there: 40 steps of 16, the
same held-out pictures, whole decades. Once from its own weights, once with all weights of the last stage drawn anew. Two minutes on one core.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from specdef.attacks.partial.freeze import TrainOnly
from specdef.experiments.deformation_measure import places
from specdef.experiments.max_lock_resnet import SIZES, TASK, problem_of
from specdef.experiments.record import versions

RATES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


def attack(
    model: nn.Module, part: TrainOnly, task: Any, rate: float, steps: int
) -> list[dict[str, float]]:
    """Train the part of a model, and return the held-out loss and accuracy every ten steps."""
    trained = part.trained(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    optimizer = torch.optim.AdamW(trained.values(), lr=rate, weight_decay=0.0)
    found = []
    for step, batch in enumerate(task.train[:steps], 1):
        model.train()
        logits = model(pixel_values=batch["pixel_values"]).logits
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits, batch["labels"]).backward()
        optimizer.step()
        if step % 10 == 0:
            found.append({"steps": step, **judged(model, task.heldout)})
    return found


def judged(model: nn.Module, batches: Any) -> dict[str, float]:
    """Return mean loss and accuracy."""
    model.eval()
    loss = right = count = 0.0
    with torch.no_grad():
        for batch in batches:
            logits = model(pixel_values=batch["pixel_values"]).logits
            labels = batch["labels"]
            loss += float(nn.functional.cross_entropy(logits, labels, reduction="sum"))
            right += float((logits.argmax(1) == labels).sum())
            count += len(labels)
    return {"loss": round(loss / count, 4), "accuracy": round(right / count, 4)}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    settings, plan = SIZES["cpu"]
    with places(settings.original) as (data, models):
        problem = problem_of(settings, data, models, 0, print)
    part = TrainOnly("last-quarter")
    record: dict[str, Any] = {"task": TASK, "steps": plan.budget.steps, "versions": versions()}
    for start in ("own weights", "fresh weights"):
        sweep = {}
        for rate in RATES:
            model = copy.deepcopy(problem.original)
            if start == "fresh weights":
                torch.manual_seed(0)
                inside = {id(p) for p in part.trained(model).values()}
                for module in model.modules():
                    reset = getattr(module, "reset_parameters", None)
                    if reset and {id(p) for p in module.parameters(recurse=False)} & inside:
                        reset()
            sweep[f"{rate:g}"] = attack(model, part, problem.task, rate, plan.budget.steps)
        best = min((e for runs in sweep.values() for e in runs), key=lambda e: e["loss"])
        record[start] = {"best": best, "sweep": sweep}
        print(start, best)
    out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
