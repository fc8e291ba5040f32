"""Symmetric sites of a model in memory: found blind, measured by their consumers, rescaled channel by channel."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from specdef.attacks.structural.edits import CONVOLUTIONS, is_linear, is_transposed
from specdef.errors import SpecDefError
from specdef.lock.channels import position_table
from specdef.lock.in_memory import model_config, unique_tensors
from specdef.symmetries import Leg, Site, SiteKind, find_sites

_PASSING = (
    nn.ReLU, nn.LeakyReLU, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.MaxPool1d, nn.MaxPool2d,
    nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
)  # fmt: skip
"""f(s x) = s f(x) for every s > 0, channel by channel."""

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def symmetric_sites(model: nn.Module) -> tuple[Site, ...]:
    """Find the rescaling symmetries of a model: by the table of its family, or from the order within `nn.Sequential`.

    A norm whose gain is 1 + weight counts too; see its kind.

    Args:
        model: A transformers model, or any module; then what stands in one `nn.Sequential` is taken to be used there alone.

    Returns:
        Sites whose legs are named as in `state_dict()`.

    Raises:
        SpecDefError: The family has no table, or the tensors do not fit it.
    """
    if getattr(model, "config", None) is None:
        return tuple(_sequential_sites(model))
    shapes = {name: tuple(tensor.shape) for name, tensor in unique_tensors(model).items()}
    return find_sites(model_config(model), shapes).sites


def without_sites(model: nn.Module, *kinds: str) -> str:
    """Say why a model has no symmetric site; empty where it has.

    Args:
        model: The model.
        *kinds: Those that count; none means all.

    Returns:
        The reason.
    """
    try:
        sites = symmetric_sites(model)
    except SpecDefError as error:
        return str(error)
    if any(not kinds or site.kind in kinds for site in sites):
        return ""
    return "no symmetric site" + (f" of kind {', '.join(kinds)}" if kinds else "")


def slices(tensor: Tensor, leg: Leg) -> Tensor:
    """Return (shape[axis], L): every slice along the axis of a leg, absolute values in float64."""
    own = tensor.detach()[leg.lead].movedim(leg.axis - len(leg.lead), 0)
    return own.reshape(len(own), -1).double().abs()


def deviation(tensor: Tensor, leg: Leg) -> Tensor:
    """Return by how many octaves each channel of a leg is larger than the median one.

    Sizes are geometric means: scaling slices along another axis shifts all of them alike and cancels here, so sites that
    share a tensor do not disturb each other.

    Args:
        tensor: The leg's tensor.
        leg: The leg.

    Returns:
        (size,) float64 on the CPU; nan for a channel of zeros.
    """
    size = slices(tensor, leg)
    logs = torch.where(size > 0, size.log2(), torch.nan).nanmean(1).cpu()
    logs = logs[position_table(leg)].nanmean(1)
    return logs - logs.nanmedian()


def rescale(tensors: Mapping[str, Tensor], site: Site, factors: Tensor) -> None:
    """Multiply the producers of a site and divide its consumers, in place.

    Args:
        tensors: By name.
        site: The site.
        factors: (size,) float64; rounds nothing where they are powers of two.
    """
    for leg, sign in site.legs():
        tensor = tensors[leg.tensor].detach()[leg.lead]
        line = torch.ones(tensor.shape[leg.axis - len(leg.lead)], dtype=torch.float64)
        line[position_table(leg)] = (factors if sign > 0 else 1 / factors)[:, None]
        shape = [1] * tensor.ndim
        shape[leg.axis - len(leg.lead)] = -1
        # in float64: a factor may be out of the range of the dtype where the product is not
        tensor.copy_(tensor.double() * line.to(tensor.device).view(shape))


def has_room(tensors: Mapping[str, Tensor], site: Site, exponents: Tensor) -> Tensor:
    """Tell for which channels scaling by 2^exponent loses nothing.

    Args:
        tensors: By name.
        site: The site.
        exponents: (size,) of the producers; the consumers take the opposite.

    Returns:
        (size,) bool.
    """
    room = torch.ones(site.size, dtype=torch.bool)
    for leg, sign in site.legs():
        size = slices(tensors[leg.tensor], leg)
        info = torch.finfo(tensors[leg.tensor].dtype)
        low = torch.where(size > 0, size, torch.inf).amin(1).cpu()[position_table(leg)].amin(1)
        high = size.amax(1).cpu()[position_table(leg)].amax(1)
        factor = torch.exp2(sign * exponents.double())
        room &= (low * factor >= info.tiny) & (high * factor <= info.max)
    return room


def _sequential_sites(model: nn.Module) -> Iterator[Site]:
    """Yield what may be rescaled between neighbours: linear, norm -> anything homogeneous -> linear."""
    for path, parent in model.named_modules():
        if not isinstance(parent, nn.Sequential):
            continue
        before: tuple[str, SiteKind, Any] | None = None
        for name, module in parent.named_children():
            own = f"{path}.{name}" if path else name
            if is_linear(module):
                if before is not None and (site := _site(*before, own, module)):
                    yield site
                before = own, "relu", module
            elif isinstance(module, _BATCH_NORMS) and module.affine:
                before = own, "batchnorm", module
            elif isinstance(module, nn.LayerNorm | nn.RMSNorm) and module.elementwise_affine:
                before = own, "norm", module
            elif not isinstance(module, _PASSING):
                before = None


def _site(
    name: str, kind: SiteKind, producer: Any, reader: str, consumer: nn.Module
) -> Site | None:
    """Return the site between two layers; None where their channels do not fit."""
    out = 1 if is_transposed(producer) else 0
    size = producer.weight.shape[out]
    # a convolution counts channels along axis 1, which a linear layer behind it would not see
    same = isinstance(producer, CONVOLUTIONS) == isinstance(consumer, CONVOLUTIONS)
    axis = 0 if is_transposed(consumer) else 1
    fits = same or kind in ("norm", "batchnorm")
    if producer.weight.ndim > 1 and not fits:
        return None
    if consumer.get_parameter("weight").shape[axis] != size:
        return None
    producers = [Leg(tensor=f"{name}.weight", axis=out if producer.weight.ndim > 1 else 0, size=size)]  # fmt: skip
    if getattr(producer, "bias", None) is not None:
        producers.append(Leg(tensor=f"{name}.bias", axis=0, size=size))
    return Site(
        name=name,
        kind=kind,
        layer=None,
        size=size,
        producers=tuple(producers),
        consumers=(Leg(tensor=f"{reader}.weight", axis=axis, size=size),),
    )
