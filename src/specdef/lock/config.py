"""What a lock is asked to be."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

Method = Literal["absorbed", "compensated", "scaled"]
Schedule = Literal["covering", "convex", "staggered", "uniform"]
Channel = Literal["least-useful", "most-active"]
Sides = Literal["both", "readers"]
Strength = Literal["max", "convex", "staggered", "uniform"]

DEFAULT_SCALE = {"absorbed": 2.0**30, "compensated": 1e4, "scaled": 1e4}
"""absorbed: FACTS 3's convex design; compensated and scaled: the value arXiv 2602.18868 reports."""

COVERING_SCALE = 2.0**48
"""Default of the covering schedule: six levels of 7 octaves for up to 31 layers, and rates of plain gradient steps, 4^-48, that float32 holds."""

PRESETS: dict[str, dict[str, Any]] = {
    "max": {"schedule": "covering"},
    "convex": {"schedule": "convex", "scale": 2.0**30, "min_scale": 2.0**8},
    "staggered": {"schedule": "staggered", "scale": 2.0**22, "min_scale": 2.0**2},
    "uniform": {"schedule": "uniform", "scale": 2.0**10, "channel": "most-active"},
}
"""Absorbed designs by name. max: the strongest known; uniform: what the papers' single scale becomes; the rest: steps between."""

CHOICES: dict[str, tuple[str, ...]] = {
    "method": ("absorbed", "compensated", "scaled"),
    "schedule": ("covering", "convex", "staggered", "uniform"),
    "channel": ("least-useful", "most-active"),
    "sides": ("both", "readers"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LockConfig:
    """Recipe of a lock; copied into its certificate.

    Args:
        method: absorbed | compensated | scaled.
        scale: Largest multiplier; a power of two for absorbed. None means 2^48 for the covering schedule, 2^30 for the other
            absorbed ones, 1e4 for other methods.
        min_scale: Smallest multiplier of all schedules but uniform (absorbed); lowered to `scale` if above.
        schedule: How the scales are spread over the sites (absorbed): covering gives every run of layers a top of its own
            (`specdef.lock.covering`), convex leaves few sites near one top.
        gap: Octaves between the levels of layers (covering).
        slack: Octaves by which the columns of a layer lie below its norms' gains (covering).
        sides: What becomes explosive (covering): both, or only the columns that read a channel.
        power: Exponent of the convex schedule.
        channel: Which channel of a site is scaled (absorbed).
        k: Singular values scaled per matrix (compensated, scaled); at most the smaller side is used.
        num_layers: Blocks locked, evenly spread, where `layers` is not given (compensated, scaled).
        target_modules: Names or one regular expression, as in PEFT; None means all.
        layers: Indices of the blocks; None means all (absorbed) or `num_layers` of them.
        storage_dtype: "float32" stores the locked pairs wider than the checkpoint (compensated); None keeps its dtype.
        max_relative_error: Largest relative error a compensated pair may add to a layer's output.
        seed: Seeds whatever is drawn.

    Raises:
        ValueError: A field is out of range.
    """

    method: Method = "absorbed"
    scale: float | None = None
    min_scale: float = 2.0**8
    schedule: Schedule = "covering"
    gap: int = 7
    slack: int = 8
    sides: Sides = "both"
    power: int = 16
    channel: Channel = "least-useful"
    k: int = 25
    num_layers: int = 5
    target_modules: tuple[str, ...] | str | None = None
    layers: tuple[int, ...] | None = None
    storage_dtype: str | None = None
    max_relative_error: float = 1e-2
    seed: int = 0

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}."
                )
        for name in ("target_modules", "layers"):
            object.__setattr__(self, name, selection(name, getattr(self, name)))
        if not (math.isfinite(self.top) and self.top > 1):
            raise ValueError(f"scale must be finite and above 1, got {self.scale}.")
        for name in ("k", "power", "num_layers", "gap"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.slack < 0:
            raise ValueError(f"slack must be at least 0, got {self.slack}.")
        if self.method == "absorbed":
            for name, value in (("scale", self.top), ("min_scale", self.bottom)):
                if not math.log2(value).is_integer():
                    raise ValueError(
                        f"{name} must be a power of two for absorbed (other factors round), got {value}."
                    )
        if self.storage_dtype not in (None, "float32"):
            raise ValueError(f"storage_dtype must be float32 or None, got {self.storage_dtype!r}.")

    @property
    def top(self) -> float:
        """The largest scale, default filled in."""
        if self.scale is not None:
            return float(self.scale)
        covering = self.method == "absorbed" and self.schedule == "covering"
        return COVERING_SCALE if covering else DEFAULT_SCALE[self.method]

    @property
    def bottom(self) -> float:
        """The smallest scale of a schedule."""
        return float(min(self.min_scale, self.top))

    @property
    def both_sides(self) -> bool:
        """Whether the writers of channels become explosive too."""
        return self.sides == "both"

    @classmethod
    def preset(cls, strength: Strength, **fields: Any) -> LockConfig:
        """Return an absorbed design by name.

        Args:
            strength: A key of `PRESETS`.
            **fields: What shall differ from it.

        Returns:
            The recipe.

        Raises:
            ValueError: There is no such design, or a field is out of range.
        """
        if strength not in PRESETS:
            raise ValueError(f"strength must be one of {', '.join(PRESETS)}, got {strength!r}.")
        return cls(**{**PRESETS[strength], **fields})

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values, `scale` filled in."""
        return {**asdict(self), "scale": self.top}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LockConfig:
        """Read back what `to_dict` wrote; unknown fields of newer versions are ignored."""
        return cls(**known_fields(cls, values))


def selection(name: str, value: Any) -> Any:
    """Return `target_modules` or `layers` as a tuple, also where a list or a single value was given, as people type it.

    Args:
        name: Which of the two.
        value: What was given.

    Returns:
        A tuple; None and a regular expression (which `matches` takes as it is) stay.
    """
    expression = isinstance(value, str) and not re.fullmatch(r"[\w.]+", value)
    if value is None or isinstance(value, tuple) or (name == "target_modules" and expression):
        return value
    return (value,) if isinstance(value, str | int) else tuple(value)


def known_fields(kind: type[Any], values: dict[str, Any]) -> dict[str, Any]:
    """Return what of a JSON object are fields of a dataclass, lists as the tuples they were."""
    names = {field.name for field in fields(kind)} & set(values)
    return {n: tuple(values[n]) if isinstance(values[n], list) else values[n] for n in names}
