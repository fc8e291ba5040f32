"""The difference of two tensors, compressed and exact to the last bit: what a key keeps where a formula cannot."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from specdef.weights.tensor_bytes import as_bytes

_BLOCK = 1 << 16
"""Elements taken at a time: the integers between tensor and planes are eight bytes each, several times over."""

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def encode_residual(original: Tensor, rebuilt: Tensor) -> Tensor:
    """Compress what `rebuilt` lacks to be `original`, to the last bit.

    The bits of a float, read as a sign-magnitude integer, count the floats in order; the residual is the difference of
    these counts, zigzag-coded, and split into byte planes. Neighbours have nothing in common but their magnitude, so the
    planes are Huffman-coded with run lengths alone: five times faster than a search for repetitions, and smaller.

    Cost: 30 million float32 values per second; 8 bytes per value of memory.

    Args:
        original: Any tensor of floats or integers.
        rebuilt: Same shape and dtype; the closer, the smaller the result.

    Returns:
        (n,) uint8, a zlib stream.
    """
    first, second = original.detach().reshape(-1), rebuilt.detach().reshape(-1)
    planes = np.empty((8, len(first)), dtype=np.uint8)
    for start in range(0, len(first), _BLOCK):
        rows = slice(start, start + _BLOCK)
        difference = _order(first[rows]) - _order(second[rows])
        zigzag = (difference << 1) ^ (difference >> 63)
        planes[:, rows] = zigzag.view(np.uint8).reshape(-1, 8).T
    packer = zlib.compressobj(strategy=zlib.Z_RLE)
    return torch.frombuffer(
        bytearray(packer.compress(planes.data) + packer.flush()), dtype=torch.uint8
    )


def decode_residual(residual: Tensor, rebuilt: Tensor) -> Tensor:
    """Return the original from `rebuilt` and what `encode_residual` gave.

    Args:
        residual: (n,) uint8.
        rebuilt: The same tensor as at encoding.

    Returns:
        The original, bit for bit.

    Raises:
        ValueError: The residual does not fit the tensor.
    """
    try:
        stream = zlib.decompressobj()
        data = stream.decompress(as_bytes(residual), 8 * rebuilt.numel() + 1)  # and no bomb
    except zlib.error as error:
        raise ValueError(f"residual cannot be decompressed: {error}") from error
    if len(data) != 8 * rebuilt.numel() or not stream.eof:
        raise ValueError("residual does not fit the tensor")
    planes = np.frombuffer(data, dtype=np.uint8).reshape(8, -1)
    flat = rebuilt.detach().reshape(-1)
    out = torch.empty_like(flat)
    for start in range(0, len(flat), _BLOCK):
        rows = slice(start, start + _BLOCK)
        zigzag = np.ascontiguousarray(planes[:, rows].T).view(np.uint64).reshape(-1)
        difference = (zigzag >> np.uint64(1)).astype(np.int64) ^ -(zigzag & np.uint64(1)).astype(
            np.int64
        )
        out[rows] = _from_order(_order(flat[rows]) + difference, flat.dtype)
    return out.reshape(rebuilt.shape)


def _order(values: Tensor) -> np.ndarray[Any, np.dtype[np.int64]]:
    if not values.is_floating_point():
        return values.to(torch.int64).numpy()
    bits = values.contiguous().view(_INTEGERS[values.element_size()]).to(torch.int64).numpy()
    lowest = -(1 << (8 * values.element_size() - 1))
    # -0.0 counts as -1, so that it stays apart from +0.0. lowest - 1 alone would not fit 64 bits.
    return np.where(bits >= 0, bits, lowest - (bits + 1))


def _from_order(order: np.ndarray[Any, np.dtype[np.int64]], dtype: torch.dtype) -> Tensor:
    if not dtype.is_floating_point:
        return torch.from_numpy(order).to(dtype)
    lowest = -(1 << (8 * dtype.itemsize - 1))
    bits = np.where(order >= 0, order, lowest - (order + 1))
    return torch.from_numpy(bits).to(_INTEGERS[dtype.itemsize]).view(dtype)
