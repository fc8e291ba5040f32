"""Linear layers, embeddings and activations that make second-order products without autograd's detours.

A Hessian-vector product makes six matrix products per linear layer where a gradient makes three, so two gradients is
its floor; what autograd adds on top is two copies of every weight-sized result, a sum and a concatenation. Here each
weight-sized product is accumulated in place (`addmm` with beta 1) into its slice of the flat vector, and the two
products for the same input are one fused call. Activations keep their first two derivatives as numbers, and a product
multiplies by them. Everything else is left to autograd.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from specdef.curvature.target import Target

ACTIVATIONS = frozenset(
    {functional.silu, functional.gelu, functional.softplus, functional.elu, functional.mish}
)
"""Functions of one number that are differentiated twice by several operations, and are worth a table of two values."""


LARGE = 1 << 20
"""Elements from which the memory of an intermediate result is kept: new pages cost as much as a pass of arithmetic."""


class FusedLayers(TorchFunctionMode):
    """Route linear layers and embeddings of known weights through `Target`, and activations past autograd, for a block.

    Args:
        target: The target.
    """

    def __init__(self, target: Target) -> None:
        super().__init__()
        self.target = target

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Replace `linear(x, W, b)` and `embedding(ids, W)`; pass everything else on."""
        kwargs = kwargs or {}
        if torch._C._are_functorch_transforms_active():  # the model calls vmap, grad or jvp
            return func(*args, **kwargs)
        if func is torch._weight_norm:
            return _weight_norm(*args, **kwargs)
        if func is functional.linear:
            x, weight, bias = _linear_arguments(*args, **kwargs)
            if self.target.knows(weight) and weight.ndim == 2 and not _autocast(x, weight):
                out = _Linear.apply(x, weight, id(weight), self.target)  # type: ignore[no-untyped-call]
                return out if bias is None else out + bias
        if func is functional.embedding:
            ids, weight, padding, plain = _embedding_arguments(*args, **kwargs)
            if plain and self.target.knows(weight):
                return _Embedding.apply(weight, ids, padding, id(weight), self.target)  # type: ignore[no-untyped-call]
        if func in ACTIVATIONS and len(args) == 1 and not kwargs.get("inplace"):
            options = {name: value for name, value in kwargs.items() if name != "inplace"}
            return _Activation.apply(args[0], partial(func, **options))  # type: ignore[no-untyped-call]
        return func(*args, **kwargs)


def _embedding_arguments(
    input: Tensor, weight: Tensor, padding_idx: int | None = None, max_norm: float | None = None,
    norm_type: float = 2.0, scale_grad_by_freq: bool = False, sparse: bool = False,
) -> tuple[Tensor, Tensor, int | None, bool]:  # fmt: skip
    plain = max_norm is None and not scale_grad_by_freq and not sparse
    return input, weight, padding_idx, plain and (padding_idx is None or padding_idx >= 0)


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """Return g v / |v|; torch's own has a wrong second derivative (2.13, CPU)."""
    return v * (g / torch.norm_except_dim(v, 2, dim))


def _autocast(x: Tensor, weight: Tensor) -> bool:
    return x.dtype != weight.dtype or torch.is_autocast_enabled(x.device.type)


def _linear_arguments(
    input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    return input, weight, bias


class _Linear(torch.autograd.Function):
    """y = x W^T."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, key: int, target: Target) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.key, ctx.target = key, target
        return functional.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        if torch.is_grad_enabled():  # building the graph of the gradient
            dx, dw = _LinearBackward.apply(x, weight, dy, ctx.key, ctx.target)  # type: ignore[no-untyped-call]
            return dx, dw, None, None
        dx = dy @ weight if ctx.needs_input_grad[0] else None
        return dx, _weight_product(ctx, dy, x, weight.shape), None, None


class _LinearBackward(torch.autograd.Function):
    """(dx, dW) = (dy W, dy^T x)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, dy: Tensor, key: int, target: Target
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight, dy)
        ctx.key, ctx.target = key, target
        ctx.set_materialize_grads(False)
        return dy @ weight, _rows(dy).T @ _rows(x)

    @staticmethod
    def backward(ctx: Any, ux: Tensor | None, uw: Tensor | None) -> tuple[Any, ...]:
        x, weight, dy = ctx.saved_tensors
        by_x = by_weight = by_dy = None
        if (
            torch.is_grad_enabled()
        ):  # the model differentiates itself: one derivative more than usual
            if uw is not None:
                by_x, by_dy = dy @ uw, functional.linear(x, uw)
            if ux is not None:
                by_weight = _rows(dy).T @ _rows(ux)
                through = functional.linear(ux, weight)
                by_dy = through if by_dy is None else by_dy + through
            return by_x, by_weight, by_dy, None, None
        if ctx.needs_input_grad[2]:
            if uw is not None:
                by_dy = torch.mm(_rows(x), uw.T, out=_large(ctx, dy))
            if ux is not None:
                by_dy = _rows(ux) @ weight.T if by_dy is None else by_dy.addmm_(_rows(ux), weight.T)
            by_dy = None if by_dy is None else by_dy.view(dy.shape)
        if not ctx.target.tangents_only:
            if ctx.needs_input_grad[0] and uw is not None:
                by_x = dy @ uw
            if ux is not None:
                by_weight = _weight_product(ctx, dy, ux, weight.shape)
        return by_x, by_weight, by_dy, None, None


