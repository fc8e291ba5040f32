"""Losses with what curvature needs of them: terms that are counted, and the Hessian with respect to the outputs.

A loss is a sum over terms (tokens, samples, elements) over their number. Batches are weighted by their terms, so that
how the data is cut into batches changes nothing.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from specdef.curvature.cross_entropy import (
    IGNORE,
    cross_entropy_gradient,
    cross_entropy_hessian_product,
    cross_entropy_terms,
)
from specdef.errors import SpecDefError

Batch = Mapping[str, Any] | Sequence[Any]
"""What one batch is: the model's arguments by name with "labels" among them, or (input, target)."""


class Loss(ABC):
    """A mean of terms, each a function of one row of outputs."""

    @abstractmethod
    def targets(self, batch: Batch) -> Tensor:
        """Return the targets of a batch, one per term, laid out like the outputs' rows; -100 does not count."""

    def count(self, targets: Tensor) -> int:
        """Return the number of terms."""
        return int((targets != IGNORE).sum())

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """Run the model and return its outputs `[*targets.shape, C]`."""
        return model_outputs(model, batch)

    @abstractmethod
    def terms(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of every term, shaped like the targets; it can be differentiated twice."""

    @abstractmethod
    def output_gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the gradient of the sum of terms with respect to the outputs."""

    @abstractmethod
    def output_hessian_product(
        self, outputs: Tensor, targets: Tensor, u: Tensor, out: Tensor | None = None
    ) -> Tensor:
        """Return the Hessian of the sum of terms with respect to the outputs, times u; in `out` if given."""


class _CrossEntropy(Loss):
    def terms(self, outputs: Tensor, targets: Tensor) -> Tensor:
        logits, flat = _rows(outputs, targets)
        bad = (flat != IGNORE) & ((flat < 0) | (flat >= outputs.shape[-1]))
        if bool(bad.any()):
            raise SpecDefError(
                f"label {int(flat[bad][0])} is outside 0..{outputs.shape[-1] - 1}",
                hint="Labels are class indices below the number of the model's outputs; -100 does not count.",
            )
        return cross_entropy_terms(logits, flat).view(targets.shape)

    def output_gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        logits, flat = _rows(outputs, targets)
        ones = logits.new_ones(len(logits))
        return cross_entropy_gradient(logits, flat, ones).view(outputs.shape)

    def output_hessian_product(
        self, outputs: Tensor, targets: Tensor, u: Tensor, out: Tensor | None = None
    ) -> Tensor:
        logits, flat = _rows(outputs, targets)
        ones = logits.new_ones(len(logits))
        out = None if out is None else out.view(logits.shape)
        product = cross_entropy_hessian_product(logits, flat, ones, u.reshape(logits.shape), out)
        return product.view(outputs.shape)


@final
class ClassificationLoss(_CrossEntropy):
    """Cross-entropy of classes, in nats per sample (or per token, for labels `[batch, length]`); -100 does not count."""

    def targets(self, batch: Batch) -> Tensor:
        """Return the labels.

        Args:
            batch: With "labels", or a pair.

        Returns:
            `[batch]` or `[batch, length]`, int64.
        """
        labels = _labels(batch)
        if labels.is_floating_point():
            raise SpecDefError(
                "ClassificationLoss needs integer labels, got floating ones",
                hint="Use MSELoss() for regression targets.",
            )
        return labels.long()


@final
class LMLoss(_CrossEntropy):
    """Cross-entropy of the next token, in nats per token; label -100 and padding do not count.

    Labels are the tokens themselves, as transformers takes them: the shift happens here. A batch without labels is
    its own target, padding left out.
    """

    def targets(self, batch: Batch) -> Tensor:
        """Return the labels moved one place to the left.

        Args:
            batch: With "labels", or with "input_ids" (and "attention_mask").

        Returns:
            `[batch, length]`, int64; the last place of every row is -100.
        """
        if isinstance(batch, Mapping) and "labels" not in batch and "input_ids" in batch:
            labels = batch["input_ids"]
            if batch.get("attention_mask") is not None:
                labels = labels.masked_fill(batch["attention_mask"] == 0, IGNORE)
        else:
            labels = _labels(batch)
        if labels.ndim != 2:
            raise SpecDefError(
                f"LMLoss needs labels [batch, length], got {list(labels.shape)}",
                hint="Use ClassificationLoss() for one label per sample.",
            )
        return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORE)], 1).long()


