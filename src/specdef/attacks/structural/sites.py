"""Symmetric sites of a model in memory: found blind, measured by their consumers, rescaled channel by channel."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from specdef.errors import SpecDefError
from specdef.lock.channels import position_table
from specdef.lock.in_memory import unique_tensors
from specdef.lock.sequential import find_symmetries
from specdef.symmetries import Leg, Site


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
    return find_symmetries(model, unique_tensors(model)).sites


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
