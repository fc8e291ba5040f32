"""What `specdef spectrum` measures and reports, and its plot."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from specdef.cli.analysis import Workload
from specdef.curvature.base import CurvatureOperator
from specdef.curvature.density import SpectralDensity, signed_log, spectral_density
from specdef.curvature.eigenvalues import Eigenvalues, top_eigenvalues
from specdef.curvature.operators import EmpiricalFisherOperator, GGNOperator, HessianOperator

_OPERATORS: dict[str, Any] = {
    "hessian": HessianOperator, "ggn": GGNOperator, "fisher": EmpiricalFisherOperator,
}  # fmt: skip

_NO_BOUND_BY_WEIGHTS = (
    "not computed, because the bounds by weights are for squared error and for networks whose every path passes the weight; "
    "this model has cross-entropy and skip connections"
)


def make_operator(
    kind: str, work: Workload, params: Sequence[str] | None, dtype: str
) -> CurvatureOperator:
    """Build the matrix of a workload.

    Args:
        kind: "hessian", "ggn" or "fisher".
        work: Model, batches and loss.
        params: Parameters, None for all.
        dtype: Type to compute in.

    Returns:
        The operator.
    """
    built: CurvatureOperator = _OPERATORS[kind](
        work.loaded.model, work.batches, work.loss, params, dtype=getattr(torch, dtype)
    )
    return built


def group_by_block(names: Iterable[str]) -> dict[str, list[str]]:
    """Group parameters: by the first numbered module on their way ("model.layers.3"), else by their own module.

    Args:
        names: Names of parameters.

    Returns:
        Block -> its parameters, in order.

    >>> group_by_block(["embed.weight", "layers.0.mlp.up.weight", "layers.0.norm.weight"])
    {'embed': ['embed.weight'], 'layers.0': ['layers.0.mlp.up.weight', 'layers.0.norm.weight']}
    """
    out: dict[str, list[str]] = {}
    for name in names:
        numbered = re.match(r"(?:[^.]+\.)*?\d+(?=\.)", name)
        block = numbered[0] if numbered else name.rpartition(".")[0] or name
        out.setdefault(block, []).append(name)
    return out


def measure(
    H: CurvatureOperator,
    k: int,
    num_probes: int,
    num_steps: int,
    *,
    tol: float,
    max_matvecs: int,
    seed: int,
) -> tuple[Eigenvalues, SpectralDensity | None]:
    """Compute the largest eigenvalues, and the density of the others.

    Args:
        H: The matrix.
        k: How many eigenvalues; fewer where there are fewer.
        num_probes: Random vectors for the density; 0 for none.
        num_steps: Lanczos steps for each.
        tol: Relative error accepted.
        max_matvecs: Products for the eigenvalues.
        seed: Of all that is drawn.

    Returns:
        The eigenvalues with their vectors, and the density.
    """
    n = H.shape[0]
    k = min(k, n)
    found = top_eigenvalues(H, k, tol=tol, max_matvecs=max(max_matvecs, k), seed=seed)
    if not num_probes:
        return found, None
    # Outliers would cost the density its steps, and drown the bulk of a locked model.
    deflate = found if k < n else None
    steps = min(num_steps, n)
    return found, spectral_density(H, num_probes, steps, seed=seed + 1, deflate=deflate)


def block_eigenvalue(
    block: CurvatureOperator, *, tol: float, max_matvecs: int, seed: int
) -> Eigenvalues:
    """Compute the largest eigenvalue of the matrix restricted to some parameters.

    Args:
        block: The restricted matrix.
        tol: Relative error accepted.
        max_matvecs: Products it may take.
        seed: Of the random start.

    Returns:
        One eigenvalue, of largest magnitude.
    """
    return top_eigenvalues(block, 1, tol=tol, max_matvecs=max_matvecs, seed=seed, vectors=False)


def spectrum_report(
    H: CurvatureOperator,
    found: Eigenvalues,
    tops: Mapping[str, Eigenvalues],
    density: SpectralDensity | None,
) -> dict[str, Any]:
    """Put what was measured into JSON values.

    Args:
        H: The matrix.
        found: Its largest eigenvalues.
        tops: Largest eigenvalue by block; may be empty.
        density: Its density; may be missing.

    Returns:
        `num_parameters, terms, loss, top, blocks, bounds, density, num_matvecs`.
    """
    parts = group_by_block(H.slices)
    return {
        "num_parameters": H.shape[0], "terms": H.num_terms, "loss": H.loss(), "top": _top(found, H, parts),
        "blocks": _blocks(parts, tops, H), "bounds": _bounds(found, tops), "density": _density(density),
        "num_matvecs": H.num_matvecs + sum(top.num_matvecs for top in tops.values()),
    }  # fmt: skip


def _top(
    found: Eigenvalues, H: CurvatureOperator, parts: Mapping[str, list[str]]
) -> list[dict[str, Any]]:
    assert found.vectors is not None
    rows = []
    for i, vector in enumerate(found.vectors):
        square = vector.double().square()
        mass = {
            block: sum(float(square[H.slices[name]].sum()) for name in members)
            for block, members in parts.items()
        }
        rows.append({"value": float(found.values[i]), **_quality(found, i), "mass": mass})
    return rows


def _blocks(
    parts: Mapping[str, list[str]], tops: Mapping[str, Eigenvalues], H: CurvatureOperator
) -> dict[str, dict[str, Any]]:
    out: dict[str, dict[str, Any]] = {}
    for name, members in parts.items():
        out[name] = {"num_parameters": sum(H.parameters[p].numel() for p in members)}
        if name in tops:
            out[name] |= {"value": float(tops[name].values[0]), **_quality(tops[name], 0)}
    return out


def _quality(found: Eigenvalues, i: int) -> dict[str, Any]:
    return {
        "error": float(found.errors[i]), "residual": float(found.residuals[i]), "converged": bool(found.converged[i]),
    }  # fmt: skip


def _bounds(found: Eigenvalues, tops: Mapping[str, Eigenvalues]) -> list[dict[str, Any]]:
    """Return lower bounds on the largest |eigenvalue|, each with truth / bound."""
    rows: list[dict[str, Any]] = []
    if tops:
        name = max(tops, key=lambda block: abs(float(tops[block].values[0])))
        value, truth = abs(float(tops[name].values[0])), abs(float(found.values[0]))
        rows.append(
            {
                "name": "block", "block": name, "value": value, "tightness": truth / value if value else math.inf,
                "equation": "max |lambda(H)| >= max |lambda(H_block)| (Cauchy interlacing)",
            }
        )  # fmt: skip
    rows.append({"name": "weights", "value": None, "reason": _NO_BOUND_BY_WEIGHTS})
    return rows


def _density(density: SpectralDensity | None) -> dict[str, Any] | None:
    if density is None:
        return None
    mean, error = density.moment(1)
    # A rule of m nodes says little of what lies within 1 / m of zero, relative to the largest.
    near = 0.01 * max(abs(density.quantile(0.0)), abs(density.quantile(1.0)))
    below, up_to = density.cumulative(torch.tensor([-near, near]).double()).value.tolist()
    return {
        "trace": mean * density.n, "trace_standard_error": error * density.n, "floor": density.floor,
        "near_zero": near, "below": below, "above": 1 - up_to,
        "quantiles": {str(q): density.quantile(q) for q in (0.01, 0.1, 0.5, 0.9, 0.99)},
    }  # fmt: skip


def curves(density: SpectralDensity | None) -> dict[str, Any] | None:
    """Return the densities of the plot.

    Args:
        density: What to draw; None gives None.

    Returns:
        `linear` and `signed_log`, each with eigenvalues, density per unit or per decade, and its standard error.
    """
    if density is None:
        return None
    return {
        name: {
            "eigenvalue": curve.grid.tolist(), "density": curve.value.tolist(),
            "standard_error": curve.standard_error.tolist(),
        }
        for name, curve in (("linear", density.density()), ("signed_log", density.log_density()))
    }  # fmt: skip


def plot_spectrum(path: Path, report: Mapping[str, Any], density: SpectralDensity | None) -> None:
    """Draw the density on a linear and on a signed logarithmic axis, and the blocks.

    Args:
        path: PNG file to write.
        report: As printed.
        density: What to draw; without it only the blocks.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4.5), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    figure.suptitle(f"{report['operator']} of {Path(report['model']).name} on {report['data']}")
    values = [row["value"] for row in report["top"]]
    if density is None:
        for axis in (left, middle):
            axis.set_axis_off()
    else:
        curve = density.density()
        left.semilogy(curve.grid, curve.value.clamp_min(1e-12))
        left.set(xlabel="eigenvalue", ylabel="density per unit", ylim=(1e-8, None))
        curve = density.log_density()
        x, y, error = curve.position, curve.value, curve.standard_error.nan_to_num(0.0)
        middle.plot(x, y)
        middle.fill_between(x, y - error, y + error, alpha=0.3)
        floor = density.floor or 1.0
        middle.axvspan(-0.5, 0.5, color="0.9", label="below rounding")
        middle.set(xlabel="eigenvalue (signed logarithm)", ylabel="density per decade")
        middle.set(yscale="log", ylim=(0.1 / density.n, None))  # one eigenvalue is still seen
        middle.set_xticks(*_signed_ticks(floor, float(curve.grid.abs().max())))
        places = signed_log(torch.tensor(values, dtype=torch.float64), floor).tolist()
        for axis, where in ((left, values), (middle, places)):
            axis.plot(
                where, [0.02] * len(where), "|", color="tab:red", markersize=14,
                transform=axis.get_xaxis_transform(), label="largest eigenvalues",
            )  # fmt: skip
        middle.legend(fontsize="small", loc="upper center")
    _plot_blocks(right, report)
    figure.savefig(path, dpi=120)


