"""What a rescaling symmetry is made of: a channel, the tensors that produce it, the tensors that read it.

Multiply every producer of channel c by s and divide every consumer by s: the function of the network does not change.
With s a power of two and no overflow or underflow, no rounding changes either, so the outputs stay bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

SiteKind = Literal["norm", "offset-norm", "value", "gated", "relu", "batchnorm", "stream"]
"""norm: norm gain -> linears that read it. offset-norm: the same where the gain is 1 + weight (Gemma). value: value
-> output projection. gated: up -> down projection. relu: linear -> ReLU -> linear. batchnorm: batch norm -> ReLU ->
convolution. stream: everything that writes a ReLU network's residual stream -> everything that reads it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Leg:
    """Where the channels of a site lie in one tensor.

    Channel c = j * block + d (0 <= d < block) lies at positions start + (j * repeat + r) * pitch + d, r = 0..repeat-1,
    along `axis`; leading axes are fixed by `lead` (the expert of a stacked tensor).

    Args:
        tensor: Name in the checkpoint.
        axis: Axis the channel runs along.
        size: Number of channels of the site.
        start: Position of channel 0 (the offset of a part of a fused tensor).
        block: Channels that lie side by side; 0 means `size` (one block).
        pitch: Distance between the starts of consecutive blocks; 0 means `block`.
        repeat: Copies of each block (query heads that read one key-value head).
        lead: Fixed indices of the leading axes; `axis` counts all axes of the tensor, these included.
    """

    tensor: str
    axis: int
    size: int
    start: int = 0
    block: int = 0
    pitch: int = 0
    repeat: int = 1
    lead: tuple[int, ...] = ()

    def positions(self, channel: int) -> tuple[int, ...]:
        """Return where `channel` lies along `axis`.

        >>> Leg(tensor="o", axis=1, size=4, block=2, repeat=2).positions(3)  # head 1, second entry, two query heads
        (5, 7)
        """
        if not 0 <= channel < self.size:
            raise IndexError(f"channel must be in 0..{self.size - 1}, got {channel}.")
        block = self.block or self.size
        pitch = self.pitch or block
        j, d = divmod(channel, block)
        return tuple(self.start + (j * self.repeat + r) * pitch + d for r in range(self.repeat))

    def index(self, channel: int) -> tuple[int | slice | list[int], ...]:
        """Return the index that selects `channel` in an array: `tensor[leg.index(c)] *= 4` scales it.

        >>> Leg(tensor="w", axis=2, size=4, lead=(1,)).index(3)
        (1, slice(None, None, None), [3])
        """
        free = (slice(None),) * (self.axis - len(self.lead))
        return (*self.lead, *free, list(self.positions(channel)))

    @property
    def extent(self) -> int:
        """Length of the tensor's axis when nothing follows the last channel; the tables rely on equality."""
        return max(self.positions(self.size - 1)) + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """One symmetric place of a network: `size` channels, each of which may be rescaled on its own.

    Args:
        name: Unique, readable: the module whose output is rescaled.
        kind: Which symmetry.
        layer: Index of the block it belongs to; None outside the blocks.
        size: Number of channels.
        producers: Tensors multiplied by the scale.
        consumers: Tensors divided by it: the linear inputs that this site covers.
    """

    name: str
    kind: SiteKind
    layer: int | None
    size: int
    producers: tuple[Leg, ...]
    consumers: tuple[Leg, ...]

    def legs(self) -> Iterator[tuple[Leg, int]]:
        """Yield every leg with +1 (producer) or -1 (consumer)."""
        for leg in self.producers:
            yield leg, +1
        for leg in self.consumers:
            yield leg, -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Uncovered:
    """A linear input that no exact symmetry of the family reaches, and why.

    Args:
        tensor: Name of the tensor whose input it is.
        reason: One clause for the user: "GELU has no rescaling symmetry".
    """

    tensor: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Symmetries:
    """Every site of one checkpoint. `sites`' consumers and `uncovered` together are all linear inputs of it.

    Args:
        family: The `model_type` whose table was used.
        sites: In the order of the network.
        uncovered: Linear inputs no site reaches.
    """

    family: str
    sites: tuple[Site, ...]
    uncovered: tuple[Uncovered, ...]
