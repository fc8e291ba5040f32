"""Figure 1 of "Locking Open Weight Models with Spectral Deformation": steps to fit a quadratic against its condition number.

f(theta) = 1/2 |X theta - y|^2 with Hessian X^T X, smallest eigenvalue 1, largest kappa; X Gaussian (64 x 8), its
singular values moved. Two ways to raise kappa: stretch the whole spectrum over [1, kappa], or raise the largest value alone as a
lock does. Steps until f - f* is 1e-6 of its start, measured by running each method, and predicted from the spectrum:

    gradient descent: f(t) - f* = 1/2 sum_j l_j e_j^2 (1 - lr l_j)^(2t), with e_j the start's error along eigenvector j;
    heavy ball and Nesterov: the two-term recursion of every e_j.

Rates: gradient descent 2 / (max + min), best possible, and 0.99 of the stability limit 2 / max (at the limit itself the top error
changes sign for ever). Heavy ball after Polyak; Nesterov with the constants that are best for quadratics (Lessard, Recht & Packard,
arXiv 1408.3595).
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from specdef.experiments.paper.earlier import figure1_comparisons
from specdef.experiments.record import (
    Progress,
    claim,
    exponent,
    make_record,
    write_record,
)

Array = NDArray[np.float64]

SAMPLES, FEATURES, TOLERANCE = 64, 8, 1e-6
"""TOLERANCE: f - f* as a share of its start."""

KAPPAS = {
    "cpu": (10.0, 30.0, 100.0, 300.0, 1e3, 3e3, 1e4, 3e4, 1e5),
    "smoke": (10.0, 100.0, 1e3),
}
SPECTRA = ("stretched", "top only")
EDGE = 0.99


def run(
    out: Path,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    size: Literal["cpu", "full", "smoke"] = "cpu",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure and predict, and write figure1.json, figure1.md and figure1.png.

    Args:
        out: Folder.
        seeds: Of X and y.
        size: cpu is whole already, and full the same; "smoke" takes three condition numbers up to 1e3.
        progress: Called with one line per condition number.

    Returns:
        The record, as JSON values: command, versions, seeds, seconds, claims, summary, data.
    """
    began = time.perf_counter()
    rows: list[dict[str, Any]] = []
    for kappa in KAPPAS["smoke" if size == "smoke" else "cpu"]:
        problems = [(seed, s, *quadratic(seed, kappa, s)) for seed in seeds for s in SPECTRA]
        H = np.stack([problem[2] for problem in problems])
        target = np.stack([problem[3] for problem in problems])
        for name, (rate, momentum, ahead) in methods(kappa).items():
            steps, worst = measure(H, target, rate, momentum, ahead)
            for i, (seed, spectrum, *_) in enumerate(problems):
                predicted = predict(H[i], target[i], rate, momentum, ahead)
                rows.append(
                    {"kappa": kappa, "method": name, "seed": seed, "spectrum": spectrum, "measured": int(steps[i]),
                     "predicted": predicted, "printed_bound": float(worst[i])}
                )  # fmt: skip
        if progress:
            progress(f"figure 1: condition number {kappa:g}")
    limit = at_the_limit(seeds[0])
    claims = _claims(rows, limit)
    record = make_record(
        "figure1", {"seeds": seeds, "size": size}, seconds=time.perf_counter() - began, claims=claims, comparisons=figure1_comparisons(claims),
        data={"tolerance": TOLERANCE, "rows": rows, "at_the_limit": limit},
    )  # fmt: skip
    write_record(out, "figure1", record, _plot(rows))
    return record


def quadratic(seed: int, kappa: float, spectrum: str) -> tuple[Array, Array]:
    """Draw a quadratic with smallest eigenvalue 1 and largest kappa.

    Args:
        seed: Of X and y.
        kappa: Condition number.
        spectrum: "stretched": all eigenvalues of X^T X moved affinely onto [1, kappa]. "top only": scaled to smallest 1, then the
            largest replaced by kappa.

    Returns:
        The Hessian X^T X and the minimiser, which is the start's error: the start is 0.
    """
    generator = np.random.default_rng(seed)
    U, S, Vh = np.linalg.svd(generator.standard_normal((SAMPLES, FEATURES)), full_matrices=False)
    values = S**2 / S[-1] ** 2
    if spectrum == "stretched":
        values = 1 + (kappa - 1) * (values - 1) / (values[0] - 1)
    else:
        values = np.minimum(values, kappa)
        values[0] = kappa
    X = (U * np.sqrt(values)) @ Vh
    y = generator.standard_normal(SAMPLES)
    return X.T @ X, Vh.T @ ((U.T @ y) / np.sqrt(values))


