"""Scaling by powers of two: exact, invertible, or refused."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from specdef.weights.edit import OutOfRange, ScaleEdit, scale_exactly
from specdef.weights.tensor_bytes import as_bytes

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_BITS = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}


def from_bits(bits: list[int], dtype: torch.dtype) -> Tensor:
    """Return the floats with these bit patterns, cut to the width of the dtype."""
    width = 8 * dtype.itemsize
    signed = [((b % 2**width) ^ (1 << (width - 1))) - (1 << (width - 1)) for b in bits]
    return torch.tensor(signed, dtype=_BITS[dtype]).view(dtype)


def exactly(value: float, exponent: int, dtype: torch.dtype) -> float | None:
    """Return value * 2^exponent where it is zero or a finite normal number, as value is; else None."""
    info = torch.finfo(dtype)
    if value == 0:
        return value
    if not math.isfinite(value) or abs(value) < info.tiny:
        return None
    try:
        scaled = math.ldexp(value, exponent)
    except OverflowError:
        return None
    return scaled if info.tiny <= abs(scaled) <= info.max else None


BITS = st.integers(0, 2**64 - 1)


@given(st.lists(BITS, min_size=1, max_size=8), st.sampled_from(DTYPES), st.integers(-300, 300))
@settings(deadline=None, max_examples=400)
@example([0x7F7FFFFF], torch.float32, 0)
@example([0x00800000], torch.float32, 253)  # the smallest normal number: 2^-126 to 2^127
@example([0x7F000000], torch.float32, -253)
@example([0x3F800000, 0x80000000], torch.float32, 127)
@example([0x3F80], torch.bfloat16, -127)
def test_any_bits_scale_exactly_or_not_at_all(
    bits: list[int], dtype: torch.dtype, exponent: int
) -> None:
    values = from_bits(bits, dtype)
    expected = [exactly(v, exponent, dtype) for v in values.tolist()]
    found = scale_exactly(values, exponent)
    if any(e is None for e in expected):
        assert found is None
        return
    assert found is not None
    assert found.dtype == dtype
    assert found.tolist() == expected
    # the sign of zero, too, comes back
    back = scale_exactly(found, -exponent)
    assert back is not None
    assert bytes(as_bytes(back)) == bytes(as_bytes(values))


@given(
    st.sampled_from(DTYPES),
    st.lists(st.integers(1, 4), min_size=1, max_size=4),
    st.integers(-12, 12),
    st.data(),
)
@settings(deadline=None, max_examples=150)
def test_the_inverse_edit_restores_every_bit(
    dtype: torch.dtype, shape: list[int], exponent: int, data: st.DataObject
) -> None:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    tensor = (torch.rand(shape, generator=generator, dtype=torch.float64) + 1).to(dtype)
    tensor *= torch.where(torch.rand(shape, generator=generator) < 0.5, -1, 1).to(dtype)
    before = bytes(as_bytes(tensor))
    axis = data.draw(st.integers(0, len(shape) - 1))
    position = data.draw(st.integers(0, shape[axis] - 1))
    length = data.draw(st.integers(0, axis))
    lead = tuple(data.draw(st.integers(0, n - 1)) for n in shape[:length])
    edit = ScaleEdit(axis=axis, position=position, exponent=exponent, lead=lead)

    index = [*lead, *[slice(None)] * (axis - length), position]
    expected = tensor.clone()
    expected[tuple(index)] *= 2.0**exponent
    edit.apply(tensor)
    assert torch.equal(tensor, expected)
    edit.inverse().apply(tensor)
    assert bytes(as_bytes(tensor)) == before
    assert edit.inverse().inverse() == edit


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["overflow", "underflow", "becomes subnormal", "is subnormal"])
def test_what_would_not_be_exact_is_refused(dtype: torch.dtype, kind: str) -> None:
    info = torch.finfo(dtype)
    smallest = torch.tensor(info.tiny, dtype=torch.float64)
    value, exponent = {
        "overflow": (info.max, 1),
        "underflow": (1.0, -1000 if dtype == torch.float64 else -200),
        "becomes subnormal": (float(smallest) * 1.5, -1),
        "is subnormal": (float(smallest) / 2, 4),
    }[kind]
    if dtype == torch.float64 and kind == "underflow":
        value = 2.0**-100
    tensor = torch.ones(3, 2, dtype=dtype)
    tensor[1, 0] = value
    before = tensor.clone()
    with pytest.raises(OutOfRange, match=r"w: slice 0 times 2\^") as caught:
        ScaleEdit(axis=1, position=0, exponent=exponent).apply(tensor, name="w")
    assert (caught.value.tensor, caught.value.position) == ("w", 0)
    assert caught.value.exit_code == 2
    assert caught.value.hint
    assert torch.equal(tensor, before)  # refused as a whole
    ScaleEdit(axis=1, position=1, exponent=1).apply(tensor)  # its neighbour is free to go


@pytest.mark.parametrize("exponent", [1023, -1023, 5000, -5000, 10**9])
def test_absurd_exponents_are_refused(exponent: int) -> None:
    assert scale_exactly(torch.ones(1, dtype=torch.float64), exponent) is None


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_is_refused(value: float) -> None:
    assert scale_exactly(torch.tensor([1.0, value]), 0) is None
    assert scale_exactly(torch.tensor([1.0, value]), -3) is None


def test_nothing_to_scale_is_no_error() -> None:
    empty = torch.empty(0, 3)
    ScaleEdit(axis=1, position=2, exponent=200).apply(empty)
    assert scale_exactly(torch.zeros(4), 500).tolist() == [0, 0, 0, 0]  # type: ignore[union-attr]


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.data())
@settings(deadline=None, max_examples=200)
def test_block_by_block_is_the_same_as_whole(shape: list[int], data: st.DataObject) -> None:
    tensor = torch.arange(1.0, torch.Size(shape).numel() + 1).reshape(shape)
    axis = data.draw(st.integers(0, len(shape) - 1))
    lead = tuple(data.draw(st.integers(0, n - 1)) for n in shape[: data.draw(st.integers(0, axis))])
    position = data.draw(st.integers(0, shape[axis] - 1))
    edit = ScaleEdit(axis=axis, position=position, exponent=5, lead=lead)
    whole = tensor.clone()
    edit.apply(whole)
    # blocks of `rows` rows along axis `first`, behind every prefix: as TensorFile.blocks cuts them
    first = data.draw(st.integers(0, len(shape) - 1))
    rows = data.draw(st.integers(1, shape[first]))
    blocks = tensor.clone()
    for prefix in itertools.product(*map(range, shape[:first])):
        for start in range(0, shape[first], rows):
            edit.apply(blocks[prefix][start : start + rows], prefix=prefix, start=start)
    assert torch.equal(blocks, whole)
