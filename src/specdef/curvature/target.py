"""The flat vector that the weight-sized products of one pass are written into."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


class Target:
    """Where weight-sized products go during one pass over a kept graph; nowhere else, so that models may call autograd.

    Args:
        slices: Slice of the flat vector by parameter name.
        leaves: The parameters by name.
    """

    def __init__(self, slices: Mapping[str, slice], leaves: Mapping[str, Tensor]) -> None:
        self._slices = {id(leaf): slices[name] for name, leaf in leaves.items()}
        self.flat: Tensor | None = None
        self.written: set[int] = set()
        # Only the way of J v to the placeholder is wanted: weights and activations need nothing.
        self.tangents_only = False

    def knows(self, weight: object) -> bool:
        """Return whether a tensor is one of the parameters."""
        return id(weight) in self._slices

    @contextmanager
    def open(self, flat: Tensor, *, first: bool) -> Iterator[None]:
        """Take products for a block; with `first`, what is in `flat` does not count until it is written."""
        self.flat = flat
        if first:
            self.written = set()
        try:
            yield
        finally:
            self.flat = None

    def add(self, key: int, shape: torch.Size, left: Tensor, right: Tensor) -> None:
        """Add left^T right to the slice of a weight."""
        assert self.flat is not None
        where = self.flat[self._slices[key]].view(shape)
        if key in self.written:
            where.addmm_(left.T, right)
        else:
            torch.mm(left.T, right, out=where)
            self.written.add(key)

    def add_rows(self, key: int, shape: torch.Size, rows: Tensor, values: Tensor) -> None:
        """Add values `[n, d]` to the given rows `[n]` of a weight's slice."""
        assert self.flat is not None
        where = self.flat[self._slices[key]].view(shape)
        if key not in self.written:
            where.zero_()
            self.written.add(key)
        where.index_add_(0, rows, values)

    def finish(self, leaves: Mapping[str, Tensor], parts: tuple[Tensor | None, ...]) -> None:
        """Add what autograd gave for each parameter, and clear what nobody wrote."""
        assert self.flat is not None
        for leaf, part in zip(leaves.values(), parts, strict=True):
            where = self.flat[self._slices[id(leaf)]]
            if id(leaf) not in self.written:
                self.written.add(id(leaf))
                where.zero_() if part is None else where.copy_(part.reshape(-1))
            elif part is not None:
                where += part.reshape(-1)
