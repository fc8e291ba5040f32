"""Measure the utility of a locked folder anew and hold it against its certificate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from specdef.curvature.losses import Batch, Loss
from specdef.lock.deformation.checkpoint import load_trainable
from specdef.lock.deformation.retain import RetainFunction, UtilityFunction, measure_utility
from specdef.lock.deformation.state import data_digest

_ROWS = 2
_SHARE = 0.002
_RELATIVE = 1e-3
"""What another machine may lose: two rows, two in a thousand of many, a thousandth of a mean loss. float32 sums in another order
move far less; the allowance is for devices that multiply float32 with ten bits (TF32)."""


def check_utility(
    folder: Path,
    recorded: Mapping[str, Any],
    heldout: Iterable[Batch],
    *,
    loss: Loss | RetainFunction | None = None,
    utility: UtilityFunction | None = None,
    load: Callable[[Path], nn.Module] | None = None,
    device: str = "cpu",
) -> tuple[dict[str, Any], list[str], list[str]]:
    """Measure the stored weights, in float32 as the lock did, and compare.

    Args:
        folder: The locked folder.
        recorded: `utility` of its certificate.
        heldout: Batches; their digest tells whether they are those of lock time.
        loss: The task loss of lock time.
        utility: The measure of lock time.
        load: How the folder becomes a model; None is `load_model` in float32.
        device: Where it runs.

    Returns:
        (metric, value, loss, rows, `recorded` value, `same_data`; problems; notes).
    """
    heldout = list(heldout)
    model = (load or load_trainable)(folder).to(device)
    found = measure_utility(model, heldout, loss, utility)
    data = recorded.get("data")
    same = isinstance(data, dict) and data.get("sha256") == data_digest(heldout)
    after = recorded.get("after")
    after = after if isinstance(after, int | float) and math.isfinite(after) else None
    values = {**found.to_dict(), "recorded": after, "same_data": same}
    if after is None:
        return values, [], ["the certificate records no utility to compare with"]
    if not same or recorded.get("metric") != found.metric:
        why = (
            f"the certificate records {recorded.get('metric')}" if same else "these are not the batches of lock time"
        )  # fmt: skip
        return values, [], [f"{found.metric} was measured, but not compared: {why}"]
    lowest = after - _tolerance(found.metric, after, found.rows)
    if found.value >= lowest:  # NaN is below
        return values, [], []
    return values, [f"{found.metric} is {found.value:.4g}, the certificate records {after:.4g}"], []


def _tolerance(metric: str, recorded: float, rows: int) -> float:
    if metric.endswith("accuracy") and rows:
        return max(_ROWS / rows, _SHARE)
    return _RELATIVE * abs(recorded)
