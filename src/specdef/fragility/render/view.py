"""What pages of a diagnosis say, worded once for HTML, Markdown and the terminal, from the reports' dictionaries alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from specdef.fragility.render.text import MISSING, number, seconds, share

Values = Mapping[str, Any]
"""A report as `FragilityReport.to_dict` writes it."""

_ROWS = 12
"""Steps in the table of the forecast, at most."""

HARMLESS = (
    "Alignment is measured on the aligned data given: the mean Kullback–Leibler divergence of what the model answers there "
    "from what it answered before, per token. It says nothing of other behaviour."
)
"""What the numbers speak of."""


def view(reports: Sequence[Values], ranking: Values | None = None) -> dict[str, Any]:
    """Word the reports of one model.

    Args:
        reports: One for each task.
        ranking: `TaskRanking.to_dict()`, for several tasks.

    Returns:
        Strings, and lists and dictionaries of them, for the templates.
    """
    return {
        "model": reports[0]["model"],
        "about": HARMLESS,
        "tasks": [_task(i, report) for i, report in enumerate(reports, start=1)],
        "comparison": comparison(reports, ranking) if ranking else None,
    }


def finding(report: Values) -> str:
    """Say that the alignment is forecast, or was seen, to pass the threshold within the planned steps.

    An observed run that was completed is the better witness: it decides where there is one.

    Args:
        report: The report.

    Returns:
        A sentence; empty where there is no such finding.
    """
    reached = report["forecast"]["time_to_threshold"]
    threshold, observed = reached["threshold"], report.get("observed")
    if observed:
        passed = [n for n, a in zip(observed["steps"], observed["alignment"], strict=True) if a is None or a >= threshold]  # fmt: skip
        if passed:
            return f"The alignment loss was seen above {number(threshold)} at step {passed[0]} of the run."
        return (
            "" if observed["status"] == "completed" else f"The run ended early: {_end(observed)}."
        )
    steps = reached["steps"]
    if steps is None:  # also where the forecast passes it beyond its own validity
        forecast = report["forecast"]
        pairs = zip(forecast["steps"], forecast["alignment"], strict=True)
        steps = next((n for n, a in pairs if a is None or a >= threshold), None)
    if steps is None or steps > report["steps"]:
        return ""
    return (
        f"The alignment loss is forecast to reach {number(threshold)} at step {number(steps)} of {report['steps']}"
        f"{'' if report['applicable'] else ', by a forecast that does not vouch for itself'}."
    )


def comparison(reports: Sequence[Values], ranking: Values) -> dict[str, Any]:
    """Word the comparison of several tasks.

    Args:
        reports: One for each task.
        ranking: `TaskRanking.to_dict()`.

    Returns:
        `rows`, the worst by forecast first, `correlation`, a sentence, and `observed`.
    """
    place_of = {row["task"]: i for i, row in enumerate(ranking["tasks"])}
    ordered = sorted(reports, key=lambda report: place_of[report["task"]])
    rows = []
    for place, report in enumerate(ordered, start=1):
        forecast, observed = report["forecast"], report.get("observed")
        rows.append({
            "place": str(place), "task": report["task"], "forecast": number(_last(forecast["alignment"])),
            "band": _range(_last(forecast["low"]), _last(forecast["high"])),
            "observed": number(_last(observed["alignment"])) if observed else MISSING,
            "reached": number(forecast["time_to_threshold"]["steps"]), "overlap": number(report["initial_overlap"]),
            "gamma": number(report["gamma"]), "applicable": "yes" if report["applicable"] else "no",
        })  # fmt: skip
    spearman = ranking.get("spearman")
    if spearman is None:
        said = "No rank correlation: not every task has a completed run, or their order is not defined."
    else:
        said = f"Spearman's rank correlation of forecast and observed alignment loss: {spearman:.2f} over {len(reports)} tasks"
        p_value = ranking.get("p_value")
        said += "; too few for a p-value." if p_value is None else f", p = {number(p_value)}."
    return {"rows": rows, "correlation": said, "observed": all(r.get("observed") for r in reports)}


def _task(index: int, report: Values) -> dict[str, Any]:
    forecast = report["forecast"]
    return {
        "id": f"task-{index}",
        "task": report["task"],
        "aligned": report["aligned"],
        "verdict": report["verdict"],
        "finding": finding(report),
        "applicable": bool(report["applicable"]),
        "reasons": list(report["reasons"]),
        "conditions": [_condition(condition) for condition in report["conditions"]],
        "numbers": _numbers(report),
        "curve": _curve(report),
        "observed": _observed(report),
        "subspace": _subspace(report["subspace"]),
        "errors": _errors(forecast),
        "facts": _facts(report),
    }


def _condition(condition: Values) -> dict[str, Any]:
    margin = condition["margin"]
    return {
        "name": condition["name"], "holds": bool(condition["holds"]), "word": "holds" if condition["holds"] else "does not hold",
        "value": number(condition["value"]), "threshold": number(condition["threshold"]),
        "baseline": number(condition["baseline"]),
        "margin": "unlimited" if margin is None else f"{number(margin)} ×", "statement": condition["statement"],
    }  # fmt: skip


def _numbers(report: Values) -> list[tuple[str, str]]:
    forecast = report["forecast"]
    reached = forecast["time_to_threshold"]
    horizon = 100 * report["steps"]
    when = number(reached["steps"])
    if reached["steps"] is None:
        when = f"not within {horizon} steps, or not where the forecast is valid"
    elif reached["low"] is not None or reached["high"] is not None:
        when += f" (earliest {number(reached['low'])}, latest {number(reached['high'])})"
    return [
        (
            f"forecast alignment loss after {report['steps']} steps",
            f"{number(_last(forecast['alignment']))} nats per token, band "
            f"{_range(_last(forecast['low']), _last(forecast['high']))}",
        ),
        (f"step at which it reaches {number(reached['threshold'])}", when),
        ("step from which t⁴ outgrows t²", number(forecast["onset_steps"])),
        ("growth over the last decade of steps", f"t^{number(forecast['exponent'])}, {forecast['regime']}"),
        ("initial overlap |Πg| / |g|", f"{number(report['initial_overlap'])}; a random subspace has {number(report['overlap_random'])}"),
        ("coupling γ = |F^½ΠHg|", f"{number(report['gamma'])}; a random direction has {number(report['gamma_random'])}"),
        (
            "with the turning of the subspace |JHg + f″(g,g)|",
            f"{number(report['acceleration'])} ± {number(report['acceleration_error'])}; γ counts the path's bending alone",
        ),
        ("rank of the subspace, smallest eigenvalue", f"{report['rank']}, {number(report['lambda_min'])}"),
        ("largest curvature of the task; stable learning rate", f"{number(forecast['lambda_max'])}; below {number(_stable(forecast['lambda_max']))}"),
    ]  # fmt: skip


def _stable(lambda_max: float | None) -> float | None:
    return 2 / lambda_max if lambda_max and lambda_max > 0 else None


def _curve(report: Values) -> list[dict[str, str]]:
    forecast, observed = report["forecast"], report.get("observed")
    seen = dict(zip(observed["steps"], observed["alignment"], strict=True)) if observed else {}
    steps = forecast["steps"]
    # evenly over the grid, which is geometric
    count = min(_ROWS, len(steps))
    chosen = sorted({round(i * (len(steps) - 1) / max(count - 1, 1)) for i in range(count)})
    return [
        {
            "step": str(steps[i]), "forecast": number(forecast["alignment"][i]),
            "band": _range(forecast["low"][i], forecast["high"][i]), "law": number(forecast["taylor"][i]),
            "quartic": number(forecast["quartic"][i]), "observed": number(seen.get(steps[i])),
        }
        for i in chosen
    ]  # fmt: skip


def _observed(report: Values) -> list[tuple[str, str]]:
    observed, exponent = report.get("observed"), report.get("exponent")
    if not observed:
        return []
    found = [
        ("run", f"{_end(observed)}, {observed['mode']} batches, {seconds(observed['seconds'])}"),
        ("alignment loss at its end", number(_last(observed["alignment"]))),
        ("task loss, first and last", f"{number(_first(observed['task_loss']), 4)}, {number(_last(observed['task_loss']), 4)}"),
        ("drift into the subspace at its end", share(_last(observed["drift"]))),
        ("steps within the band", share(observed["band_coverage"])),
        ("forecast wrong by a factor of (median)", _factor(observed["error_factor"])),
    ]  # fmt: skip
    if exponent:
        window = f"steps {exponent['window'][0]} to {exponent['window'][1]}"
        said = f"{number(exponent['value'])} ({_range(exponent['low'], exponent['high'])}, 95 %), {window}"
        if not exponent["is_power_law"]:
            said += "; no window is a power law"
        if exponent.get("predicted") is not None:
            said += f"; forecast {number(exponent['predicted'])}"
        found.append(("exponent of its growth", said))
    return found


def _end(observed: Values) -> str:
    steps = observed["steps"]
    return f"{observed['status']}, last looked at {f'after step {steps[-1]}' if steps else 'before the first step'}"


def _factor(decades: float | None) -> str:
    return MISSING if decades is None else number(10**decades)


def _subspace(subspace: Values) -> dict[str, Any]:
    rows = []
    trace, total = subspace["trace"], 0.0
    for k, (value, error, converged) in enumerate(
        zip(subspace["values"], subspace["errors"], subspace["converged"], strict=True), start=1
    ):
        total += value or 0.0
        rows.append({
            "rank": str(k), "value": number(value), "error": number(error), "converged": "yes" if converged else "no",
            "share": share(total / trace if trace else None),
        })  # fmt: skip
    kind = "generalised Gauss-Newton matrix" if subspace["fisher"] == "ggn" else "empirical Fisher matrix"  # fmt: skip
    error = subspace.get("trace_error")
    said = (
        f"{kind}; trace {number(trace)}{'' if error is None else f' ± {number(error)}'}; these eigenvectors hold "
        f"{share(subspace['energy'])} of it, {share(subspace.get('energy_wanted'))} was asked for; "
        f"{subspace['num_matvecs']} products"
    )
    return {"rows": rows, "said": said}


def _errors(forecast: Values) -> list[tuple[str, str]]:
    error, valid = forecast["model_error"], forecast["valid_steps"]
    return [
        ("looked at after step", str(error["at_step"])),
        ("error of the path", share(error["path"])),
        ("error of a preconditioner held fixed", share(error.get("metric"))),
        ("true alignment loss over the quadratic one", number(error["alignment_ratio"])),
        ("change of the task's gradient", share(error.get("gradient_change"))),
        ("effect of two Lanczos steps less", share(error.get("krylov"))),
        ("valid up to step", "no limit found" if valid is None else number(math.floor(valid))),
    ]


def _facts(report: Values) -> list[tuple[str, str]]:
    cost, parameters = report["cost"], report["parameters"]
    spent = ", ".join(
        f"{cost[name]} {words}"
        for name, words in (
            ("gradients", "gradients"), ("losses", "losses"), ("hessian_products", "products with the Hessian"),
            ("fisher_products", "products with the Fisher matrix"),
        )
        if cost.get(name) is not None
    )  # fmt: skip
    optimizer = report["optimizer"]
    name = optimizer if isinstance(optimizer, str) else ", ".join(f"{k} {v}" for k, v in optimizer.items())  # fmt: skip
    return [
        ("model", report["model"]),
        ("aligned data", report["aligned"]),
        ("task", report["task"]),
        ("optimiser", name),
        ("learning rate, steps, batches", f"{number(report['learning_rate'])}, {report['steps']}, {report.get('batches', '')}"),
        ("parameters that move", f"{parameters['count']:,} in {parameters['tensors']} tensors"),
        ("cost", f"{spent}; {seconds(cost.get('seconds'))}"),
        ("seed, type", f"{report.get('seed', '')}, {report.get('dtype', '')}"),
        ("versions", ", ".join(f"{k} {v}" for k, v in report["versions"].items())),
        *[(str(label), str(value)) for label, value in (report.get("about") or {}).items()],
    ]  # fmt: skip


def _range(low: float | None, high: float | None) -> str:
    return f"{number(low)} to {number(high)}"


def _first(values: Sequence[float | None]) -> float:
    return _last(list(reversed(values)))


def _last(values: Sequence[float | None]) -> float:
    return next((float(v) for v in reversed(values) if v is not None), math.nan)
