"""Algorithm 1 of papers/001: W <- W - lr grad[alpha retain - (1 - alpha) (1/n) sum of the top-k singular values].

The gradient of a singular value is u v^T (of the k largest together, where the k-th and the next differ: sum u_i v_i^T), so
the spectral term needs no SVD in autograd: the tracker keeps the triplets warm from step to step, and u v^T is added
to the gradient of the retain loss before the optimiser sees it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from specdef.curvature.losses import Batch, Loss
from specdef.errors import CheckpointError, NotConverged, SpecDefError
from specdef.lock.deformation.config import DeformationConfig
from specdef.lock.deformation.data import split_held_out
from specdef.lock.deformation.matrices import WeightMatrix, find_matrices
from specdef.lock.deformation.memory import explained_memory
from specdef.lock.deformation.records import DeformationResult, Progress
from specdef.lock.deformation.retain import (
    RetainFunction,
    UtilityFunction,
)
from specdef.lock.deformation.run import Run
from specdef.lock.deformation.state import (
    copy_tensors,
    deferred_interrupt,
    restore_tensors,
)
from specdef.lock.randomness import forked_rng

_DIVERGED_HINT = (
    "Lower the learning rate, clip gradients (max_grad_norm), or raise retain_weight towards 1."
)


def deform(
    model: nn.Module,
    config: DeformationConfig,
    retain: Iterable[Batch],
    heldout: Iterable[Batch] | None = None,
    *,
    loss: Loss | RetainFunction | None = None,
    utility: UtilityFunction | None = None,
    checkpoint: Path | None = None,
    resume: bool = False,
    checkpoint_seconds: float = 120.0,
    progress: Callable[[Progress], None] | None = None,
) -> DeformationResult:
    """Train a model in place by Algorithm 1.

    A step costs a plain training step and one product of every matrix with a thin block. The state kept is the last one
    evaluated whose utility is above the floor; a run that turns NaN ends with it. Modes and `requires_grad` are left as
    they were, and so is the whole model where an error is raised.

    Args:
        model: Any module; its parameters are trained in their own dtype.
        config: The recipe.
        retain: Training batches: a list, reshuffled in every epoch, or a sized loader in its own order.
        heldout: Batches utility is measured on; None takes the last tenth of `retain`.
        loss: The task loss: a `Loss`, a callable of model and batch, or None for cross-entropy (squared error for
            floating labels).
        utility: Own measure of utility, higher is better; None is accuracy, or the negative loss.
        checkpoint: File the state is saved to now and then and on Ctrl-C; None saves nothing. Left there at the end: remove
            it once the result is stored.
        resume: Go on from `checkpoint`.
        checkpoint_seconds: Time between saves.
        progress: Told after every step.

    Returns:
        What was done.

    Raises:
        SelectionError: Nothing was selected.
        SpecDefError: k is above a rank, the data does not fit, the start loss is not finite, memory is short.
        CheckpointError: The state exists already, cannot be written, or is of another run.
        NotConverged: No state after the start may be kept; `.result` says what was tried.
    """
    matrices = find_matrices(model, config)
    if len({parameter.device for parameter in model.parameters()}) > 1:
        raise SpecDefError("the model lies on several devices", hint="Load it on one.")
    if checkpoint is not None and checkpoint.exists() and not resume:
        raise CheckpointError(
            "is the state of an unfinished lock", path=checkpoint,
            hint="Go on with --resume (resume=True), or remove it to begin anew.",
        )  # fmt: skip
    if resume and (checkpoint is None or not checkpoint.exists()):
        raise CheckpointError("is not there to resume from", path=checkpoint or "checkpoint", hint="Leave --resume out.")  # fmt: skip
    train, held = split_held_out(retain, heldout)
    with (
        _prepared(model, matrices, config.train),
        forked_rng(model),
        explained_memory(),
        deferred_interrupt(checkpoint is not None) as interrupted,
    ):
        original = copy_tensors(model)
        try:
            run = Run(model, config, matrices, train, held, loss, utility, original)
            run.start(checkpoint if resume else None)
            result = run.train(checkpoint, checkpoint_seconds, interrupted.is_set, progress)
            if result.kept_step == 0:
                if checkpoint is not None:
                    checkpoint.unlink(missing_ok=True)  # it leads here again
                raise NotConverged(
                    f"no lock: {result.reason}", result=result,
                    hint=_DIVERGED_HINT if result.stopped == "diverged" else
                    "Raise max_utility_loss or retain_weight, lower the learning rate, or give more retain data.",
                )  # fmt: skip
        except BaseException:
            restore_tensors(model, original)
            raise
    return result


@contextmanager
def _prepared(model: nn.Module, matrices: dict[str, WeightMatrix], trained: str) -> Iterator[None]:
    """Set training mode and what moves; put modes, `requires_grad` and (empty) gradients back afterwards.

    Buffers stay the same objects, too: a module may assign a new one in its forward, and callers hold the old.
    """
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    buffers = [(m, n, b) for m in model.modules() for n, b in m._buffers.items() if b is not None]
    moving = {id(item.parameter) for item in matrices.values()}
    if trained == "targets":
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in moving)
    model.train()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
            parameter.grad = None
        for module, name, buffer in buffers:
            now = module._buffers.get(name)
            if now is not None and now is not buffer:
                buffer.data = now.detach()
                module._buffers[name] = buffer
