"""Options of `specdef lock` that only some methods have, and the command that groups them and refuses the others'."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from specdef.errors import SpecDefError

_DEFORMATION, _DATA = "Deformation", "Retain data (deformation)"


class Method(StrEnum):
    """Lock methods."""

    absorbed = "absorbed"
    compensated = "compensated"
    deformation = "deformation"
    scaled = "scaled"


class RetainLosses(StrEnum):
    """What a deformation retains."""

    task = "task"
    kl = "kl"
    both = "task+kl"


class Teachers(StrEnum):
    """How the original's outputs are had."""

    auto = "auto"
    cached = "cached"
    online = "online"


class Optimizers(StrEnum):
    """Optimisers of a deformation."""

    adadelta = "adadelta"
    adam = "adam"
    adamw = "adamw"
    rmsprop = "rmsprop"
    sgd = "sgd"


class RateSchedules(StrEnum):
    """Learning-rate schedules."""

    step = "step"
    linear = "linear"
    cosine = "cosine"
    constant = "constant"


class Trained(StrEnum):
    """Which parameters move."""

    all = "all"
    targets = "targets"


def _option(panel: str, *names: str, help: str) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel)


Search = Annotated[
    int | None,
    typer.Option(
        "--search",
        help="Try so many designs, the given one first, and lock by the one whose best attack gains least on half of the calibration text (absorbed, covering).",
    ),
]
SearchSteps = Annotated[
    int | None,
    typer.Option("--search-steps", help="Steps of every attack of --search [default: 10]."),
]
K = Annotated[
    int | None,
    typer.Option(
        "--k",
        help="Singular values per matrix: scaled (compensated, scaled: 25) or raised (deformation: 1).",
    ),
]
# fmt: off
RetainWeight = Annotated[float, _option(_DEFORMATION, "--retain-weight", help="alpha: weight of the retain loss against the singular values, above 0 and at most 1.")]
RetainLoss = Annotated[RetainLosses, _option(_DEFORMATION, "--retain-loss", help="The task's loss, KL(original || locked), or their sum.")]
Teacher = Annotated[Teachers, _option(_DEFORMATION, "--teacher", help="Outputs of the original for KL: kept, computed in every step, or kept where they are small.")]
Optimizer = Annotated[Optimizers, _option(_DEFORMATION, "--optimizer", help="What trains.")]
LearningRate = Annotated[float | None, _option(_DEFORMATION, "--learning-rate", help="Its rate [default: adadelta 1, adam 1e-3, adamw and rmsprop 1e-4, sgd 1e-2].")]
WeightDecay = Annotated[float, _option(_DEFORMATION, "--weight-decay", help="Its weight decay.")]
LrSchedule = Annotated[RateSchedules, _option(_DEFORMATION, "--lr-schedule", help="step: times --gamma after every epoch; linear and cosine: to 0.")]
Gamma = Annotated[float, _option(_DEFORMATION, "--gamma", help="Of the step schedule.")]
Epochs = Annotated[int, _option(_DEFORMATION, "--epochs", help="Passes over the retain data, where --steps is not given.")]
Steps = Annotated[int | None, _option(_DEFORMATION, "--steps", help="Optimiser steps; wins over --epochs.")]
MaxGradNorm = Annotated[float | None, _option(_DEFORMATION, "--max-grad-norm", help="Clip gradients to this norm [default: no clipping].")]
Embeddings = Annotated[bool, _option(_DEFORMATION, "--embeddings", help="Deform embeddings too.")]
Train = Annotated[Trained, _option(_DEFORMATION, "--train", help="What moves: all parameters, or the deformed matrices alone.")]
TargetSigmaMax = Annotated[float | None, _option(_DEFORMATION, "--target-sigma-max", help="Stop once a matrix's largest singular value is this large.")]
TargetGrowth = Annotated[float | None, _option(_DEFORMATION, "--target-growth", help="Stop once it has grown by this factor.")]
MaxUtilityLoss = Annotated[str, _option(_DEFORMATION, "--max-utility-loss", help="Held-out accuracy that may be lost (0.02: two points), or none for no floor.")]
Patience = Annotated[int, _option(_DEFORMATION, "--patience", help="Evaluations in a row below that floor after which training ends.")]
EvalEvery = Annotated[int | None, _option(_DEFORMATION, "--eval-every", help="Steps between evaluations [default: 20 evaluations in all].")]
Checkpoint = Annotated[Path | None, _option(_DEFORMATION, "--checkpoint", help="Where an unfinished training is kept [default: OUT.checkpoint.safetensors].")]
Resume = Annotated[bool, _option(_DEFORMATION, "--resume", help="Go on from there.")]
Plot = Annotated[Path | None, _option(_DEFORMATION, "--plot", help="PNG of retain loss, utility and sigma_max over the steps [default: OUT.png].")]

