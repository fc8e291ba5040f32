"""What a diagnosis is given, checked and made ready."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar, get_args

import torch
from torch import Tensor, nn

from specdef.curvature.losses import Batch, ClassificationLoss, LMLoss, Loss, MSELoss
from specdef.curvature.parameters import select_parameters
from specdef.errors import SpecDefError
from specdef.fragility.subspace import Fisher, FisherSubspace
from specdef.fragility.task import BatchMode
from specdef.rates.adaptive import Adam, AdamW
from specdef.rates.linear import SGD, GradientDescent, HeavyBall, Nesterov, Optimizer
from specdef.rates.optimizers import resolve

OPTIMIZERS = ("sgd", "gd", "heavy_ball", "nesterov", "adam", "adamw")
"""Names of the methods whose path is known."""

Made = TypeVar("Made")


def check(
    optimizer: Optimizer | str,
    *,
    learning_rate: float,
    steps: int,
    batches: str,
    krylov_steps: int,
    threshold: float,
    fisher: str,
) -> Optimizer:
    """Refuse what is out of range.

    Args:
        optimizer: An instance or a name.
        learning_rate: Positive.
        steps: At least 2.
        batches: full or cycled.
        krylov_steps: At least 2.
        threshold: Positive.
        fisher: ggn or empirical.

    Returns:
        The optimiser.

    Raises:
        ValueError: Something is.
    """
    method = resolve(optimizer)
    if not isinstance(method, GradientDescent | SGD | HeavyBall | Nesterov | Adam | AdamW):
        raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {method.name}.")
    for name, value in (("learning_rate", learning_rate), ("threshold", threshold)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive, got {value}.")
    for name, count in (("steps", steps), ("krylov_steps", krylov_steps)):
        if count < 2:
            raise ValueError(f"{name} must be at least 2, got {count}.")
    if batches not in get_args(BatchMode):
        raise ValueError(f"batches must be full or cycled, got {batches!r}.")
    if fisher not in get_args(Fisher):
        raise ValueError(f"fisher must be ggn or empirical, got {fisher!r}.")
    return method


def loss_for(batches: Sequence[Batch]) -> Loss:
    """Choose a loss by the labels of the first batch.

    Args:
        batches: At least one.

    Returns:
        `MSELoss` for floating labels, `LMLoss` for one for each input token or none at all, else `ClassificationLoss`.

    Raises:
        SpecDefError: There is no batch.
    """
    if not batches:
        raise SpecDefError("there is no data", hint="Give at least one batch.")
    batch = batches[0]
    named = isinstance(batch, Mapping)
    labels = batch.get("labels") if isinstance(batch, Mapping) else batch[1]
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if isinstance(labels, Tensor) and labels.is_floating_point():
        return MSELoss()
    if named and isinstance(ids, Tensor) and (labels is None or labels.shape == ids.shape):
        return LMLoss()
    return ClassificationLoss()


def in_type(
    model: nn.Module, names: Sequence[str], dtype: torch.dtype | None
) -> tuple[nn.Module, torch.dtype]:
    """Return a model whose floating tensors have the type to compute in, and the type.

    Three operators and the alignment loss look at the same weights: where these have to be cast, it is done once.

    Args:
        model: The model.
        names: The selected parameters.
        dtype: The type wanted; None for the parameters' own, and float32 for half precision.

    Returns:
        The model itself, or a copy in the type.

    Raises:
        ValueError: The type is neither float32 nor float64.
    """
    own = select_parameters(model, names)[names[0]].dtype
    if dtype is None:
        dtype = torch.float64 if own == torch.float64 else torch.float32
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype must be float32 or float64, got {dtype}.")
    tensors = [*model.parameters(), *model.buffers()]
    if all(t.dtype == dtype for t in tensors if t.is_floating_point()):
        return model, dtype
    return copy.deepcopy(model).to(dtype), dtype


def naming(what: str, make: Callable[[], Made]) -> Made:
    """Call a function, and say in an error of the data which data it speaks of.

    Args:
        what: "aligned" or "task".
        make: The function.

    Returns:
        Its result.

    Raises:
        SpecDefError: The function raised one.
    """
    try:
        return make()
    except SpecDefError as error:
        if type(error) is not SpecDefError:
            raise
        raise SpecDefError(f"{what} data: {error}", hint=error.hint) from error


def check_known(subspace: FisherSubspace, parameters: tuple[str, ...], n: int, fisher: Fisher) -> None:  # fmt: skip
    """Refuse a subspace that is of something else.

    Args:
        subspace: The subspace.
        parameters: Names of the parameters it should be of.
        n: Their number of weights.
        fisher: What its matrix should be.

    Raises:
        ValueError: It is of other parameters, another matrix, or not in the Euclidean metric.
    """
    if subspace.parameters != parameters or subspace.vectors.shape[1] != n:
        raise ValueError("subspace is of other parameters than those chosen.")
    if subspace.fisher != fisher or subspace.metric is not None:
        raise ValueError(f"subspace must be of the {fisher} matrix in the Euclidean metric.")
