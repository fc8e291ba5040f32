"""What all curvature matrices of a model share: data, weights, the flat vector, and the loss and gradient at any point.

All are means over the terms of the data (tokens, samples, elements): (1/N) sum over batches of the batch's sum. The
graph that products go through is kept between them while memory allows; a change of the weights or the data is
noticed, not mixed in.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from specdef.curvature.graph import (
    GraphMemory,
    OverLimit,
    default_memory_limit,
    grad,
    plain_autograd,
    run_at,
    twice_differentiable,
    widen,
    without_checkpoints,
)
from specdef.curvature.linear import SymmetricOperator
from specdef.curvature.losses import Batch, Loss
from specdef.curvature.parameters import Params, flat_slices, select_parameters
from specdef.curvature.target import Target
from specdef.errors import SecondOrderError, SpecDefError, StaleGraphError


class CurvatureOperator(SymmetricOperator):
    """A symmetric matrix of second derivatives, or one like it, of the mean loss of a model on given data.

    The model runs in evaluation mode and is never changed. Frozen and unselected parameters are constants. A change of the
    weights raises StaleGraphError, but `p.data.add_()` leaves no trace.

    Args:
        model: Any module; transformers models give logits.
        batches: Dicts of the model's arguments with "labels", or (input, target) pairs.
        loss: The loss.
        params: Which parameters, see `select_parameters`; None for all that require a gradient.
        dtype: Type to compute in; None takes the parameters' own, and float32 for half precision.
        memory_limit: Bytes of graph to keep between products; 0 keeps nothing, None half of what is free.

    Raises:
        SelectionError: No such parameter.
        SpecDefError: No data, or no term that counts.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Batch],
        loss: Loss,
        params: Params = None,
        *,
        dtype: torch.dtype | None = None,
        memory_limit: int | None = None,
    ) -> None:
        self.parameters = select_parameters(model, params)
        self.slices = flat_slices(self.parameters)
        first = next(iter(self.parameters.values()))
        if dtype is None:
            dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"dtype must be float32 or float64, got {dtype}.")
        super().__init__(
            sum(p.numel() for p in self.parameters.values()), dtype=dtype, device=first.device
        )
        self.model, self.loss_function = model, loss
        self.batches = [self._prepare(batch) for batch in batches]
        self._targets = [loss.targets(batch) for batch in self.batches]
        self.num_terms = sum(loss.count(targets) for targets in self._targets)
        if not self.num_terms:
            raise SpecDefError(
                "the data has no term that counts" if self.batches else "there is no data",
                hint="Give at least one batch with a label that is not -100.",
            )
        self._memory_limit = memory_limit
        self._checked = False
        self.refresh()

    def refresh(self) -> None:
        """Take the weights and data as they are now; kept graphs are dropped.

        Raises:
            StaleGraphError: A parameter is gone or has another shape.
        """
        self._graphs: list[Any] = [None] * len(self.batches)
        limit = self._memory_limit
        self._memory = GraphMemory(default_memory_limit(self.device) if limit is None else limit)
        # detach() shares memory and version counter, so a kept graph costs no copy of the weights.
        self._weights = {
            name: tensor.detach().to(self.dtype) if tensor.is_floating_point() else tensor
            for name, tensor in [*self.model.named_parameters(), *self.model.named_buffers()]
        }
        if any(name not in self._weights or self._weights[name].shape != p.shape for name, p in self.parameters.items()):  # fmt: skip
            raise StaleGraphError(
                "a selected parameter is gone, tied to another, or has another shape",
                hint="Build a new operator.",
            )
        self._leaves = {
            name: self._weights[name].detach().requires_grad_() for name in self.parameters
        }
        self._target = Target(self.slices, self._leaves)
        self._state = self._versions()

    # --- the loss and its gradient -----------------------------------------------------------------------------------

    def loss(self) -> float:
        """Return the loss, mean per term."""
        return self.loss_at(None)

    def loss_at(self, displacement: Tensor | None) -> float:
        """Return the loss at the weights plus a displacement.

        Args:
            displacement: `[n]`; None for zero.

        Returns:
            Mean per term; it may be infinite or NaN far away.
        """
        self._check_unchanged()
        weights = self._displaced(displacement)
        total = 0.0
        with plain_autograd(self.device), torch.no_grad():
            for i in range(len(self.batches)):
                total += float(self._sum(weights, i).double())
        return total / self.num_terms

    def gradient(self) -> Tensor:
        """Return the gradient of the mean loss, `[n]`."""
        return self.gradient_at(None)

    def gradient_at(self, displacement: Tensor | None) -> Tensor:
        """Return the gradient of the mean loss at the weights plus a displacement.

        Args:
            displacement: `[n]`; None for zero.

        Returns:
            `[n]`.
        """
        return self.loss_and_gradient_at(displacement)[1]

    def loss_and_gradient_at(self, displacement: Tensor | None) -> tuple[float, Tensor]:
        """Return loss and gradient at the weights plus a displacement: one forward and one backward pass.

        Args:
            displacement: `[n]`; None for zero.

        Returns:
            Mean loss, and gradient `[n]`.
        """
        self._check_unchanged()
        with plain_autograd(self.device):
            weights = self._displaced(displacement)
            leaves = {name: weights[name].detach().requires_grad_() for name in self.parameters}
            total = 0.0
            gradient = torch.zeros(self.shape[0], dtype=self.dtype, device=self.device)
            for i in range(len(self.batches)):
                value = without_checkpoints(partial(self._sum, {**weights, **leaves}, i))
                self._add(gradient, grad(value, list(leaves.values())))
                total += float(value.detach().double())
        return total / self.num_terms, gradient / self.num_terms

    # --- flat vectors ------------------------------------------------------------------------------------------------

    def unflatten(self, v: Tensor) -> dict[str, Tensor]:
        """Return a flat vector `[n]` as views by parameter name and shape."""
        return {name: v[self.slices[name]].view_as(p) for name, p in self.parameters.items()}

    def flatten(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return tensors by parameter name as one flat vector `[n]`."""
        return torch.cat([tensors[name].detach().reshape(-1).to(self.device, self.dtype) for name in self.parameters])  # fmt: skip

    # --- products ----------------------------------------------------------------------------------------------------

    def _matvec(self, v: Tensor) -> Tensor:
        self._check_unchanged()
        with plain_autograd(self.device):
            if not self._checked:
                self._check_deterministic()
            flat = torch.empty_like(v)
            for i in range(len(self.batches)):
                graph = self._graphs[i]
                kept = graph is not None
                with twice_differentiable():
                    if graph is None:
                        graph, kept = self._build_kept(i)
                    with self._target.open(flat, first=i == 0):
                        self._target.finish(self._leaves, self._product(graph, v, keep=kept))
                if kept:
                    self._graphs[i] = graph
        return flat

    @abstractmethod
    def _build(self, index: int) -> Any:
        """Return the graph of one batch that products go through."""

    @abstractmethod
    def _product(self, graph: Any, v: Tensor, *, keep: bool) -> tuple[Tensor | None, ...]:
        """Return the batch's share of the product with v by parameter, less what went to the target."""

    def _normaliser(self) -> float:
        return self.num_terms

    def _build_kept(self, index: int) -> tuple[Any, bool]:
        """Build a batch's graph, and say whether there is room to keep it."""
        free = {t.untyped_storage().data_ptr() for t in [*self._weights.values(), *_tensors(self.batches[index])]}  # fmt: skip
        if self._memory.limit > self._memory.used:
            try:
                with self._memory.count(free):
                    return self._build(index), True
            except (OverLimit, RuntimeError):
                # Too large, out of memory, or not countable as in torch.func: later batches need not try.
                self._memory.limit = self._memory.used
        return self._build(index), False

    # --- private -----------------------------------------------------------------------------------------------------

    def _prepare(self, batch: Batch) -> Batch:
        def move(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return value.to(self.device, self.dtype if value.is_floating_point() else None)

        if isinstance(batch, Mapping):
            return {name: move(value) for name, value in batch.items()}
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise SpecDefError(
                f"a batch is {_describe(batch)}, not a dict or an (input, target) pair",
                hint='Give dicts of the model\'s arguments with "labels", or (input, target) pairs.',
            )
        return move(batch[0]), move(batch[1])

    def _outputs(self, weights: Mapping[str, Tensor], index: int) -> Tensor:
        batch = self.batches[index]
        return run_at(
            self.model, weights, lambda model: self.loss_function.outputs(model, batch), dtype=self.dtype
        )  # fmt: skip

    def _sum(self, weights: Mapping[str, Tensor], index: int) -> Tensor:
        """Return the sum of a batch's terms at other weights."""
        outputs = self._outputs(weights, index)
        return self.loss_function.terms(widen(outputs, self.dtype), self._targets[index]).sum()

    def _displaced(self, displacement: Tensor | None) -> dict[str, Tensor]:
        if displacement is None:
            return self._weights
        if displacement.shape != (self.shape[0],):
            raise ValueError(
                f"displacement must be [{self.shape[0]}], got {list(displacement.shape)}."
            )
        moved = self.unflatten(displacement.detach().to(self.device, self.dtype))
        return {**self._weights, **{name: self._weights[name] + d for name, d in moved.items()}}

    def _add(self, total: Tensor, parts: tuple[Tensor, ...]) -> None:
        for where, part in zip(self.slices.values(), parts, strict=True):
            total[where] += part.reshape(-1)

    def _versions(self) -> list[tuple[int, int]]:
        tensors = [*self.model.parameters(), *self.model.buffers()]
        for batch in self.batches:
            tensors += _tensors(batch)
        return [(t.data_ptr(), -1 if t.is_inference() else t._version) for t in tensors]

    def _check_unchanged(self) -> None:
        if self._versions() != self._state:
            raise StaleGraphError(
                f"the weights, buffers or data changed after {type(self).__name__} was built",
                hint="Call refresh() to take the new ones, or build a new operator.",
            )

    def _check_deterministic(self) -> None:
        weights = {**self._weights, **self._leaves}
        values = [without_checkpoints(lambda: self._sum(weights, 0)).detach().double()]
        with torch.no_grad():
            values.append(self._sum(self._weights, 0).double())
        if abs(values[0] - values[1]) > 1e-5 * abs(values[0]):
            raise SecondOrderError(
                f"the model gives another loss each time ({values[0]:.8g}, then {values[1]:.8g})",
                hint="Switch off what is random in its forward pass: curvature needs one function.",
            )
        self._checked = True


def _describe(batch: Any) -> str:
    return f"a {type(batch).__name__}" + (f" of {len(batch)}" if hasattr(batch, "__len__") else "")


def _tensors(batch: Batch) -> list[Tensor]:
    values = batch.values() if isinstance(batch, Mapping) else batch
    return [value for value in values if isinstance(value, Tensor)]
