"""Tensors as the bytes that a safetensors file holds, and back."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from specdef.errors import CheckpointError

TORCH_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
    "I64": torch.int64, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32,
    "F64": torch.float64, "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64,
    "C64": torch.complex64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def as_tensor(buffer: bytes | bytearray | memoryview, dtype: str, shape: tuple[int, ...]) -> Tensor:
    """View writable bytes as a tensor.

    Args:
        buffer: The bytes.
        dtype: Dtype name from a header.
        shape: Shape of the result.

    Returns:
        A tensor that shares the memory.

    Raises:
        CheckpointError: torch has no such dtype.
    """
    if dtype not in TORCH_DTYPES:
        raise CheckpointError(f"dtype {dtype} cannot be read here")
    if len(buffer) == 0:
        return torch.empty(shape, dtype=TORCH_DTYPES[dtype])
    return torch.frombuffer(buffer, dtype=TORCH_DTYPES[dtype]).view(shape)


def as_bytes(tensor: Tensor) -> memoryview:
    """View a contiguous CPU tensor as bytes."""
    flat = tensor.detach().contiguous().reshape(-1)
    if not flat.numel():
        return memoryview(b"")
    view: Any = flat.view(torch.uint8).numpy()
    return memoryview(view)


def tensor_sha256(tensor: Tensor) -> str:
    """Hash a tensor's bytes as they would stand in a file."""
    return hashlib.sha256(as_bytes(tensor.cpu())).hexdigest()
