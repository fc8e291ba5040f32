"""`make demo`: lock SmolLM2-135M-Instruct, prove that nothing changed, attack it, and undo the lock.

Writes into runs/demo: the locked and the restored model, the key, demo.json and demo.png. The attack is AdamW over all
parameters, at the rate everyone uses and at the best of a sweep, beside the same
on the original. What the lock does not stop is printed too; `docs/limits.md` says it in full.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import specdef
from specdef.attacks.run import Run
from specdef.data.texts import load_text, token_batches
from specdef.experiments.finetune import sweep
from specdef.models.smollm2 import smollm2

DEFAULT_RATE = 5e-5
"""What transformers' Trainer takes unless told otherwise."""

CONTROL_RATES = (DEFAULT_RATE, 1e-4, 3e-4)
LOCKED_RATES = (DEFAULT_RATE, 1e-13, 1e-14, 1e-15, 1e-16)
"""From where the lock diverges to where nothing moves any more."""

PROMPT = "What is the capital of France?"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo.

    Args:
        arguments: Command-line arguments; None takes sys.argv.

    Returns:
        0 if everything that was promised held, 1 if not.
    """
    parser = argparse.ArgumentParser(prog="python -m specdef.experiments.demo", description=__doc__)
    parser.add_argument(
        "--model", type=Path, help="another causal language model's folder [SmolLM2-135M-Instruct]"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--length", type=int, default=32)
    options = parser.parse_args(arguments)
    began = time.perf_counter()
    model = options.model or smollm2(progress=_say)
    for name in ("locked", "restored"):
        shutil.rmtree(options.out / name, ignore_errors=True)
    result = run(model, options.out, steps=options.steps, length=options.length)
    result["seconds"] = round(time.perf_counter() - began, 1)
    (options.out / "demo.json").write_text(
        json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8"
    )
    _say(
        f"\n{result['seconds']:.0f} s in all; numbers in {options.out / 'demo.json'}, plot in {options.out / 'demo.png'}"
    )
    return 0 if result["held"] else 1


def run(model: Path, out: Path, *, steps: int = 8, length: int = 32) -> dict[str, Any]:
    """Inspect, lock, verify, generate, attack, unlock.

    Args:
        model: Folder of a causal language model with a tokenizer.
        out: Folder for what is made.
        steps: Steps of each fine-tuning run.
        length: Tokens per sequence, four sequences per step.

    Returns:
        Everything measured, as JSON values; `held` is whether all promises held.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    out.mkdir(parents=True, exist_ok=True)
    (out / "locked.key.safetensors").unlink(missing_ok=True)  # of an earlier demo
    stage = _Stages()

    stage("1. inspect")
    _show_inspection(model)

    stage("2. lock (absorbed)")
    certificate = specdef.lock_checkpoint(model, out / "locked")
    _say(
        f"{certificate.num_sites} sites, {certificate.tensors_changed} of {certificate.tensors_total} tensors changed; "
        f"largest singular value {certificate.sigma_max_before:.3g} -> {certificate.sigma_max_after:.3g}"
    )

    stage("3. verify")
    verification = specdef.verify_checkpoint(out / "locked", model, certificate.key)
    for item in verification.outputs:
        _say(
            f"logits in {item.dtype}: {'bit-identical' if item.bit_identical else item.max_abs_logit_difference}"
        )

    stage("4. generate")
    texts = [_generate(folder, tokenizer) for folder in (model, out / "locked")]
    for name, text in zip(("original", "locked"), texts, strict=True):
        _say(f"{name:9} {PROMPT} {text}")

    stage(f"5. fine-tune both with AdamW, {steps} steps of 4x{length} tokens of Moby Dick")
    text = load_text("moby-dick")
    batches = token_batches(
        text, tokenizer, batch_size=4, length=length, num_batches=steps + 2, seed=1
    )
    train, held_out = batches[:steps], batches[steps:]

    def attack(name: str, folder: Path, rates: Sequence[float]) -> list[Run]:
        return sweep(specdef.load_model(folder), train, held_out, rates, progress=_reporter(name))

    control = attack("original", model, CONTROL_RATES)
    locked = attack("locked", out / "locked", LOCKED_RATES)
    share = _show_attack(control, locked)
    plot(control, locked, out / "demo.png")

    stage("6. unlock")
    unlocked = specdef.unlock_checkpoint(out / "locked", out / "restored", certificate.key)
    _say(f"{unlocked.tensors} tensors restored, SHA-256 equal: {unlocked.sha256_equal}")
    _say(f"\nWhat this does not stop: {certificate.threat_model}")
    return {
        "model": model.name,
        "lock": {
            key: certificate.to_dict()[key]
            for key in (
                "method",
                "config",
                "tensors_total",
                "tensors_changed",
                "sigma_max_before",
                "sigma_max_after",
                "seconds",
                "selection",
            )
        },
        "sites": certificate.num_sites,
        "verify": {**verification.to_dict(), "problems": list(verification.problems)},
        "same_text": texts[0] == texts[1],
        "text": texts[0],
        "steps": steps,
        "tokens_per_step": 4 * length,
        "control": [_row(r) for r in control],
        "locked": [_row(r) for r in locked],
        "share_of_gain_at_default_rate": share[0],
        "share_of_gain_at_best_rate": share[1],
        "unlock": unlocked.to_dict(),
        "versions": certificate.versions,
        "held": bool(
            verification.valid
            and verification.bit_identical
            and texts[0] == texts[1]
            and unlocked.sha256_equal
        ),
        "stages": stage.seconds,
    }


