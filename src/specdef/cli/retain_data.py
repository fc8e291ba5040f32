"""The data of a deformation lock: which batches are trained on, and which measure utility, at lock time and in `verify`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specdef.cli.analysis import parse_columns
from specdef.cli.common import say
from specdef.errors import SpecDefError

if TYPE_CHECKING:
    from torch import Tensor

    from specdef.cli.task_model import TaskModel


_COUNTS = frozenset(("batch_size", "num_batches", "eval_batches", "length", "seed"))


@dataclass(frozen=True, slots=True, kw_only=True)
class RetainData:
    """How batches are drawn.

    Args:
        retain: Name, file or folder.
        heldout: Other data that utility is measured on; None takes batches of `retain` that are not trained on.
        batch_size: Rows per batch.
        num_batches: Batches per epoch.
        eval_batches: Held-out batches.
        length: Tokens per row of text, at most.
        split: Part of `retain`.
        heldout_split: Part of `heldout`, or of `retain`.
        columns: As on the command line.
        task: What the model does, where its configuration does not say.
        seed: Of the draw.

    Raises:
        ValueError: A count is too small, or the held-out data is the retain data.
    """

    retain: str
    heldout: str | None = None
    batch_size: int = 32
    num_batches: int = 100
    eval_batches: int = 10
    length: int = 128
    split: str | None = None
    heldout_split: str | None = None
    columns: str | None = None
    task: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("batch_size", "num_batches", "eval_batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1.")
        held = (Path(self.heldout or self.retain).resolve(), self.heldout_split or "train")
        if self.apart and held == (Path(self.retain).resolve(), self.split or "train"):
            raise ValueError(
                "--heldout names the very data that is trained on; leave it out to hold some of it out."
            )
        parse_columns(self.columns)  # a mistake in it should not wait for the model

    @property
    def apart(self) -> bool:
        """Whether held-out batches come from other data."""
        return self.heldout is not None or self.heldout_split is not None

    def record(self) -> dict[str, Any]:
        """Return what the certificate says: data by its name alone, no path of this machine."""
        values = asdict(self)
        for name in ("retain", "heldout"):
            if values[name] is not None:
                values[name] = Path(values[name]).name
        return values

    def training(self, loaded: TaskModel) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:  # fmt: skip
        """Draw all batches.

        Args:
            loaded: The model they are for.

        Returns:
            Batches to train on, and batches to measure utility on.

        Raises:
            SpecDefError: The data cannot be used, or there is too little of it.
        """
        if self.apart:
            return self._draw(loaded, self.retain, self.split, self.num_batches), self.held(loaded)
        batches = self._both(loaded)
        return batches[: self.num_batches], batches[self.num_batches :]

    def held(self, loaded: TaskModel) -> list[dict[str, Tensor]]:
        """Draw the held-out batches alone.

        Args:
            loaded: The model they are for.

        Returns:
            The same as `training` draws.
        """
        if self.apart:
            return self._draw(
                loaded, self.heldout or self.retain, self.heldout_split, self.eval_batches
            )
        return self._both(loaded)[self.num_batches :]

    def _both(self, loaded: TaskModel) -> list[dict[str, Tensor]]:
        try:
            return self._draw(loaded, self.retain, self.split, self.num_batches + self.eval_batches)
        except SpecDefError as error:
            if "were asked for" not in str(error):
                raise
            asked = f"{self.num_batches} to train on and {self.eval_batches} held out"
            raise SpecDefError(
                f"{error} ({asked})",
                hint=f"{error.hint} --num-batches, --eval-batches and --batch-size say how much is asked for.",
            ) from error

    def _draw(
        self, loaded: TaskModel, data: str, split: str | None, count: int
    ) -> list[dict[str, Tensor]]:
        from specdef.data.batches import load_batches

        drawn = load_batches(
            data, loaded.model.config, loaded.processor, task=loaded.task, batch_size=self.batch_size, num_batches=count,
            length=self.length, seed=self.seed, split=split, columns=parse_columns(self.columns),
            note=lambda text: say(f"note: {text}"),
        )  # fmt: skip
        dtype = next(loaded.model.parameters()).dtype  # a float64 model takes no float32 pictures
        return [
            {name: x.to(dtype) if x.is_floating_point() else x for name, x in batch.items()}
            for batch in drawn
        ]


def recorded(values: Mapping[str, Any], given: Mapping[str, Any]) -> RetainData:
    """Return the data of a certificate, with what the command line names in its place.

    Args:
        values: What `RetainData.record` returned; unknown entries are passed over.
        given: By the same names; None keeps what is recorded.

    Returns:
        How to draw the held-out batches again.

    Raises:
        SpecDefError: The certificate does not say, or the data it names is not given.
    """
    known = {name: values[name] for name in RetainData.__dataclass_fields__ if name in values}
    known |= {name: value for name, value in given.items() if value is not None}
    missing = set(RetainData.__dataclass_fields__) - set(known)
    if missing - {"retain"}:
        raise SpecDefError(
            f"the certificate does not say how the retain data was drawn ({', '.join(sorted(missing))})",
            hint="It was not locked by this command line: use specdef.verify_checkpoint(…, heldout=…).",
        )
    if known["heldout"] is not None and given.get("heldout") is None:
        raise SpecDefError(
            f"utility was measured on held-out data of its own ({known['heldout']})",
            hint="Name it: --heldout DATA.",
        )
    for name, value in known.items():  # a certificate may be forged
        if type(value) is not int if name in _COUNTS else not isinstance(value, str | None):
            raise SpecDefError(f"the certificate's data cannot be read ({name}: {value!r})", hint=f"Name it: --{name.replace('_', '-')}.")  # fmt: skip
    return RetainData(**known)
