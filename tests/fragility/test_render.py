"""Pages of a diagnosis say what the report says, show strange names as they stand, and fetch nothing."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest
import torch

from specdef.fragility.conditions import Condition
from specdef.fragility.exponent import ExponentFit
from specdef.fragility.forecast import Forecast, ModelError, TimeToThreshold
from specdef.fragility.observe import Observation
from specdef.fragility.ranking import rank_tasks
from specdef.fragility.render.pages import html_page, markdown_page, write_pages
from specdef.fragility.render.plots import COLORS, forecast_plot, svg
from specdef.fragility.render.view import finding
from specdef.fragility.report import FragilityReport
from specdef.fragility.subspace import FisherSubspace

STEPS = (1, 3, 10, 30, 100)


def made(*, task: str = "python", scale: float = 1.0, observe: bool = True, **changes: Any) -> FragilityReport:  # fmt: skip
    """A report with numbers that are easily recognised: the forecast ends at 0.0324 times `scale`."""
    curve = tuple(scale * 0.0324 * (n / 100) ** 4 for n in STEPS)
    forecast = Forecast(
        steps=STEPS, alignment=curve, low=tuple(0.5 * v for v in curve), high=tuple(2 * v for v in curve),
        taylor=tuple(0.9 * v for v in curve), quartic=tuple(0.8 * v for v in curve), in_subspace=curve,
        stochastic=(0.0,) * 5, onset_steps=7.25, exponent=3.97, regime="quartic", applicable=False,
        time_to_threshold=TimeToThreshold(threshold=0.05, steps=111.5 / scale, low=91.25, high=None),
        reasons=("The learning rate times the largest curvature is 0.77.",), learning_rate=1e-3, lambda_max=12.5,
        valid_steps=math.inf, model_error=ModelError(path=0.0123, metric=0.0, alignment_ratio=1.17, gradient_change=0.2, krylov=0.0, at_step=100),
    )  # fmt: skip
    observed = Observation(
        steps=STEPS, alignment=tuple(1.5 * v for v in curve), in_subspace=curve, drift=(0.011, 0.012, 0.02, 0.1, 0.23456),
        displacement=STEPS, task_loss=(3.5, 3.4, 3.3, 3.2, 3.0625), status="completed", mode="full", seconds=12.0,
        band_coverage=1.0, error_factor=0.176, floor=1e-12,
    )  # fmt: skip
    report = FragilityReport(
        model="tiny", aligned="declines", task=task, optimizer={"name": "gd"}, learning_rate=1e-3, steps=100,
        batches="full", parameters={"count": 12345, "tensors": 3, "names": ["w"]},
        subspace=FisherSubspace(
            vectors=torch.eye(2, 5), values=torch.tensor([8.125, 2.5]).double(), errors=torch.tensor([0.01, 0.02]).double(),
            converged=torch.tensor([True, False]), trace=12.0, trace_error=math.nan, energy=0.885, energy_wanted=0.9,
            num_matvecs=31, fisher="ggn", metric=None, parameters=("w",),
        ),
        gradient_norm=1.5, initial_overlap=0.01625, overlap_random=0.013, overlap_quantile=0.02, gamma=4.375, gamma_random=0.5,
        gamma_quantile=0.9, acceleration=17.25, acceleration_error=0.0625,
        conditions=(
            Condition(name="low-rank sensitivity", holds=False, value=0.115, threshold=0.1, baseline=None, margin=0.87, statement="The tail has 0.115."),
            Condition(name="initial orthogonality", holds=True, value=0.01625, threshold=0.02, baseline=0.013, margin=1.23, statement="Within the quantile."),
            Condition(name="curvature coupling", holds=True, value=4.375, threshold=0.9, baseline=0.5, margin=math.inf, statement="Coupled."),
        ),
        forecast=forecast, observed=observed if observe else None,
        exponent=ExponentFit(value=4.04, low=3.91, high=4.17, window=(3, 100), num_points=4, rms=0.01, is_power_law=True, predicted=3.98)
        if observe else None,
        cost={"gradients": 4, "losses": 2, "hessian_products": 13, "fisher_products": 41, "seconds": 75.0},
        verdict="Alignment holds for the planned steps.", seed=0, dtype="float32", versions={"specdef": "0.1.0"},
    )  # fmt: skip
    return replace(report, **changes)


def several(*reports: FragilityReport) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    return [report.to_dict() for report in reports], rank_tasks(reports).to_dict()


class Checked(HTMLParser):
    """Collects tags, and ids of which each may be there once; every tag must be closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids += [value or "" for name, value in attrs if name == "id"]
        self.links += [value or "" for name, value in attrs if name in ("href", "src", "xlink:href")]  # fmt: skip
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def parse(page: str) -> Checked:
    found = Checked()
    found.feed(page)
    assert found.open == []
    return found


NUMBERS = (
    "0.0324", "0.0162 to 0.0648", "7.25", "0.0163", "4.38", "8.12", "88 %", "12,345", "1.17", "3.91 to 4.17", "0.0486", "23 %",
    "The learning rate times the largest curvature is 0.77.", "Alignment holds for the planned steps.", "3.062", "112",
    "does not hold", "unlimited", "0.16", "17.2 ± 0.0625",
)  # fmt: skip


def test_both_pages_hold_the_numbers() -> None:
    report = made().to_dict()
    page, text = html_page([report]), markdown_page([report])
    for wanted in NUMBERS:
        assert wanted in page, wanted
        assert wanted in text, wanted


