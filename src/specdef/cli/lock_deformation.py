"""`specdef lock --method deformation`: model and retain data, the training with its progress, plot, summary, dry run."""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specdef.cli.common import human_bytes, print_json, say
from specdef.cli.retain_data import RetainData
from specdef.cli.training_progress import duration, training_view
from specdef.errors import CheckpointError, NotConverged, SpecDefError
from specdef.lock.deformation.config import DeformationConfig, Teacher

if TYPE_CHECKING:
    from torch import Tensor, nn

    from specdef.cli.task_model import TaskModel
    from specdef.lock.certificate import LockCertificate
    from specdef.lock.deformation.matrices import WeightMatrix
    from specdef.lock.deformation.retain import Utility


_ATTEMPT = ".attempt.png"


class Interrupted(SpecDefError):
    """Ctrl-C during the training, whose state was kept."""

    exit_code = 130


@dataclass(frozen=True, slots=True, kw_only=True)
class Deformation:
    """A deformation lock as the command line asks for it.

    Args:
        folder: Model folder.
        out: Folder to create.
        recipe: The recipe.
        data: How batches are drawn.
        source_name: Name of the model in the certificate.
        key: Where the key goes; None is beside the output.
        checkpoint: Where an unfinished training is kept; None is beside the output.
        resume: Go on from there.
        plot: Where the plot goes; None is beside the output.
        device: Where the model is trained.
    """

    folder: Path
    out: Path
    recipe: DeformationConfig
    data: RetainData
    source_name: str = ""
    key: Path | None = None
    checkpoint: Path | None = None
    resume: bool = False
    plot: Path | None = None
    device: str = "cpu"

    def lock(self) -> tuple[LockCertificate, Path | None]:
        """Lock the folder.

        Returns:
            (certificate, plot). The plot is None where it could not be written.

        Raises:
            SpecDefError: Model, data or recipe cannot be used; nothing was written.
            NotConverged: Nothing may be kept; only a plot of the attempt was written.
            Interrupted: By Ctrl-C; the state of the training was kept.
        """
        from specdef.lock.lock import lock_checkpoint

        plot, state = self._require_places()
        loaded, retain, heldout = self._load()
        try:
            with training_view() as view:
                certificate = lock_checkpoint(
                    self.folder, self.out, self.recipe, key_path=self._beside(self.key, ".key.safetensors"), source_name=self.source_name, progress=view.bytes,
                    status=view.status, retain=retain, heldout=heldout, checkpoint=state, resume=self.resume,
                    training_progress=view.training, data=self.data.record(), load=lambda _: loaded.model,
                )  # fmt: skip
        except NotConverged as error:
            if error.result is not None:
                history = [snapshot.to_dict() for snapshot in error.result.history]
                metric = error.result.utility_before.metric
                self._draw(plot.with_suffix(_ATTEMPT), history, 0, metric)
            raise
        except KeyboardInterrupt:
            if not state.exists():
                raise
            raise Interrupted(
                f"interrupted; the training so far is in {state}",
                hint="Go on with the same command and --resume, or remove the file.",
            ) from None
        training = certificate.training
        metric = str(certificate.utility["metric"])
        return certificate, self._draw(plot, training["history"], training["kept_step"], metric)

    def _beside(self, path: Path | None, suffix: str) -> Path:
        """Return a path that was named, or the one beside the output."""
        out = self.out if self.out.name else self.out.absolute()  # the folder it is called in
        return path or out.with_name(out.name + suffix)

    def _require_places(self) -> tuple[Path, Path]:
        """Return the paths of plot and state; refuse a plot where something else is or will be."""
        from specdef.weights.atomic import refuse_existing

        plot, key = self._beside(self.plot, ".png"), self._beside(self.key, ".key.safetensors")
        state = self._beside(self.checkpoint, ".checkpoint.safetensors")
        refuse_existing(plot)
        for drawn in (plot, plot.with_suffix(_ATTEMPT)):
            if drawn.resolve() in (key.resolve(), state.resolve()):
                raise CheckpointError("is to be the plot and something else at once", path=drawn, hint="Name another --plot.")  # fmt: skip
        if plot.resolve().is_relative_to(self.out.resolve()):
            raise CheckpointError("lies inside the locked folder", path=plot, hint="Name another --plot.")  # fmt: skip
        return plot, state

    def dry_run(self, *, as_json: bool) -> None:
        """Say what would be deformed, on what, and about how long it would take; write nothing.

        Args:
            as_json: Print one JSON object as well.
        """
        from specdef.lock.deformation.matrices import find_matrices, track
        from specdef.lock.deformation.memory import memory_bytes

        self._require_places()
        recipe = self.recipe
        loaded, train, heldout = self._load()
        matrices = find_matrices(loaded.model, recipe)
        tracker = track(matrices, recipe.k)
        tracker.update()
        moving = [m.parameter for m in matrices.values()] if recipe.train == "targets" else loaded.model.parameters()  # fmt: skip
        utility, step_seconds, eval_seconds = self._measure(loaded.model, train, heldout)
        steps = recipe.steps or recipe.epochs * len(train)
        evaluations = math.ceil(steps / recipe.interval(steps))
        shapes = Counter(_shape(name, m, loaded.model) for name, m in matrices.items())
        values: dict[str, Any] = {
            "method": "deformation", "dry_run": True, "out": str(self.out), "config": recipe.to_dict(), "data": self.data.record(),
            "matrices": [{"kind": kind, "shape": list(shape), "count": count} for (kind, shape), count in shapes.items()],
            "singular_values": tracker.count, "sigma_max_before": max(float(s.max()) for s in tracker.values.values()),
            "steps": steps, "steps_per_epoch": len(train), "evaluations": evaluations, "utility": utility.to_dict(),
            "memory_bytes": memory_bytes(loaded.model, recipe, sum(p.numel() for p in moving if p.requires_grad)),
            "step_seconds": step_seconds, "seconds": steps * step_seconds + (evaluations + 1) * eval_seconds,
        }  # fmt: skip
        if as_json:
            print_json(values)
        say(f"deformation of {len(matrices)} matrices, {tracker.count} singular values, largest {values['sigma_max_before']:.4g}")  # fmt: skip
        for (kind, shape), count in shapes.items():
            say(f"  {count:4} x {kind} {' x '.join(map(str, shape))}")
        say(f"{steps} steps ({steps / len(train):.3g} epochs of {len(train)} batches of {self.data.batch_size}), {evaluations} evaluations")  # fmt: skip
        say(f"now: {utility.metric} {utility.value:.4g}, task loss {utility.loss:.4g}, on {_rows(utility.metric, utility.rows)}")  # fmt: skip
        say(f"memory: about {human_bytes(values['memory_bytes'])} besides activations")
        say(
            f"time: about {duration(values['seconds'])}; an estimate from one forward and backward pass of {duration(step_seconds)}, "
            "without the optimiser, the singular values and writing"
        )
        say("dry run: nothing was written")

    def _measure(
        self, model: nn.Module, train: list[dict[str, Tensor]], heldout: list[dict[str, Tensor]]
    ) -> tuple[Utility, float, float]:
        """Return (utility now, seconds of a pass forward and back, seconds of an evaluation); the model is left as it was."""
        from specdef.lock.deformation.data import require_finite, require_fit
        from specdef.lock.deformation.memory import explained_memory
        from specdef.lock.deformation.retain import (
            Retain,
            evaluating,
            measure_utility,
            to_device,
        )

        teacher: Teacher = "online" if self.recipe.teacher == "online" else "cached"
        require_fit(model, train, heldout, None)
        retain = Retain(model, kind=self.recipe.retain_loss, teacher=teacher, batches=train[:1])
        require_finite(model, retain, train[:1], heldout, None)
        with explained_memory():
            began = time.perf_counter()
            utility = measure_utility(model, heldout)
            measured = time.perf_counter()
            with evaluating(model):
                retain(model, to_device(train[0], model), 0).backward()  # type: ignore[no-untyped-call]
            if self.device != "cpu":
                float(next(p.grad for p in model.parameters() if p.grad is not None).sum())  # waits
            done = time.perf_counter()
        model.zero_grad(set_to_none=True)
        return utility, done - measured, measured - began

    def _load(self) -> tuple[TaskModel, list[dict[str, Tensor]], list[dict[str, Tensor]]]:
        from specdef.cli.task_model import load_task_model
        from specdef.lock.lock import open_lockable

        opened = open_lockable(self.folder, self.out, "deformation")  # before the model
        wide = any(info.dtype == "F64" for info in opened.infos.values())
        loaded = load_task_model(
            self.folder, task=self.data.task, dtype="float64" if wide else "float32", device=self.device
        )  # fmt: skip
        return loaded, *self.data.training(loaded)

    def _draw(
        self, path: Path, history: Sequence[Mapping[str, Any]], kept: int, metric: str
    ) -> Path | None:
        from specdef.lock.deformation.plot import draw
        from specdef.weights.atomic import atomic_file

        allowed = self.recipe.max_utility_loss
        try:
            with atomic_file(path) as work:
                draw(
                    work, history, kept_step=kept, metric=metric, target=self.recipe.target_sigma_max,
                    floor=None if allowed is None else history[0]["utility"] - allowed,
                )  # fmt: skip
        except CheckpointError as error:
            say(f"no plot: {error}")
            return None
        say(f"plot: {path}")
        return path


