"""Where tensors come from: a folder on disk, or a model in memory. Lock methods plan against this and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from specdef.errors import CheckpointError
from specdef.weights.checkpoint import Checkpoint, TensorFile
from specdef.weights.tensor_bytes import as_tensor

SAMPLE_LINES = 64
"""Entries of a slice a statistic of a large tensor is taken from: a norm is then good to about 9 %."""

SAMPLE_READS = 16
"""The same where every entry costs a read of its own (columns of a matrix): enough to see that a channel is alive."""

EXACT_ELEMENTS = 2**20
"""Tensors up to this size are read whole."""


@runtime_checkable
class TensorSource(Protocol):
    """What a lock method may ask of the model it plans for."""

    config: dict[str, Any]

    @property
    def names(self) -> tuple[str, ...]:
        """Tensor names."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor name to shape."""

    def read(self, name: str) -> Tensor:
        """Return a whole tensor."""

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor."""

    def lines(self, name: str, axis: int, lead: tuple[int, ...]) -> Tensor:
        """Return (shape[axis], L): entries of every slice along `axis`, behind `lead`; a sample of them if many."""


class FolderSource:
    """Tensors of a checkpoint on disk.

    Args:
        checkpoint: The open folder.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.config = checkpoint.config
        self.names = checkpoint.names
        self.shapes = checkpoint.shapes

    def read(self, name: str) -> Tensor:
        """Return a whole tensor."""
        return self.checkpoint.read(name)

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor."""
        return as_tensor(b"", self.checkpoint.info(name).dtype, (0,)).dtype

    def lines(self, name: str, axis: int, lead: tuple[int, ...]) -> Tensor:
        """Return entries of every slice along `axis`; reads only the bytes it needs.

        Args:
            name: The tensor.
            axis: Axis of the slices.
            lead: Fixed indices of the leading axes.

        Returns:
            (shape[axis], L), in the tensor's dtype.
        """
        info = self.checkpoint.info(name)
        before, length, after, skip = _split(info.shape, axis, lead)
        itemsize = info.nbytes // max(_product(info.shape), 1)
        few = before * length * after <= EXACT_ELEMENTS
        with TensorFile(self.checkpoint, name) as file:

            def part(offset: int, shape: tuple[int, ...]) -> Tensor:
                buffer = bytearray(_product(shape) * itemsize)
                file.read_into(memoryview(buffer), (skip + offset) * itemsize)
                return as_tensor(buffer, info.dtype, shape)

            if few:
                return _slices(part(0, (before, length, after)))
            outer = _evenly(before, max(1, SAMPLE_READS // after))
            pick = _evenly(after, SAMPLE_LINES)
            # (length, after) is one contiguous piece of the file for every outer index; taken 2^20 entries at a time
            step = max(1, EXACT_ELEMENTS // after)
            pieces = [
                torch.cat([
                    part((a * length + row) * after, (min(step, length - row), after))[:, pick]
                    for row in range(0, length, step)
                ])
                for a in outer
            ]  # fmt: skip
        return torch.cat(pieces, dim=1)


class MemorySource:
    """Tensors of a model in memory.

    Args:
        tensors: Name to tensor, names as in a checkpoint.
        config: The model's configuration as in `config.json`.
    """

    def __init__(self, tensors: Mapping[str, Tensor], config: dict[str, Any]) -> None:
        self.tensors = tensors
        self.config = config
        self.names = tuple(tensors)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}

    def read(self, name: str) -> Tensor:
        """Return a copy of a whole tensor, on the CPU.

        Raises:
            CheckpointError: There is no such tensor.
        """
        if name not in self.tensors:
            raise CheckpointError("no such tensor", tensor=name)
        return self.tensors[name].detach().cpu().clone()

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor."""
        return self.tensors[name].dtype

    def lines(self, name: str, axis: int, lead: tuple[int, ...]) -> Tensor:
        """Return entries of every slice along `axis`: all of them.

        Args:
            name: The tensor.
            axis: Axis of the slices.
            lead: Fixed indices of the leading axes.

        Returns:
            (shape[axis], L), in the tensor's dtype.
        """
        before, length, after, _ = _split(self.shapes[name], axis, lead)
        return _slices(self.tensors[name].detach().cpu()[lead].reshape(before, length, after))


def _slices(cube: Tensor) -> Tensor:
    return cube.movedim(1, 0).flatten(1)


def _split(shape: tuple[int, ...], axis: int, lead: tuple[int, ...]) -> tuple[int, int, int, int]:
    """Return (product before axis, behind lead; shape[axis]; product after axis; entries before `lead`)."""
    skip = 0
    for i, index in enumerate(lead):
        skip += index * _product(shape[i + 1 :])
    return _product(shape[len(lead) : axis]), shape[axis], _product(shape[axis + 1 :]), skip


def _product(shape: tuple[int, ...]) -> int:
    out = 1
    for n in shape:
        out *= n
    return out


def _evenly(n: int, count: int) -> list[int]:
    """Return at most `count` indices spread evenly over 0..n-1."""
    count = min(n, count)
    return [(2 * i + 1) * n // (2 * count) for i in range(count)]