def methods(kappa: float) -> dict[str, tuple[float, float, bool]]:
    """Return (rate, momentum, whether the gradient is taken ahead) of each method for eigenvalues in [1, kappa]."""
    root, nesterov = math.sqrt(kappa), math.sqrt(3 * kappa + 1)
    return {
        "GD, 2/(max+min)": (2 / (kappa + 1), 0.0, False),
        "GD, 0.99 of the limit": (EDGE * 2 / kappa, 0.0, False),
        "heavy ball": (4 / (root + 1) ** 2, ((root - 1) / (root + 1)) ** 2, False),
        "Nesterov": (4 / (3 * kappa + 1), (nesterov - 2) / (nesterov + 2), True),
    }


def law(method: str, kappa: float) -> float:
    """Return the asymptotic number of steps, from the slowest eigenvalue alone."""
    digits = math.log(1 / TOLERANCE) / 4
    if method.startswith("GD"):
        return digits * kappa / (EDGE if "limit" in method else 1.0)
    return digits * math.sqrt(3 * kappa + 1 if method == "Nesterov" else kappa)


def measure(
    H: Array, target: Array, rate: float, momentum: float, ahead: bool, *, budget: int = 10**7
) -> tuple[NDArray[np.int64], Array]:
    """Run a method on several quadratics from 0 until each has reached the tolerance.

    Args:
        H: Hessians `[problems, n, n]`.
        target: Minimisers `[problems, n]`.
        rate: Learning rate.
        momentum: Of heavy ball or Nesterov.
        ahead: Take the gradient at the point that momentum leads to (Nesterov).
        budget: Steps after which the rest counts as not reached (-1).

    Returns:
        Steps, and the largest (f(t) - f*) / (sigma_max |theta_0 - theta*|^2 (1 - 2/sqrt kappa)^t) on the way: at
        most 1 where section 2's printed rate holds (its eta sqrt kappa is 2/sqrt kappa at the largest rate when sigma_min = 1).
    """
    b = np.einsum("pij,pj->pi", H, target)
    kappa = np.linalg.eigvalsh(H)[:, -1]
    theta, before = np.zeros_like(target), np.zeros_like(target)
    start = 0.5 * (target * b).sum(1)
    log_bound = np.log(kappa * (target**2).sum(1))
    # At kappa <= 4 the printed rate is zero or less: it would claim convergence in one step.
    log_rate = np.log(np.maximum(1 - 2 / np.sqrt(kappa), 1e-300))
    steps = np.full(len(H), -1)
    worst = np.full(len(H), -np.inf)
    for t in range(budget + 1):
        gradient = (H @ theta[:, :, None])[:, :, 0] - b
        excess = 0.5 * ((theta - target) * gradient).sum(1)
        open_ = steps < 0
        if momentum:
            ratio = np.log(np.maximum(excess, 1e-300)) - log_bound - t * log_rate
            worst = np.where(open_, np.maximum(worst, ratio), worst)
        steps[open_ & (excess <= TOLERANCE * start)] = t
        if (steps >= 0).all() or not (excess < 1e100).all():
            break
        move = momentum * (theta - before)
        if ahead:
            gradient = (H @ (theta + move)[:, :, None])[:, :, 0] - b
        theta, before = theta + move - rate * gradient, theta
    return steps, np.exp(np.minimum(worst, 700.0))


def predict(H: Array, target: Array, rate: float, momentum: float, ahead: bool) -> int:
    """Count the steps from the spectrum.

    Args:
        H: Hessian.
        target: Minimiser.
        rate: Learning rate, below the stability limit.
        momentum: Of heavy ball or Nesterov.
        ahead: Nesterov.

    Returns:
        The first t with f(t) - f* at most the tolerance times its start.
    """
    values, vectors = np.linalg.eigh(H)
    error = vectors.T @ target
    weights = values * error**2
    goal = TOLERANCE * float(weights.sum())
    if not momentum:

        def reached(t: int) -> bool:
            return float((weights * (1 - rate * values) ** (2 * t)).sum()) <= goal

        high = 1
        while not reached(high):
            high *= 2
        low = high // 2
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if reached(middle) else (middle + 1, high)
        return low
    now, before, t = np.ones_like(error), np.ones_like(error), 0
    while float((weights * now**2).sum()) > goal:
        forward = now + momentum * (now - before)
        pull = rate * values * (forward if ahead else now)
        now, before, t = forward - pull, now, t + 1
    return t


