"""Do locked weights fit a runtime's dtype: nothing infinite, nothing below the smallest normal number.

Subnormal numbers count as not fitting: hardware may flush them to zero. What is written is checked exactly, value by value,
by `specdef.weights.edit.scale_exactly`; here the question is asked beforehand, for every dtype the model may be loaded in, and
of the gradients too: a slice scaled by 2^e has its gradient scaled by 2^-e, and Adam squares it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from specdef.lock.range_report import ADAM_EXPONENT, DtypeRange, RangeReport, TensorRange
from specdef.weights.edit import ScaleEdit, total_exponents
from specdef.weights.source import EXACT_ELEMENTS, TensorSource

RUNTIME_DTYPES = ("float32", "bfloat16", "float16")
"""What models are loaded in."""


def planned_ranges(
    source: TensorSource,
    scalings: Mapping[str, Sequence[ScaleEdit]],
    *,
    dtypes: Sequence[str] = RUNTIME_DTYPES,
) -> RangeReport:
    """Judge a plan's scalings before anything is written.

    Cost: reads tensors of up to 2^20 entries, of larger ones the scaled rows and a sample of the scaled columns.

    Args:
        source: The unlocked model.
        scalings: Tensor name to its edits, as in `LockPlan.scalings`; exponents of either sign.
        dtypes: Runtime dtypes.

    Returns:
        The report.
    """
    return _report(_planned(source, scalings), dtypes, [source.dtype(name) for name in scalings])


def locked_ranges(
    original: TensorSource,
    locked: TensorSource,
    names: Iterable[str] | None = None,
    *,
    dtypes: Sequence[str] = RUNTIME_DTYPES,
) -> RangeReport:
    """Judge a locked model by comparing it with its original, value by value, whatever the method.

    Cost: reads both; memory of the largest tensor, a few times.

    Args:
        original: The unlocked model.
        locked: The locked one.
        names: Tensors to compare; None is all that both have in the same shape.
        dtypes: Runtime dtypes.

    Returns:
        The report.
    """
    before, after = original.shapes, locked.shapes
    chosen = [
        name for name in (locked.names if names is None else names)
        if name in after and before.get(name) == after[name] and locked.dtype(name).is_floating_point
    ]  # fmt: skip
    stored: list[torch.dtype] = []

    def pairs() -> Iterator[_Scaled]:
        for name in chosen:
            old, new = original.read(name).double(), locked.read(name).double()
            changed = old != new
            if changed.any():
                stored.append(locked.dtype(name))
                old, new = old[changed], new[changed]
                # what overflowed was scaled by more than there was room for; what was 0 has no ratio
                limit = torch.full_like(new, torch.finfo(locked.dtype(name)).max)
                ratio = (torch.where(new.isinf(), limit, new) / old).abs().log2()
                exponents = torch.where(ratio.isfinite(), ratio, 0.0).round()
                yield _Scaled(name, old, new, exponents, exact=True)

    return _report(pairs(), dtypes, stored)


class _Scaled(NamedTuple):
    """Scaled values of one tensor before and after, and the exponents between them; all float64."""

    tensor: str
    before: Tensor
    after: Tensor
    exponents: Tensor
    exact: bool


def _planned(
    source: TensorSource, scalings: Mapping[str, Sequence[ScaleEdit]]
) -> Iterator[_Scaled]:
    for name, edits in scalings.items():
        shape = source.shapes[name]
        if math.prod(shape) <= EXACT_ELEMENTS:
            exponents = total_exponents(shape, edits)
            scaled = exponents != 0
            before, exact = source.read(name)[scaled].double(), True
            exponents = exponents[scaled]
        else:
            pieces = [_slice(source, name, edit, edits) for edit in edits]
            before = torch.cat([values.flatten() for values, _ in pieces]).double()
            exponents = torch.cat([scale.flatten() for _, scale in pieces])
            exact = False
        yield _Scaled(name, before, before * torch.exp2(exponents), exponents, exact)


def _slice(
    source: TensorSource, name: str, edit: ScaleEdit, edits: Sequence[ScaleEdit]
) -> tuple[Tensor, Tensor]:
    """Return values and exponents of one scaled slice of a large tensor.

    A row is one piece of the file and is read whole, with what other edits do to its entries; a column is sampled, and there
    the few entries that another edit scales too are left to the row that they lie in.
    """
    shape, row = source.shapes[name], edit.axis == len(edit.lead)
    if not row or edit.axis + 1 == len(shape):
        values = source.lines(name, edit.axis, edit.lead)[edit.position]
        return values, torch.full(values.shape, float(edit.exponent), dtype=torch.float64)
    values = source.lines(name, edit.axis + 1, (*edit.lead, edit.position))
    exponents = torch.full(values.shape, float(edit.exponent), dtype=torch.float64)
    for other in edits:
        if other.axis == edit.axis + 1 and other.lead == edit.lead:
            exponents[other.position] += other.exponent
    return values, exponents


def _report(
    scaled: Iterable[_Scaled], dtypes: Sequence[str], stored: Sequence[torch.dtype]
) -> RangeReport:
    found: dict[str, list[_Fit]] = {dtype: [] for dtype in dtypes}
    growth, squares, sampled = 0, [], False
    for item in scaled:
        if not item.before.numel():
            continue
        for dtype in dtypes:
            found[dtype].append(_fit(item, getattr(torch, dtype)))
        largest = -int(item.exponents.min())
        growth = max(growth, largest)
        sampled |= not item.exact
        if largest > ADAM_EXPONENT:
            squares.append(item.tensor)
    return RangeReport(
        stored=tuple(dict.fromkeys(str(dtype).removeprefix("torch.") for dtype in stored)),
        dtypes=tuple(_dtype_range(dtype, fits) for dtype, fits in found.items()),
        gradient_exponent=growth,
        adam_overflow=tuple(squares),
        sampled=sampled,
    )


def _dtype_range(dtype: str, fits: list[_Fit]) -> DtypeRange:
    return DtypeRange(
        dtype=dtype, overflow=tuple(fit.overflow for fit in fits if fit.overflow),
        subnormal=tuple(fit.subnormal for fit in fits if fit.subnormal),
        max_exponent_up=min((fit.up for fit in fits if fit.up is not None), default=None),
        max_exponent_down=min((fit.down for fit in fits if fit.down is not None), default=None),
    )  # fmt: skip


class _Fit(NamedTuple):
    overflow: TensorRange | None
    subnormal: TensorRange | None
    up: int | None
    down: int | None


def _fit(item: _Scaled, dtype: torch.dtype) -> _Fit:
    """Judge one tensor; values that do not fit without a lock either do not count against it."""
    info = torch.finfo(dtype)
    before, after = item.before.to(dtype), item.after.to(dtype)
    normal = before.isfinite() & (before.abs() >= info.tiny)
    up = _largest(item.before[normal & (item.exponents > 0)].abs(), lambda x: info.max / x.max())
    down = _largest(item.before[normal & (item.exponents < 0)].abs(), lambda x: x.min() / info.tiny)

    def record(bad: Tensor, room: int | None) -> TensorRange | None:
        if not bad.any():
            return None
        worst = int(item.exponents[bad][item.exponents[bad].abs().argmax()])
        return TensorRange(
            tensor=item.tensor, exponent=worst, max_exponent=(room or 0) * (1 if worst > 0 else -1),
            share=float(bad.double().mean()),
        )  # fmt: skip

    return _Fit(
        record(normal & ~after.isfinite(), up), record(normal & (after.abs() < info.tiny), down), up, down
    )  # fmt: skip


def _largest(values: Tensor, room: Any) -> int | None:
    """Return floor(log2) of the room that values leave; None where there are none."""
    return math.floor(math.log2(float(room(values)))) if values.numel() else None
