"""Time `topk_svd` beside `torch.linalg.svd` and `torch.svd_lowrank` at equal residual, in one run.

`svd_lowrank` gets, for each width q, the smallest niter whose residual is no larger than the one `topk_svd` reached
(bisection up to CAP times the time of `topk_svd`), and the fastest such (q, niter) is timed in turns with `topk_svd`.
Its time does not include measuring a residual; that of `topk_svd` does. LAPACK's time does not depend on the values, so
it is taken once per shape, on the Gaussian matrix, whose singular values it also checks.

    python benchmarks/topk_svd.py --out benchmarks/results/topk_svd.json [--quick] [--threads N]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specdef.spectral.topk import topk_svd_info

CAP = 3.0


def decaying(m: int, n: int, values: Tensor, seed: int) -> Tensor:
    """Build an (m, n) float32 matrix with the given singular values, mixed by 64 reflections on each side."""
    generator = torch.Generator().manual_seed(seed)
    A = torch.zeros(m, n)
    A.diagonal()[:] = values.float()
    left = torch.linalg.qr(torch.randn(m, 64, generator=generator))[0]
    right = torch.linalg.qr(torch.randn(n, 64, generator=generator))[0]
    A = A - 2 * left @ (left.T @ A)
    return A - 2 * (A @ right) @ right.T


def seconds(call: Callable[[], Any]) -> float:
    """Return the wall time of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def residual(A: Tensor, U: Tensor, S: Tensor, V: Tensor, k: int) -> float:
    """Measure the largest residual of the first k triplets, relative to S[0]."""
    U, S, V = U[:, :k], S[:k], V[:, :k]
    left = torch.linalg.vector_norm(A @ V - U * S, dim=0)
    right = torch.linalg.vector_norm(A.T @ U - V * S, dim=0)
    return float((torch.maximum(left, right) / S[0]).max())


def lowrank(A: Tensor, q: int, niter: int) -> tuple[Tensor, Tensor, Tensor]:
    """Run `torch.svd_lowrank` from a fixed seed (it knows only the global generator)."""
    torch.manual_seed(0)
    return torch.svd_lowrank(A, q, niter)


def best_lowrank(A: Tensor, k: int, target: float, limit: float) -> dict[str, Any] | None:
    """Find the fastest (q, niter) of `svd_lowrank` with residual <= target in at most `limit` seconds."""
    best: dict[str, Any] | None = None
    widths = sorted({max(k, 16), max(k + 7, 16), 32, 48})
    for q in widths:
        once = seconds(lambda q=q: lowrank(A, q, 0))
        pair = max((seconds(lambda q=q: lowrank(A, q, 2)) - once) / 2, 1e-5)
        bound = limit if best is None else min(limit, best["seconds"])
        high = int((bound - once) / pair)
        if high < 0 or residual(A, *lowrank(A, q, high), k) > target:
            continue
        low = -1
        while high - low > 1:
            middle = (low + high) // 2
            if residual(A, *lowrank(A, q, middle), k) <= target:
                high = middle
            else:
                low = middle
        took = statistics.median(seconds(lambda q=q, h=high: lowrank(A, q, h)) for _ in range(3))
        if best is None or took < best["seconds"]:
            reached = residual(A, *lowrank(A, q, high), k)
            best = {"q": q, "niter": high, "seconds": took, "residual": reached}
    return best


def compare(
    A: Tensor, k: int, oracle: Tensor, lapack: float | None, repeats: int
) -> dict[str, Any]:
    """Time one (matrix, k) against both references."""
    info = topk_svd_info(A, k)
    reached = float(info.svd.residual.max())
    error = float(((info.svd.S.double() - oracle[:k]).abs() / oracle[:k]).max())
    first = statistics.median(seconds(lambda: topk_svd_info(A, k)) for _ in range(2))
    other = best_lowrank(A, k, reached, CAP * first)
    ours, theirs = [], []
    for _ in range(repeats):
        ours.append(seconds(lambda: topk_svd_info(A, k)))
        if other is not None:
            theirs.append(seconds(lambda: lowrank(A, other["q"], other["niter"])))
    mine = statistics.median(ours)
    row: dict[str, Any] = {
        "k": k,
        "method": info.method,
        "num_passes": info.num_passes,
        "seconds": mine,
        "residual": reached,
        "max_relative_error_of_S": error,
        "lapack_seconds": lapack,
        "lapack_ratio": None if lapack is None else lapack / mine,
    }
    if other is None:
        row["lowrank"] = f"residual not reached within {CAP} times our time"
        row["lowrank_ratio_at_least"] = CAP
    else:
        other["seconds"] = statistics.median(theirs)
        row["lowrank"] = other
        row["lowrank_ratio"] = other["seconds"] / mine
    return row


def main() -> None:
    """Run the comparison and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="576 x 1536 only")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    began = time.perf_counter()
    load = os.getloadavg()
    shapes = [(576, 1536)] if args.quick else [(576, 1536), (4096, 4096), (4096, 14336)]
    results: list[dict[str, Any]] = []
    for m, n in shapes:
        side = min(m, n)
        repeats = 11 if side < 1000 else 3
        index = torch.arange(1, side + 1, dtype=torch.float64)
        gaussian = torch.randn(m, n, generator=torch.Generator().manual_seed(0))
        held: list[Tensor] = []
        lapack = seconds(
            lambda A=gaussian, h=held: h.append(torch.linalg.svd(A, full_matrices=False)[1])
        )
        exact = held[0].double()
        cases: list[tuple[str, Tensor, Tensor]] = [("gaussian", gaussian, exact)]
        for power in (0.5, 1.0):
            values = index**-power
            cases.append((f"i^-{power}", decaying(m, n, values, seed=1), values))
        for name, A, oracle in cases:
            for k in (1, 8, 25):
                row = {"shape": [m, n], "spectrum": name, **compare(A, k, oracle, lapack, repeats)}
                row["oracle"] = "torch.linalg.svd" if name == "gaussian" else "planted values"
                results.append(row)
                ratio = row.get("lowrank_ratio", f">{CAP}")
                print(
                    f"{m}x{n} {name} k={k}: {row['seconds'] * 1e3:.1f} ms {row['method']}, residual "
                    f"{row['residual']:.1e}, error {row['max_relative_error_of_S']:.1e}, LAPACK x{row['lapack_ratio']:.1f}, "
                    f"svd_lowrank x{ratio if isinstance(ratio, str) else round(ratio, 2)}",
                    flush=True,
                )
    report = {
        "benchmark": "topk_svd against torch.linalg.svd and torch.svd_lowrank at equal residual",
        "dtype": "float32",
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "load_average_at_start": load[0],
        "load_average_at_end": os.getloadavg()[0],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "seconds_total": time.perf_counter() - began,
        "quick": args.quick,
        "results": results,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    partial = args.out.with_suffix(".tmp")
    partial.write_text(json.dumps(report, indent=1) + "\n")
    partial.replace(args.out)


if __name__ == "__main__":
    main()
