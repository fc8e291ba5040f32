"""What pages of an audit say, worded once for HTML and Markdown, from the report's dictionary alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from specdef.audit.render.charts import SIDES, Runs, cell_charts
from specdef.fragility.render.text import MISSING, seconds

_MARKS = {
    "held": "●", "held at this budget": "●", "weakened": "◆", "broken": "▲", "invalid": "○", "not tested": "○",
    "not applicable": "–", "pruned by tier": "–",
}  # fmt: skip
_MEASURED = ("held", "weakened", "broken", "invalid")


def view(report: Mapping[str, Any]) -> dict[str, Any]:
    """Word a report.

    Args:
        report: `AuditReport.to_dict()`, or what was read back from its JSON; with `about`, names and settings of the run by
            their labels, where these are known.

    Returns:
        Strings, and lists and dictionaries of them, for the templates; charts as SVG.
    """
    start = report["start"]
    sides = _sides(report["curves"])
    scratch = sides.get(("scratch", "adamw"), {}).get("scratch", ())
    ordered = sorted(report["cells"], key=lambda cell: cell["tier"])  # stable: as they were run
    cells = [_cell(number, cell) for number, cell in enumerate(ordered, start=1)]
    details = []
    for number, cell in enumerate(ordered, start=1):
        own = sides.get((cell["attack"], cell["optimizer"]))
        if own:
            charts = cell_charts({**own, "scratch": scratch}, start.get("counted_from"))
            details.append(cells[number - 1] | {"charts": charts})
    return {
        "verdict": report["verdict"],
        "useless": bool(report.get("useless")),
        "tiers": [_tier(tier) for tier in report["tiers"]],
        "cells": cells,
        "details": details,
        "start": _start(start),
        "scratch": _scratch(report["cells"], scratch, start.get("counted_from")),
        "utility": _utility(ordered, start),
        "goal": _goal(report),
        "costs": [_cost(cell) for cell in ordered if cell["status"] in ("broken", "weakened")],
        "flags": _flags(ordered),
        "not_tested": list(report["not_tested"]),
        "facts": _facts(report),
    }


def number(value: float | None, digits: int = 4) -> str:
    """Write a number; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return MISSING
    return f"{value:.{digits}g}"


def share(value: float | None) -> str:
    """Write a share in per cent."""
    if value is None or not math.isfinite(value):
        return MISSING
    if abs(value) >= 10:
        return f"{value:.0f} ×"
    return f"{value:.0%}" if abs(value) >= 0.1 else f"{value:.1%}"


def _interval(ends: Sequence[float | None] | None, write: Any) -> str:
    if not ends or any(end is None for end in ends):
        return ""
    return f"{write(ends[0])} to {write(ends[1])}"


def _status(text: str) -> dict[str, str]:
    return {"word": text, "mark": _MARKS.get(text, "○"), "css": text.split()[0]}


def _cell(index: int, cell: Mapping[str, Any]) -> dict[str, Any]:
    slow = number(cell.get("slowdown"), 3)
    if cell.get("slowdown_censored") and slow != MISSING:
        slow = f"≥ {slow}"
    return {
        "id": f"cell-{index}",
        "tier": str(cell["tier"]),
        "attack": cell["attack"],
        "optimizer": cell["optimizer"],
        "status": _status(cell["status"]),
        "measured": cell["status"] in _MEASURED,
        "learning_rate": number(cell.get("learning_rate"), 3),
        "steps": number(cell.get("steps")),
        "locked": number(cell.get("locked")),
        "control": number(cell.get("control")),
        "scratch": number(cell.get("scratch")),
        "recovered": share(cell.get("recovered")),
        "interval": _interval(cell.get("recovered_interval"), share),
        "slowdown": slow,
        "seeds": number(cell.get("seeds")),
        "trials": number(cell.get("trials")),
        "flags": list(cell.get("flags") or ()),
        "notes": list(cell.get("notes") or ()),
    }


def _tier(tier: Mapping[str, Any]) -> dict[str, Any]:
    if tier.get("attack"):
        best = f"{tier['attack']} with {tier['optimizer']}"
        if (tier.get("recovered") or 0) > 0:
            said = f"{best} recovered most: {share(tier['recovered'])} of the control's gain"
        else:
            said = f"nothing was recovered, {best} came nearest"
        said += f"; {tier['cells']} cell{'' if tier['cells'] == 1 else 's'} measured"
        if invalid := tier.get("invalid"):
            said += f", {invalid} without a valid result"
    else:
        said = tier.get("reason", "")
    return {
        "tier": str(tier["tier"]), "name": tier["name"], "status": _status(tier["status"]), "said": said,
    }  # fmt: skip


