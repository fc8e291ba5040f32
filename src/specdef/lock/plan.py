"""What a lock is going to do, before it does it: edits of tensors, and a record for people."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from specdef.lock.range_report import RangeReport
from specdef.weights.edit import ScaleEdit


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteRecord:
    """One locked place.

    Args:
        name: Site (absorbed) or weight matrix (compensated, scaled).
        kind: Kind of the symmetry, or "matrix".
        layer: Block index, where there is one.
        scale: The multiplier.
        covers: Tensors whose slices became explosive: those that read the channel or write it (absorbed), or the matrix itself.
        side: "readers" where those that read the channel were divided by a scale above 1, "writers" where those that write it were multiplied
            by one below (absorbed).
        channel: Channel scaled (absorbed).
        k: Singular values scaled (compensated, scaled).
        score: Score the channel was chosen by (absorbed): usefulness or activity, measured or from the weights.
        sigma_max_before: Largest singular value of the matrix before, where it was computed.
        sigma_max_after: The same after.
        residual: Relative residual of those singular values.
        relative_error: Error the pair adds to the layer's output, relative (compensated).
    """

    name: str
    kind: str
    scale: float
    covers: tuple[str, ...]
    layer: int | None = None
    channel: int | None = None
    side: str | None = None
    k: int | None = None
    score: float | None = None
    sigma_max_before: float | None = None
    sigma_max_after: float | None = None
    residual: float | None = None
    relative_error: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that say something."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class Projection:
    """How one matrix is locked: W~ = (I + (scale - 1) U U^T) W, and where C = I - (1 - 1/scale) U U^T goes.

    Args:
        basis: (m, k) float64, orthonormal columns: the top left singular vectors U of W.
        scale: The multiplier.
        dtype: Dtype name of the original tensor ("BF16").
        transposed: The tensor is stored as W^T (GPT-2's Conv1D).
    """

    basis: Tensor
    scale: float
    dtype: str
    transposed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LockPlan:
    """The whole plan of a lock.

    Args:
        method: The lock method.
        sites: What is locked, for the record.
        scalings: Tensor name to exact scalings (absorbed).
        projections: Tensor name to projection (compensated, scaled).
        uncovered: Linear inputs the lock does not reach: name to reason.
        notes: Sentences the user should read.
        ranges: Whether what is scaled fits the dtypes it may be loaded in (absorbed).
        sigma_max_before: Largest singular value of the matrix whose largest singular value is largest after the lock.
        sigma_max_after: The same after.
    """

    method: str
    sites: tuple[SiteRecord, ...]
    scalings: Mapping[str, tuple[ScaleEdit, ...]] = field(default_factory=dict)
    projections: Mapping[str, Projection] = field(default_factory=dict)
    uncovered: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    ranges: RangeReport | None = None
    sigma_max_before: float = float("nan")
    sigma_max_after: float = float("nan")

    @property
    def num_sites(self) -> int:
        """Number of places locked; one that is locked on both sides counts once."""
        return len({record.name for record in self.sites})

    @property
    def tensors_changed(self) -> tuple[str, ...]:
        """Names of the tensors the plan edits."""
        return (*self.scalings, *self.projections)
