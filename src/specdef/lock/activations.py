"""Activations of a model on real inputs: how large they become at every module, and where they stop being numbers.

A lock scales channels between modules, so weights that fit a dtype do not yet show that what they compute fits. This is
measured, on calibration text or any batches, in every dtype the model may be loaded in.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from specdef.curvature.losses import Batch, model_outputs
from specdef.errors import SpecDefError
from specdef.lock.deformation.retain import to_device
from specdef.lock.load import load_model

_KEPT_LOGITS = 2**27
"""Outputs of the original that are kept for comparison, at most; the first batch counts in any case."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleRange:
    """Largest absolute values at one module, NaN where one of them is.

    Args:
        module: Its path.
        input: At its inputs; 0 where it was given no floating tensor, or holds other modules (which are listed themselves).
        output: At its outputs.
    """

    module: str
    input: float
    output: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationRange:
    """Activations of one model in one dtype.

    Args:
        dtype: The dtype.
        finite: Every activation is a finite number.
        largest: Largest absolute activation; NaN or infinite where not finite.
        where: The module it was seen at; the first one whose activations are not finite, in the order of computation.
        room: log2 of the factor by which `largest` may grow before the dtype overflows; None where not finite.
        subnormal: Share of the outputs below the smallest normal number, zeros not counted: hardware may flush them.
        modules: Every module, in the order of computation.
        max_abs_logit_difference: From the original in the same dtype; None where none was given.
        original_finite: Whether the original's activations are; None likewise.
        original_subnormal: The original's share of subnormal outputs; None likewise.
        by_range: Not run in this dtype, for lack of operations on this device: judged from the activations in float32.
    """

    dtype: str
    finite: bool
    largest: float
    where: str
    room: int | None
    subnormal: float
    modules: tuple[ModuleRange, ...]
    max_abs_logit_difference: float | None = None
    original_finite: bool | None = None
    original_subnormal: float | None = None
    by_range: bool = False

    @property
    def problem(self) -> str:
        """What is wrong, and where; empty where all is well, or where the original is no better."""
        if self.finite or self.original_finite is False:
            return ""
        what = "are not a number" if math.isnan(self.largest) else "overflow"
        return f"activations of {self.where} {what} in {self.dtype}"

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return asdict(self)

    def sentence(self) -> str:
        """Say it in words."""
        if not self.finite:
            also = "; the original's do too" if self.original_finite is False else ""
            what = "stop being numbers" if math.isnan(self.largest) else "overflow"
            return f"activations in {self.dtype} {what} at {self.where}{also}"
        how = " (not run in it: judged from float32)" if self.by_range else ""
        text = f"activations in {self.dtype}{how}: at most {self.largest:.3g}, at {self.where}; 2^{self.room} of room"
        if self.max_abs_logit_difference is not None:
            text += (
                f"; outputs differ from the original's by up to {self.max_abs_logit_difference:.3g}"
            )
        if self.subnormal > (self.original_subnormal or 0.0):
            text += (
                f"; {self.subnormal:.2%} of them are subnormal, which hardware may flush to zero"
            )
        return text


def measure_activations(model: nn.Module, batches: Sequence[Batch]) -> ActivationRange:
    """Run a model and watch every module.

    Cost: a forward pass per batch, and a pass over the activations.

    Args:
        model: In evaluation mode, on any device, in any dtype.
        batches: What it is run on; labels are not needed.

    Returns:
        What was seen.
    """
    return _run(model, batches)[0]


def check_activations(
    locked: str | Path,
    original: str | Path | None,
    batches: Sequence[Batch],
    dtypes: Sequence[str],
    *,
    device: str = "cpu",
) -> tuple[ActivationRange, ...]:
    """Load a locked model in every dtype, run it, and compare it with its original.

    Cost: two models per dtype, one in memory at a time, and of each a forward pass per batch.

    Args:
        locked: Locked folder.
        original: The unlocked one; None for no comparison.
        batches: What both are run on.
        dtypes: Dtypes to load them in.
        device: Where they run.

    Returns:
        One entry per dtype.
    """
    return tuple(_check(Path(locked), original, batches, dtype, device) for dtype in dtypes)


def require_finite_activations(locked: str | Path, batches: Sequence[Batch]) -> ActivationRange:
    """Refuse a lock whose activations overflow the dtype it is stored in.

    Args:
        locked: Locked folder.
        batches: Calibration text.

    Returns:
        What was seen.

    Raises:
        SpecDefError: An activation is infinite or not a number.
    """
    found = measure_activations(load_model(locked), batches)
    if found.problem:
        raise SpecDefError(
            f"the lock would break the model: {found.problem} on the calibration text",
            hint="Use a smaller --scale, leave the layer out with --layers, or lock a checkpoint with more exponent room (bfloat16, float32).",
        )
    return found


