"""Which channel and which site gets which exponent: what calibration knows, and what the weights alone can say.

    python benchmarks/channel_selection.py --out benchmarks/results/channel_selection.json

On SmolLM2-135M-Instruct: (1) the rank correlation of statistics of the weights with the calibrated usefulness of a
channel, and how useful the channel is that each statistic would pick (mean percentile, 0.5 is a random pick); (2) how much
of the unlocked gain full-parameter AdamW keeps, best over a sweep of learning rates, for some designs of the absorbed lock.
A few steps, one text, one seed: enough to choose a default by, not to claim a strength. About ten minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
from scipy.stats import spearmanr
from transformers import AutoTokenizer

import specdef
from specdef.data.texts import load_text, token_batches
from specdef.experiments.finetune import sweep
from specdef.lock.calibrate import calibrated_scores
from specdef.lock.channels import Channels
from specdef.lock.in_memory import model_config, unique_tensors
from specdef.models.smollm2 import smollm2
from specdef.symmetries import find_sites
from specdef.symmetries.site import Site
from specdef.weights.source import MemorySource

CONTROL_RATES = (5e-5, 1e-4, 2e-4, 3e-4)
MILD_RATES = (1e-5, 3e-6, 1e-6, 3e-7, 1e-7)
STEEP_RATES = (1e-8, 1e-9, 3e-10, 1e-10, 3e-11, 1e-11, 1e-12)
LOW_RATES = (1e-12, 1e-13, 1e-14, 3e-15, 1e-15, 3e-16, 1e-16, 1e-17)
"""Each sweep goes from where the design diverges to where nothing moves; `at_edge` says if it did not."""

Statistic = Callable[[Site], torch.Tensor]


def statistics(channels: Channels) -> dict[str, Statistic]:
    """Return what can be said of a channel without data."""

    def produced(site: Site) -> torch.Tensor:
        return channels.statistics(site.producers[0]).rms

    def consumed(site: Site) -> torch.Tensor:
        return (
            torch.stack([channels.statistics(leg).rms.square() for leg in site.consumers])
            .sum(0)
            .sqrt()
        )

    return {
        "producer": produced,
        "consumer": consumed,
        "product": lambda site: produced(site) * consumed(site),
        "ratio": lambda site: consumed(site) / produced(site).clamp_min(1e-30),
    }


def correlations(
    sites: tuple[Site, ...], scores: dict[str, torch.Tensor], found: dict[str, Statistic]
) -> list[dict[str, object]]:
    """Compare each statistic with the calibrated score, by kind of site."""
    rows = []
    for kind in dict.fromkeys(site.kind for site in sites):
        chosen = [site for site in sites if site.kind == kind]
        for name, statistic in found.items():
            ranks, smallest, largest = [], [], []
            for site in chosen:
                truth, guess = scores[site.name], statistic(site)
                ranks.append(float(spearmanr(guess, truth).statistic))
                smallest.append(float((truth < truth[guess.argmin()]).float().mean()))
                largest.append(float((truth < truth[guess.argmax()]).float().mean()))
            rows.append(
                {"kind": kind, "statistic": name, "mean_rank_correlation": sum(ranks) / len(ranks),
                 "usefulness_percentile_of_smallest": sum(smallest) / len(smallest),
                 "usefulness_percentile_of_largest": sum(largest) / len(largest)}
            )  # fmt: skip
    return rows


def site_order(
    sites: tuple[Site, ...], statistic: Statistic, *, largest: bool
) -> dict[str, torch.Tensor]:
    """Return scores that order sites by kind and depth (gated, value, norm; late first) and channels by a statistic."""
    rank = {"gated": 0, "value": 1, "norm": 2}
    depth = 1 + max(site.layer or 0 for site in sites)
    out = {}
    for site in sites:
        values = statistic(site).double()
        order = (-values if largest else values).argsort().argsort().double() / len(values)
        out[site.name] = order + 2 * (rank[site.kind] * depth + depth - (site.layer or 0))
    return out


def main() -> None:
    """Run the experiment."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results/channel_selection.json")
    )
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--length", type=int, default=32)
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = smollm2()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = specdef.load_model(folder)
    source = MemorySource(unique_tensors(model), model_config(model))
    sites = find_sites(source.config, source.shapes).sites
    calibration = token_batches(
        load_text("sotu"), tokenizer, batch_size=4, length=options.length, num_batches=8, seed=0
    )
    scores = calibrated_scores(model, sites, calibration)
    found = statistics(Channels(source))
    report: dict[str, object] = {"correlations": correlations(sites, scores, found)}
    batches = token_batches(
        load_text("moby-dick"),
        tokenizer,
        batch_size=4,
        length=options.length,
        num_batches=options.steps + 2,
        seed=1,
    )
    train, held_out = batches[: options.steps], batches[options.steps :]

    def best(
        scores: dict[str, torch.Tensor] | None,
        config: specdef.LockConfig | None,
        rates: tuple[float, ...],
    ) -> dict[str, object]:
        model = specdef.load_model(folder)
        if config is not None:
            tensors = unique_tensors(model)
            plan = specdef.plan_lock(
                MemorySource(tensors, model_config(model)), config, scores=scores
            )
            for name, edits in plan.scalings.items():
                for edit in edits:
                    edit.apply(tensors[name].data, name=name)
        runs = sweep(model, train, held_out, rates)
        winner = min(runs, key=lambda run: run.best)
        losses = {
            f"{run.setting.learning_rate:g}": run.best if math.isfinite(run.best) else None
            for run in runs
        }
        return {"start": runs[0].losses[0], "best": winner.best, "learning_rate": winner.setting.learning_rate,
                "at_edge": winner.setting.learning_rate in (rates[0], rates[-1]), "best_by_rate": losses}  # fmt: skip

    convex, strongest = specdef.LockConfig.preset("convex"), specdef.LockConfig.preset("max")
    designs = {
        "unlocked": (None, None, CONTROL_RATES),
        "uniform 2^10, most active": (None, specdef.LockConfig.preset("uniform"), MILD_RATES),
        "convex, calibrated": (scores, convex, STEEP_RATES),
        "max, calibrated": (scores, strongest, LOW_RATES),
        "max, data-free (the default)": (None, strongest, LOW_RATES),
        "convex, data-free (site order, largest producer)": (None, convex, STEEP_RATES),
        "convex, site order, smallest product": (site_order(sites, found["product"], largest=False), convex, STEEP_RATES),
        "convex, ordered by smallest product": ({s.name: found["product"](s) for s in sites}, convex, MILD_RATES),
    }  # fmt: skip
    results: dict[str, dict[str, object]] = {}
    for name, (given, config, rates) in designs.items():
        results[name] = best(given, config, rates)
        control = results["unlocked"]
        gain = float(control["start"]) - float(control["best"])  # type: ignore[arg-type]
        kept = float(results[name]["start"]) - float(results[name]["best"])  # type: ignore[arg-type]
        results[name]["share_of_unlocked_gain"] = kept / gain
        print(
            f"{name:64} {results[name]['best']:.3f} at {results[name]['learning_rate']:g}: {kept / gain:.1%}",
            flush=True,
        )
    report |= {
        "designs": results,
        "steps": options.steps,
        "tokens_per_step": 4 * options.length,
        "torch": torch.__version__,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
