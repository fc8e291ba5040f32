"""Table 3 of papers/001 beside ours: per-class accuracies as a table and drawn, and a verdict on every claim."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from specdef.experiments.lock_table import SCRATCH, UNLOCKED, Rows
from specdef.experiments.paper.locks import DEFORMATION
from specdef.experiments.paper.runs import PAPER, SWEEP
from specdef.experiments.paper.verdicts import RESISTED, comparison, held_if, resistance
from specdef.experiments.table3_data import CAR, CLASSES
from specdef.experiments.table3_setup import CALLED

BEFORE, ORIGINAL = "before", "original"
"""What was measured before any attack; the net that knows all classes. The unlocked net is the one that has unlearned cars."""

PAPERS: dict[tuple[str, str], tuple[float, ...]] = {
    (ORIGINAL, BEFORE): (90.34, 92.16, 85.71, 75.94, 88.06, 82.41, 91.12, 93.31, 93.75, 92.79),
    (UNLOCKED, BEFORE): (76.46, 0.00, 80.71, 65.01, 87.65, 81.19, 82.03, 86.02, 86.52, 74.85),
    (UNLOCKED, PAPER): (82.29, 86.23, 77.37, 65.81, 83.81, 73.21, 89.22, 89.17, 89.26, 86.00),
    (DEFORMATION, BEFORE): (75.86, 0.00, 60.48, 47.71, 64.98, 64.83, 75.05, 72.44, 80.66, 77.39),
    (DEFORMATION, PAPER): (55.94, 0.00, 61.60, 37.18, 53.04, 61.15, 72.30, 72.83, 69.53, 90.83),
}  # fmt: skip
"""(net, when) to its accuracies in per cent, in the order of `CLASSES`."""

FORGOTTEN = 0.01
"""Cars recognised at most where they count as unlearned: some shapes of trucks and boats are always mistaken for one."""

RESTORED = 0.5
"""Share of the original's accuracy on cars from which on they count as relearned; the paper has 0.94."""


def paper_others(net: str, when: str) -> float:
    """Return the paper's mean accuracy on the other nine classes, a fraction.

    >>> round(paper_others("original", "before"), 4)
    0.8816
    """
    values = PAPERS[net, when]
    return (sum(values) - values[CAR]) / (len(values) - 1) / 100


def best_of_sweeps(states: Rows) -> Rows:
    """Keep of every net and seed, of all sweeps, the run with the lowest held-out loss; the rest as it is.

    Args:
        states: As the experiment collects them; those of sweeps have a loss.

    Returns:
        States: by net those before attacks, at the paper's rate, of the sweep.
    """
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for state in states:
        key = (state["lock"], state["at"], state["seed"])
        old = found.get(key)
        if old is None or _loss(state) < _loss(old):
            found[key] = state
    order = list(dict.fromkeys(state["lock"] for state in states))
    when = (BEFORE, PAPER, SWEEP)
    return sorted(found.values(), key=lambda s: (order.index(s["lock"]), when.index(s["at"])))


def means(states: Rows) -> dict[tuple[str, str], dict[str, float] | None]:
    """Put the seeds together.

    Args:
        states: Of `best_of_sweeps`.

    Returns:
        (net, when) to the mean of every metric; None where a run of any seed diverged.
    """
    groups: dict[tuple[str, str], Rows] = {}
    for state in states:
        groups.setdefault((state["lock"], state["at"]), []).append(state)
    return {
        key: {n: sum(s["metrics"][n] for s in part) / len(part) for n in part[0]["metrics"]}
        if all(s["metrics"] for s in part)
        else None
        for key, part in groups.items()
    }


def table(states: Rows) -> list[str]:
    """Write accuracies by class, the paper's row before ours, as a table in Markdown.

    Args:
        states: Before attacks and after.

    Returns:
        Lines; per cent, means over seeds.
    """
    chosen = best_of_sweeps(states)
    lines = [
        "", "Accuracy by class, per cent", "",
        f"| net | {' | '.join(CLASSES)} | other classes | others called car |", "|---" * 13 + "|",
    ]  # fmt: skip
    for key, metrics in means(chosen).items():
        if paper := PAPERS.get(key):
            numbers = [*(f"{x:.1f}" for x in paper), f"{100 * paper_others(*key):.1f}", "–"]
            lines.append(f"| *{_name(key)}, the paper* | {' | '.join(numbers)} |")
        numbers = [f"{100 * metrics[n]:.1f}" if metrics else "–" for n in (*CLASSES, "others", CALLED)]  # fmt: skip
        lines.append(f"| {_name(key)}{_where(key, chosen)} | {' | '.join(numbers)} |")
    return lines


