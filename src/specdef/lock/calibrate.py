"""Usefulness of channels, measured on calibration text: gradient per unit of activation (FACTS 3).

usefulness_c = |d loss / d W[:, c]| / rms(x_c). Rescaling x_c by s multiplies both by s, so the score does not depend on
the scale the channel happens to have; a channel with a small score moves the loss little however far it is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from specdef.errors import SpecDefError
from specdef.lock.names import NameMap
from specdef.symmetries.site import Leg, Site

Batch = Mapping[str, Tensor]


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
        model: Run in evaluation mode, and left in the mode it was in; called as `model(**batch)`, with a `loss` in what it returns.
        sites: Sites whose consumers are Linear, Conv1D or convolution weights of the model.
        batches: Inputs with labels.
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
    rows = dict.fromkeys(legs, 0)
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
            handles.append(module.register_forward_pre_hook(_watch(activity, rows, name, dim)))
        for number, batch in enumerate(batches):
            with torch.enable_grad():
                loss = model(**batch).loss
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
    if not any(rows.values()):
        raise SpecDefError("no calibration batches", hint="Give a text that is long enough.")
    return {site.name: _score(site, gradients, activity, rows, channel) for site in sites}


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


def _watch(
    activity: dict[str, Tensor], rows: dict[str, int], name: str, dim: int
) -> Callable[..., None]:
    def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        flat = inputs[0].detach().movedim(dim, -1).flatten(0, -2)
        activity[name].add_(flat.double().square().sum(0).cpu())
        rows[name] += flat.shape[0]

    return hook


def _score(
    site: Site,
    gradients: Mapping[str, Tensor],
    activity: Mapping[str, Tensor],
    rows: Mapping[str, int],
    channel: str,
) -> Tensor:
    gradient = torch.zeros(site.size, dtype=torch.float64)
    square = torch.zeros(site.size, dtype=torch.float64)
    for leg in site.consumers:
        index = torch.tensor([leg.positions(c) for c in range(leg.size)])
        gradient += gradients[leg.tensor][index].sum(1)
        square = torch.maximum(
            square, activity[leg.tensor][index].mean(1) / max(rows[leg.tensor], 1)
        )
    if channel == "most-active":
        return square.sqrt().float()
    return torch.where(square > 0, gradient.sqrt() / square.sqrt(), torch.inf).float()