class _Embedding(torch.autograd.Function):
    """y = W[ids]; as in torch, the row `padding` has no gradient."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, ids: Tensor, padding: int | None, key: int, target: Target
    ) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.shape, ctx.padding, ctx.key, ctx.target = weight.shape, padding, key, target
        return functional.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        (ids,) = ctx.saved_tensors
        if ctx.padding is not None:
            dy = dy * (ids != ctx.padding)[..., None]
        if torch.is_grad_enabled():
            dw: Tensor | None = _EmbeddingBackward.apply(dy, ids, ctx.shape)  # type: ignore[no-untyped-call]
        elif ctx.target.flat is None:
            dw = _scatter(dy, ids, ctx.shape)
        else:
            ctx.target.add_rows(ctx.key, ctx.shape, ids.reshape(-1), _rows(dy))
            dw = None
        return dw, None, None, None, None


class _EmbeddingBackward(torch.autograd.Function):
    """dW: the rows of dy summed by their ids."""

    @staticmethod
    def forward(ctx: Any, dy: Tensor, ids: Tensor, shape: torch.Size) -> Tensor:
        ctx.save_for_backward(ids)
        return _scatter(dy, ids, shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, uw: Tensor) -> tuple[Tensor, None, None]:
        (ids,) = ctx.saved_tensors
        return functional.embedding(ids, uw), None, None


def _scatter(dy: Tensor, ids: Tensor, shape: torch.Size) -> Tensor:
    return dy.new_zeros(shape).index_add_(0, ids.reshape(-1), _rows(dy))


class _Activation(torch.autograd.Function):
    """y = f(x) element by element, with f' and f'' computed when the graph is built."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        with torch.enable_grad():
            z = x.detach().requires_grad_()
            y = function(z)
            (first,) = torch.autograd.grad(y.sum(), z, create_graph=True)
            (second,) = torch.autograd.grad(first.sum(), z)
        ctx.save_for_backward(x, first.detach(), second)
        return y.detach()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        x, first, second = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _ActivationBackward.apply(x, dy, first, second), None  # type: ignore[no-untyped-call]
        return dy * first, None


class _ActivationBackward(torch.autograd.Function):
    """dx = dy f'(x)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dy: Tensor, first: Tensor, second: Tensor) -> Tensor:
        ctx.save_for_backward(first, dy * second)
        return dy * first

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, u: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        first, curvature = ctx.saved_tensors
        by_x = u * curvature if ctx.needs_input_grad[0] else None
        return by_x, u * first if ctx.needs_input_grad[1] else None, None, None


def _large(ctx: Any, dy: Tensor) -> Tensor | None:
    """Return memory for a product shaped like dy that is kept between passes, where it is large: logits, above all."""
    if dy.numel() < LARGE:
        return None
    if not hasattr(ctx, "memory"):
        ctx.memory = dy.new_empty(_rows(dy).shape)
    memory: Tensor = ctx.memory
    return memory


def _weight_product(ctx: Any, left: Tensor, right: Tensor, shape: torch.Size) -> Tensor | None:
    """Return left^T right, or None when it went into the flat result."""
    if not ctx.needs_input_grad[1]:
        return None
    if ctx.target.flat is None:
        return _rows(left).T @ _rows(right)
    ctx.target.add(ctx.key, shape, _rows(left), _rows(right))
    return None


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])