def _check(
    locked: Path, original: str | Path | None, batches: Sequence[Batch], dtype: str, device: str
) -> ActivationRange:
    try:
        before = None
        if original is not None:
            model = load_model(original, dtype=dtype, device=device)
            before, expected = _run(model, batches, keep=True)
            del model
            gc.collect()  # one model in memory at a time
        found, logits = _run(load_model(locked, dtype=dtype, device=device), batches, keep=before is not None)  # fmt: skip
    except RuntimeError as error:  # torch's word for an operation a device lacks in a dtype
        if "not implemented for" not in str(error):
            raise
        return _by_range(_check(locked, original, batches, "float32", device), dtype)
    if before is None:
        return found
    difference = max(float((a - b).abs().max()) for a, b in zip(logits, expected, strict=True))
    return replace(
        found, max_abs_logit_difference=difference, original_finite=before.finite,
        original_subnormal=before.subnormal,
    )  # fmt: skip


def _by_range(wide: ActivationRange, dtype: str) -> ActivationRange:
    """Judge activations measured in float32 by the range of another dtype."""
    info = torch.finfo(getattr(torch, dtype))
    over = [m for m in wide.modules if not max(m.input, m.output) <= info.max]
    return replace(
        wide, dtype=dtype, by_range=True, finite=wide.finite and not over,
        largest=math.inf if over and wide.finite else wide.largest, where=over[0].module if over else wide.where,
        room=None if over else _room(wide.largest, info.max), max_abs_logit_difference=None, original_finite=None,
    )  # fmt: skip


def _run(
    model: nn.Module, batches: Sequence[Batch], *, keep: bool = False
) -> tuple[ActivationRange, list[Tensor]]:
    """Return the ranges, and the float64 logits of the first batches where they are to be kept."""
    seen: dict[str, list[float]] = {}
    counts = [0, 0]

    def hook(name: str, leaf: bool) -> Any:
        def watch(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            # A module that holds others may be given masks, whose large values are no activations.
            given = [_largest(x) for x in _floats((args, kwargs))] if leaf else []
            made = []
            for x in _floats(output):
                made.append(_largest(x))
                small = (x.abs() < torch.finfo(x.dtype).tiny) & (x != 0)
                counts[0] += int(small.sum())
                counts[1] += x.numel()
            old = seen.setdefault(name, [0.0, 0.0])
            seen[name] = [_max([old[0], *given]), _max([old[1], *made])]

        return watch

    handles = [
        module.register_forward_hook(hook(name, not any(module.children())), with_kwargs=True)
        for name, module in model.named_modules()
    ]
    kept: list[Tensor] = []
    try:
        with torch.no_grad():
            for i, batch in enumerate(batches):
                logits = model_outputs(model, fitted(batch, model))
                if keep and (i == 0 or (i + 1) * logits.numel() <= _KEPT_LOGITS):
                    kept.append(logits.double().cpu())
    finally:
        for handle in handles:
            handle.remove()
    modules = tuple(ModuleRange(module=name or "the model", input=a, output=b) for name, (a, b) in seen.items())  # fmt: skip
    values = [_max([m.input, m.output]) for m in modules]
    bad = [i for i, value in enumerate(values) if not math.isfinite(value)]
    at = bad[0] if bad else max(range(len(values)), key=values.__getitem__)
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    found = ActivationRange(
        dtype=str(dtype).removeprefix("torch."), finite=not bad, largest=values[at], where=modules[at].module,
        room=None if bad else _room(values[at], torch.finfo(dtype).max), subnormal=counts[0] / max(counts[1], 1), modules=modules,
    )  # fmt: skip
    return found, kept


def fitted(batch: Batch, model: nn.Module) -> Batch:
    """Return a batch on the device of a model, its floating inputs in the model's dtype."""
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())

    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    own = to_device(batch, model)
    if isinstance(own, Mapping):
        return {name: cast(value) for name, value in own.items()}
    return [cast(value) for value in own]


def _floats(value: Any) -> Iterator[Tensor]:
    """Yield the floating tensors in what a module is given or gives."""
    if isinstance(value, Tensor):
        if value.is_floating_point() and value.numel():
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _floats(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _floats(item)


def _largest(value: Tensor) -> float:
    return float(value.abs().max())


def _max(values: Sequence[float]) -> float:
    """Return the largest; NaN if one is."""
    return math.nan if any(math.isnan(v) for v in values) else max(values)


def _room(largest: float, limit: float) -> int:
    return math.floor(math.log2(limit / largest)) if largest else math.floor(math.log2(limit))
