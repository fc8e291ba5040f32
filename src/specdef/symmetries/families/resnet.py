"""ResNet, basic and bottleneck: a hook, since stages differ and a residual stream spans several layers.

Inside a layer, batch norm (weight, bias) -> ReLU -> next convolution is a site. The residual stream carries no norm and
only ReLU and pooling act on it, so a channel of it may be rescaled as a whole: everything that writes it (the last batch
norm of each layer, the batch norm of the projecting shortcut, the stem where the first stage does not project) against
everything that reads it (the first convolution of each later layer, the next projecting shortcut, the classifier behind
the average pool). The scale sits in the batch norm's weight and bias, never in a convolution: its running statistics and
eps stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from specdef.symmetries.families.encoder import PIXELS
from specdef.symmetries.site import Leg, Site, Uncovered
from specdef.symmetries.table import HOMOGENEOUS, Family

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def resnet_sites(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], prefix: str
) -> tuple[tuple[Site, ...], tuple[Uncovered, ...]]:
    """Return the sites of a ResNet.

    Args:
        config: config.json as a dict.
        shapes: Tensors of the checkpoint.
        prefix: What stands before the names of the base model.

    Returns:
        The sites, and the inputs that none of them reaches.
    """
    depths = config.get("depths") or (3, 4, 6, 3)
    last = 1 if config.get("layer_type", "bottleneck") == "basic" else 2
    known = {"classifier.1.weight", "classifier.1.bias"}

    def batch_norm(module: str) -> tuple[str, str]:
        known.update(f"{module}.{leaf}" for leaf in _STATISTICS)
        return f"{module}.weight", f"{module}.bias"

    stem = f"{prefix}embedder.embedder"
    inner: list[Site] = []
    streams: list[_Stream] = [
        _Stream(f"{prefix}embedder", None, batch_norm(f"{stem}.normalization"))
    ]
    for stage, depth in enumerate(depths):
        for index in range(depth):
            layer = f"{prefix}encoder.stages.{stage}.layers.{index}"
            streams[-1].readers.append(f"{layer}.layer.0.convolution.weight")
            for k in range(last):
                writers = batch_norm(f"{layer}.layer.{k}.normalization")
                consumer = f"{layer}.layer.{k + 1}.convolution.weight"
                # Nothing but a literal ReLU stands here, whatever hidden_act says.
                inner.append(
                    _site(
                        f"{layer}.layer.{k}.normalization",
                        stage,
                        shapes,
                        writers,
                        [consumer],
                        batchnorm=True,
                    )
                )
            if f"{layer}.shortcut.convolution.weight" in shapes:
                # The projection reads the old stream and starts a new one.
                streams[-1].readers.append(f"{layer}.shortcut.convolution.weight")
                writers = batch_norm(f"{layer}.shortcut.normalization")
                streams.append(_Stream(f"{prefix}encoder.stages.{stage}", stage, writers))
            streams[-1].writers.extend(batch_norm(f"{layer}.layer.{last}.normalization"))
    classified = "classifier.1.weight" in shapes
    if classified:
        streams[-1].readers.append("classifier.1.weight")

    activation = str(config.get("hidden_act", "relu"))
    reason = ""
    if not classified:
        reason = (
            "without a classifier the network returns its streams, which may then not be rescaled"
        )
    elif activation not in HOMOGENEOUS:
        reason = f"the residual stream passes through {activation}, which has no rescaling symmetry"
    outer = [_site(s.name, s.stage, shapes, s.writers, s.readers) for s in streams if s.readers]

    uncovered = [Uncovered(tensor=f"{stem}.convolution.weight", reason=PIXELS)]
    known.add(f"{stem}.convolution.weight")
    known.update(leg.tensor for site in (*inner, *outer) for leg, _ in site.legs())
    strangers = sorted(shapes.keys() - known)
    if strangers:
        # What it reads is unknown, so nothing can be said of any channel.
        reason = f"{strangers[0]} is not in the table of this family, so its readers are unknown"
        inner, closed = [], [*inner, *outer]
        uncovered += [Uncovered(tensor=t, reason=reason) for t in strangers if len(shapes[t]) > 1]
    else:
        closed = outer if reason else []
    uncovered += [
        Uncovered(tensor=leg.tensor, reason=reason)
        for site in closed
        for leg in site.consumers
        if leg.tensor in shapes
    ]
    return (*inner, *(() if reason else outer)), tuple(uncovered)


class _Stream:
    """A residual stream: what writes it and what reads it."""

    def __init__(self, name: str, stage: int | None, writers: tuple[str, ...]) -> None:
        self.name = name
        self.stage = stage
        self.writers = list(writers)
        self.readers: list[str] = []


def _site(
    name: str,
    stage: int | None,
    shapes: Mapping[str, tuple[int, ...]],
    writers: tuple[str, ...] | list[str],
    readers: list[str],
    *,
    batchnorm: bool = False,
) -> Site:
    # A missing or misshapen tensor is reported by find_sites, which checks every leg.
    size = (shapes.get(writers[0]) or (1,))[0]
    return Site(
        name=name,
        kind="batchnorm" if batchnorm else "stream",
        layer=stage,
        size=size,
        producers=tuple(Leg(tensor=t, axis=0, size=size) for t in writers),
        consumers=tuple(Leg(tensor=t, axis=1, size=size) for t in readers),
    )


FAMILIES = {
    "resnet": Family(
        prefixes=("resnet.", ""), layer=("encoder.stages.{layer}.",), hook=resnet_sites
    )
}
