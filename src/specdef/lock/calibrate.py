"""Usefulness of channels, measured on calibration text: gradient per unit of root curvature.

usefulness_c = |sum_t d_t x_tc| / sqrt(sum_t |d_t|^2 x_tc^2), with x_t the input of a linear layer at token t and d_t the loss's
gradient with respect to its output: the gradient of column c, over the root of the trace of its empirical Fisher matrix. Half its
square, times the number of tokens, bounds what a step along that gradient gains where the Fisher matrix stands for the curvature; it
lies at 1 for a column that is all noise. Rescaling x_c by s multiplies both by s, so the score does not depend on the scale the channel
happens to have.

Differs from FACTS 3, which divides by rms(x_c) alone: a channel that is huge at one token, where the loss hardly depends on it, then counts
as useless though it is not explosive either (dev/LOG.md, 2026-11-22; `benchmarks/slices.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from specdef.errors import SpecDefError
from specdef.lock.channels import position_table
from specdef.lock.deformation.retain import task_loss, task_mean
from specdef.lock.names import NameMap
from specdef.symmetries.site import Leg, Site

Batch = Mapping[str, Tensor] | Sequence[Tensor]


def calibrated_scores(
    model: nn.Module,
    sites: Sequence[Site],
    batches: Iterable[Batch],
    *,
    channel: str = "least-useful",
    progress: Callable[[int], None] | None = None,
) -> dict[str, Tensor]:
    """Score every channel of every site on data.

    Cost: one forward and backward pass per batch; memory of the model and of one gradient at a time.

    Args:
        model: Run in evaluation mode, and left in the mode it was in; called as `model(**batch)`, with a `loss` in what it returns, for
            batches by name.
        sites: Sites whose consumers are Linear, Conv1D or convolution weights of the model.
        batches: Inputs with labels, or (input, target) pairs.
        channel: "least-useful" for usefulness, "most-active" for rms(x_c).
        progress: Called with the number of batches done.

    Returns:
        Site name to (size,) float32 scores; inf for a channel that was never active, which is not explosive.

    Raises:
        SpecDefError: A consumer is no plain module of the model, or the loss is missing or not finite.
    """
    legs = {leg.tensor: leg for site in sites for leg in site.consumers}
    names = NameMap(model)
    weights = {name: names.tensor(name) for name in legs}
    gradients = {
        name: torch.zeros(_axis_length(weights[name], leg), dtype=torch.float64)
        for name, leg in legs.items()
    }
    activity = {name: torch.zeros_like(total) for name, total in gradients.items()}
    fisher = {name: torch.zeros_like(total) for name, total in gradients.items()}
    watches: dict[str, _Watch] = {}
    handles: list[Any] = []
    was = {p: p.requires_grad for p in model.parameters()}
    training = {module: module.training for module in model.modules()}
    try:
        model.eval()  # batch norm would otherwise learn from the calibration text
        for parameter in was:
            parameter.requires_grad_(False)
        for name, leg in legs.items():
            weight = weights[name]
            weight.requires_grad_(True)
            handles.append(
                weight.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                    _collect(gradients[name], leg)
                )
            )
            module, dim = _reader(model, weight, leg)
            watched = _Watch(activity[name], fisher[name], dim)
            handles.append(module.register_forward_pre_hook(watched.forward))
            handles.append(module.register_forward_hook(watched.output))
            watches[name] = watched
        for number, batch in enumerate(batches):
            with torch.enable_grad():
                loss = _loss(model, batch)
                if loss is None or not bool(loss.isfinite()):
                    raise SpecDefError(
                        f"calibration batch {number} gives loss {None if loss is None else float(loss)}",
                        hint="Give batches with labels that fit the model.",
                    )
                loss.backward()
            if progress:
                progress(number + 1)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in training.items():
            module.training = mode
        for parameter, flag in was.items():
            parameter.requires_grad_(flag)
            parameter.grad = None
    if not any(watched.rows for watched in watches.values()):
        raise SpecDefError("no calibration batches", hint="Give a text that is long enough.")
    if channel == "most-active":
        return {
            site.name: _activity(
                site, {n: a / max(watches[n].rows, 1) for n, a in activity.items()}
            )
            for site in sites
        }
    return {site.name: _usefulness(site, gradients, fisher) for site in sites}


def _loss(model: nn.Module, batch: Batch) -> Any:
    """Return the model's own loss for a batch by name, what suits its labels for a pair."""
    if isinstance(batch, Mapping):
        return model(**batch).loss
    kind = task_loss(model, batch)
    return task_mean(kind, kind.outputs(model, batch), batch)