Retain = Annotated[str | None, _option(_DATA, "--retain", help="Data of the task to keep: sotu, moby-dick, mnist, a file or a folder (docs/data.md).")]
BatchSize = Annotated[int, _option(_DATA, "--batch-size", help="Rows per batch.")]
NumBatches = Annotated[int, _option(_DATA, "--num-batches", help="Batches per epoch.")]
EvalBatches = Annotated[int, _option(_DATA, "--eval-batches", help="Batches utility is measured on; never trained on.")]
Length = Annotated[int, _option(_DATA, "--length", help="Tokens per row of text, at most.")]
Split = Annotated[str | None, _option(_DATA, "--split", help="Part of a data folder [default: train, if any].")]
Heldout = Annotated[str | None, _option(_DATA, "--heldout", help="Other data to measure utility on [default: more batches of --retain].")]
HeldoutSplit = Annotated[str | None, _option(_DATA, "--heldout-split", help="Part of it, or of --retain.")]
Columns = Annotated[str | None, _option(_DATA, "--columns", help="Columns with other names, like text=body,label=gold.")]
Task = Annotated[str | None, _option(_DATA, "--task", help="causal-lm, sequence-classification or image-classification, where config.json names no architecture.")]
# fmt: on

_TRAINED = frozenset((
    "retain_weight", "retain_loss", "teacher", "optimizer", "learning_rate", "weight_decay", "lr_schedule", "gamma", "epochs",
    "steps", "max_grad_norm", "embeddings", "train", "target_sigma_max", "target_growth", "max_utility_loss", "patience",
    "eval_every", "checkpoint", "resume", "plot", "retain", "batch_size", "num_batches", "eval_batches", "length", "split",
    "heldout", "heldout_split", "columns", "task",
))  # fmt: skip
_PROJECTED = frozenset(("scale", "k", "num_layers", "storage_dtype", "max_relative_error"))

OWN: dict[Method, frozenset[str]] = {
    Method.absorbed: frozenset(
        (
            *("strength", "scale", "min_scale", "schedule", "gap", "slack", "sides", "power"),
            *("channel", "calibration", "search", "search_steps"),
        )
    ),
    Method.compensated: _PROJECTED,
    Method.scaled: _PROJECTED,
    Method.deformation: _TRAINED | {"k"},
}
"""Options that not every method has, by method."""


class GroupedHelp(TyperCommand):
    """A verb whose help is in groups."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the help of arguments and options, in the groups that `rich_help_panel` names."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            kind = "Arguments" if parameter.param_type_name == "argument" else "Options"
            if record is not None:
                name = getattr(parameter, "rich_help_panel", None) or kind
                groups.setdefault(name, []).append(record)
        for name, records in groups.items():
            with formatter.section(name):
                formatter.write_dl(records)


class LockCommand(GroupedHelp):
    """`specdef lock`: no option of a method stands beside another method."""

    def invoke(self, ctx: Any) -> Any:
        """Run the verb, unless an option was given that its method lacks."""
        method = Method(ctx.params["method"])
        foreign = frozenset().union(*OWN.values()) - OWN[method]
        given = [
            name for name in ctx.params
            if name in foreign and ctx.get_parameter_source(name).name != "DEFAULT"
        ]  # fmt: skip
        if given:
            owners = [str(m) for m, names in OWN.items() if given[0] in names]
            raise SpecDefError(
                f"{', '.join('--' + name.replace('_', '-') for name in given)}: not an option of --method {method}",
                hint=f"Leave it out, or choose --method {' or '.join(owners)}.",
            )
        return super().invoke(ctx)
