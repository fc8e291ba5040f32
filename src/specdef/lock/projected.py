"""The scaled and compensated locks: the top-k singular values times `scale`, with or without a layer C that undoes it.

arXiv 2602.18868 ("SpecDef"): W = U S V^T, W~ = U S~ V^T with the top k values scaled, C = U S S~^-1 U^T, so that C W~ = W.
With U_k the top left singular vectors alone,

    W~ = (I + (scale - 1) U_k U_k^T) W        C = I - (1 - 1/scale) U_k U_k^T,

which needs only U_k, holds for any W (also one that was trained since), and makes C independent of W.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from specdef.errors import SelectionError, SpecDefError
from specdef.lock.config import LockConfig
from specdef.lock.plan import LockPlan, Projection, SiteRecord
from specdef.spectral.topk import topk_svd
from specdef.spectral.views import as_matrix, from_matrix
from specdef.symmetries import is_transposed, layer_index, lockable_matrices, matches
from specdef.weights.source import TensorSource
from specdef.weights.tensor_bytes import DTYPE_NAMES

_PROBES = 64
"""Gaussian inputs the rounding error of a compensated pair is measured on."""

_WORST = 8
"""Matrices with the largest errors that a smaller scale is tried on before it is named."""


def plan_projected(
    source: TensorSource, config: LockConfig, *, progress: Callable[[str], None] | None = None
) -> LockPlan:
    """Decompose every chosen matrix and measure what the lock's rounding does to it.

    Cost: one top-k SVD in float64 per matrix; memory of the largest chosen matrix in float64, three times.

    Args:
        source: The model.
        config: The recipe.
        progress: Called with the name of each matrix before it is decomposed.

    Returns:
        The plan.

    Raises:
        SelectionError: Nothing is selected.
        SpecDefError: A matrix is zero or not finite, or the compensated pair would break the function in its dtype.
    """
    names = select_matrices(source, config)
    projections, records, notes = {}, [], []
    for name in names:
        if progress:
            progress(name)
        transposed = is_transposed(name, source.config)
        matrix = as_matrix(source.read(name), transposed=transposed).double()
        if not bool(matrix.isfinite().all()):
            raise SpecDefError(f"{name} holds NaN or Inf", hint="The checkpoint is damaged.")
        if not bool(matrix.any()):
            raise SpecDefError(
                f"{name} is zero, it has no singular values to scale",
                hint="Leave it out with --target-modules or --layers.",
            )
        k = min(config.k, *matrix.shape)
        if k == min(matrix.shape):
            notes.append(
                f"{name}: k = {k} covers every singular value; uniform scaling is no lock (FACTS 2.5)."
            )
        left, values, _, residual = topk_svd(matrix, k, seed=config.seed)
        basis = torch.linalg.qr(left.double()).Q  # C inverts W~ only as well as U_k is orthonormal
        projection = Projection(
            basis=basis,
            scale=config.top,
            dtype=DTYPE_NAMES[source.dtype(name)],
            transposed=transposed,
        )
        error = None
        if config.method == "compensated":
            error = pair_error(
                matrix, projection, _pair_dtype(source, name, config), seed=config.seed
            )
        projections[name] = projection
        records.append(
            SiteRecord(
                name=name, kind="matrix", layer=layer_index(name), scale=config.top, covers=(name,), k=k,
                sigma_max_before=float(values[0]), sigma_max_after=float(values[0]) * config.top,
                residual=float(residual.max()), relative_error=error,
            )
        )  # fmt: skip
    if config.method == "compensated":
        _require_budget(source, config, projections, records)
    largest = max(records, key=lambda record: record.sigma_max_after or 0.0)
    return LockPlan(
        method=config.method,
        sites=tuple(records),
        projections=projections,
        notes=tuple(notes),
        sigma_max_before=largest.sigma_max_before or float("nan"),
        sigma_max_after=largest.sigma_max_after or float("nan"),
    )


def select_matrices(source: TensorSource, config: LockConfig) -> list[str]:
    """Name the weight matrices that are locked.

    Args:
        source: The model.
        config: Its layers, num_layers and target_modules are used. Without `layers`, `num_layers` blocks spread evenly.

    Returns:
        Names in the source's order.

    Raises:
        SelectionError: Nothing is selected.
    """
    names = lockable_matrices(source.config, source.shapes)
    layers = config.layers
    if layers is None:
        blocks = sorted({i for name in names if (i := layer_index(name)) is not None})
        count = min(config.num_layers, len(blocks))
        layers = (
            tuple(blocks[(2 * i + 1) * len(blocks) // (2 * count)] for i in range(count))
            if blocks
            else None
        )
    kept = [name for name in names if layers is None or layer_index(name) in layers]
    if config.target_modules is not None:
        kept = [name for name in kept if matches(name, config.target_modules)]
    if not kept:
        raise SelectionError(
            f"layers={config.layers}, target_modules={config.target_modules} select none of {len(names)} matrices",
            nearest=names[:5],
            hint="`specdef inspect MODEL` lists the matrices.",
        )
    return kept


def scaled_matrix(weight: Tensor, projection: Projection) -> Tensor:
    """Return W~ in float64, stored as `weight` is.

    Args:
        weight: The tensor as stored: (out, in), (in, out) if transposed, or (out, in, kh, kw).
        projection: Basis and scale.

    Returns:
        Same shape, float64.
    """
    matrix = as_matrix(weight, transposed=projection.transposed).double()
    basis = projection.basis.to(matrix.device)
    matrix = matrix + (projection.scale - 1) * basis @ (basis.T @ matrix)
    return from_matrix(matrix, weight, transposed=projection.transposed)


def compensation(projection: Projection) -> Tensor:
    """Return C = I - (1 - 1/scale) U_k U_k^T, (m, m) float64."""
    basis = projection.basis
    return (
        torch.eye(basis.shape[0], dtype=basis.dtype) - (1 - 1 / projection.scale) * basis @ basis.T
    )


def pair_error(
    matrix: Tensor, projection: Projection, dtype: torch.dtype, *, seed: int = 0
) -> float:
    """Measure the relative error that storing and running C, W~ in `dtype` adds to W x.

    Args:
        matrix: (m, n) W in float64.
        projection: Basis and scale.
        dtype: Storage and compute dtype of the pair.
        seed: Seeds the Gaussian inputs.

    Returns:
        |C (W~ x) - W x| / |W x| over 64 Gaussian inputs, every step rounded to `dtype`; inf where it overflows.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(matrix.shape[1], _PROBES, generator=generator, dtype=torch.float64).to(dtype)
    locked = matrix + (projection.scale - 1) * projection.basis @ (projection.basis.T @ matrix)
    y = compensation(projection).to(dtype) @ (locked.to(dtype) @ x)
    exact = matrix @ x.double()
    error = float((y.double() - exact).norm() / exact.norm())
    return error if error == error else float("inf")


