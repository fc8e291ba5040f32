"""What an interrupted experiment has made already, so that a run goes on from there."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from specdef.experiments.lock_table import state_file
from specdef.experiments.record import Progress, plain
from specdef.weights.atomic import atomic_file


class Kept:
    """Values and states of models by name, in the cache until the experiment has ended.

    Args:
        experiment: Its name.
        *decides: Whatever the numbers depend on, beside the versions.
    """

    def __init__(self, experiment: str, *decides: object) -> None:
        self.journal: Path = state_file(experiment, *decides)
        self.path = self.journal.with_suffix(".json")
        self.values: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8")) if self.path.exists() else {}  # fmt: skip

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """Return a value made before, or make and keep it.

        Args:
            name: Of the value.
            make: Returns JSON values; infinite and undefined numbers become None.

        Returns:
            The value as JSON holds it.
        """
        if name not in self.values:
            self.values[name] = plain(make())
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(self.path) as path:
                path.write_text(json.dumps(self.values), encoding="utf-8")
        return self.values[name]

    def trained(
        self, name: str, model: nn.Module, train: Callable[[nn.Module], Mapping[str, Any]]
    ) -> dict[str, Any]:
        """Give a model the weights it was trained to before, or train it in place and keep them.

        Args:
            name: Of the training.
            model: The model before it; left in evaluation mode.
            train: Trains it in place and returns facts.

        Returns:
            The facts, as JSON holds them.
        """
        place = self.file(name)
        if name in self.values and place.exists():
            model.load_state_dict(load_file(place))
        else:
            facts = dict(train(model))
            place.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(place) as path:
                save_file(_separate(model.state_dict()), path)
            self.values.pop(name, None)
            self.once(name, lambda: facts)
        model.eval()
        found: dict[str, Any] = self.values[name]
        return found

    def file(self, name: str, suffix: str = ".safetensors") -> Path:
        """Return where something of this experiment is kept in a file of its own."""
        plain_name = "".join(c if c.isalnum() else "-" for c in name)
        return self.journal.with_name(f"{self.journal.stem}.{plain_name}{suffix}")

    def forget(self) -> None:
        """Remove everything; for when the record is written."""
        for path in self.journal.parent.glob(f"{self.journal.stem}.*"):
            path.unlink(missing_ok=True)


class Clock:
    """Wall time of a run and of those before it that were interrupted, brought up to date with every line of progress.

    Args:
        kept: The state of the experiment.
        progress: Told what `say` is; None tells nobody.
    """

    def __init__(self, kept: Kept, progress: Progress | None) -> None:
        self._file = kept.file("seconds", ".txt")
        self._progress = progress
        self._before = float(self._file.read_text()) if self._file.exists() else 0.0
        self._began = time.perf_counter()

    def total(self) -> float:
        """Return the seconds so far."""
        return self._before + time.perf_counter() - self._began

    def say(self, line: str) -> None:
        """Keep the time, and pass a line on."""
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(self._file) as path:
            path.write_text(str(self.total()))
        if self._progress:
            self._progress(line)


def _separate(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tied tensors apart: the format stores each once, and a state names both."""
    return {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}  # fmt: skip
