"""One deformation under way: steps, evaluations, the state that may be kept, and the four ways it ends."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from specdef.curvature.losses import Batch, Loss
from specdef.errors import SpecDefError
from specdef.lock.deformation.config import DeformationConfig
from specdef.lock.deformation.data import Batches, batches_from, require_finite, require_fit
from specdef.lock.deformation.fit import explained_fit
from specdef.lock.deformation.matrices import WeightMatrix, largest_singular_values, track
from specdef.lock.deformation.memory import require_memory
from specdef.lock.deformation.optimizers import make_optimizer, rate_factor
from specdef.lock.deformation.records import DeformationResult, Progress, Snapshot, Stopped
from specdef.lock.deformation.retain import (
    Retain,
    RetainFunction,
    Utility,
    UtilityFunction,
    measure_utility,
    to_device,
)
from specdef.lock.deformation.state import (
    copy_tensors,
    load_state,
    restore_tensors,
    run_identity,
    save_state,
)


class Run:
    """One deformation: model, optimiser, tracker, and the last state that may be kept.

    Args:
        model: In training mode.
        config: The recipe.
        matrices: What is deformed.
        train: Training batches.
        held: Held-out batches.
        loss: The task loss.
        utility: The user's measure of utility.
        original: Its tensors as they are, on the CPU.
    """

    def __init__(
        self,
        model: nn.Module,
        config: DeformationConfig,
        matrices: dict[str, WeightMatrix],
        train: Batches,
        held: Sequence[Batch],
        loss: Loss | RetainFunction | None,
        utility: UtilityFunction | None,
        original: dict[str, Tensor],
    ) -> None:
        self.model, self.config, self.matrices = model, config, matrices
        self.train_batches, self.held = train, held
        self.loss, self.utility = loss, utility
        self.per_epoch = len(train)
        self.steps = config.steps or config.epochs * self.per_epoch
        self.every = config.interval(self.steps)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        require_memory(model, config, sum(p.numel() for p in self.parameters))
        torch.manual_seed(config.seed)
        require_fit(model, train, held, loss)
        batches = train if isinstance(train, Sequence) else None
        self.retain = Retain(model, kind=config.retain_loss, teacher=config.teacher, loss=loss, batches=batches)  # fmt: skip
        require_finite(model, self.retain, train, held, loss)
        self.optimizer = make_optimizer(self.parameters, config)
        self.tracker = track(matrices, config.k, seed=config.seed)
        self.original = self.good = original
        self.kept, self.below, self.step, self.met = 0, 0, 0, False
        self.history: list[Snapshot] = []
        self.spent, self.training, self.spectral = 0.0, 0.0, 0.0
        self.losses: list[float] = []
        self.identity: dict[str, Any] = {}

    def start(self, state: Path | None) -> None:
        """Measure the original; then go to a saved state, if there is one.

        Args:
            state: Its file.
        """
        self.tracker.update()
        self.sigma_before = self._sigma()
        self.utility_before = measure_utility(self.model, self.held, self.loss, self.utility)
        self.began = time.perf_counter()
        for what, value in (("utility", self.utility_before.value), ("held-out loss", self.utility_before.loss)):  # fmt: skip
            if not math.isfinite(value):
                raise SpecDefError(f"the {what} of the model as it is, is {value}", hint="The model or the held-out data is damaged.")  # fmt: skip
        if self._reached():
            raise SpecDefError(f"sigma_max of the model as it is, is {max(self.sigma_before.values()):.4g} already", hint="Raise target_sigma_max above it.")  # fmt: skip
        if state is None:
            self.history.append(self._snapshot(self.utility_before))
            return
        tracker, self.good, numbers = load_state(state, self.model, self.optimizer, self._identity())  # fmt: skip
        self.tracker.load_state_dict(tracker)
        self.step, self.kept, self.below = numbers["step"], numbers["kept"], numbers["below"]
        self.met = numbers["met"]
        self.spent, self.training, self.spectral = numbers["seconds"]
        self.losses = numbers["losses"]
        self.history = [Snapshot(**values) for values in numbers["history"]]

    def train(
        self,
        checkpoint: Path | None,
        checkpoint_seconds: float,
        interrupted: Callable[[], bool],
        progress: Callable[[Progress], None] | None,
    ) -> DeformationResult:
        """Take steps until one of the ends is reached.

        Args:
            checkpoint: Where the state is saved to; None saves nothing.
            checkpoint_seconds: Time between saves.
            interrupted: Says whether Ctrl-C was pressed.
            progress: Told after every step.

        Returns:
            What was done; the model holds the state that is kept.
        """
        saved = time.perf_counter()
        first = self.step
        stopped: tuple[Stopped, str] | None = None
        for index, batch in batches_from(self.train_batches, self.config.seed, self.step, self.steps):  # fmt: skip
            problem = self._step(index, batch)
            self.step += 1
            snapshot = None
            if problem is None and self._due() and (problem := self._track()) is None:
                snapshot = self._evaluate()
                stopped = self._verdict(snapshot)
            if problem:
                stopped = ("diverged", f"{problem} in step {self.step}")
            if progress:
                done = time.perf_counter() - self.began
                progress(
                    Progress(
                        step=self.step, steps=self.steps, seconds=self.spent + done,
                        seconds_left=done / (self.step - first) * (self.steps - self.step),
                        train_loss=self.losses[-1] if self.losses else None,
                        sigma_max=max(self._sigma().values()), snapshot=snapshot,
                    )
                )  # fmt: skip
            if stopped:
                break
            if checkpoint is not None and (interrupted() or time.perf_counter() - saved > checkpoint_seconds):  # fmt: skip
                self._save(checkpoint)
                saved = time.perf_counter()
            if interrupted():
                raise KeyboardInterrupt
        return self._finish(*(stopped or ("finished", f"all {self.steps} steps were taken")))

    def _due(self) -> bool:
        """Say whether the model is evaluated now: at regular steps, at the last, and once the target is first met."""
        first = not self.met and self._reached()
        self.met = self.met or first
        return first or self.step % self.every == 0 or self.step == self.steps

    def _step(self, index: int, batch: Batch) -> str | None:
        """Take one step; return what went wrong, before the weights are touched where it shows by then."""
        began = time.perf_counter()
        weight = self.config.retain_weight
        self.optimizer.zero_grad(set_to_none=True)
        with explained_fit(self.model, batch):
            loss = self.retain(self.model, to_device(batch, self.model), index)
        if not loss.requires_grad:
            raise SpecDefError("the retain loss depends on no weight that moves", hint="Return it with its graph: no detach, item or no_grad.")  # fmt: skip
        (loss if weight == 1 else weight * loss).backward()  # type: ignore[no-untyped-call]
        if loss.is_cuda:  # what follows would be charged with the wait
            torch.cuda.synchronize(loss.device)
        spectral = time.perf_counter()
        if problem := self._track():
            return problem
        self._add_spectral_gradient()
        self.spectral += time.perf_counter() - spectral
        value = float(loss.detach())
        if not math.isfinite(value):
            return f"the retain loss became {value}"
        self.losses.append(value)
        if self.config.max_grad_norm is not None:
            norm = nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
            if not bool(norm.isfinite()):
                return f"the norm of the gradient became {float(norm)}"
        rate = self.config.rate * rate_factor(self.config, self.step, self.steps, self.per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.training += time.perf_counter() - began
        return None

    def _track(self) -> str | None:
        """Bring the tracker up to date; return what does not let it: a matrix that is not finite, or lost its rank."""
        try:
            self.tracker.update()
        except (ValueError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
            return str(error).rstrip(".")
        return None

    def _add_spectral_gradient(self) -> None:
        """Subtract (1 - alpha) / n sum u v^T from the gradient of the retain loss."""
        weight = self.config.retain_weight
        if weight < 1:
            gradients = {name: item.gradient() for name, item in self.matrices.items()}
            self.tracker.add_gradient(gradients, -(1 - weight) / self.tracker.count)

    def _evaluate(self) -> Snapshot:
        self.optimizer.zero_grad(set_to_none=True)
        snapshot = self._snapshot(measure_utility(self.model, self.held, self.loss, self.utility))
        self.history.append(snapshot)
        self.losses = []
        if self._good(snapshot):
            self.good, self.kept, self.below = copy_tensors(self.model), self.step, 0
        else:
            self.below += 1
        return snapshot

    def _verdict(self, snapshot: Snapshot) -> tuple[Stopped, str] | None:
        """Say whether the run ends here."""
        if not (math.isfinite(snapshot.utility) and math.isfinite(snapshot.retain_loss)):
            what, value = ("held-out loss", snapshot.retain_loss) if math.isfinite(snapshot.utility) else ("utility", snapshot.utility)  # fmt: skip
            return "diverged", f"the {what} became {value} by step {self.step}"
        if self._good(snapshot):
            if self._reached():
                return "target", f"the target was reached in step {self.step}: sigma_max {snapshot.sigma_max:.4g}, growth {snapshot.growth:.4g}"  # fmt: skip
            return None
        last = self.step == self.steps
        if last or self.below >= self.config.patience:
            floor = self.utility_before.value - (self.config.max_utility_loss or 0.0)
            return "utility", f"{self.utility_before.metric} was {snapshot.utility:.4g} at step {self.step}, below the floor of {floor:.4g}"  # fmt: skip
        return None

    def _good(self, snapshot: Snapshot) -> bool:
        if not (math.isfinite(snapshot.utility) and math.isfinite(snapshot.retain_loss)):
            return False
        allowed = self.config.max_utility_loss
        # a count of hits over rows differs from the same fraction by rounding alone
        return allowed is None or snapshot.utility >= self.utility_before.value - allowed - 1e-12

    def _reached(self) -> bool:
        wanted, factor = self.config.target_sigma_max, self.config.target_growth
        sigma = self._sigma()
        return (wanted is not None and max(sigma.values()) >= wanted) or (
            factor is not None and max(self._growth(sigma)) >= factor
        )

    def _snapshot(self, utility: Utility) -> Snapshot:
        sigma = self._sigma()
        growth = self._growth(sigma)
        return Snapshot(
            step=self.step, epoch=self.step / self.per_epoch,
            learning_rate=self.config.rate * rate_factor(self.config, self.step, self.steps, self.per_epoch),
            train_loss=statistics.fmean(self.losses) if self.losses else None,
            retain_loss=utility.loss, utility=utility.value, sigma_max=max(sigma.values()), growth=max(growth),
            median_growth=statistics.median(growth), seconds=self.spent + time.perf_counter() - self.began,
        )  # fmt: skip

    def _sigma(self) -> dict[str, float]:
        largest = torch.stack([values[..., 0].max() for values in self.tracker.values.values()])
        return dict(zip(self.tracker.values, largest.tolist(), strict=True))

    def _growth(self, sigma: dict[str, float]) -> list[float]:
        return [value / self.sigma_before[name] for name, value in sigma.items()]

    def _finish(self, stopped: Stopped, reason: str) -> DeformationResult:
        if self.kept != self.step:
            reason += f"; the state of step {self.kept} is kept" if self.kept else "; no state after the start can be kept"  # fmt: skip
            restore_tensors(self.model, self.good)
        kept = next(s for s in self.history if s.step == self.kept)
        return DeformationResult(
            sigma_before=self.sigma_before, sigma_after=largest_singular_values(self.matrices), utility_before=self.utility_before,
            utility_after=Utility(metric=self.utility_before.metric, value=kept.utility, loss=kept.retain_loss, rows=self.utility_before.rows),
            history=tuple(self.history), steps=self.step, kept_step=self.kept, stopped=stopped, reason=reason,
            seconds=self.spent + time.perf_counter() - self.began, step_seconds=self.training / max(self.step, 1),
            spectral_seconds=self.spectral / max(self.step, 1),
        )  # fmt: skip

    def _identity(self) -> dict[str, Any]:
        if not self.identity:  # reads all data and weights
            train = self.train_batches if isinstance(self.train_batches, Sequence) else []
            self.identity = run_identity(self.config, self.original, [*train, *self.held], self.per_epoch, list(self.matrices))  # fmt: skip
        return self.identity

    def _save(self, path: Path) -> None:
        numbers = {
            **self._identity(), "step": self.step, "kept": self.kept, "below": self.below, "met": self.met,
            "seconds": [self.spent + time.perf_counter() - self.began, self.training, self.spectral],
            "losses": self.losses, "history": [snapshot.to_dict() for snapshot in self.history],
        }  # fmt: skip
        save_state(path, self.model, self.optimizer, self.tracker.state_dict(), self.good, numbers)