def _pair_dtype(source: TensorSource, name: str, config: LockConfig) -> torch.dtype:
    return torch.float32 if config.storage_dtype else source.dtype(name)


def _require_budget(
    source: TensorSource,
    config: LockConfig,
    projections: Mapping[str, Projection],
    records: Sequence[SiteRecord],
) -> None:
    """Refuse a scale whose rounding would break the function, and name the largest one that was found to fit.

    Raises:
        SpecDefError: A pair adds more than the error allowed.
    """
    worst = max(records, key=lambda record: record.relative_error or 0.0)
    error = worst.relative_error or 0.0
    if error <= config.max_relative_error:
        return
    scale = _floor(config.top * config.max_relative_error / error) if error < float("inf") else 2.0
    matrices = {  # worst first: most scales that do not fit are found out by the first matrix
        r.name: as_matrix(source.read(r.name), transposed=projections[r.name].transposed).double()
        for r in sorted(records, key=lambda r: -(r.relative_error or 0.0))[:_WORST]
    }

    def fits(scale: float) -> bool:
        return all(
            pair_error(
                matrix,
                replace(projections[name], scale=scale),
                _pair_dtype(source, name, config),
                seed=config.seed,
            )
            <= config.max_relative_error
            for name, matrix in matrices.items()
        )

    while scale > 1 and not fits(scale):
        scale = _floor(
            0.9 * scale
        )  # part of the error is the dtype's own and does not fall with the scale
    remedy = f"the largest scale that fits is about {scale:g}" if scale > 1 else "no scale fits"
    raise SpecDefError(
        f"{worst.name}: at scale {config.top:g} the compensated pair adds a relative error of {error:.2g} in "
        f"{str(_pair_dtype(source, worst.name, config)).removeprefix('torch.')} (allowed: {config.max_relative_error:g}); {remedy}",
        hint="Use that scale, --storage-dtype float32 for the locked pairs, or --method absorbed (exact).",
    )


def _floor(value: float) -> float:
    """Round down to one significant digit: a budget is not to be promised to three."""
    if not 0 < value < float("inf"):
        return 0.0
    power = 10.0 ** (len(f"{value:.0f}") - 1) if value >= 1 else 10.0 ** -(len(f"{1 / value:.0f}"))
    return (value // power) * power
