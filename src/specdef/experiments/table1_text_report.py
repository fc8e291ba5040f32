"""The text half of Table 1 of papers/001 beside what was measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from specdef.experiments.lock_table import SCRATCH, UNLOCKED, Rows
from specdef.experiments.pair_models import DECODER, ENCODER
from specdef.experiments.pair_tasks import BY_F1, GLOSSES, OWN, RTE, VERSES
from specdef.experiments.paper.locks import DEFORMATION, raised
from specdef.experiments.paper.runs import PAPER, SWEEP, statistics, summarise
from specdef.experiments.paper.verdicts import RESISTED, comparison, held_if, resistance

PAPERS: dict[tuple[str, str, str], float] = {
    (kind, task, lock): value / 100
    for kind, lock, values in (
        (ENCODER, UNLOCKED, (90, 69, 83, 85)), (ENCODER, DEFORMATION, (90, 52, 42, 45)),
        (DECODER, UNLOCKED, (85, 71, 71, 84)), (DECODER, DEFORMATION, (84, 52, 20, 52)),
    )
    for task, value in zip((OWN, RTE, VERSES, GLOSSES), values, strict=True)
}  # fmt: skip
"""(kind of model, task, lock) to F1 or accuracy: DeBERTa-v3-xsmall and SmolLM2-135M-Instruct; QQP and QNLI under their stand-ins."""

KEPT = 0.02
"""F1 on its own task that a locked model may lose: two points, as in the project's other tables."""

_STAND_INS = {VERSES: "QQP", GLOSSES: "QNLI"}
_SUBJECTS = {ENCODER: "DeBERTa-v3-xsmall", DECODER: "SmolLM2-135M-Instruct"}


def scored(rows: Rows) -> Rows:
    """Summarise attacks by held-out loss, with the metric of each task besides.

    Args:
        rows: Of `attack_case`, measured with F1 and accuracy.

    Returns:
        Cells of `summarise`, with `score`: F1 for the stand-in of QQP, accuracy otherwise.
    """
    # Groups follow the rows, so both lists are in one order.
    by_score = summarise([{**row, "accuracy": _score(row)} for row in rows], "loss")
    return [{**cell, "score": other["accuracy"]} for cell, other in zip(summarise(rows, "loss"), by_score, strict=True)]  # fmt: skip


def _score(row: Mapping[str, Any]) -> float | None:
    metrics = row.get("metrics") or {}
    return metrics.get("f1") if row["task"] in BY_F1 else row.get("accuracy")


def comparisons(
    own: Rows, cells: Rows, rows: Rows, facts: Sequence[Mapping[str, Any]] = ()
) -> Rows:
    """Compare with the paper: use that is kept, what the unlocked model learns, what locks resist.

    Args:
        own: F1 and accuracy on MRPC by model and lock.
        cells: Of `scored`.
        rows: Of `attack_case`.
        facts: Of `lock_all`.

    Returns:
        One entry for every number.
    """
    found = []
    for one in own:
        if one["lock"] != UNLOCKED:
            found.append(_kept(one, next(o for o in own if (o["model"], o["lock"]) == (one["model"], UNLOCKED))))  # fmt: skip
    kinds = {one["model"]: one["kind"] for one in own}
    for model, task in dict.fromkeys((c["model"], c["task"]) for c in cells):
        part = {(c["lock"], c["at"]): c for c in cells if (c["model"], c["task"]) == (model, task)}
        begin = [r for r in rows if (r["model"], r["task"], r["lock"]) == (model, task, UNLOCKED)]
        learned = _learned(kinds[model], part, begin)
        found.append(learned)
        if math.isnan(learned["numbers"]["share"]):
            continue
        locks = dict.fromkeys(lock for lock, _ in part if lock not in (UNLOCKED, SCRATCH))
        mine = [fact for fact in facts if fact["model"] == model]
        found += [_resists(kinds[model], lock, part, learned, raised(mine, lock)) for lock in locks]
    return found


