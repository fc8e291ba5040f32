"""What the runs of `collapse` say: a table, and claims with the numbers they rest on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from specdef.experiments.record import claim

Rows = Sequence[Mapping[str, Any]]

FACTOR = 2.0
"""Within which a forecast is called right."""


def table(rows: Rows, ranks: Rows) -> list[str]:
    """Write the table in Markdown.

    Args:
        rows: Reports with their run and seed.
        ranks: Rank correlations by run and seed.

    Returns:
        Lines.
    """
    lines = [
        "",
        "| run | task | overlap / random | gamma / random | forecast | observed | observed / forecast | in band | exponent | applicable |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in rows:
        observed, exponent = row["observed"], row["exponent"]
        seen, said = _last(row)
        lines.append(
            f"| {row['run']} | {row['task']} | {_ratio(row['initial_overlap'], row['overlap_random'])} | "
            f"{_ratio(row['gamma'], row['gamma_random'])} | {said:.2e} ({row['forecast']['low'][-1]:.1e} to {row['forecast']['high'][-1]:.1e}) | "
            f"{seen:.2e} | {_ratio(seen, said)} | {observed['band_coverage']:.0%} | {_interval(exponent)} | "
            f"{'yes' if row['applicable'] else 'no: ' + row['reasons'][0]} |"
        )  # fmt: skip
    lines.append("")
    for rank in ranks:
        numbers = ", ".join(f"{what.replace('_', ' ')} {rank[what]:.2f}" for what in ("forecast", "initial_overlap", "gamma") if rank[what] is not None)  # fmt: skip
        if numbers:
            lines.append(f"{rank['run']}, seed {rank['seed']}: Spearman with the observed damage over {rank['tasks']} tasks: {numbers}.")  # fmt: skip
    return lines


def claims(planted: Rows, rows: Rows, ranks: Rows) -> list[dict[str, Any]]:
    """State what the numbers bear out and what not.

    Args:
        planted: Of `planted_results`.
        rows: Reports with their run and seed.
        ranks: Rank correlations.

    Returns:
        The claims.
    """
    toy = {entry["name"]: entry for entry in planted}
    exponents = {name: entry["report"]["exponent"]["value"] for name, entry in toy.items()}
    errors = {name: max(entry["errors"].values()) for name, entry in toy.items()}
    said = [
        claim("Planted: estimates of the law's quantities are within 1 % of the truth.", max(errors.values()) <= 0.01, errors=errors),
        claim("Planted: without overlap the alignment loss grows with the fourth power of time (4.0 ± 0.1).", abs(exponents["no overlap"] - 4) <= 0.1, exponent=exponents["no overlap"]),
        claim("Planted: with overlap it grows with the second (2.0 ± 0.1).", abs(exponents["overlap"] - 2) <= 0.1, exponent=exponents["overlap"]),
        claim("Planted: beyond the stable rate the forecast calls itself not applicable.", not toy["beyond the stable rate"]["report"]["applicable"], reasons=toy["beyond the stable rate"]["report"]["reasons"]),
    ]  # fmt: skip
    tuned = [row for row in rows if "lora" not in row["run"]]
    if not tuned:
        return said
    overlaps = {_name(row): row["initial_overlap"] / row["overlap_random"] for row in tuned}
    said.append(claim("The task's gradient is no more aligned with the sensitive subspace than with a random one (condition 2).", all(row["initial_overlap"] <= row["overlap_quantile"] for row in tuned), overlap_over_random=overlaps))  # fmt: skip
    couplings = {_name(row): row["gamma"] / row["gamma_random"] for row in tuned}
    said.append(claim("Curvature couples the task into the sensitive subspace more than it would a random direction (condition 3).", all(row["gamma"] > row["gamma_quantile"] for row in tuned), gamma_over_random=couplings))  # fmt: skip
    energies = {_name(row): row["subspace"]["energy"] for row in tuned}
    said.append(claim("The sensitive subspace holds 90 % of the Fisher matrix' trace (condition 1).", min(energies.values()) >= 0.9, energy=energies))  # fmt: skip
    flow = {_name(row): row["exponent"]["value"] for row in rows if row["run"] == "sgd" and row["exponent"]}  # fmt: skip
    said.append(claim("Quartic law: under gradient descent the observed exponent is 4 (above 3.5).", bool(flow) and min(flow.values()) > 3.5, exponents=flow))  # fmt: skip
    for what, part in (
        ("where it calls itself applicable", [row for row in rows if row["applicable"]]),
        ("where it does not", [row for row in rows if not row["applicable"]]),
    ):
        if part:
            ratios = {_name(row): _last(row)[0] / _last(row)[1] for row in part}
            right = [1 / FACTOR <= ratio <= FACTOR for ratio in ratios.values()]
            said.append(claim(f"The forecast is within a factor of {FACTOR:g} of the observed damage in every run {what}.", all(right), right=sum(right), runs=len(right), observed_over_forecast=ratios))  # fmt: skip
            coverage = {_name(row): row["observed"]["band_coverage"] for row in part}
            said.append(claim(f"The band holds at least 90 % of the observed steps, in the median run {what}.", median(coverage.values()) >= 0.9, coverage=coverage))  # fmt: skip
    for rank in ranks:
        if rank["forecast"] is not None:
            said.append(claim(f"{rank['run']}, seed {rank['seed']}: the forecast ranks the tasks as the runs do (Spearman at least 0.8).", round(rank["forecast"], 6) >= 0.8, **{k: v for k, v in rank.items() if k not in ("run", "seed")}))  # fmt: skip
    return said


def _name(row: Mapping[str, Any]) -> str:
    return f"{row['run']}, {row['task']}, seed {row['seed']}"


def _last(row: Mapping[str, Any]) -> tuple[float, float]:
    """Return observed and forecast alignment loss at the last step looked at."""
    step = row["observed"]["steps"][-1]
    at = row["forecast"]["steps"].index(step)
    return row["observed"]["alignment"][-1], row["forecast"]["alignment"][at]


def _ratio(value: float, baseline: float) -> str:
    return f"{value / baseline:.3g}" if baseline else "–"


def _interval(exponent: Mapping[str, Any] | None) -> str:
    if exponent is None:
        return "–"
    text = f"{exponent['value']:.2f} ({exponent['low']:.2f} to {exponent['high']:.2f})"
    return text if exponent["is_power_law"] else f"{text}, no power law"
