"""Quantising: weights rounded to integers and back, in the formats that people run models in.

A lock makes neighbouring columns differ by powers of two. Formats in which they share a step lose the small ones: a
column scaled down rounds to zero, a column scaled up takes the step of its whole row, block or matrix for itself. In
GGUF the step is stored in float16 besides, and overflows where a block holds more than some 2^22.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from specdef.lock.deformation.config import DeformationConfig
from specdef.lock.deformation.matrices import find_matrices
from specdef.lock.sequential import is_transposed

GGUF_FORMATS = ("q8_0", "q5_0", "q4_0", "q6_k", "q4_k")
"""Block formats of llama.cpp that people publish."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """One way to quantise.

    Args:
        name: Short name.
        summary: What shares a step with what.
        weights: Rounds a matrix (…, out, in); None leaves weights alone.
        activation_bits: Width the inputs of linear layers are rounded to, one step per token; None leaves them alone.
    """

    name: str
    summary: str
    weights: Callable[[Tensor], Tensor] | None = None
    activation_bits: int | None = None


def round_to_grid(matrix: Tensor, bits: int, group: int | None = None) -> Tensor:
    """Return a matrix rounded to integers of some bits times a step, the step such that the largest entry is kept.

    Args:
        matrix: (…, out, in).
        bits: Width of the integers.
        group: Inputs that share a step; None for all. The last group may be shorter.

    Returns:
        Same shape and dtype.

    >>> round_to_grid(torch.tensor([[1.0, 0.4, -0.1]]), 2)
    tensor([[1., 0., -0.]])
    """
    top = 2 ** (bits - 1) - 1
    rounded = []
    for part in torch.split(matrix.double(), group or max(1, matrix.shape[-1]), dim=-1):
        step = part.abs().amax(-1, keepdim=True) / top
        rounded.append(torch.where(step > 0, (part / step).round() * step, 0.0))
    return torch.cat(rounded, -1).to(matrix.dtype)


def round_to_gguf(matrix: Tensor, name: str) -> Tensor:
    """Return a matrix written in a block format of GGUF and read back, by the reference code of the package `gguf`.

    Args:
        matrix: (…, out, in).
        name: The format, like "q8_0".

    Returns:
        Same shape and dtype; NaN or infinite where a block's step overflows.

    Raises:
        NotImplementedError: The package reads this format but does not write it.
        ValueError: `in` is no whole number of blocks.
    """
    from gguf import GGMLQuantizationType, quants

    kind = GGMLQuantizationType[name.upper()]
    values = matrix.detach().float().cpu().numpy()
    with np.errstate(all="ignore"):  # steps overflow float16: that is what is measured
        try:
            packed = quants.quantize(np.ascontiguousarray(values), kind)
        except quants.QuantError as error:
            raise ValueError(str(error)) from error
        back = quants.dequantize(packed, kind)
    return torch.from_numpy(back).reshape(matrix.shape).to(matrix)


INTEGER_FORMATS = (
    Format(name="int8", summary="one step per output channel", weights=lambda w: round_to_grid(w, 8)),
    Format(
        name="int8-tensor", summary="one step per matrix",
        weights=lambda w: round_to_grid(w.flatten(-2), 8).view(w.shape),
    ),
    Format(name="int4-group32", summary="one step per 32 inputs", weights=lambda w: round_to_grid(w, 4, 32)),
    Format(name="int8-activations", summary="inputs of linear layers, one step per token", activation_bits=8),
)  # fmt: skip


def formats() -> tuple[tuple[Format, ...], dict[str, str]]:
    """Return the formats that can be measured here, and of the others why not."""
    found, skipped = list(INTEGER_FORMATS), {}
    here = importlib.util.find_spec("gguf") is not None
    for name in GGUF_FORMATS:
        if not here:
            skipped[name] = "the package gguf is not installed (extra: gguf)"
            continue
        try:
            round_to_gguf(torch.zeros(1, 256), name)
        except NotImplementedError:
            skipped[name] = "the package gguf reads this format but does not write it"
            continue
        block = "one step in float16 per 32 inputs"
        found.append(
            Format(name=name, summary=block, weights=lambda w, name=name: round_to_gguf(w, name))  # type: ignore[misc]
        )
    return tuple(found), skipped


def weight_matrices(model: nn.Module) -> dict[str, Tensor]:
    """List every weight matrix of a model; embeddings and what is tied to them are left out, as quantisers leave them wider.

    Args:
        model: Any module.

    Returns:
        Name to view (…, out, in), without gradient: what is written there is written to the model.

    Raises:
        SelectionError: There is none.
    """
    frozen = [p for p in model.parameters() if p.is_floating_point() and not p.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)  # those that do not train are no candidates there
        items = find_matrices(model, DeformationConfig(k=1))
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
    views = {}
    for name, item in items.items():
        view = item.view(item.parameter.detach())
        transposed = is_transposed(model.get_submodule(name.rpartition(".")[0]))
        views[name] = view.mT if transposed else view
    return views


@contextmanager
def quantized(model: nn.Module, form: Format) -> Iterator[int]:
    """Quantise a model for a while, in place.

    Args:
        model: Any module; its weights are put back, bit for bit.
        form: How.

    Yields:
        The number of matrices that are no whole number of blocks, and stay as they are.
    """
    kept: list[tuple[Tensor, Tensor]] = []
    handles: list[Any] = []
    left = 0
    try:
        if form.activation_bits is not None:
            bits = form.activation_bits
            for module in model.modules():
                if isinstance(module, nn.Linear) or is_transposed(module):
                    handles.append(
                        module.register_forward_pre_hook(
                            lambda _, inputs: (round_to_grid(inputs[0], bits), *inputs[1:])
                        )
                    )
        if form.weights is not None:
            for view in weight_matrices(model).values():
                try:
                    rounded = form.weights(view)
                except ValueError:  # a row that is no whole number of blocks
                    left += 1
                    continue
                kept.append((view, view.clone()))
                view.copy_(rounded)
        yield left
    finally:
        for handle in handles:
            handle.remove()
        for view, before in kept:
            view.copy_(before)