def draw(states: Rows) -> Figure:
    """Draw the table as a map of colours, cars first.

    Args:
        states: Before attacks and after.

    Returns:
        The figure.
    """
    chosen = best_of_sweeps(states)
    order = ["car", *(c for c in CLASSES if c != "car")]
    names, values = [], []
    for key, metrics in means(chosen).items():
        if paper := PAPERS.get(key):
            names.append(f"{_name(key)}, the paper")
            values.append([*(paper[CLASSES.index(c)] for c in order), 100 * paper_others(*key)])
        names.append(_name(key) + _where(key, chosen))
        values.append([100 * metrics[c] if metrics else np.nan for c in (*order, "others")])
    figure = Figure(figsize=(11, 0.36 * len(names) + 1.2), layout="constrained")
    axis = figure.subplots()
    shown = np.array(values)
    image = axis.imshow(np.ma.masked_invalid(shown), vmin=0, vmax=100, cmap="YlGnBu", aspect="auto")
    for (i, j), value in np.ndenumerate(shown):
        if np.isfinite(value):
            axis.text(j, i, f"{value:.0f}", ha="center", va="center", fontsize=8, color="w" if value > 60 else "k")  # fmt: skip
    axis.axvline(0.5, color="k", lw=2)
    axis.axvline(9.5, color="k", lw=2)
    axis.set_xticks(range(11), [*order, "mean of\nothers"], fontsize=8)
    axis.set_yticks(range(len(names)), names, fontsize=8)
    figure.colorbar(image, label="accuracy, per cent")
    return figure


def comparisons(states: Rows, cells: Rows) -> list[dict[str, Any]]:
    """Set every number the paper reports beside ours.

    Args:
        states: Before attacks and after.
        cells: Of `runs.summarise`, with the share of what the unlocked net regains in the same way.

    Returns:
        Entries for the record.
    """
    found = means(best_of_sweeps(states))
    original, unlearned = found[ORIGINAL, BEFORE], found[UNLOCKED, BEFORE]
    assert original and unlearned
    relearned = found.get((UNLOCKED, PAPER))
    share, paper_share = _restored(relearned, original), PAPERS[UNLOCKED, PAPER][CAR] / PAPERS[ORIGINAL, BEFORE][CAR]  # fmt: skip
    entries = [
        comparison(
            "cars recognised by the original ResNet-18 (CIFAR-10)", paper=_paper_car(ORIGINAL, BEFORE),
            ours=_percent(original["car"]), verdict=held_if(original["car"] >= RESTORED),
            note="a net trained here, for fewer epochs; held from one half on", others=original["others"],
            others_paper=paper_others(ORIGINAL, BEFORE),
        ),
        comparison(
            "cars recognised after unlearning", paper=_paper_car(UNLOCKED, BEFORE), ours=_percent(unlearned["car"]),
            verdict=held_if(unlearned["car"] <= FORGOTTEN), note="continued training without cars", limit=FORGOTTEN,
        ),
        _cost("unlearning", original, unlearned, paper_others(ORIGINAL, BEFORE), paper_others(UNLOCKED, BEFORE)),
        comparison(
            "cars relearned by the unlearned net, without a lock, by SGD at 0.1", paper=_paper_car(UNLOCKED, PAPER),
            ours=_percent(relearned["car"] if relearned else None), verdict=held_if(share >= RESTORED),
            note=f"{_share(share)} of what the original recognised, the paper {_share(paper_share)}; held from one half on",
            restored=share, restored_paper=paper_share,
        ),
    ]  # fmt: skip
    locks = [lock for lock, at in found if at == BEFORE and lock not in (ORIGINAL, UNLOCKED)]
    for lock in locks:
        locked, attacked = found[lock, BEFORE], found.get((lock, PAPER))
        assert locked
        own = "" if lock == DEFORMATION else "the paper's numbers are the deformation's"
        entries += [
            _cost(f"under the lock: {lock}", unlearned, locked, paper_others(UNLOCKED, BEFORE), paper_others(DEFORMATION, BEFORE), own),
            _resisted(lock, found, cells, own),
            _cost(
                f"relearning at 0.1 under the lock: {lock}", locked, attacked, paper_others(DEFORMATION, BEFORE),
                paper_others(DEFORMATION, PAPER), own,
            ),
        ]  # fmt: skip
    return entries


