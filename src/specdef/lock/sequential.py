"""Rescaling symmetries of a model in memory: by the table of its family, or from the order of layers in `nn.Sequential`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from specdef.errors import SpecDefError
from specdef.symmetries import Leg, Site, SiteKind, Symmetries, Uncovered, find_sites

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

_PASSING = (
    nn.ReLU, nn.LeakyReLU, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.MaxPool1d, nn.MaxPool2d,
    nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
)  # fmt: skip
"""f(s x) = s f(x) for every s > 0, channel by channel."""

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def find_symmetries(model: nn.Module, tensors: Mapping[str, Tensor]) -> Symmetries:
    """Find every rescaling symmetry of a model.

    Args:
        model: A transformers model, or any module; then what stands in one `nn.Sequential` is taken to be used there alone.
        tensors: Its tensors by name, each once.

    Returns:
        The symmetries, with legs named as the tensors are.

    Raises:
        SpecDefError: The family has no table, or the tensors do not fit it.
    """
    if getattr(model, "config", None) is not None:
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        return find_sites(model_config(model), shapes)
    sites = tuple(sequential_sites(model))
    read = {leg.tensor for site in sites for leg in site.consumers}
    linear = (
        f"{path}.weight" for path, module in model.named_modules() if path and is_linear(module)
    )
    uncovered = (
        Uncovered(tensor=name, reason="no layer to scale with right before it")
        for name in linear
        if name not in read
    )
    return Symmetries(family="sequential", sites=sites, uncovered=tuple(uncovered))


def model_config(model: nn.Module) -> dict[str, Any]:
    """Return the model's configuration as its config.json holds it.

    Raises:
        SpecDefError: It is no transformers model.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        raise SpecDefError(
            f"{type(model).__name__} has no transformers configuration",
            hint="Lock it as a checkpoint folder instead.",
        )
    return dict(config.to_dict())


def is_transposed(module: nn.Module) -> bool:
    """Tell whether a module is transformers' Conv1D, a linear layer that stores its weight (in, out)."""
    return type(module).__name__ == "Conv1D" and isinstance(getattr(module, "weight", None), Tensor)


def is_linear(module: nn.Module) -> bool:
    """Tell whether a module is a plain linear layer or convolution; subclasses may do more, so they do not count."""
    convolution = type(module) in CONVOLUTIONS and getattr(module, "groups", 1) == 1
    return type(module) is nn.Linear or convolution or is_transposed(module)


def sequential_sites(model: nn.Module) -> Iterator[Site]:
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
