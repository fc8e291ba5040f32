"""The guard beside a Hugging Face `Trainer`. Importing this module imports transformers."""

from __future__ import annotations

import math
from typing import Any

from transformers.trainer_callback import TrainerCallback

from specdef.fragility.guard import DriftGuard


class GuardCallback(TrainerCallback):  # type: ignore[misc]  # transformers has no types
    """Attach a guard for as long as a Trainer trains, and put what it sees into the Trainer's logs.

    Logged beside loss and learning rate: `drift_in_subspace`, `drift_share`, and where known `drift_alignment`,
    `drift_exponent`, `drift_steps_left`.

    Args:
        guard: Made on the model that is trained, at its aligned weights; a run resumed from a checkpoint then still measures
            from those. With `aligned` make it after the Trainer, which moves the model to its device.
        stop: End the training once the loss that is forecast has passed the guard's threshold.
    """

    def __init__(self, guard: DriftGuard, *, stop: bool = False) -> None:
        self.guard, self.stop = guard, stop

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attach the guard to the Trainer's optimiser; one left attached by a run that was interrupted is moved.

        Args:
            args: Of the Trainer.
            state: Of the Trainer.
            control: Of the Trainer.
            kwargs: With the optimiser.
        """
        self.guard.detach()
        self.guard.attach(kwargs["optimizer"])

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Detach the guard.

        Args:
            args: Of the Trainer.
            state: Of the Trainer.
            control: Of the Trainer.
            kwargs: What else the Trainer passes.
        """
        self.guard.detach()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Ask the Trainer to stop where that is wanted.

        Args:
            args: Of the Trainer.
            state: Of the Trainer.
            control: Of the Trainer.
            kwargs: What else the Trainer passes.

        Returns:
            The control.
        """
        last = self.guard.last
        if self.stop and last is not None and last.steps_left == 0:
            control.should_training_stop = True
        return control

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add the newest record to the logs.

        Args:
            args: Of the Trainer.
            state: Of the Trainer, whose log history holds the entry already.
            control: Of the Trainer.
            kwargs: With the logs.
        """
        values = log_values(self.guard)
        # the history got a copy before callbacks were asked; those after this one see the dict
        for logs in (kwargs.get("logs"), state.log_history[-1] if state.log_history else None):
            if logs is not None:
                logs.update(values)


def log_values(guard: DriftGuard) -> dict[str, float]:
    """Return the newest record as numbers for a log, finite ones only.

    Args:
        guard: The guard.

    Returns:
        Name to number; empty before the first step.
    """
    last = guard.last
    if last is None:
        return {}
    measured = next((r.alignment for r in reversed(guard.history) if r.alignment is not None), None)
    values = {
        "drift_in_subspace": last.in_subspace,
        "drift_share": last.drift,
        "drift_alignment": measured,
        "drift_exponent": last.exponent,
        "drift_steps_left": last.steps_left,
    }
    return {name: v for name, v in values.items() if v is not None and math.isfinite(v)}
