"""What `specdef verify` measures beside hashes and outputs: ranges of the weights, activations on data, the cost of quantising."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specdef.cli.analysis import DataOptions, load_workload
from specdef.cli.common import say

if TYPE_CHECKING:
    from specdef.lock.activations import ActivationRange
    from specdef.lock.quantization_cost import QuantizationReport
    from specdef.lock.range_report import RangeReport


@dataclass(frozen=True, slots=True, kw_only=True)
class Checks:
    """What was measured.

    Args:
        ranges: Of the weights; None without an original.
        activations: Per dtype; None without data.
        quantization: What quantising costs; None where it was not asked for.
        problems: What breaks the model in the dtype it is stored in.
    """

    ranges: RangeReport | None = None
    activations: tuple[ActivationRange, ...] | None = None
    quantization: QuantizationReport | None = None
    problems: tuple[str, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON keys that `verify` adds; null for what was not measured."""
        return {
            "ranges": self.ranges.to_dict() if self.ranges else None,
            "activations": None if self.activations is None else [a.to_dict() for a in self.activations],
            "quantization": self.quantization.to_dict() if self.quantization else None,
        }  # fmt: skip

    def say(self) -> None:
        """Tell people."""
        for text in self.ranges.sentences() if self.ranges else ():
            say(text)
        for item in self.activations or ():
            say(item.sentence())
        if self.quantization:
            for text in (*self.quantization.lines(), *self.quantization.sentences()):
                say(text)


def run_checks(
    locked: Path,
    original: Path | None,
    data: DataOptions | None,
    *,
    dtypes: Sequence[str],
    quantization: bool,
    device: str,
    status: Callable[[str], None] | None,
) -> Checks:
    """Measure what the arguments allow.

    Args:
        locked: Locked folder.
        original: The unlocked model; its tokenizer serves where the locked folder has none.
        data: What the models are run on.
        dtypes: Dtypes activations are measured in; what the model is stored in is added.
        quantization: Measure what quantising costs; needs the original and data.
        device: Where the models run.
        status: Told what is being worked on.

    Returns:
        What was found.
    """
    from specdef.lock.ranges import locked_ranges
    from specdef.weights.checkpoint import Checkpoint
    from specdef.weights.source import FolderSource

    tell = status or (lambda _: None)
    source = FolderSource(Checkpoint.open(locked))
    kinds = {source.dtype(name) for name in source.names}
    stored = sorted(str(kind).removeprefix("torch.") for kind in kinds if kind.is_floating_point)
    ranges = None
    if original is not None:
        tell("ranges of the weights")
        ranges = locked_ranges(FolderSource(Checkpoint.open(original)), source)
    activations = None
    cost = None
    if data is not None:
        from specdef.lock.activations import check_activations
        from specdef.lock.quantization_cost import compare_quantization

        work = load_workload(
            locked, data, dtype="float32", device=device, original=original, quiet=status is None
        )
        batches, loss = work.batches, work.loss
        del work  # one model in memory at a time
        tell("activations")
        names = tuple(dict.fromkeys((*dtypes, *stored)))
        activations = check_activations(locked, original, batches, names, device=device)
        if quantization and original is not None:
            cost = compare_quantization(
                original, locked, batches, loss, device=device, progress=lambda text: tell(f"quantising the {text}")
            )  # fmt: skip
    problems = [*(ranges.problems if ranges else ())]
    problems += [
        a.problem + ", the dtype it is stored in"
        for a in activations or ()
        if a.dtype in stored and a.problem
    ]
    return Checks(
        ranges=ranges, activations=activations, quantization=cost, problems=tuple(problems)
    )