@final
class MSELoss(Loss):
    """Squared error, mean over all elements as in torch.nn.MSELoss: each element of the output is a term."""

    def targets(self, batch: Batch) -> Tensor:
        """Return the regression targets."""
        return _labels(batch)

    def count(self, targets: Tensor) -> int:
        """Return the number of elements."""
        return targets.numel()

    def terms(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the squared error of every element."""
        return self._difference(outputs, targets).square()

    def output_gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return 2 (outputs - targets)."""
        return 2 * self._difference(outputs, targets).view(outputs.shape)

    def output_hessian_product(
        self, outputs: Tensor, targets: Tensor, u: Tensor, out: Tensor | None = None
    ) -> Tensor:
        """Return 2 u."""
        return torch.mul(u, 2, out=out)

    @staticmethod
    def _difference(outputs: Tensor, targets: Tensor) -> Tensor:
        # Dimensions of 1 may differ; others must not, as a reshape would mix them up.
        if [d for d in outputs.shape if d != 1] != [d for d in targets.shape if d != 1]:
            raise SpecDefError(
                f"MSELoss: outputs {list(outputs.shape)} and targets {list(targets.shape)} do not match",
                hint="Give one target for every element of the output.",
            )
        return outputs.reshape(targets.shape) - targets.to(outputs.dtype)


def model_outputs(model: nn.Module, batch: Batch) -> Tensor:
    """Run a model on a batch, without its labels.

    Args:
        model: A transformers model or any module.
        batch: Arguments by name, or (input, target). A module that does not know the only name gets it by position.

    Returns:
        The logits, or whatever tensor the module gives.

    Raises:
        SpecDefError: What comes out holds no tensor.
    """
    if isinstance(batch, Mapping):
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        known = _parameter_names(type(model))
        if len(inputs) == 1 and known is not None and not (known & set(inputs)):
            out = model(*inputs.values())
        else:
            config = getattr(model, "config", None)
            if getattr(config, "use_cache", None) is not None and (
                known is None or "use_cache" in known
            ):
                inputs.setdefault("use_cache", False)
            out = model(**inputs)
    else:
        out = model(batch[0])
    out = getattr(out, "logits", out)
    out = out[0] if isinstance(out, tuple) else out
    if not isinstance(out, Tensor):
        raise SpecDefError(
            f"{type(model).__name__} gave {type(out).__name__}, not a tensor or an output with logits",
            hint="Wrap the model so that it returns its logits.",
        )
    return out


def _parameter_names(kind: type[nn.Module]) -> set[str] | None:
    """Return the names `forward` takes; None when it takes any."""
    parameters = inspect.signature(kind.forward).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return {p.name for p in parameters}


def _labels(batch: Batch) -> Tensor:
    """Return the labels of a batch."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else batch[1]
    if not isinstance(labels, Tensor):
        raise SpecDefError(
            "a batch has no labels", hint='Give dicts with a tensor under "labels", or (input, target) pairs.'
        )  # fmt: skip
    return labels


def _rows(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return logits `[n, C]` and targets `[n]`, whose shapes fit."""
    if outputs.shape[:-1] != targets.shape:
        raise SpecDefError(
            f"logits {list(outputs.shape)} do not fit labels {list(targets.shape)}",
            hint="Logits carry one more dimension than labels: the classes.",
        )
    return outputs.reshape(-1, outputs.shape[-1]), targets.reshape(-1)
