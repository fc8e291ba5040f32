"""The paper's MNIST lock: a ResNet-18 learns to read digits, its singular values are raised by Algorithm 1, and it still reads.

Settings of "Locking Open Weight Models with Spectral Deformation", Appendix B.2: alpha 0.5, k 1, AdaDelta with learning
rate 1, times 0.7 after every epoch, batches of 32. Size full takes the paper's 60,000 rows, but for 2,000 that are held
out of the lock, and 10 epochs; size cpu takes fewer. Accuracy is of all 10,000 test pictures; the state that is kept is
chosen by the held-out rows. Size smoke is a small net on scikit-learn's 8 x 8 digits, which need not be fetched.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from specdef.experiments.deformation_measure import GROWTH, Settings, lock_seed, places, trained
from specdef.experiments.deformation_plot import draw
from specdef.experiments.record import Progress, claim, make_record, plain, versions, write_record
from specdef.weights.atomic import atomic_file

TRAINED, KEPT = 0.985, 0.98
"""Accuracy that is asked before and after."""

SIZES: dict[str, Settings] = {
    "cpu": Settings(rows=20_000, epochs=5, retain_rows=25_000, lock_epochs=3),
    "full": Settings(rows=60_000, epochs=10, retain_rows=58_000, lock_epochs=10),
    "smoke": Settings(
        data="digits", rows=1280, epochs=3, retain_rows=960, lock_epochs=3, heldout_rows=160, test_rows=500,
        max_utility_loss=0.1, hidden_sizes=(8, 16), depths=(1, 1),
    ),
}  # fmt: skip


def run(
    out: Path,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    size: Literal["cpu", "full", "smoke"] = "cpu",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train, lock and measure, and write deformation.json, deformation.md and deformation.png.

    What is done is kept, and a run that was interrupted goes on from there: finished seeds in deformation.partial.json,
    the state of a lock under way beside it, and trained models in the cache.

    Args:
        out: Folder; made if absent.
        seeds: Of the original's weights and data, and of the lock.
        size: See `SIZES`.
        progress: Called with a line of text now and then.

    Returns:
        The record, as JSON values: command, versions, size, settings, seeds, seconds, claims, summary, data.
    """
    say = progress or (lambda _: None)
    settings = SIZES[size]
    out.mkdir(parents=True, exist_ok=True)
    partial = out / "deformation.partial.json"
    known = {"versions": versions(), "settings": plain(asdict(settings))}
    done: dict[str, Any] = _finished(partial, known)
    with places(settings) as (data, models):
        for seed in seeds:
            if str(seed) in done:
                say(f"seed {seed}: done before")
                continue
            state = out / f"deformation.seed{seed}.checkpoint.safetensors"
            folder, training = trained(data, models, settings, seed, say)
            done[str(seed)] = lock_seed(data, folder, training, settings, seed, state, say)
            with atomic_file(partial) as path:
                path.write_text(json.dumps(plain({**known, "seeds": done})), encoding="utf-8")
    rows = [done[str(seed)] for seed in seeds]
    claims = _claims(rows)
    record = make_record(
        "deformation", {"seeds": seeds, "size": size}, settings=known["settings"], claims=claims,
        seconds=sum(row["seconds"] for row in rows), data={"rows": rows},
    )  # fmt: skip
    write_record(out, "deformation", record, draw(rows, KEPT, GROWTH))
    partial.unlink()
    return record


def _claims(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    def each(*path: str) -> list[Any]:
        found: list[Any] = rows
        for name in path:
            found = [entry[name] for entry in found]
        return found

    before, after = each("test", "accuracy_before"), each("test", "accuracy_after")
    sigma, best, median = each("sigma_max", "growth"), each("growth", "max"), each("growth", "median")  # fmt: skip
    count = f"of all {rows[0]['test']['rows']:,} test pictures"
    return [
        claim(f"Trained, the network reads at least {TRAINED:.1%} {count} (every seed).", min(before) >= TRAINED, accuracy=before),
        claim(f"Locked, it reads at least {KEPT:.0%} (every seed).", min(after) >= KEPT, accuracy=after),
        claim("Its largest singular value, over all matrices, rises at least tenfold (every seed).", min(sigma) >= GROWTH, growth=sigma, before=each("sigma_max", "before"), after=each("sigma_max", "after")),
        claim("That of the matrix that grows most does (every seed).", min(best) >= GROWTH, growth=best, of=each("growth", "largest_in")),
        claim("That of half of the matrices does (every seed).", min(median) >= GROWTH, median_growth=median, smallest_growth=each("growth", "min"), tenfold=each("growth", "tenfold"), matrices=each("growth", "matrices")),
    ]  # fmt: skip


def _finished(partial: Path, known: dict[str, Any]) -> dict[str, Any]:
    """Return the seeds that an interrupted run of the same settings and versions has finished."""
    try:
        stored: dict[str, Any] = json.loads(partial.read_text(encoding="utf-8"))
        return stored["seeds"] if {**stored, **known} == stored else {}
    except (OSError, ValueError, KeyError):
        return {}
