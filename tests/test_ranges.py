"""Ranges of locked weights, judged before and after the lock, against values computed one by one."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

import specdef
from specdef.lock.config import LockConfig
from specdef.lock.lock import plan_lock
from specdef.lock.ranges import RUNTIME_DTYPES, locked_ranges, planned_ranges
from specdef.weights import source as source_module
from specdef.weights.checkpoint import Checkpoint
from specdef.weights.edit import ScaleEdit, apply_all, scale_exactly
from specdef.weights.source import FolderSource, MemorySource

ROW, COLUMN = 1, 2


def matrix(dtype: torch.dtype = torch.float32) -> Tensor:
    """Return values between 2^-6 and 2^0, with a zero."""
    generator = torch.Generator().manual_seed(3)
    values = 2.0 ** (-6 * torch.rand(6, 8, generator=generator))
    values[0, COLUMN] = 0.0
    return values.to(dtype)


def edits(row: int, column: int) -> dict[str, tuple[ScaleEdit, ...]]:
    return {
        "w": (
            ScaleEdit(axis=0, position=ROW, exponent=row),
            ScaleEdit(axis=1, position=COLUMN, exponent=column),
        )
    }


def entry(report, dtype):
    return next(e for e in report.dtypes if e.dtype == dtype)


@pytest.mark.parametrize(
    ("row", "column"), [(8, -8), (-50, 50), (14, 0), (17, -3), (-100, -20), (130, -1), (-70, -70)]
)
def test_a_plan_is_judged_as_its_values_are(row: int, column: int) -> None:
    """Against the values themselves, entry by entry: the crossing of two slices has both exponents."""
    before = matrix()
    after = before.double()
    after[ROW] *= 2.0**row
    after[:, COLUMN] *= 2.0**column
    report = planned_ranges(MemorySource({"w": before}, {}), edits(row, column))
    assert report.stored == ("float32",) and not report.sampled
    for dtype in RUNTIME_DTYPES:
        info = torch.finfo(getattr(torch, dtype))
        cast = after.to(getattr(torch, dtype))
        found = entry(report, dtype)
        lost = (before != 0) & (cast.abs() < info.tiny)
        assert bool(found.overflow) == bool(cast.isinf().any())
        assert bool(found.subnormal) == bool(lost.any())
        assert found.fits == (not cast.isinf().any() and not lost.any())
        touched = torch.zeros_like(before, dtype=torch.bool)
        touched[ROW], touched[:, COLUMN] = row != 0, column != 0
        touched[ROW, COLUMN] = row + column != 0
        for items, bad in ((found.overflow, cast.isinf()), (found.subnormal, lost)):
            if items:
                expected = bad.sum() / (touched & (before != 0) | touched).sum()
                assert items[0].share == pytest.approx(float(expected))


@pytest.mark.parametrize("dtype", RUNTIME_DTYPES)
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_exponent_fits_and_the_next_does_not(dtype: str, sign: int) -> None:
    kind = getattr(torch, dtype)
    values = matrix(kind)
    scaling = {"w": (ScaleEdit(axis=0, position=ROW, exponent=sign),)}
    found = entry(planned_ranges(MemorySource({"w": values}, {}), scaling), dtype)
    room = found.max_exponent_up if sign > 0 else found.max_exponent_down
    assert room is not None and found.fits
    assert (found.max_exponent_up is None) == (sign < 0)
    assert scale_exactly(values[ROW], sign * room) is not None
    assert scale_exactly(values[ROW], sign * (room + 1)) is None


def test_what_did_not_fit_without_a_lock_does_not_count() -> None:
    values = torch.tensor([[1e-6, 1.0], [1.0, 1.0]])  # 1e-6 is subnormal in float16 as it stands
    scaling = {"w": (ScaleEdit(axis=0, position=0, exponent=1),)}
    assert entry(planned_ranges(MemorySource({"w": values}, {}), scaling), "float16").fits


def test_large_tensors_are_sampled_and_rows_are_whole(monkeypatch, tmp_path) -> None:
    """A single value too large in a row is found, with what a column does to it."""
    values = matrix()
    values[ROW, 5] = 2.0**20
    monkeypatch.setattr("specdef.lock.ranges.EXACT_ELEMENTS", 4)
    report = planned_ranges(MemorySource({"w": values}, {}), edits(110, -3))
    assert report.sampled and entry(report, "float32").overflow[0].max_exponent == 107
    assert source_module.EXACT_ELEMENTS > 4
    calm = {"w": (*edits(110, -3)["w"], ScaleEdit(axis=1, position=5, exponent=-5))}
    assert entry(planned_ranges(MemorySource({"w": values}, {}), calm), "float32").fits


def test_gradients_grow_where_weights_shrink() -> None:
    source = MemorySource({"w": matrix()}, {})
    report = planned_ranges(source, edits(40, -60))
    assert report.gradient_exponent == 60 and not report.adam_overflow
    report = planned_ranges(source, edits(-61, 40))
    assert report.gradient_exponent == 61 and report.adam_overflow == ("w",)
    assert any("Adam" in text for text in report.warnings())
    assert planned_ranges(source, edits(40, 10)).gradient_exponent == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folders_before_and_after_agree(tiny_folder, tmp_path: Path, dtype: torch.dtype) -> None:
    """The plan's judgement of a lock is that of the locked folder."""
    folder = tiny_folder("llama", dtype)
    original = FolderSource(Checkpoint.open(folder))
    config = LockConfig(scale=2.0**20, schedule="convex")
    plan = plan_lock(original, config)
    specdef.lock_checkpoint(folder, tmp_path / "locked", config)
    found = locked_ranges(original, FolderSource(Checkpoint.open(tmp_path / "locked")))
    by_tensor = {name: plan.scalings[name] for name in original.names if name in plan.scalings}
    assert found == planned_ranges(original, by_tensor)
    assert found.stored == (str(dtype).removeprefix("torch."),)
    assert entry(found, "float32").fits and not entry(found, "float16").fits
    assert not found.problems
    assert "float16 breaks it" in " ".join(found.sentences())
    values = found.to_dict()
    assert [d["fits"] for d in values["dtypes"]] == [True, True, False]


def test_an_overflow_in_the_stored_dtype_is_a_problem() -> None:
    before = matrix(torch.float16)
    after = {"w": before.clone()}
    apply_all(after, {"w": (ScaleEdit(axis=0, position=ROW, exponent=17),)}, exact=False)
    assert after["w"].isinf().any()
    found = locked_ranges(MemorySource({"w": before}, {}), MemorySource(after, {}))
    assert len(found.problems) == 1 and "w" in found.problems[0] and "float16" in found.problems[0]
    assert 16 <= entry(found, "float16").overflow[0].exponent <= 17


def test_other_shapes_and_names_are_passed_over() -> None:
    original = MemorySource({"w": matrix(), "v": torch.ones(3), "i": torch.ones(2).int()}, {})
    locked = MemorySource({"w": matrix(), "v": torch.ones(4), "u": torch.ones(1)}, {})
    found = locked_ranges(original, locked)
    assert all(e.fits and e.max_exponent_up is None for e in found.dtypes)
    assert not found.stored and math.isfinite(found.gradient_exponent)