def _kept(one: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    papers = [PAPERS[one["kind"], OWN, lock] for lock in (UNLOCKED, DEFORMATION)]
    return comparison(
        f"{one['model']}: F1 on MRPC before and under the lock, {one['lock']}",
        paper=f"{papers[0]:.0%} → {papers[1]:.0%}", ours=f"{before['f1']:.1%} → {one['f1']:.1%}",
        verdict=held_if(one["f1"] >= before["f1"] - KEPT), note=_whose(one["kind"], one["lock"]),
        before=before["f1"], locked=one["f1"], accuracy_before=before["accuracy"], accuracy_locked=one["accuracy"],
    )  # fmt: skip


def _learned(
    kind: str, part: Mapping[tuple[str, str], Mapping[str, Any]], rows: Rows
) -> dict[str, Any]:
    """Say whether the unlocked model learns a task at the paper's rate: its held-out loss falls below that of a guess."""
    cell = part[UNLOCKED, PAPER]
    task = cell["task"]
    share, loss, score = (_mean(cell[n]) for n in ("recovered", "loss", "score"))
    at_papers_rate = [row for row in rows if row["at"] == PAPER]
    start, guess = (_mean(statistics([row[n] for row in at_papers_rate])) for n in ("began_at", "guess"))  # fmt: skip
    notes = [_whose(kind, UNLOCKED, task)]
    if math.isnan(share):
        notes.append("at no rate that was run does it learn anything in these steps, so what locks resist is not judged")  # fmt: skip
    elif share < RESISTED:
        notes.append(f"at the paper's rate it gains {_share(share)} of what it gains at best")
    return comparison(
        f"{cell['model']}, unlocked, learns {task}", paper=_percent(PAPERS.get((kind, task, UNLOCKED))),
        ours=f"{_percent(score)}, held-out loss {start:.3f} → {loss:.3f} (a guess: {guess:.3f})",
        verdict=held_if(share >= RESISTED), note="; ".join(n for n in notes if n),
        share=share, loss=loss, start_loss=start, guess=guess, score=score,
    )  # fmt: skip


def _resists(
    kind: str, lock: str, part: Mapping[tuple[str, str], Mapping[str, Any]], learned: Mapping[str, Any], growth: str
) -> dict[str, Any]:  # fmt: skip
    there = part[lock, PAPER]
    best = part.get((lock, SWEEP))
    task = there["task"]
    shares = [_mean(cell["recovered"]) if cell else math.nan for cell in (there, best)]
    control = learned["numbers"]["share"]
    notes = [_whose(kind, lock, task), growth]
    if best is None:
        notes.append("not swept at this size")
    if math.isnan(control) or control < RESISTED:
        notes.append("the unlocked model does not learn it at the paper's rate either")
    swept = "" if best is None else f", {_share(shares[1])} at the best of the sweep"
    return comparison(
        f"{there['model']}, {lock}: resists {task}", paper=_percent(PAPERS.get((kind, task, DEFORMATION))),
        ours=f"{_percent(_mean(there['score']))}; {_share(shares[0])} of the unlocked gain in loss at the paper's rate{swept}",
        verdict=resistance(shares[0], shares[1]), note="; ".join(n for n in notes if n),
        share_papers_rate=shares[0], share_best=shares[1], control_share=control,
    )  # fmt: skip


def _whose(kind: str, lock: str, task: str = OWN) -> str:
    notes = [f"the paper: {_subject(kind, task)}"] if kind == ENCODER or task in _STAND_INS else []
    if lock not in (UNLOCKED, DEFORMATION):
        notes.append("the paper's number is that of its own lock")
    return "; ".join(notes)


def _subject(kind: str, task: str) -> str:
    return _SUBJECTS[kind] + (f" on {_STAND_INS[task]}" if task in _STAND_INS else "")


def _mean(entry: Mapping[str, Any] | None) -> float:
    return math.nan if entry is None else float(entry["mean"])


def _share(value: float) -> str:
    return "–" if math.isnan(value) else f"{max(value, 0):.0%}"


def _percent(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.1%}".replace(".0%", "%")


def own_table(own: Sequence[Mapping[str, Any]]) -> list[str]:
    """Write F1 and accuracy on MRPC as a table in Markdown.

    Args:
        own: By model and lock.

    Returns:
        Lines.
    """
    lines = ["", "| model | lock | F1 on MRPC | accuracy |", "|---" * 4 + "|"]
    return [*lines, *(f"| {o['model']} | {o['lock']} | {o['f1']:.3f} | {o['accuracy']:.3f} |" for o in own)]  # fmt: skip
