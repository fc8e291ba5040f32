"""Edits of one tensor: exact scalings of slices, and replacements by a new matrix.

A `ScaleEdit` multiplies slices by a power of two. It is applied block by block, is checked to be exactly invertible, and
its inverse has the exponent negated: that is why an absorbed lock can be undone to the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from specdef.errors import SpecDefError


class OutOfRange(SpecDefError):
    """A scaled value does not fit its dtype exactly.

    Args:
        tensor: Name of the tensor.
        position: Position of the slice along its axis.
        exponent: The exponent asked for.
        dtype: The dtype it does not fit.
    """

    def __init__(self, tensor: str, position: int, exponent: int, dtype: torch.dtype) -> None:
        super().__init__(
            f"{tensor}: slice {position} times 2^{exponent} leaves the exact range of {dtype}",
            hint="Use a smaller --scale, or a checkpoint in bfloat16 or float32 (float16 has hardly any room).",
        )
        self.tensor = tensor
        self.position = position


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleEdit:
    """Multiply tensor[lead..., :, position, :] by 2^exponent.

    Args:
        axis: Axis of the slice.
        position: Index along it.
        exponent: Power of two.
        lead: Fixed indices of the leading axes (expert of a stacked tensor); all before `axis`.
    """

    axis: int
    position: int
    exponent: int
    lead: tuple[int, ...] = ()

    def inverse(self) -> ScaleEdit:
        """Return the edit that undoes this one."""
        return replace(self, exponent=-self.exponent)

    def apply(
        self,
        tensor: Tensor,
        *,
        name: str = "",
        prefix: tuple[int, ...] = (),
        start: int = 0,
        exact: bool = True,
    ) -> None:
        """Scale in place the part of the slice that lies in a block.

        Args:
            tensor: The block: rows start, start + 1, … along axis len(prefix) of the whole tensor, behind the fixed
                indices `prefix`. The defaults mean the whole tensor.
            name: Named in errors.
            prefix: Fixed indices of the axes before the block's first.
            start: Index of the block's first row.
            exact: Refuse what does not fit; otherwise it is rounded.

        Raises:
            OutOfRange: The result would not be exact, finite and normal.
        """
        first = len(prefix)
        fixed = dict(enumerate(self.lead)) | {self.axis: self.position}
        index: list[int | slice] = [slice(None)] * tensor.ndim
        for axis, position in fixed.items():
            if axis < first:
                if position != prefix[axis]:
                    return
            elif axis == first:
                if not start <= position < start + tensor.shape[0]:
                    return
                index[0] = position - start
            else:
                index[axis - first] = position
        view = tensor[tuple(index)]
        # on the CPU, whatever the device: a slice is small, and not every device computes in float64
        scaled = (scale_exactly if exact else _scale)(view.cpu(), self.exponent)
        if scaled is None:
            raise OutOfRange(name, self.position, self.exponent, tensor.dtype)
        tensor[tuple(index)] = scaled


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplaceEdit:
    """Replace a whole tensor by a function of it, of the same shape.

    Args:
        compute: Old tensor to new tensor.
        dtype: Dtype name of the result in the file ("F32"); None keeps the tensor's own.
    """

    compute: Callable[[Tensor], Tensor]
    dtype: str | None = None


Edit = ReplaceEdit | tuple[ScaleEdit, ...]
"""What is done to one tensor: one replacement, or any number of scalings."""


def apply_all(
    tensors: Mapping[str, Tensor], edits: Mapping[str, Sequence[ScaleEdit]], *, exact: bool = True
) -> None:
    """Apply scalings to tensors in place: all of them, or none if one does not fit.

    Cost: only the slices are touched; no tensor is copied.

    Args:
        tensors: Tensor name to tensor, parameters included.
        edits: Tensor name to its scalings.
        exact: Refuse what does not fit; otherwise it is rounded.

    Raises:
        OutOfRange: A result would not be exact; everything is as it was.
    """
    done: list[tuple[Tensor, ScaleEdit]] = []
    try:
        for name, scalings in edits.items():
            for edit in scalings:
                tensor = tensors[name].detach()
                edit.apply(tensor, name=name, exact=exact)
                done.append((tensor, edit))
    except BaseException:
        for tensor, edit in reversed(done):
            edit.inverse().apply(tensor, exact=exact)
        raise


def inverses(edits: Sequence[ScaleEdit]) -> tuple[ScaleEdit, ...]:
    """Return the scalings that undo `edits`: in the other order, so that every value in between has been seen to fit."""
    return tuple(edit.inverse() for edit in reversed(edits))


def total_exponents(shape: Sequence[int], edits: Iterable[ScaleEdit]) -> Tensor:
    """Return the power of two that scalings multiply every entry of a tensor by, all together.

    Args:
        shape: Of the tensor.
        edits: Its scalings.

    Returns:
        Exponents in float64, of that shape.

    >>> row, column = ScaleEdit(axis=0, position=1, exponent=3), ScaleEdit(axis=1, position=0, exponent=-5)
    >>> total_exponents((2, 2), [row, column])
    tensor([[-5.,  0.],
            [-2.,  3.]], dtype=torch.float64)
    """
    total = torch.zeros(tuple(shape), dtype=torch.float64)
    for edit in edits:
        total[edit.lead].select(edit.axis - len(edit.lead), edit.position).add_(edit.exponent)
    return total


def scale_exactly(values: Tensor, exponent: int) -> Tensor | None:
    """Return values * 2^exponent in the same dtype, or None where that would lose anything.

    Subnormal numbers count as lost on both sides: hardware may flush them to zero.

    >>> scale_exactly(torch.tensor([1.5, 0.0]), 3)
    tensor([12.,  0.])
    >>> scale_exactly(torch.tensor([1.0]), 128) is None  # above the largest float32
    True
    """
    if not -1022 <= exponent <= 1022:  # the factor and its inverse must themselves be normal
        return None
    tiny = torch.finfo(values.dtype).tiny
    # Not torch.ldexp, which computes 2^exponent in float32 and so fails above 2^127.
    scaled = _scale(values, exponent)
    size, scaled_size = values.abs(), scaled.abs()
    exact = scaled.to(torch.float64) * math.ldexp(1.0, -exponent) == values.to(torch.float64)
    normal = (values == 0) | ((size >= tiny) & (scaled_size >= tiny))
    return scaled if bool((exact & normal & scaled.isfinite()).all()) else None


def _scale(values: Tensor, exponent: int) -> Tensor:
    return (values.to(torch.float64) * math.ldexp(1.0, exponent)).to(values.dtype)
