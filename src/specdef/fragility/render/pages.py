"""HTML, Markdown, JSON and plots of a diagnosis; names of models and data are escaped, since anyone may have chosen them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from specdef.fragility.render.plots import (
    Draw,
    drift_plot,
    forecast_plot,
    png,
    scatter_plot,
    spectrum_plot,
    svg,
)
from specdef.fragility.render.text import environment
from specdef.fragility.render.view import view
from specdef.weights.atomic import atomic_folder

NAMES = ("fragility.html", "fragility.md", "fragility.json")
"""Files of a report, beside its plots."""

Values = Mapping[str, Any]
"""A report as `FragilityReport.to_dict` writes it."""

_PACKAGE = "specdef.fragility.render"
_CAPTIONS = {
    "forecast": "Forecast of the alignment loss", "drift": "Drift into the sensitive subspace",
    "spectrum": "Spectrum of the Fisher matrix",
}  # fmt: skip


def html_page(reports: Sequence[Values], ranking: Values | None = None) -> str:
    """Make the page: one file, nothing is fetched.

    Args:
        reports: One for each task.
        ranking: `TaskRanking.to_dict()`, for several tasks.

    Returns:
        HTML.
    """
    values = view(reports, ranking)
    for task, report in zip(values["tasks"], reports, strict=True):
        task["plots"] = [
            {"svg": svg(draw, f"{_CAPTIONS[name]}, {report['task']}", f"{task['id']}-{name}"), "caption": _CAPTIONS[name]}
            for name, draw in _plots(report).items()
        ]  # fmt: skip
    scatter = values["comparison"] is not None and values["comparison"]["observed"]
    values["scatter"] = svg(scatter_plot(reports), "Observed against forecast", "tasks") if scatter else None  # fmt: skip
    return environment(_PACKAGE).get_template("fragility.html.j2").render(values)


def markdown_page(reports: Sequence[Values], ranking: Values | None = None, plots: Sequence[str] = ()) -> str:  # fmt: skip
    """Make the same in Markdown.

    Args:
        reports: As for `html_page`.
        ranking: As for `html_page`.
        plots: Names of plots that lie beside the page.

    Returns:
        Markdown.
    """
    values = view(reports, ranking) | {"plots": list(plots)}
    return environment(_PACKAGE, markdown=True).get_template("fragility.md.j2").render(values)


def write_pages(folder: Path, reports: Sequence[Values], ranking: Values | None, values: Values) -> list[Path]:  # fmt: skip
    """Write all of it into a folder that appears whole or not at all.

    Args:
        folder: Must not exist, or be empty.
        reports: As for `html_page`.
        ranking: As for `html_page`.
        values: What goes into the JSON file, without numbers that JSON does not know.

    Returns:
        The files.
    """
    with atomic_folder(folder) as place:
        drawn: dict[str, Draw] = {}
        for index, report in enumerate(reports, start=1):
            which = f"-{index}" if len(reports) > 1 else ""
            drawn |= {f"{name}{which}.png": draw for name, draw in _plots(report).items()}
        if ranking and all(report.get("observed") for report in reports):
            drawn["tasks.png"] = scatter_plot(reports)
        for name, draw in drawn.items():
            png(draw, place / name)
        text = json.dumps(values, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
        pages = (html_page(reports, ranking), markdown_page(reports, ranking, list(drawn)), text)
        for name, page in zip(NAMES, pages, strict=True):
            (place / name).write_text(page, encoding="utf-8")
    return [folder / name for name in (*NAMES, *drawn)]


def _plots(report: Values) -> dict[str, Draw]:
    found = {"forecast": forecast_plot(report), "spectrum": spectrum_plot(report)}
    if report.get("observed"):
        found["drift"] = drift_plot(report)
    return found
