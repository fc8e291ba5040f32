"""Flags: when a cell cannot be trusted as it stands, or must be read with care, and what to do about it."""

from __future__ import annotations

from typing import Literal, get_args

Flag = Literal[
    "control-not-broken", "best-at-edge", "diverged-everywhere", "rounding-does-the-work",
    "utility-already-lost", "scratch-reached",
]  # fmt: skip

ADVICE: dict[Flag, str] = {
    "control-not-broken": "The attack does not learn on the unlocked model either: give it more steps, more data or another task.",
    "best-at-edge": "The best learning rate is the last one tried: a better one may lie beyond; allow more trials.",
    "diverged-everywhere": "No learning rate tried was stable on the locked model: allow lower rates, or run in float64.",
    "rounding-does-the-work": "Most steps were smaller than the rounding of the weights: run again in float64 before counting on this.",
    "utility-already-lost": "The locked model does not do its own work any more: what cannot be trained is worth nothing if it cannot be used.",
    "scratch-reached": "Fresh weights learn the task as well as this attack does: no lock can hold longer on it, so a task that needs the model tells more.",
}
"""One sentence each: what it means, and what to do."""

FLAGS: tuple[Flag, ...] = get_args(Flag)