def _sides(curves: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], dict[str, Runs]]:
    found: dict[tuple[str, str], dict[str, Runs]] = {}
    for curve in curves:
        if curve["side"] in SIDES and curve["runs"]:
            found.setdefault((curve["attack"], curve["optimizer"]), {})[curve["side"]] = curve["runs"]  # fmt: skip
    return found


def _start(start: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = (
        ("unlocked model", "original"), ("locked model", "locked"), ("constant guess", "constant_guess"),
        ("gains are counted from", "counted_from"),
    )  # fmt: skip
    return [(label, number(start.get(name))) for label, name in rows]


def _scratch(cells: Sequence[Mapping[str, Any]], runs: Runs, start: float | None) -> str:
    loss = next((c["scratch"] for c in cells if c.get("scratch") is not None), None)
    if loss is None:
        return "There is no from-scratch reference."
    best = min((c for c in cells if c.get("locked") is not None), key=lambda c: c["locked"], default=None)  # fmt: skip
    said = f"The same architecture with fresh weights, data and budget reaches a held-out loss of {number(loss)}"
    said += f" ({len(runs)} runs)" if runs else ""
    said += f", from {number(start)}." if start is not None else "."
    if best is None:
        return said
    near = f" The best attack on the locked model reaches {number(best['locked'])} ({best['attack']} with {best['optimizer']}): "
    if best["locked"] < loss:
        return said + near + "attacking the locked model is worth more than starting anew."
    return said + near + "no attack got further than starting anew does."


def _utility(cells: Sequence[Mapping[str, Any]], start: Mapping[str, Any]) -> dict[str, Any]:
    rows = [
        {
            "attack": cell["attack"],
            "optimizer": cell["optimizer"],
            "status": _status(cell["status"]),
            "attacked": number(cell["utility"].get("attacked")),
        }
        for cell in cells
        if cell.get("utility")
    ]
    return {
        "known": start.get("utility_original") is not None,
        "original": number(start.get("utility_original")),
        "locked": number(start.get("utility_locked")),
        "rows": rows,
    }


def _goal(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return the task's own numbers: before any attack, and after the best run on either side."""
    before = report.get("metrics") or {}
    names = list(before.get("original") or {})
    rows = [("before any attack", "", {"locked": before.get("locked"), "control": before.get("original")})]  # fmt: skip
    rows += [(c["attack"], c["optimizer"], c["metrics"]) for c in report["cells"] if c.get("metrics")]  # fmt: skip
    return {
        "names": names,
        "rows": [
            {
                "attack": attack, "optimizer": optimizer,
                "locked": [number((values.get("locked") or {}).get(name)) for name in names],
                "control": [number((values.get("control") or {}).get(name)) for name in names],
            }
            for attack, optimizer, values in rows
        ],
    }  # fmt: skip


def _cost(cell: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "attack": cell["attack"],
        "optimizer": cell["optimizer"],
        "status": _status(cell["status"]),
        "recovered": share(cell.get("recovered")),
        "learning_rate": number(cell.get("learning_rate"), 3),
        "steps": number(cell.get("steps")),
        "attack_seconds": seconds(cell.get("attack_seconds")),
        "seconds": seconds(cell.get("seconds")),
        "trials": number(cell.get("trials")),
        "added": f"{cell.get('added_parameters') or 0:,}",
        "flops": f"{number(cell.get('relative_cost'), 3)} ×",
    }


def _flags(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for cell in cells:
        for flag, advice in zip(cell.get("flags") or (), cell.get("advice") or (), strict=True):
            entry = found.setdefault(flag, {"flag": flag, "advice": advice, "cells": []})
            entry["cells"].append(f"{cell['attack']} with {cell['optimizer']}")
    return list(found.values())


def _facts(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    budget = report["budget"]
    limit = budget.get("seconds")
    cost = f"{budget['steps']} steps, {budget['evaluations']} evaluations"
    facts = [
        ("suite", report["suite"]), ("task", report["task"]),
        ("budget of a run", cost + (f", {seconds(limit)} at most" if limit else "")),
        ("seeds", f"{report['seeds']} per side"), ("precision", report.get("dtype", "float32")),
        ("wall time", seconds(report.get("seconds"))),
    ]  # fmt: skip
    facts += [(str(name), str(value)) for name, value in (report.get("about") or {}).items()]
    facts.append(("versions", ", ".join(f"{n} {v}" for n, v in report["versions"].items())))
    return facts