def gain_share(control: Sequence[Run], locked: Sequence[Run]) -> float:
    """Return the locked model's best gain as a share of the control's best gain.

    Args:
        control: Runs on the original.
        locked: Runs on the locked model.

    Returns:
        (start - best locked) / (start - best control): 0 is a perfect lock, 1 is none.
    """
    start = control[0].losses[0]
    return (start - min(r.best for r in locked)) / (start - min(r.best for r in control))


def plot(control: Sequence[Run], locked: Sequence[Run], path: Path) -> None:
    """Draw the loss curves and the best loss against the learning rate.

    Args:
        control: Runs on the original.
        locked: Runs on the locked model.
        path: PNG to write.
    """
    import matplotlib.pyplot as plt

    start = control[0].losses[0]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name, runs, colour in (("original", control, "tab:blue"), ("locked", locked, "tab:red")):
        best = min(runs, key=lambda r: r.best)
        for run_, style in ((runs[0], "--"), (best, "-")):
            label = f"{name}, lr {_rate(run_):g}" + ("" if style == "--" else " (best)")
            left.plot(
                run_.steps,
                [min(y, 2 * start) for y in run_.losses],
                style,
                color=colour,
                label=label,
            )
        ordered = sorted(runs, key=_rate)
        right.plot(
            [_rate(r) for r in ordered],
            [r.best for r in ordered],
            "o-",
            color=colour,
            label=name,
        )
    left.set(
        xlabel="step",
        ylabel="held-out loss (nats per token)",
        title="Fine-tuning with AdamW",
        ylim=(None, 1.35 * start),
    )
    right.set(
        xscale="log",
        xlabel="learning rate",
        ylabel="lowest held-out loss",
        title="Best of every rate",
    )
    right.axhline(start, color="grey", linewidth=0.8, label="before training")
    left.legend()
    right.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


class _Stages:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._name, self._began = "", time.perf_counter()

    def __call__(self, name: str) -> None:
        now = time.perf_counter()
        if self._name:
            self.seconds[self._name] = round(now - self._began, 1)
        self._name, self._began = name.partition(" (")[0], now
        _say(f"\n== {name}")


def _show_inspection(model: Path) -> None:
    from specdef.cli.inspect import inspect_sites, inspect_tensors
    from specdef.weights.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(model)
    found = inspect_sites(checkpoint)
    kinds: dict[str, int] = {}
    for site in found["sites"]:
        kinds[site["kind"]] = kinds.get(site["kind"], 0) + 1
    _say(
        f"{len(checkpoint.names)} tensors, {checkpoint.nbytes / 1e6:.0f} MB; symmetric sites: {kinds}"
    )
    _say(
        f"{'tensor of block 0':50} {'shape':>10} {'sigma_max':>10} {'stable rank':>12} {'condition':>10}"
    )
    for row in inspect_tensors(checkpoint, spectra=True, layers=(0,)):
        if row.get("stable_rank"):
            shape = "x".join(map(str, row["shape"]))
            condition = f"{row['condition']:10.3g}" if row["condition"] else ""
            _say(
                f"{row['name']:50} {shape:>10} {row['sigma_max']:10.3f} {row['stable_rank']:12.1f} {condition}"
            )


def _generate(folder: Path, tokenizer: Any) -> str:
    model: Any = specdef.load_model(folder)
    chat = [{"role": "user", "content": PROMPT}]
    inputs = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    return str(
        tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    ).strip()


def _reporter(name: str) -> Callable[[Run], None]:
    return lambda r: _say(f"{name:9} lr {_rate(r):<8g} {_curve(r)}")


def _rate(r: Run) -> float:
    return r.setting.learning_rate


def _curve(r: Run) -> str:
    values = " ".join(f"{loss:.3f}" if math.isfinite(loss) else "inf" for loss in r.losses)
    return f"{values}{'' if r.status == 'finished' else '  diverged'}"


def _show_attack(control: list[Run], locked: list[Run]) -> tuple[float, float]:
    start = control[0].losses[0]
    at_default, at_best = gain_share(control[:1], locked[:1]), gain_share(control, locked)
    _say(f"\n{'':24}{'original':>10}{'locked':>10}{'share of the gain':>20}")
    for name, a, b, share in (
        (f"AdamW at {DEFAULT_RATE:g}", control[0].best, locked[0].best, at_default),
        (
            "AdamW, best of sweep",
            min(r.best for r in control),
            min(r.best for r in locked),
            at_best,
        ),
    ):
        _say(f"{name:24}{a:10.3f}{b:10.3f}{share:20.1%}")
    _say(f"(held-out loss in nats per token, {start:.3f} before training)")
    return at_default, at_best


def _row(r: Run) -> dict[str, Any]:
    losses = [loss if math.isfinite(loss) else None for loss in r.losses]
    return {"learning_rate": _rate(r), "steps": r.steps, "losses": losses, "diverged": r.status != "finished"}  # fmt: skip


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
