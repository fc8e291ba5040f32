"""What quantising a locked model costs, simulated: round to nearest, per row of the weights or per token of the activations.

    python benchmarks/quantised_lock.py --out benchmarks/results/quantised_lock.json

Relative error of the logits against the float model, on SmolLM2-135M-Instruct and its default lock, on text. A minute.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

import specdef
from specdef.data.texts import load_text, token_batches
from specdef.models.smollm2 import smollm2


def quantise_weights(model: nn.Module, bits: int) -> None:
    """Round every linear weight to `bits` with one step per row."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.data = rounded(module.weight.data, bits)


def quantise_activations(model: nn.Module, bits: int) -> None:
    """Round the input of every linear layer to `bits` with one step per token."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _, inputs: (rounded(inputs[0], bits),))


def rounded(values: Tensor, bits: int) -> Tensor:
    """Round along the last axis with one symmetric step per slice."""
    step = values.abs().amax(-1, keepdim=True).clamp_min(1e-38) / (2 ** (bits - 1) - 1)
    return (values / step).round() * step


def main() -> None:
    """Run the simulation."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/quantised_lock.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = smollm2()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = token_batches(
        load_text("moby-dick"), tokenizer, batch_size=4, length=64, num_batches=1, seed=0
    )[0]
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    ways: dict[str, Callable[[nn.Module], None]] = {
        "weights int8": lambda model: quantise_weights(model, 8),
        "weights int4": lambda model: quantise_weights(model, 4),
        "activations int8": lambda model: quantise_activations(model, 8),
    }
    report: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as work, torch.no_grad():
        specdef.lock_checkpoint(folder, Path(work) / "locked")
        exact = specdef.load_model(folder)(**inputs).logits
        for way, quantise in ways.items():
            report[way] = {}
            for name, path in (("original", folder), ("locked", Path(work) / "locked")):
                model = specdef.load_model(path)
                quantise(model)
                report[way][name] = float((model(**inputs).logits - exact).norm() / exact.norm())
            print(way, report[way], flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
