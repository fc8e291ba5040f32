"""Running a model at given weights so that autograd can go through it twice: the ground all operators stand on.

What is known to go wrong here: the fused attention kernels have no second derivative; models ask for float32 inside
a float64 run; dropout and batch statistics make every run another function; a kept graph holds every activation.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from specdef.errors import SecondOrderError


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put every module in evaluation mode for a block: dropout off, batch norm with its running statistics."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Take attention kernels that have a second derivative, and say clearly when something else has none.

    Raises:
        SecondOrderError: An operation of the model has no second derivative.
    """
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    except NotImplementedError as error:
        raise _once_only(str(error)) from error
    except RuntimeError as error:
        text = str(error)
        if "derivative for" in text and "not implemented" in text:
            raise _once_only(text) from error
        raise


@contextmanager
def plain_autograd(device: torch.device) -> Iterator[None]:
    """Record in full precision for a block, whatever the caller has set: no_grad, inference mode, autocast."""
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):  # fmt: skip
        yield


def without_checkpoints(function: Callable[[], Tensor]) -> Tensor:
    """Evaluate a function of the model, and refuse what computes it again in the backward pass.

    Activation checkpointing would do so at the model's own weights, and without the types and kernels asked for here:
    derivatives at other weights are then wrong, or zero, in silence.

    Args:
        function: Gives a tensor with its graph.

    Returns:
        The tensor.

    Raises:
        SecondOrderError: The model checkpoints activations, or changes how they are saved.
    """
    try:
        with torch.autograd.graph.disable_saved_tensors_hooks(_HOOKS):
            value = function()
    except RuntimeError as error:
        if str(error) != _HOOKS:
            raise
        raise _checkpointed() from error
    if any(node.name() == "CheckpointFunctionBackward" for node in _nodes([value])):
        raise _checkpointed()
    return value


_HOOKS = "specdef: hooks on saved tensors"


def _checkpointed() -> SecondOrderError:
    return SecondOrderError(
        "the model checkpoints its activations or hooks into how autograd saves them",
        hint="Switch it off, in transformers by model.gradient_checkpointing_disable().",
    )


def check_twice_differentiable(gradients: Iterable[Tensor]) -> None:
    """Look for operations that are marked as differentiable once only.

    Autograd passes over them in silence when it looks for the way to given inputs, and their curvature would be zero.

    Args:
        gradients: First derivatives, with their graph.

    Raises:
        SecondOrderError: There is one.
    """
    if any(node.name() == "torch::autograd::Error" for node in _nodes(gradients)):
        raise _once_only("an operation is marked once_differentiable")


def _nodes(outputs: Iterable[Tensor]) -> Iterator[Node]:
    """Yield every node of a graph once."""
    stack = [out.grad_fn for out in outputs if out.grad_fn is not None]
    seen = set(stack)
    while stack:
        node = stack.pop()
        yield node
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                stack.append(following)


def _once_only(reason: str) -> SecondOrderError:
    return SecondOrderError(
        f"the model cannot be differentiated twice ({reason.splitlines()[0]:.150})",
        hint="Load it with attn_implementation='eager' or 'sdpa', without custom kernels.",
    )


class KeepDouble(TorchFunctionMode):
    """Keep float64 where a model casts to float32 by itself (Llama's RMSNorm and softmax do), or calls a kernel without it."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Drop a cast of a float64 tensor to float32; pass everything else on."""
        kwargs = dict(kwargs or {})
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func is Tensor.float:
                return args[0]
            if kwargs.get("dtype") is torch.float32:
                kwargs["dtype"] = torch.float64
            if func in (Tensor.to, Tensor.type):
                args = tuple(torch.float64 if a is torch.float32 else a for a in args)
            if getattr(func, "__name__", "") in ("grouped_mm", "_grouped_mm"):
                return _grouped_mm(*args, **kwargs)
        return func(*args, **kwargs)


def _grouped_mm(
    rows: Tensor, matrices: Tensor, *, offs: Tensor, bias: Tensor | None = None, **_: Any
) -> Tensor:
    """Multiply groups of rows, each ending at an offset, by their matrices: mixtures of experts call it."""
    ends = [0, *offs.tolist()]
    groups = [rows[a:b] @ matrix for a, b, matrix in zip(ends, ends[1:], matrices, strict=False)]
    product = torch.cat([*groups, rows.new_zeros(len(rows) - ends[-1], matrices.shape[-1])])
    return product if bias is None else product + bias


def run_at(
    model: nn.Module, weights: Mapping[str, Tensor], function: Callable[[nn.Module], Tensor], *, dtype: torch.dtype
) -> Tensor:  # fmt: skip
    """Evaluate a function of the model at other weights; the model itself is not touched.

    Args:
        model: The model.
        weights: Every parameter and buffer by name, in the type to compute in.
        function: Takes the model.
        dtype: The type to compute in; float64 holds against casts inside the model.

    Returns:
        What the function gives.
    """
    runner = _Runner(model, function)
    names = {f"model.{name}": tensor for name, tensor in weights.items()}
    with evaluation_mode(model):
        if dtype != torch.float64:
            return _call(runner, names)
        with KeepDouble():
            return _call(runner, names)


def _call(runner: _Runner, names: dict[str, Tensor]) -> Tensor:
    out: Tensor = torch.func.functional_call(runner, names, ())
    return out


class _Runner(nn.Module):
    """A module whose forward is a function of the model, since functional_call calls forward only."""

    def __init__(self, model: nn.Module, function: Callable[[nn.Module], Tensor]) -> None:
        super().__init__()
        self.model = model
        self._function = function

    def forward(self) -> Tensor:
        return self._function(self.model)


def grad(
    outputs: Any, inputs: list[Tensor], vectors: Any = None, *, create_graph: bool = False,
    retain_graph: bool | None = None, unused: bool = False,
) -> tuple[Any, ...]:  # fmt: skip
    """Differentiate; with `unused`, None stands for what autograd has nothing to say about, else zeros."""
    return torch.autograd.grad(
        outputs, inputs, vectors, create_graph=create_graph, retain_graph=retain_graph,
        **({"allow_unused": True} if unused else {"materialize_grads": True}),
    )  # fmt: skip


def widen(outputs: Tensor, dtype: torch.dtype) -> Tensor:
    """Return outputs in the type to compute in: models may give logits in another."""
    return outputs.to(dtype)


class OverLimit(Exception):
    """A graph would hold more memory than allowed."""


class GraphMemory:
    """Counts the bytes autograd keeps, each storage once.

    Args:
        limit: Bytes in all.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.used = limit, 0

    @contextmanager
    def count(self, free: set[int]) -> Iterator[None]:
        """Count what is saved in a block.

        Args:
            free: Addresses of storages that exist anyway: weights and data.

        Raises:
            OverLimit: More than the limit would be kept; what this block kept is not counted.
        """
        before, seen = self.used, set(free)

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                self.used += storage.nbytes()
                if self.used > self.limit:
                    raise OverLimit
            return tensor

        try:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                yield
        except (OverLimit, RuntimeError):
            self.used = before
            raise


def default_memory_limit(device: torch.device) -> int:
    """Return half of the memory that is free on a device, in bytes; 4 GiB where that is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 2
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, OSError, ValueError):
        return 4 << 30
