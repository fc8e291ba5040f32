"""Pages of an audit: every cell is in them, names are escaped, nothing is fetched, and nothing is promised."""

from __future__ import annotations

import itertools
import json
import math
import re
from copy import deepcopy
from html.parser import HTMLParser
from typing import Any

import pytest

from specdef.audit.flags import ADVICE
from specdef.audit.render.pages import (
    NAMES,
    html_page,
    json_page,
    markdown_page,
    read_report,
    write_pages,
)
from specdef.audit.render.svg import HEIGHT, WIDTH, Series, chart
from specdef.audit.verdict import TIERS
from specdef.errors import CheckpointError

NASTY = "<script src=//x.example/a.js>alert(1)</script>\"'|`*_[a](b)\n# {{ 7*7 }} {% raw %}"


def run(side: str, seed: int, trial: int, rate: float, losses: list[float | None], **other: Any) -> dict[str, Any]:  # fmt: skip
    return {
        "attack": side, "setting": {"optimizer": "adamw", "learning_rate": rate}, "seed": seed, "trial": trial,
        "steps": list(range(0, 4 * len(losses), 4)), "losses": losses, "accuracies": [None] * len(losses),
        "status": "finished", **other,
    }  # fmt: skip


def cell(attack: str, tier: int, status: str, **other: Any) -> dict[str, Any]:
    return {"attack": attack, "tier": tier, "optimizer": "adamw", "status": status, "flags": [], "advice": [], "notes": []} | other  # fmt: skip


def sample() -> dict[str, Any]:
    """Return a report with everything that may be odd in one: cells out of order, without runs, without numbers."""
    locked = [
        run("full", seed, trial, rate, losses, status="finished" if None not in losses else "diverged")
        for seed in (0, 1)
        for trial, (rate, losses) in enumerate(
            [(1e-4, [4.0, None]), (1e-9, [4.0, 3.9, 3.8]), (1e-14, [4.0, 4.0, 4.0 + seed])]
        )
    ]  # fmt: skip
    control = [
        run("full", s, t, r, loss)
        for s in (0, 1)
        for t, (r, loss) in enumerate([(1e-4, [4.0, 3.0, 2.0]), (1e-3, [4.0, 9e9, math.inf])])
    ]
    numbers = {
        "learning_rate": 1e-9, "steps": 8, "start": 4.0, "locked": 3.8, "control": 2.0, "scratch": 3.7, "recovered": 0.1,
        "recovered_interval": [-0.05, 0.25], "slowdown": 4.0, "slowdown_censored": True, "seeds": 2, "trials": 6,
        "seconds": 12.5, "attack_seconds": 1.25, "added_parameters": 12345, "relative_cost": 1.5,
    }  # fmt: skip
    broken = {
        **numbers, "recovered": 0.93, "slowdown_censored": False, "slowdown": 1.0, "recovered_interval": None,
        "utility": {"original": 0.81, "locked": 0.79, "attacked": 0.123},
        "flags": ["best-at-edge", "scratch-reached"], "advice": [ADVICE["best-at-edge"], ADVICE["scratch-reached"]],
    }  # fmt: skip
    return {
        "suite": "2026.1", "task": NASTY, "budget": {"steps": 8, "evaluations": 4, "seconds": 90.0}, "seeds": 2,
        "verdict": f"Broken at tier 5 by merge on {NASTY}.",
        "tiers": [
            {"tier": 2, "name": TIERS[2], "status": "held at this budget", "attack": "full-adamw", "optimizer": "adamw", "recovered": 0.1, "cells": 1, "reason": ""},
            {"tier": 4, "name": TIERS[4], "status": "not tested", "attack": "", "optimizer": "", "recovered": None, "cells": 0, "reason": "no attack applies"},
            {"tier": 5, "name": TIERS[5], "status": "broken", "attack": "merge", "optimizer": "adamw", "recovered": 0.93, "cells": 2, "reason": ""},
        ],
        "cells": [
            cell("merge", 5, "broken", **broken),
            cell("full-adamw", 2, "held", **numbers),
            cell(NASTY, 5, "not applicable", notes=[f"why not: {NASTY}"]),
            cell("full-soap", 4, "invalid", control=math.inf, flags=["control-not-broken"], advice=[ADVICE["control-not-broken"]]),
            cell("rebalance", 5, "pruned by tier", notes=["tier 5 was broken already, by merge"]),
            cell("clip-spectrum", 5, "weakened", recovered=math.nan, learning_rate=math.inf),
        ],
        "curves": [
            {"attack": "full-adamw", "optimizer": "adamw", "side": "locked", "runs": locked},
            {"attack": "full-adamw", "optimizer": "adamw", "side": "control", "runs": control},
            {"attack": "scratch", "optimizer": "adamw", "side": "scratch", "runs": [run("scratch", 0, 0, 1e-3, [4.6, 3.7])]},
            {"attack": "full-soap", "optimizer": "adamw", "side": "control", "runs": [run("full-soap", 0, 0, 1e-3, [None, None])]},
            {"attack": "merge", "optimizer": "adamw", "side": "locked", "runs": []},
        ],
        "not_tested": ["tier 6 (rebuild from outputs): not asked for", NASTY],
        "start": {"original": 4.0, "locked": 4.0, "constant_guess": 4.6, "counted_from": 4.0, "utility_original": 0.81, "utility_locked": 0.79},
        "useless": False, "versions": {"specdef": "0.1.0", "torch": "2.13.0"}, "seconds": 321.0,
        "about": {"command": "specdef audit x", "locked model": NASTY},
    }  # fmt: skip


