"""Which parameters of a model are weight matrices, and as which matrices Algorithm 1 sees them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from specdef.errors import SelectionError, SpecDefError
from specdef.lock.deformation.config import DeformationConfig
from specdef.lock.selection import check_selection
from specdef.spectral.topk import topk_svd
from specdef.spectral.tracking import TopKTracker
from specdef.symmetries import layer_index, matches, module_name

_CONVOLUTIONS = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_NORMS = (nn.LayerNorm, nn.RMSNorm)
_REPARAMETRISED = ("g", "v", "orig")
"""How weight norm, spectral norm and pruning of old end the names of what a weight is computed from."""


@dataclass(frozen=True, slots=True)
class WeightMatrix:
    """A parameter that stands for one matrix, or for a stack of them.

    Args:
        parameter: The parameter itself.
        stacked: A bare parameter with three axes (experts, rows, columns): each expert is a matrix of its own.
    """

    parameter: nn.Parameter
    stacked: bool = False

    def view(self, tensor: Tensor) -> Tensor:
        """View a tensor shaped like the parameter as the matrix, or stack, whose singular values are raised.

        A convolution (out, in / groups, *kernel) is (out, in / groups * prod(kernel)), the matrix that multiplies unfolded
        patches; a transposed one (in, out / groups * prod(kernel)). With groups these are the kernels of all groups below
        one another. Two axes stay as they are stored: a transpose has the same singular values.

        Args:
            tensor: The parameter's data or gradient.

        Returns:
            (m, n) or (b, m, n), sharing the memory of `tensor`.
        """
        if self.stacked or tensor.ndim == 2:
            return tensor
        return tensor.view(tensor.shape[0], -1)

    def gradient(self) -> Tensor:
        """Return the view of the gradient, laid out anew where it has none; zeros where the loss does not reach it."""
        parameter = self.parameter
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if not self.stacked and parameter.ndim > 2 and not parameter.grad.is_contiguous():
            parameter.grad = parameter.grad.contiguous()
        return self.view(parameter.grad)


def find_matrices(model: nn.Module, config: DeformationConfig) -> dict[str, WeightMatrix]:
    """List the weight matrices a deformation works on.

    Weights of linear layers, attention and convolutions, stacked experts, and, where `config.embeddings` says so,
    embeddings; a tensor tied to an embedding counts as one. Left out: vectors, position tables and class tokens (bare
    parameters named so or with a first axis of 1), norms, and what `requires_grad` excludes.

    Args:
        model: Any module.
        config: Its `target_modules`, `layers`, `embeddings` and `k` are used.

    Returns:
        Name, as in `model.named_parameters()`, to matrix.

    Raises:
        SelectionError: Nothing was selected, or a part of the selection selects nothing.
        SpecDefError: A matrix has fewer than k singular values, or is parametrised or no plain float.
    """
    modules = dict(model.named_modules())
    embedded = {id(m.weight) for m in modules.values() if isinstance(m, _EMBEDDINGS)}
    candidates: dict[str, WeightMatrix] = {}
    for name, parameter in model.named_parameters():
        path, _, own = name.rpartition(".")
        owner = modules[path]
        if ".parametrizations." in name or _reparametrised(owner, own):
            raise SpecDefError(
                f"{name} is a parametrisation of a weight, not the weight itself",
                hint="Remove it first: torch.nn.utils.parametrize.remove_parametrizations, remove_weight_norm, "
                "remove_spectral_norm or prune.remove.",
            )
        if parameter.ndim < 2 or isinstance(owner, _NORMS) or not parameter.requires_grad:
            continue
        if id(parameter) in embedded and not config.embeddings:
            continue
        leaf = isinstance(owner, (nn.Linear, *_EMBEDDINGS, *_CONVOLUTIONS))
        if not leaf and (parameter.shape[0] == 1 or "position" in own or "pos_emb" in own):
            continue
        stacked = parameter.ndim == 3 and not isinstance(owner, _CONVOLUTIONS)
        candidates[name] = WeightMatrix(parameter, stacked)
    if not candidates:
        raise SelectionError(
            f"{type(model).__name__} has no weight matrix that can be trained",
            hint="A deformation needs linear layers or convolutions with requires_grad.",
        )
    check_selection(candidates, config)
    chosen = {name: item for name, item in candidates.items() if _selected(name, config)}
    if not chosen:
        raise SelectionError(
            "target_modules and layers together select no weight matrix",
            hint="Leave one of them out, or name modules of these blocks.",
        )
    _check(chosen, config.k)
    return chosen


def track(matrices: Mapping[str, WeightMatrix], k: int, *, seed: int = 0) -> TopKTracker:
    """Return a tracker of the k largest singular triplets of some matrices.

    Args:
        matrices: As `find_matrices` gives them.
        k: Triplets per matrix.
        seed: Of computations from scratch.

    Returns:
        The tracker, not yet updated; float64 throughout is tracked to ten digits, for those who compare them.
    """
    views = {name: item.view(item.parameter.data) for name, item in matrices.items()}
    exact = all(view.dtype == torch.float64 for view in views.values())
    return TopKTracker(views, k, tol=1e-10 if exact else 1e-2, seed=seed)


def largest_singular_values(matrices: Mapping[str, WeightMatrix]) -> dict[str, float]:
    """Compute the largest singular value of every matrix (of a stack: of its largest), from scratch.

    Args:
        matrices: As `find_matrices` gives them.

    Returns:
        Name to value.
    """
    out = {}
    for name, item in matrices.items():
        view = item.view(item.parameter.data)
        stack = view if view.ndim == 3 else view[None]
        out[name] = max(float(topk_svd(matrix, 1).S[0]) for matrix in stack)
    return out


def _selected(name: str, config: DeformationConfig) -> bool:
    path = module_name(name)
    inside = config.layers is None or layer_index(path) in config.layers
    return inside and (config.target_modules is None or matches(path, config.target_modules))


def _reparametrised(owner: nn.Module, own: str) -> bool:
    """Say whether the owner computes a weight from this parameter."""
    base, _, end = own.rpartition("_")
    return end in _REPARAMETRISED and hasattr(owner, base) and base not in owner._parameters


def _check(chosen: Mapping[str, WeightMatrix], k: int) -> None:
    for name, item in chosen.items():
        parameter = item.parameter
        if parameter.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            raise SpecDefError(f"{name} is stored as {parameter.dtype}", hint="Load the model in float32.")  # fmt: skip
        if not item.stacked and parameter.ndim > 2 and not parameter.is_contiguous():
            parameter.data = (
                parameter.data.contiguous()
            )  # channels_last kernels have no matrix view
        shape = tuple(item.view(parameter.data).shape)
        if k > min(shape[-2:]):
            raise SpecDefError(
                f"{name}: k = {k} singular values are to be raised, but a {shape[-2]} x {shape[-1]} matrix has "
                f"{min(shape[-2:])}",
                hint=f"Use k = {min(shape[-2:])}, or leave the module out by target_modules.",
            )