def at_the_limit(seed: int, kappa: float = 100.0) -> dict[str, Any]:
    """Say what gradient descent does just below, at and just above 2 / sigma_max in as many steps as the best rate needs tenfold."""
    H, target = quadratic(seed, kappa, "stretched")
    best = predict(H, target, 2 / (kappa + 1), 0.0, False)
    values, vectors = np.linalg.eigh(H)
    weights = values * (vectors.T @ target) ** 2
    left = {
        share: float((weights * (1 - share * 2 / values[-1] * values) ** (20 * best)).sum() / weights.sum())
        for share in (EDGE, 1.0, 1.01)
    }  # fmt: skip
    return {"kappa": kappa, "steps": 10 * best, "excess_left": {str(s): v for s, v in left.items()}}


def _claims(rows: list[dict[str, Any]], limit: dict[str, Any]) -> list[dict[str, Any]]:
    def chosen(start: str, spectrum: str | None = None) -> list[dict[str, Any]]:
        return [r for r in rows if r["method"].startswith(start) and spectrum in (None, r["spectrum"])]  # fmt: skip

    def fitted(method: str) -> dict[str, float]:
        return {
            spectrum: round(exponent([r["kappa"] for r in part], [r["measured"] for r in part]), 4)
            for spectrum in SPECTRA
            if (part := [r for r in chosen(method, spectrum) if r["kappa"] >= 100])
        }

    gd, momentum = chosen("GD"), chosen("heavy ball") + chosen("Nesterov")
    off = {name: max(abs(r["measured"] - r["predicted"]) for r in part) for name, part in (("GD", gd), ("accelerated", momentum))}  # fmt: skip
    slow, fast = fitted("GD, 2"), {m: fitted(m) for m in ("heavy ball", "Nesterov")}
    worst = {
        m: {
            k: max(r["printed_bound"] for r in chosen(m) if r["kappa"] == k)
            for k in sorted({r["kappa"] for r in rows})
        }
        for m in ("heavy ball", "Nesterov")
    }
    left = limit["excess_left"]
    return [
        claim("Steps of gradient descent follow from the spectrum to within one step.", off["GD"] <= 1, runs=len(gd), largest_difference=off["GD"]),
        claim("Steps of heavy ball and Nesterov follow from the spectrum to within one step.", off["accelerated"] <= 1, runs=len(momentum), largest_difference=off["accelerated"]),
        claim("Gradient descent at its best rate needs O(kappa) steps.", all(abs(p - 1) <= 0.05 for p in slow.values()), exponents=slow, fitted_from_kappa=100),
        # From rest, heavy ball's fastest error first grows like t: sqrt(kappa) log(kappa) steps, hence the wider band.
        claim("Accelerated methods need O(sqrt kappa) steps, up to a logarithm.", all(abs(p - 0.5) <= 0.1 for e in fast.values() for p in e.values()), exponents=fast, fitted_from_kappa=100),
        claim("The learning rate is limited to 2/sigma_max: below it converges, at it stalls, above it diverges.", left[str(EDGE)] < TOLERANCE < left["1.0"] < 1 < left["1.01"], **limit),
        claim("f - f* <= sigma_max |theta_0 - theta*|^2 (1 - 2/sqrt kappa)^t, section 2's rate at the largest learning rate, until the tolerance.", all(w <= 1 for part in worst.values() for w in part.values()), largest_ratio=worst),
    ]  # fmt: skip


def _plot(rows: list[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, spectrum in zip(axes, SPECTRA, strict=True):
        for i, method in enumerate(methods(10.0)):
            part = [r for r in rows if r["method"] == method and r["spectrum"] == spectrum]
            kappas = sorted({r["kappa"] for r in part})
            colour = f"C{i}"
            axis.plot([r["kappa"] for r in part], [r["measured"] for r in part], "o", ms=5, mfc="none", color=colour, label=f"{method}: measured")  # fmt: skip
            means = [np.mean([r["predicted"] for r in part if r["kappa"] == k]) for k in kappas]
            axis.plot(kappas, means, "-", color=colour, lw=1.2)
            axis.plot(kappas, [law(method, k) for k in kappas], ":", color=colour, lw=1)
        axis.set(
            xscale="log",
            yscale="log",
            xlabel="condition number (smallest eigenvalue 1)",
            title=f"spectrum: {spectrum}",
        )
    axes[0].set_ylabel(f"steps until the excess loss is {TOLERANCE:g} of its start")
    axes[0].plot([], [], "k-", lw=1.2, label="from the spectrum (mean of seeds)")
    axes[0].plot([], [], "k:", lw=1, label="slowest eigenvalue alone: kappa, sqrt kappa")
    axes[0].legend(fontsize=8)
    return figure
