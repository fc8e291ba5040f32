"""What quantising costs a locked model beside its original: logits and loss against the unquantised ones."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from specdef.curvature.losses import Batch, ClassificationLoss, LMLoss, Loss, model_outputs
from specdef.lock.deformation.retain import to_device
from specdef.lock.load import load_model
from specdef.lock.quantization import Format, formats, quantized

_CACHED_LOGITS = 2**27
"""Logits of the unquantised model that are kept in memory; batches beyond count for the loss alone."""

_HARMLESS = 0.05
"""Nats (per token, or per sample) that quantising may cost the locked model more than the original before it is said."""

_LARGER_ERROR = 1.5
"""Factor by which its logits may be further off likewise. A loss alone can fall by chance while the outputs are others."""

_UNUSABLE = 1.0
"""Relative error of the logits, or nats, from which on the quantised model is called unusable."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FormatCost:
    """What one format does to one model.

    Args:
        format: Its name.
        relative_logit_error: |logits - unquantised logits| / |unquantised logits|, over the first batches, as many as fit
            in memory; NaN or infinite where a logit is not finite.
        loss: Cross-entropy, in nats per token or sample; NaN likewise.
        not_representable: Matrices that are no whole number of blocks, and stayed as they were.
    """

    format: str
    relative_logit_error: float
    loss: float
    not_representable: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers as JSON values; null where not finite."""
        return {
            "relative_logit_error": _json(self.relative_logit_error),
            "loss": _json(self.loss),
            "not_representable": self.not_representable,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCost:
    """What every format does to one model.

    Args:
        loss: Of the unquantised model.
        formats: By format.
    """

    loss: float
    formats: tuple[FormatCost, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizationReport:
    """What quantising costs the original and the locked model.

    Args:
        original: The unlocked model.
        locked: The locked one.
        skipped: Formats that could not be measured: name to reason.
    """

    original: ModelCost
    locked: ModelCost
    skipped: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        pairs = zip(self.original.formats, self.locked.formats, strict=True)
        return {
            "loss": {"original": _json(self.original.loss), "locked": _json(self.locked.loss)},
            "formats": [
                {"format": a.format, "original": a.to_dict(), "locked": b.to_dict()}
                for a, b in pairs
            ],
            "skipped": self.skipped,
        }

    def lines(self) -> list[str]:
        """Return a table for people."""
        rows = [
            f"{'quantised to':18} {'logit error':>24} {'loss':>24}",
            f"{'':18} {'original':>12}{'locked':>12} {'original':>12}{'locked':>12}",
            f"{'unquantised':18} {'':>12}{'':>12} {self.original.loss:12.4f}{self.locked.loss:12.4f}",
        ]
        for a, b in zip(self.original.formats, self.locked.formats, strict=True):
            errors = "".join(_percent(x.relative_logit_error) for x in (a, b))
            losses = "".join(_number(x.loss) for x in (a, b))
            rows.append(f"{a.format:18} {errors} {losses}")
        return rows

    def sentences(self) -> list[str]:
        """Say in words what that means, and what can be done."""
        dear, unusable = [], []
        for a, b in zip(self.original.formats, self.locked.formats, strict=True):
            error = b.relative_logit_error
            lost = (b.loss - self.locked.loss) - (a.loss - self.original.loss)
            if not (lost <= _UNUSABLE and error <= _UNUSABLE):
                unusable.append(b.format)
            elif lost > _HARMLESS or error > _LARGER_ERROR * a.relative_logit_error:
                dear.append(f"{b.format} ({lost:+.2f} in loss)")
        out = []
        if unusable:
            out.append(f"Quantising makes the locked model unusable: {', '.join(unusable)}.")
        if dear:
            out.append(
                f"Quantising costs the locked model more than the original: {', '.join(dear)}."
            )
        out.append(
            "Run the locked model in float32 or bfloat16. A quantised copy as good as the original's has to be made from the "
            "original and carries no lock, and quantised weights cannot be locked."
            if out
            else "Quantising costs the locked model no more than the original."
        )
        return [*out, *(f"{name} was not measured: {why}." for name, why in self.skipped.items())]


def measure_quantization(
    model: nn.Module,
    batches: Sequence[Batch],
    loss: Loss | None = None,
    *,
    forms: Sequence[Format] | None = None,
    progress: Callable[[str], None] | None = None,
) -> ModelCost:
    """Measure what every format costs one model, against the same model unquantised.

    Cost: one forward pass per batch and format, and one more per batch; memory of the model twice, and of its logits.

    Args:
        model: In evaluation mode, in float32 or wider; its weights are as they were afterwards.
        batches: Held-out batches with labels.
        loss: Of the task; None is that of the next token for a causal language model, else that of classes.
        forms: Formats; None for all there are.
        progress: Told which format is measured.

    Returns:
        The cost.
    """
    loss = loss or (LMLoss() if hasattr(model, "lm_head") else ClassificationLoss())
    batches = [to_device(batch, model) for batch in batches]
    exact: list[Tensor] = []

    def run(form: str, left: int = 0) -> FormatCost:
        """Measure the model as it is now; the first time, keep its logits."""
        total, terms = 0.0, 0
        difference, size = 0.0, 0.0
        for i, batch in enumerate(batches):
            logits = model_outputs(model, batch)
            targets = loss.targets(batch)
            total += float(loss.terms(logits.float(), targets).double().sum())
            terms += loss.count(targets)
            if not form and (i == 0 or (i + 1) * logits.numel() <= _CACHED_LOGITS):
                exact.append(logits)
            if i < len(exact):
                difference += float((logits.double() - exact[i].double()).square().sum())
                size += float(exact[i].double().square().sum())
        error = math.sqrt(difference / size) if size else math.nan
        return FormatCost(format=form, relative_logit_error=error, loss=total / max(terms, 1), not_representable=left)  # fmt: skip

    costs = []
    with torch.no_grad():
        plain = run("").loss
        for form in formats()[0] if forms is None else forms:
            if progress:
                progress(form.name)
            with quantized(model, form) as left:
                costs.append(run(form.name, left))
    return ModelCost(loss=plain, formats=tuple(costs))


def compare_quantization(
    original: str | Path,
    locked: str | Path,
    batches: Sequence[Batch],
    loss: Loss | None = None,
    *,
    device: str = "cpu",
    forms: Sequence[Format] | None = None,
    progress: Callable[[str], None] | None = None,
) -> QuantizationReport:
    """Measure what every format costs a locked folder beside its original; one model is in memory at a time.

    Args:
        original: The unlocked folder.
        locked: The locked one.
        batches: Held-out batches with labels.
        loss: As for `measure_quantization`.
        device: Where the models run, in float32.
        forms: Formats; None for all there are.
        progress: Told what is measured.

    Returns:
        Both costs.
    """
    costs = []
    for which, folder in (("original", original), ("locked", locked)):
        told = (lambda name, which=which: progress(f"{which} in {name}")) if progress else None
        model = load_model(folder, dtype="float32", device=device)
        costs.append(measure_quantization(model, batches, loss, forms=forms, progress=told))
        del model
        gc.collect()
    return QuantizationReport(original=costs[0], locked=costs[1], skipped={} if forms else formats()[1])  # fmt: skip


def _json(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _percent(value: float) -> str:
    return f"{value:12.1%}" if math.isfinite(value) else f"{'not a number':>12}"


def _number(value: float) -> str:
    return f"{value:12.4f}" if math.isfinite(value) else f"{'not a number':>12}"