class Page(HTMLParser):
    """Elements, attributes and text of a page, text by element."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, str] = {}
        self._open: list[str] = []
        self.feed(text)
        assert not self._open, self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text[self._open[-1] if self._open else ""] = self.text.get(self._open[-1] if self._open else "", "") + data  # fmt: skip

    @property
    def words(self) -> str:
        return " ".join(" ".join(text.split()) for text in self.text.values())


def empty() -> dict[str, Any]:
    return sample() | {"cells": [], "curves": [], "tiers": [], "not_tested": [], "start": {}, "about": {}}  # fmt: skip


def test_the_page_fetches_nothing_and_runs_nothing():
    page = Page(html_page(sample()))
    assert not {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe", "object", "base", "form", "a"}  # fmt: skip
    for tag, attributes in page.tags:
        assert not attributes.keys() & {"src", "href", "srcset", "data", "action", "style"}, tag
        assert not any(name.startswith("on") for name in attributes), tag
    assert not re.search(r"url\(|@import|//", page.text["style"])
    policy = next(a for t, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy["content"] == "default-src 'none'; style-src 'unsafe-inline'"


def test_names_are_text_in_html_and_one_line_in_markdown():
    assert " ".join(NASTY.split()) in " ".join(Page(html_page(sample())).text["td"].split())
    text = markdown_page(sample())
    assert "<script" not in text
    rows = [line for line in text.splitlines() if "not applicable" in line]
    assert len(rows) == 1 and len(re.findall(r"(?<!\\)\|", rows[0])) == 13
    assert r"\{\{ 7\*7 \}\}" in rows[0] and "49" not in text
    assert r"\[a\](b)" in rows[0]


@pytest.mark.parametrize("make", [html_page, markdown_page])
def test_every_cell_and_tier_is_there(make):
    report = sample()
    text = make(report)
    text = Page(text).words if make is html_page else text.replace("\\", "")
    for c in report["cells"]:
        if c["attack"] != NASTY:
            assert c["attack"] in text
        assert c["status"] in text
        assert all(flag in text for flag in c["flags"])
        assert all(advice in text for advice in c["advice"])
    for tier in report["tiers"]:
        assert tier["name"] in text and tier["status"] in text and tier["reason"] in text
    for fact in ("93%", "≥ 4", "-5.0% to 25%", "0.123", "12,345", "1.5 ×", "tier 6 (rebuild from outputs): not asked for", "0.1.0", "specdef audit x", "3.7"):  # fmt: skip
        assert fact in text, fact
    assert text.index("full-adamw") < text.index("full-soap") < text.rindex("rebalance")
    assert "nan" not in text.split() and "inf" not in text.split() and "None" not in text.split()


def test_cells_are_sorted_by_tier_and_coloured_by_status_and_word():
    page = html_page(sample())
    rows = re.findall(r'<tr id="row-cell-\d" class="(\w+)">\s*<td class="n">(\d)</td>', page)
    assert [tier for _, tier in rows] == sorted(tier for _, tier in rows)
    assert [css for css, _ in rows] == ["held", "invalid", "broken", "not", "pruned", "weakened"]
    style = page[page.index("<style>") : page.index("</style>")]
    assert all(f".status.{css}" in style for css in ("held", "weakened", "broken"))
    assert "prefers-color-scheme: dark" in style and "max-width: 46rem" in style


def test_charts_are_drawn_for_what_was_run():
    page = Page(html_page(sample()))
    charts = [a for tag, a in page.tags if tag == "svg"]
    # Three of full-adamw; of full-soap, whose control has no finite loss, only the one with the reference; merge has no runs.
    assert len(charts) == 4 and page.text["p"].count("nothing to draw") == 2
    # Locked: three rates, one of them diverged with both seeds; two seeds in the other charts.
    marks = [a.get("class") for tag, a in page.tags if tag in ("circle", "rect", "path")]
    assert marks.count("cross locked") == 2
    assert marks.count("mark locked") == 3 + 2 * 3 + 2 * 3
    assert marks.count("mark scratch") == 2 * 2


@pytest.mark.parametrize("make", [html_page, markdown_page])
@pytest.mark.parametrize("report", [sample(), sample() | {"useless": True}, empty()], ids=["all", "useless", "empty"])  # fmt: skip
def test_nothing_is_called_secure(make, report):
    assert not re.search(r"secur(?!ity-policy)|unbreakable|tamper-proof", make(report), re.IGNORECASE)  # fmt: skip
    assert ("does not do its own work" in make(report)) is report["useless"]


def test_an_empty_report_says_so():
    page = Page(html_page(empty())).words
    assert "No attack was run." in page and "Not measured: no retain data was given." in page
    assert "There is no from-scratch reference." in page


def test_from_scratch_is_compared_with_the_best_attack():
    assert "no attack got further than starting anew does" in html_page(sample())
    report = sample()
    report["cells"][0]["locked"] = 2.1
    assert "The best attack on the locked model reaches 2.1 (merge with adamw): attacking the locked model is worth more" in html_page(report)  # fmt: skip


def test_pages_are_the_same_from_the_json_alone(tmp_path):
    report = sample()
    files = write_pages(tmp_path / "a", report)
    assert tuple(file.name for file in files) == NAMES
    again = write_pages(tmp_path / "b", read_report(files[2]))
    for one, other in zip(files, again, strict=True):
        assert one.read_bytes() == other.read_bytes()
    values = json.loads(json_page(report), parse_constant=pytest.fail)
    assert values["cells"][3]["control"] is None
    assert values["cells"][1] == json.loads(json.dumps(report["cells"][1]))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"cells": []}', '{"cells": 3, "start": {}, "curves": []}'])  # fmt: skip
def test_another_file_is_refused(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"x\.json: is no report of an audit"):
        read_report(tmp_path / "x.json")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_report(tmp_path / "none.json")


def test_a_share_below_zero_is_nothing():
    report = sample()
    report["tiers"][0]["recovered"] = -0.27
    assert (
        "nothing was recovered, full-adamw with adamw came nearest; 1 cell measured"
        in html_page(report)
    )
    assert "full-adamw with adamw recovered most: 10%" in html_page(sample())


def test_rendering_changes_nothing():
    report = sample()
    before = deepcopy({n: v for n, v in report.items() if n != "cells"})
    html_page(report)
    assert {n: v for n, v in report.items() if n != "cells"} == before


POINTS = {
    "one": [(1e-4, 3.0)],
    "equal": [(1e-4, 3.0), (1e-4, 3.0)],
    "many decades": [(10.0**-k, 3.0 - k / 40) for k in range(36)],
    "infinite": [(1e-4, math.inf), (1e-3, 2.0)],
    "negative": [(1e-4, -3.0), (1e-3, -2.0)],
    "huge": [(1e-4, 1e30), (1e-3, 2.0)],
}


@pytest.mark.parametrize("points", POINTS.values(), ids=POINTS)
@pytest.mark.parametrize("log", [True, False])
def test_points_stay_inside_the_chart(points, log):
    drawn = chart(
        [Series(label=NASTY, kind="locked", points=tuple(points))], title=NASTY, x_label="x", y_label="y", log_x=log, start=3.0, ceiling=3.5
    )  # fmt: skip
    page = Page(drawn)
    circles = [(float(a["cx"] or "nan"), float(a["cy"] or "nan")) for t, a in page.tags if t == "circle"]  # fmt: skip
    assert len(circles) == len(points)
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in circles)
    labels = [a for t, a in page.tags if t == "text" and a.get("text-anchor") == "middle"]
    assert 2 <= len(labels) <= 9
    # Larger is higher up, as far as the top.
    order = sorted(zip([y for _, y in points], [y for _, y in circles], strict=True))
    assert all(a[1] >= b[1] - 0.11 for a, b in itertools.pairwise(order))


def test_a_logarithmic_axis_is_one():
    points = ((1e-6, 1.0), (1e-4, 2.0), (1e-2, 3.0))
    page = Page(chart([Series(label="", kind="control", points=points)], title="", x_label="", y_label="", log_x=True))  # fmt: skip
    a, b, c = (float(x["x"] or "nan") for t, x in page.tags if t == "rect")
    assert b - a == pytest.approx(c - b, abs=0.11) and b > a
    assert {"1e-6", "1e-4", "1e-2"} <= set(re.findall(r"1e-?\d", page.words))