def _signed_ticks(floor: float, largest: float) -> tuple[list[float], list[str]]:
    """Return places and labels of zero and some powers of ten on either side."""
    low, high = math.ceil(math.log10(floor)), math.floor(math.log10(largest))
    powers = range(high, low, -max(1, (high - low) // 3))
    values = [sign * 10.0**p for p in powers for sign in (-1, 1)]
    places = signed_log(torch.tensor(values, dtype=torch.float64), floor).tolist()
    labels = [f"${'-' if v < 0 else ''}10^{{{round(math.log10(abs(v)))}}}$" for v in values]
    return [0.0, *places], ["0", *labels]


def _plot_blocks(axis: Any, report: Mapping[str, Any]) -> None:
    names = list(report["blocks"])
    heights = [abs(row.get("value", 0.0)) for row in report["blocks"].values()]
    mass = [report["top"][0]["mass"][name] for name in names]
    rows = list(range(len(names)))
    if any(heights):
        axis.barh(rows, heights, height=0.8, color="0.7", label="largest |eigenvalue| of the block")
        axis.set_xscale("log")
        axis.set_xlabel("|eigenvalue|")
        axis = axis.twiny()
    axis.plot(mass, rows, "o", color="tab:red", label="mass of the first eigenvector")
    axis.set(xlim=(0, 1), xlabel="mass of the first eigenvector (red)")
    axis.set_yticks(rows, names, fontsize="x-small" if len(rows) < 20 else "xx-small")
    axis.invert_yaxis()