def test_the_page_is_well_formed_and_fetches_nothing() -> None:
    page = html_page(*several(made(task="a"), made(task="b", scale=3)))
    found = parse(page)
    assert page.startswith("<!doctype html>")
    assert found.tags.count("svg") == 7  # three for each task, and the scatter
    assert len(set(found.ids)) == len(found.ids)
    assert all(link.startswith("#") for link in found.links)
    assert {link[1:] for link in found.links} <= set(found.ids)
    assert not re.search(r"@import|url\((?!#)|<script|<link|<img", page)
    assert "prefers-color-scheme: dark" in page
    # matplotlib's own black and the markers' colours would vanish at night
    assert "#0101" not in page and "#000000" not in page


def test_a_plot_is_the_same_every_time() -> None:
    report = made().to_dict()
    first, second = (svg(forecast_plot(report), "t", "n") for _ in range(2))
    assert first == second and "var(--forecast)" in first and "<metadata" not in first


def test_names_are_shown_as_they_stand() -> None:
    bad = "<script>x</script> $a_b$ [l](u) | &amp;"
    report = made(task=bad, model=bad, aligned=bad).to_dict()
    page = html_page(*several(made(task=bad, model=bad, aligned=bad), made(task="b", scale=2, model=bad, aligned=bad)))  # fmt: skip
    assert "script" not in parse(page).tags
    assert "&lt;script&gt;x&lt;/script&gt; $a_b$ [l](u) | &amp;amp;" in page
    text = markdown_page([report])
    assert "<script>" not in text and "[l](u)" not in text
    assert all(line.count("|") - line.count("\\|") == 3 for line in text.splitlines() if line.startswith("| task"))  # fmt: skip


def test_without_a_run_nothing_is_said_of_one() -> None:
    report = made(observe=False).to_dict()
    page = html_page([report])
    assert "The run" not in page and parse(page).tags.count("svg") == 2
    assert "The run" not in markdown_page([report])


def test_tasks_are_ranked_by_forecast() -> None:
    text = markdown_page(*several(made(task="mild"), made(task="harsh", scale=4)))
    assert text.index("| 1 | harsh") < text.index("| 2 | mild")
    assert "1.00 over 2 tasks; too few" in text
    text = markdown_page(*several(made(task="mild"), made(task="harsh", scale=4, observe=False)))
    assert "No rank correlation" in text


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"observe": False}, ""),  # forecast at step 111.5 of 100
        ({"observe": False, "scale": 2}, "is forecast to reach 0.05 at step 55.8 of 100, by a forecast that does not vouch"),
        ({}, ""),  # ends at 0.049
        ({"scale": 2}, "was seen above 0.05 at step 100"),
    ],
)  # fmt: skip
def test_a_finding_is_named(options, expected) -> None:
    said = finding(made(**options).to_dict())
    assert expected in said and bool(said) is bool(expected)


def test_an_observed_run_outweighs_the_forecast() -> None:
    report = made(scale=2).to_dict()
    report["observed"]["alignment"] = [0.0] * 5
    assert finding(report) == ""
    report["observed"]["status"] = "diverged"
    assert "ended early: diverged, last looked at after step 100" in finding(report)


def test_a_run_that_diverged_at_once_has_its_page() -> None:
    empty = dict.fromkeys(
        ("steps", "alignment", "in_subspace", "drift", "displacement", "task_loss"), ()
    )
    report = made(observed=replace(made().observed, status="diverged", band_coverage=math.nan, error_factor=math.nan, **empty), exponent=None)  # fmt: skip
    text = markdown_page([report.to_dict()])
    assert "diverged, last looked at before the first step" in text
    assert "ended early" in html_page([report.to_dict()])


def test_flat_and_missing_numbers_can_be_drawn() -> None:
    """Nothing above zero, nothing finite, one step: still a page."""
    forecast = made().forecast
    none = dict.fromkeys(("alignment", "low", "high", "taylor", "quartic"), (math.nan,) * 5)
    for changes in (none, {name: (0.0,) * 5 for name in none}):
        report = made(observe=False, forecast=replace(forecast, onset_steps=None, **changes)).to_dict()  # fmt: skip
        assert parse(html_page([report])).tags.count("svg") == 2


def test_files_appear_together(tmp_path) -> None:
    reports, ranking = several(made(task="a"), made(task="b", scale=3))
    files = write_pages(tmp_path / "out", reports, ranking, {"x": 1})
    names = {file.name for file in files}
    assert names == {
        "fragility.html", "fragility.md", "fragility.json", "tasks.png",
        *(f"{kind}-{i}.png" for kind in ("forecast", "spectrum", "drift") for i in (1, 2)),
    }  # fmt: skip
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    assert json.loads((tmp_path / "out" / "fragility.json").read_text()) == {"x": 1}
    assert (tmp_path / "out" / "forecast-1.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "out" / "fragility.md").read_text()
    assert all(f"](<{name}>)" in text for name in names if name.endswith(".png"))


def test_a_forecast_that_explodes_does_not_hide_the_run() -> None:
    from matplotlib.figure import Figure

    axis = Figure().subplots()
    forecast = replace(made().forecast, alignment=(1e-6, 1.0, 1e9, 1e30, math.inf))
    forecast_plot(made(forecast=forecast).to_dict())(axis, COLORS)
    low, high = axis.get_ylim()
    assert low < 1.5 * 0.0324 * 0.3**4 < 1.5 * 0.0324 < high < 10