def say_training(certificate: LockCertificate) -> None:
    """Say how a deformation ended and what it did.

    Args:
        certificate: Of the lock, sites in full.
    """
    training, utility = certificate.training, certificate.utility
    say(f"{training['reason']} ({training['kept_step']} of {training['steps']} steps are in the result)")  # fmt: skip
    say(
        f"{utility['metric']} {utility['before']:.4g} -> {utility['after']:.4g}, task loss {utility['retain_loss_before']:.4g} -> "
        f"{utility['retain_loss_after']:.4g}, on {_rows(utility['metric'], utility['rows'])}, as stored"
    )
    growth = [site["scale"] for site in certificate.sites if isinstance(site, dict)]
    say(
        f"sigma_max grew by {min(growth):.3g} to {max(growth):.3g}, median {statistics.median(growth):.3g}, "
        f"over {len(growth)} matrices"
    )
    share = training["spectral_seconds"] / (training["step_seconds"] or 1.0)
    say(f"{duration(training['step_seconds'])} per step, {share:.1%} of it for the singular values")


def _rows(metric: str, rows: int) -> str:
    return f"{rows} held-out {'tokens' if metric.startswith('next-token') else 'rows'}"


def _shape(name: str, item: WeightMatrix, model: nn.Module) -> tuple[str, tuple[int, ...]]:
    """Return what holds a matrix, and its shape as a matrix or stack."""
    owner = model.get_submodule(name.rpartition(".")[0])
    return type(owner).__name__, tuple(item.view(item.parameter.data).shape)
