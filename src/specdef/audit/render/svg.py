"""Line charts as inline SVG: coloured by the page's style sheet, so that they suit light and dark, and open offline."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 360, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 10, 12, 40

Point = tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One line of a chart.

    Args:
        label: Said when pointed at.
        kind: locked, control or scratch: its colour, its dashes and the shape of its points.
        points: (x, y); a y that is not finite, or above the chart, is drawn at its top.
        crossed: Points drawn as crosses: runs that diverged.
    """

    label: str
    kind: str
    points: tuple[Point, ...]
    crossed: tuple[Point, ...] = ()


def chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
    log_x: bool = False,
    start: float | None = None,
    ceiling: float = math.inf,
) -> Markup:
    """Draw lines.

    Args:
        series: What to draw.
        title: Read out in place of the picture.
        x_label: Name of the horizontal axis.
        y_label: Name of the vertical axis.
        log_x: Logarithmic horizontal axis; x must be positive then.
        start: Loss gains count from: a dotted line.
        ceiling: Where the chart ends: what diverged must not flatten the rest.

    Returns:
        An svg element; a sentence where there is nothing to draw.
    """
    place = math.log10 if log_x else float
    xs = [place(x) for s in series for x, _ in (*s.points, *s.crossed)]
    ys = [y for s in series for _, y in s.points if math.isfinite(y)]
    if not xs or not ys:
        return Markup('<p class="empty">{}: nothing to draw</p>').format(title)
    x_low, x_high = _span(min(xs), max(xs), 0.02)
    seen = [min(y, ceiling) for y in ys] + ([] if start is None else [start])
    y_low, y_high = _span(min(seen), max(seen), 0.06)

    def at(point: Point) -> Point:
        x, y = place(point[0]), point[1] if math.isfinite(point[1]) else y_high
        across = _LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - _LEFT - _RIGHT)
        up = (min(y, y_high) - y_low) / (y_high - y_low)
        return across, HEIGHT - _BOTTOM - up * (HEIGHT - _TOP - _BOTTOM)

    parts = [
        Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">').format(
            WIDTH, HEIGHT, title
        ),
        *_x_axis(x_low, x_high, log_x, x_label),
        *_y_axis(y_low, y_high, y_label),
    ]
    if start is not None:
        _, y = at((10**x_low if log_x else x_low, start))
        parts.append(_line(_LEFT, y, WIDTH - _RIGHT, y, "start"))
    for s in series:
        parts += _drawn(s, at)
    return Markup("").join([*parts, Markup("</svg>")])


def _drawn(series: Series, at: Callable[[Point], Point]) -> list[Markup]:
    kind = series.kind
    found = []
    placed = [at(p) for p in series.points]
    if len(placed) > 1:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        found.append(Markup('<polyline class="{}" points="{}"/>').format(kind, path))
    tip = Markup("<title>{}</title>").format(series.label)
    for x, y in placed:
        found.append(_mark(kind, x, y, tip))
    for x, y in (at(p) for p in series.crossed):
        d = f"M{x - 3:.1f} {y - 3:.1f}l6 6m0 -6l-6 6"
        found.append(Markup('<path class="cross {}" d="{}">{}</path>').format(kind, d, tip))
    return found


def _mark(kind: str, x: float, y: float, tip: Markup) -> Markup:
    if kind == "control":
        return Markup('<rect class="mark {}" x="{}" y="{}" width="5" height="5">{}</rect>').format(
            kind, f"{x - 2.5:.1f}", f"{y - 2.5:.1f}", tip
        )
    if kind == "scratch":
        d = f"M{x:.1f} {y - 3.5:.1f}l3.2 6h-6.4z"
        return Markup('<path class="mark {}" d="{}">{}</path>').format(kind, d, tip)
    return Markup('<circle class="mark {}" cx="{}" cy="{}" r="2.8">{}</circle>').format(
        kind, f"{x:.1f}", f"{y:.1f}", tip
    )


def _x_axis(low: float, high: float, log: bool, label: str) -> list[Markup]:
    ticks = _decades(low, high) if log else [t for t in _ticks(low, high) if t == round(t)]
    base = HEIGHT - _BOTTOM
    found = [_line(_LEFT, base, WIDTH - _RIGHT, base, "axis")]
    for tick in ticks:
        x = _LEFT + (tick - low) / (high - low) * (WIDTH - _LEFT - _RIGHT)
        text = f"1e{tick:.0f}" if log else f"{tick:g}"
        found += [_line(x, base, x, base + 4, "axis"), _text(x, base + 15, text, "middle")]
    return [*found, _text((_LEFT + WIDTH - _RIGHT) / 2, HEIGHT - 6, label, "middle")]


def _y_axis(low: float, high: float, label: str) -> list[Markup]:
    found = []
    for tick in _ticks(low, high):
        y = HEIGHT - _BOTTOM - (tick - low) / (high - low) * (HEIGHT - _TOP - _BOTTOM)
        found += [_line(_LEFT, y, WIDTH - _RIGHT, y, "grid"), _text(_LEFT - 5, y + 3.5, f"{tick:.4g}", "end")]  # fmt: skip
    middle = (_TOP + HEIGHT - _BOTTOM) / 2
    turned = Markup('<text transform="translate(11 {}) rotate(-90)" text-anchor="middle">{}</text>')
    return [*found, turned.format(f"{middle:.1f}", label)]


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    ends = (f"{v:.1f}" for v in (x1, y1, x2, y2))
    return Markup('<line class="{}" x1="{}" y1="{}" x2="{}" y2="{}"/>').format(kind, *ends)


def _text(x: float, y: float, text: str, anchor: str) -> Markup:
    place = (f"{x:.1f}", f"{y:.1f}")
    return Markup('<text x="{}" y="{}" text-anchor="{}">{}</text>').format(*place, anchor, escape(text))  # fmt: skip


def _span(low: float, high: float, margin: float) -> tuple[float, float]:
    """Return an interval with room at both ends, never an empty one."""
    room = margin * (high - low) or max(abs(high) * 0.1, 0.5)
    return low - room, high + room


def _ticks(low: float, high: float, wanted: int = 4) -> list[float]:
    """Return round numbers in an interval.

    >>> _ticks(0.0, 10.0)
    [0.0, 2.5, 5.0, 7.5, 10.0]
    """
    raw = (high - low) / wanted
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * m for m in (1, 2, 2.5, 5, 10) if size * m >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 12) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def _decades(low: float, high: float) -> list[int]:
    """Return powers of ten in an interval of exponents, six at most."""
    first, last = math.ceil(low - 1e-9), math.floor(high + 1e-9)
    if last < first:
        return [round((low + high) / 2)]
    stride = max(1, -(-(last - first + 1) // 6))
    return list(range(first, last + 1, stride))
