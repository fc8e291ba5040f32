"""What the weights alone say of the channels of a site: how large each is, whether it is alive, what room it has."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from specdef.symmetries.site import Leg, Site
from specdef.weights.source import TensorSource


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelStatistics:
    """Statistics of one leg's slices, per channel, from all entries or an even sample of them.

    Args:
        rms: (size,) root mean square.
        smallest: (size,) smallest absolute value that is not zero; inf where all are zero.
        largest: (size,) largest absolute value.
        dtype: Dtype of the tensor.
    """

    rms: Tensor
    smallest: Tensor
    largest: Tensor
    dtype: torch.dtype


class Channels:
    """Reads the statistics of a model's sites; keeps those of producers, for there are few (experts are consumers).

    Args:
        source: The model.
    """

    def __init__(self, source: TensorSource) -> None:
        self._source = source
        self._read: dict[Leg, ChannelStatistics] = {}

    def statistics(self, leg: Leg, *, keep: bool = True) -> ChannelStatistics:
        """Return the statistics of a leg; costs one read of its (sampled) lines.

        Args:
            leg: The leg.
            keep: Remember them, so that the next call costs nothing.

        Returns:
            Its statistics, float32.
        """
        found = self._read.get(leg)
        if found is None:
            lines = self._source.lines(leg.tensor, leg.axis, leg.lead)
            size = lines.abs().float()
            nonzero = torch.where(size > 0, size, torch.inf)
            index = position_table(leg)
            found = ChannelStatistics(
                rms=size.square().mean(1)[index].mean(1).sqrt(),
                smallest=nonzero.amin(1)[index].amin(1),
                largest=size.amax(1)[index].amax(1),
                dtype=lines.dtype,
            )
            if keep:
                self._read[leg] = found
        return found

    def usable(self, site: Site, exponent: float) -> Tensor:
        """Say which channels are alive and have room for a scale.

        A channel that nothing writes or nothing reads is not explosive: scaling it locks nothing.

        Args:
            site: The site.
            exponent: log2 of the scale.

        Returns:
            (size,) bool, judged from what was sampled.
        """
        usable = torch.ones(site.size, dtype=torch.bool)
        for leg, sign in site.legs():
            if sign > 0 and leg.tensor.endswith("bias"):
                continue  # may be zero; whether it fits is checked when it is scaled
            found = self.statistics(leg, keep=sign > 0)
            if not found.dtype.is_floating_point:
                return torch.zeros(site.size, dtype=torch.bool)
            info = torch.finfo(found.dtype)
            low, high = found.smallest.double(), found.largest.double()
            factor = 2.0 ** (sign * exponent)
            fits = (low >= info.tiny) & (low * factor >= info.tiny) & (high * factor <= info.max)
            usable &= fits & (high > 0)
        return usable

    def activity(self, site: Site) -> Tensor:
        """Return how large the weights make each channel: |gain_c|, or the rms of W_producer[c, :].

        Args:
            site: The site.

        Returns:
            (size,) float32.
        """
        return self.statistics(site.producers[0]).rms

    def reach(self, site: Site) -> Tensor:
        """Return how far a step of one unit in a channel's writer moves the outputs of its readers: |W[:, c]| over all of them.

        Args:
            site: The site.

        Returns:
            (size,) float32.
        """
        square = torch.zeros(site.size)
        for leg in site.consumers:
            shape = self._source.shapes[leg.tensor]
            length = math.prod(shape[len(leg.lead) :]) / shape[leg.axis]
            square += self.statistics(leg, keep=False).rms.square() * length
        return square.sqrt()


def position_table(leg: Leg) -> Tensor:
    """Return (size, repeat) positions of every channel along the leg's axis; row c is `leg.positions(c)`."""
    channel = torch.arange(leg.size)
    block = leg.block or leg.size
    start = (
        leg.start
        + (channel // block * leg.repeat)[:, None] * (leg.pitch or block)
        + (channel % block)[:, None]
    )
    return start + torch.arange(leg.repeat)[None, :] * (leg.pitch or block)