def _resisted(lock: str, found: Mapping[Any, Any], cells: Rows, note: str) -> dict[str, Any]:
    """Compare what relearning brings back under a lock with what it does without one: cars less what else is called one."""
    shares = {at: _recovered(cells, lock, at) for at in (PAPER, SWEEP)}
    control = _recovered(cells, UNLOCKED, PAPER), _recovered(cells, UNLOCKED, SWEEP)
    after = {at: found.get((lock, at)) for at in (PAPER, SWEEP)}
    deaf = [at for at, share in zip((PAPER, SWEEP), control, strict=True) if share is None or share < RESISTED]  # fmt: skip
    notes = [
        note,
        "shares are of cars recognised less other pictures called cars",
        *(f"the unlocked net itself learns nothing at the {at}" for at in deaf),
    ]
    texts = [f"{_cars(after[at])} at the {at} ({_share(shares[at])} of what comes back without a lock)" for at in (PAPER, SWEEP)]  # fmt: skip
    return comparison(
        f"cars relearned under the lock: {lock}", paper=_paper_car(DEFORMATION, PAPER), ours=", ".join(texts),
        verdict=resistance(shares[PAPER], shares[SWEEP]), note="; ".join(n for n in notes if n),
        share_at_the_papers_rate=shares[PAPER], share_best_of_the_sweeps=shares[SWEEP], limit=RESISTED,
    )  # fmt: skip


def _cost(
    what: str, before: Mapping[str, float], after: Mapping[str, float] | None, paper_before: float, paper_after: float,
    note: str = "",
) -> dict[str, Any]:  # fmt: skip
    """Compare what something takes from the other classes; it holds where that is no more than in the paper."""
    left = after["others"] if after else 0.0
    lost, allowed = before["others"] - left, paper_before - paper_after
    return comparison(
        f"mean accuracy of the other classes, {what}", paper=f"{_percent(paper_before)} → {_percent(paper_after)}",
        ours=f"{_percent(before['others'])} → {_percent(after['others'] if after else None)}", verdict=held_if(lost <= allowed),
        note="; ".join(n for n in (note, "held if no more is lost than in the paper") if n), lost=lost, lost_in_the_paper=allowed,
    )  # fmt: skip


def _recovered(cells: Rows, lock: str, at: str) -> float | None:
    values = [c["recovered"]["mean"] for c in cells if (c["lock"], c["at"]) == (lock, at) and c["recovered"]]  # fmt: skip
    return max(values, default=None)


def _restored(relearned: Mapping[str, float] | None, original: Mapping[str, float]) -> float:
    return relearned["car"] / original["car"] if relearned and original["car"] else 0.0


def _name(key: tuple[str, str]) -> str:
    net, when = key
    names = {UNLOCKED: "unlearned", SCRATCH: "fresh weights"}
    after = {BEFORE: "", PAPER: " + relearning, SGD at 0.1", SWEEP: " + relearning, best of the sweeps"}  # fmt: skip
    return names.get(net, net) + after[when]


def _where(key: tuple[str, str], chosen: Rows) -> str:
    """Say which run of the sweeps was the best, or that one diverged."""
    part = [s for s in chosen if (s["lock"], s["at"]) == key]
    texts = [f"{s['attack']} at {s['learning_rate']:g}" for s in part if key[1] == SWEEP]
    texts += ["diverged"] * any(not s["metrics"] for s in part)
    return f" ({', '.join(dict.fromkeys(texts))})" if texts else ""


def _loss(state: Mapping[str, Any]) -> float:
    loss = state.get("loss")
    return float("inf") if loss is None else float(loss)


def _cars(metrics: Mapping[str, float] | None) -> str:
    """Say how many cars are called one, and how much else."""
    if metrics is None:
        return "diverged"
    more = f" (and of other pictures {_percent(metrics[CALLED])})" if metrics[CALLED] >= FORGOTTEN else ""  # fmt: skip
    return _percent(metrics["car"]) + more


def _paper_car(net: str, when: str) -> str:
    return _percent(PAPERS[net, when][CAR] / 100)


def _percent(value: float | None) -> str:
    return "diverged" if value is None else f"{100 * value:.1f} %"


def _share(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.2f}"
