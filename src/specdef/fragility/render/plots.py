"""Plots of a diagnosis, each from the report's dictionary: as SVG coloured by the page's style sheet, and as PNG."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

Values = Mapping[str, Any]
"""A report as `FragilityReport.to_dict` writes it, or read back from JSON, where None stands for what is not finite."""

Draw = Callable[[Any, Mapping[str, str]], None]
"""Draws into axes of matplotlib with colours by their names."""

COLORS = {
    "ink": "#1a1d21", "soft": "#5b6470", "rule": "#d9dee4", "forecast": "#0068b5", "observed": "#c44601", "law": "#6f7782",
}  # fmt: skip
"""Colours on white."""

# Stand for colours of the style sheet, which differ by day and night: no plot uses them otherwise.
_MARKED = {name: f"#0101{i:02x}" for i, name in enumerate(COLORS, start=1)}
_SIZE = (6.0, 3.8)
# How far above threshold and run an axis goes, and how far down it reaches from there.
_ABOVE, _DECADES = 30.0, 1e-7


def forecast_plot(report: Values) -> Draw:
    """Draw alignment loss over steps, both logarithmic: forecast with its band, the law, and what was observed.

    Args:
        report: The report.

    Returns:
        What draws it.
    """
    forecast, observed = report["forecast"], report.get("observed")

    def draw(axis: Any, color: Mapping[str, str]) -> None:
        steps = _column(forecast["steps"])
        band = _positive(steps, forecast["low"], forecast["high"])
        threshold = (forecast.get("time_to_threshold") or {}).get("threshold")
        floor, top = _limits(forecast, observed, threshold)
        if band:
            axis.fill_between(
                [x for x, *_ in band], [max(low, floor) for _, low, _ in band], [high for *_, high in band],
                color=color["forecast"], alpha=0.18, lw=0, label="band",
            )  # fmt: skip
        for name, label, style in (
            ("alignment", "forecast", {"color": color["forecast"], "lw": 2}),
            (
                "taylor",
                "Taylor law in the subspace",
                {"color": color["law"], "ls": "--", "lw": 1.2},
            ),
            ("quartic", "its t⁴ term", {"color": color["law"], "ls": ":", "lw": 1.2}),
        ):
            _line(axis, steps, forecast.get(name), label, **style)
        if observed:
            _line(
                axis, _column(observed["steps"]), observed["alignment"], "observed", color=color["observed"], lw=0, marker="o", ms=4,
            )  # fmt: skip
        if threshold:
            axis.axhline(threshold, color=color["ink"], lw=0.9, ls=(0, (1, 3)), label="threshold")
        onset = forecast.get("onset_steps")
        last = max(steps, default=1.0)
        if onset and math.isfinite(onset) and 1 <= onset <= last:
            axis.axvline(onset, color=color["soft"], lw=0.9, label="t⁴ outgrows t²")
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_ylim(floor, top)
        axis.set(xlabel="steps", ylabel="alignment loss (nats per token)")

    return draw


def drift_plot(report: Values) -> Draw:
    """Draw the share of the displacement that lies in the sensitive subspace, and what it costs there.

    Args:
        report: With `observed`.

    Returns:
        What draws it.
    """
    observed = report["observed"]

    def draw(axis: Any, color: Mapping[str, str]) -> None:
        steps = _column(observed["steps"])
        _line(axis, steps, observed["drift"], "observed drift", color=color["observed"], marker="o", ms=4, lw=1.2)  # fmt: skip
        axis.axhline(report["initial_overlap"], color=color["forecast"], lw=1.2, label="overlap of the gradient")  # fmt: skip
        if random := report.get("overlap_random"):
            axis.axhline(random, color=color["law"], lw=1.2, ls="--", label="random subspace")
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set(xlabel="steps", ylabel="share of the displacement in the subspace")

    return draw


def spectrum_plot(report: Values) -> Draw:
    """Draw the largest eigenvalues of the Fisher matrix with their errors, and the share of its trace they make.

    Args:
        report: The report.

    Returns:
        What draws it.
    """
    subspace = report["subspace"]

    def draw(axis: Any, color: Mapping[str, str]) -> None:
        values, errors = _column(subspace["values"]), _column(subspace["errors"])
        ranks = list(range(1, len(values) + 1))
        axis.errorbar(ranks, values, yerr=errors, color=color["forecast"], fmt="o", ms=4, capsize=2, label="eigenvalue")  # fmt: skip
        axis.set_yscale("log")
        axis.set(xlabel="rank", ylabel="eigenvalue of the Fisher matrix")
        axis.set_xticks(ranks)
        trace = subspace.get("trace")
        if trace:
            sums = [sum(values[:k]) / trace for k in ranks]
            other = axis.twinx()
            other.plot(ranks, sums, color=color["law"], ls="--", lw=1.2, label="share of the trace")
            other.set_ylim(0, 1.05)
            other.set_ylabel("share of the trace")
            _style(other, color)
            other.grid(False)

    return draw


def scatter_plot(reports: Sequence[Values]) -> Draw:
    """Draw the observed alignment loss of several tasks against the forecast one, at the end of training.

    Args:
        reports: With `observed`.

    Returns:
        What draws it.
    """

    def draw(axis: Any, color: Mapping[str, str]) -> None:
        points = []
        for report in reports:
            pair = (_last(report["forecast"]["alignment"]), _last(report["observed"]["alignment"]))
            if all(v > 0 for v in pair):
                points.append((*pair, str(report["task"])))
        for x, y, name in points:
            axis.plot([x], [y], "o", color=color["observed"], ms=6)
            axis.annotate(_plain(name), (x, y), xytext=(6, 4), textcoords="offset points", color=color["ink"])  # fmt: skip
        if points:
            ends = [v for x, y, _ in points for v in (x, y)]
            low, high = 0.5 * min(ends), 2 * max(ends)
            axis.plot([low, high], [low, high], color=color["law"], ls="--", lw=1, label="forecast = observed")  # fmt: skip
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set(xlabel="forecast alignment loss", ylabel="observed alignment loss")

    return draw


def svg(draw: Draw, title: str, name: str) -> Markup:
    """Draw as an svg element for a page.

    Args:
        draw: What draws.
        title: Read out in place of the picture.
        name: Begins the element's ids, which must differ between the pictures of a page.

    Returns:
        The element; its colours are variables of the style sheet.
    """
    text = io.StringIO()
    _save(draw, _MARKED, text, format="svg", transparent=True, metadata={"Date": None})
    found = text.getvalue()
    found = re.sub(r"<metadata>.*?</metadata>", "", found[found.index("<svg") :], flags=re.DOTALL)
    found = re.sub(r'(<svg [^>]*?) width="[^"]*"', r"\1", found, count=1)
    found = re.sub(r'(<svg [^>]*?) height="[^"]*"', r"\1", found, count=1)
    for color, marked in _MARKED.items():
        found = found.replace(marked, f"var(--{color})")
    found = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", found)
    label = Markup('<svg class="chart" role="img" aria-label="{}" ').format(title)
    return label + Markup(found.removeprefix("<svg "))


def png(draw: Draw, path: Path) -> None:
    """Draw into a PNG file.

    Args:
        draw: What draws.
        path: The file.
    """
    _save(draw, COLORS, path, format="png", dpi=150)


def _save(draw: Draw, color: Mapping[str, str], target: Any, **options: Any) -> None:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "specdef", "axes.unicode_minus": False}):  # fmt: skip
        figure = Figure(figsize=_SIZE)
        axis = figure.subplots()
        draw(axis, color)
        _style(axis, color)
        # fixed margins: a layout engine draws every figure three times
        twin = len(figure.axes) > 1
        figure.subplots_adjust(left=0.17, right=0.88 if twin else 0.97, bottom=0.14, top=0.83)
        handles = [pair for a in figure.axes for pair in zip(*a.get_legend_handles_labels(), strict=True)]  # fmt: skip
        if handles:
            figure.legend(
                *zip(*handles, strict=True), loc="upper center", ncols=3, frameon=False, fontsize=9, labelcolor=color["ink"],
            )  # fmt: skip
        figure.savefig(target, **options)


def _style(axis: Any, color: Mapping[str, str]) -> None:
    from matplotlib.ticker import NullFormatter

    axis.tick_params(which="both", colors=color["soft"], labelcolor=color["soft"])
    for spine in axis.spines.values():
        spine.set_color(color["rule"])
    axis.xaxis.label.set_color(color["soft"])
    axis.yaxis.label.set_color(color["soft"])
    axis.grid(True, color=color["rule"], lw=0.6)
    axis.set_axisbelow(True)
    for line in (axis.xaxis, axis.yaxis):
        low, high = line.get_view_interval()
        if line.get_scale() == "log" and high >= 10 * low:  # then the decades say enough
            line.set_minor_formatter(NullFormatter())


def _line(axis: Any, steps: Sequence[float], values: Any, label: str, **style: Any) -> None:
    points = _positive(steps, values) if values else []
    if points:
        axis.plot(*zip(*points, strict=True), label=label, **style)


def _positive(steps: Sequence[float], *columns: Any) -> list[tuple[float, ...]]:
    """Return the rows that a log-log plot can show: a positive step, finite values, the last of them positive."""
    rows = zip(steps, *map(_column, columns), strict=True)
    return [row for row in rows if row[0] > 0 and row[-1] > 0 and all(map(math.isfinite, row))]


def _limits(forecast: Values, observed: Values | None, threshold: float | None) -> tuple[float, float]:  # fmt: skip
    """Return the ends of the axis: a forecast that explodes must not flatten the rest, and the first steps say little."""
    seen = _column(observed["alignment"]) if observed else []
    known = [v for v in (*seen, threshold or 0.0) if math.isfinite(v) and v > 0]
    point = [v for v in _column(forecast["alignment"]) if math.isfinite(v) and v > 0]
    if not (known or point):
        return 1e-12, 1.0
    top = max(known, default=max(point, default=1.0))
    top = 3 * max(top, min(max(point, default=top), _ABOVE * top))
    return max(0.5 * min(v for v in (*known, *point) if v <= top), _DECADES * top), top


def _column(values: Any) -> list[float]:
    return [math.nan if v is None else float(v) for v in values]


def _last(values: Any) -> float:
    return next((v for v in reversed(_column(values)) if math.isfinite(v)), math.nan)


def _plain(text: str) -> str:
    """Return a name as matplotlib prints it: a dollar sign would begin a formula."""
    return text.replace("$", r"\$")
