"""What is said of a lock's ranges: per runtime dtype what does not fit, and what gradients do."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

ADAM_EXPONENT = 60
"""log2 of the growth of a gradient above which Adam's second moment is taken to overflow: g^2 < 2^128 leaves 2^64 for g, of
which four octaves are for the unscaled gradient (FACTS 3)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRange:
    """What of one tensor does not fit one dtype.

    Args:
        tensor: Its name.
        exponent: log2 of the scaling that does not fit; of those, the furthest from 0.
        max_exponent: log2 of the furthest scaling in that direction at which all would fit; 0 where there is no room.
        share: Of the scaled values that were looked at, the fraction that does not fit.
    """

    tensor: str
    exponent: int
    max_exponent: int
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DtypeRange:
    """How the scaled values fit one dtype, as far as they did before the lock.

    Args:
        dtype: Its name.
        overflow: Tensors with values that become infinite.
        subnormal: Tensors with values that become subnormal or zero.
        max_exponent_up: Largest exponent at which everything that is scaled up would fit; None where nothing is.
        max_exponent_down: Largest exponent (of 1 / scale) at which everything that is scaled down would fit; None likewise.
    """

    dtype: str
    overflow: tuple[TensorRange, ...]
    subnormal: tuple[TensorRange, ...]
    max_exponent_up: int | None
    max_exponent_down: int | None

    @property
    def fits(self) -> bool:
        """Whether nothing overflows and nothing becomes subnormal."""
        return not self.overflow and not self.subnormal


@dataclass(frozen=True, slots=True, kw_only=True)
class RangeReport:
    """Ranges of a lock's weights and gradients.

    Args:
        stored: Dtypes of the scaled tensors, by name.
        dtypes: One entry per runtime dtype.
        gradient_exponent: log2 of the largest growth of a gradient.
        adam_overflow: Tensors with gradients that grow by more than 2^60, whose square overflows float32.
        sampled: Some tensors are large and were looked at in part; the lock checks every value when it writes.
    """

    stored: tuple[str, ...]
    dtypes: tuple[DtypeRange, ...]
    gradient_exponent: int
    adam_overflow: tuple[str, ...]
    sampled: bool

    @property
    def problems(self) -> tuple[str, ...]:
        """What overflows the dtype it is stored in, one sentence per tensor."""
        return tuple(
            f"{item.tensor}: scaled values overflow {entry.dtype}, the dtype it is stored in ({_room(item)})"
            for entry in self.dtypes
            if entry.dtype in self.stored
            for item in entry.overflow
        )

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        values = asdict(self)
        for entry, made in zip(self.dtypes, values["dtypes"], strict=True):
            made["fits"] = entry.fits
        return values

    def sentences(self) -> list[str]:
        """Say it in words: where the lock can be loaded, and what warnings there are."""
        good = [entry.dtype for entry in self.dtypes if entry.fits]
        return [
            *([f"The locked weights fit {' and '.join(good)}."] if good else []),
            *self.warnings(),
        ]

    def warnings(self) -> list[str]:
        """Say where the lock cannot be loaded, and which gradients overflow."""
        out = []
        for entry in self.dtypes:
            kinds = ((entry.overflow, "overflow"), (entry.subnormal, "have values that vanish"))
            if counts := [f"{len(items)} tensors {what}" for items, what in kinds if items]:
                first = max(entry.overflow or entry.subnormal, key=lambda item: item.share)
                does = "breaks it" if entry.overflow else "may change its outputs"
                out.append(
                    f"Loading the locked model in {entry.dtype} {does}: {' and '.join(counts)} ({first.tensor} is scaled by "
                    f"2^{first.exponent}; {_room(first)})."
                )
        if self.adam_overflow:
            out.append(
                f"Gradients of {len(self.adam_overflow)} tensors grow by up to 2^{self.gradient_exponent}: above "
                f"2^{ADAM_EXPONENT} Adam's second moment overflows in float32, which freezes those entries and would unlock the rest."
            )
        return out


def _room(item: TensorRange) -> str:
    return f"2^{item.max_exponent} would fit" if item.max_exponent else "no smaller scale fits"