def _reader(model: nn.Module, parameter: Tensor, leg: Leg) -> tuple[nn.Module, int]:
    """Return the module that multiplies by this weight, and the dimension of its input the channel runs along."""
    for module in model.modules():
        if getattr(module, "weight", None) is parameter and not leg.lead:
            if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
                return module, 1
            return module, -1
    raise SpecDefError(
        f"{leg.tensor} is not the weight of a plain linear layer, so its input cannot be watched",
        hint="Use the data-free selection.",
    )


def _axis_length(parameter: Tensor, leg: Leg) -> int:
    return parameter.shape[leg.axis]


def _collect(total: Tensor, leg: Leg) -> Callable[[Tensor], None]:
    def hook(parameter: Tensor) -> None:
        assert parameter.grad is not None
        others = [axis for axis in range(parameter.ndim) if axis != leg.axis]
        # Sum of squares over batches: the norm of the stack of the batches' gradients, not of their mean, which
        # would cancel between batches.
        total.add_(parameter.grad.double().square().sum(others).cpu())
        parameter.grad = None

    return hook


class _Watch:
    """Sums over tokens of squared inputs, and of these times the squared gradients of the outputs.

    Where inputs and outputs do not lie side by side (a convolution), squares are summed over a sample's positions first.
    """

    def __init__(self, activity: Tensor, fisher: Tensor, dim: int) -> None:
        self.activity, self.fisher, self.dim = activity, fisher, dim
        self.rows = 0
        self._squares: list[Tensor] = []

    def forward(self, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].detach().movedim(self.dim, -1)
        square = x.double().square().flatten(0, -2)
        self.activity.add_(square.sum(0).cpu())
        self.rows += square.shape[0]
        self._squares.append(x.float().square())

    def output(self, _module: nn.Module, _inputs: Any, out: Tensor) -> None:
        # On the tensor: a hook on the module warns where no input of it has a gradient.
        out.register_hook(self.backward)  # type: ignore[no-untyped-call]

    def backward(self, gradient: Tensor) -> None:
        square = self._squares.pop()
        slope = gradient.detach().float().movedim(self.dim, -1).square().sum(-1, keepdim=True)
        if square.shape[:-1] != slope.shape[:-1]:
            square, slope = (t.flatten(1, -2).sum(1) for t in (square, slope))
        self.fisher.add_((square.double() * slope).flatten(0, -2).sum(0).cpu())


def _activity(site: Site, mean_square: Mapping[str, Tensor]) -> Tensor:
    square = torch.zeros(site.size, dtype=torch.float64)
    for leg in site.consumers:
        square = torch.maximum(square, mean_square[leg.tensor][position_table(leg)].mean(1))
    return square.sqrt().float()


def _usefulness(
    site: Site, gradients: Mapping[str, Tensor], fisher: Mapping[str, Tensor]
) -> Tensor:
    gradient, curvature = (
        sum((total[leg.tensor][position_table(leg)].sum(1) for leg in site.consumers), torch.zeros(site.size))
        for total in (gradients, fisher)
    )  # fmt: skip
    return torch.where(curvature > 0, (gradient / curvature).sqrt(), torch.inf).float()
