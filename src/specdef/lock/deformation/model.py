"""Lock a module in memory by deformation: any module, with or without a transformers configuration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from specdef.lock.certificate import LockCertificate, build_certificate
from specdef.lock.deformation.config import DeformationConfig
from specdef.lock.deformation.state import copy_tensors, model_tensors, restore_tensors
from specdef.lock.deformation.stored import HALF, Training, deform_stored, require_change
from specdef.lock.key import Key
from specdef.lock.residual import encode_residual
from specdef.weights.rewrite import TensorHashes
from specdef.weights.tensor_bytes import as_bytes, tensor_sha256


def deform_model(
    model: nn.Module, tensors: Mapping[str, Tensor], config: DeformationConfig, training: Training
) -> tuple[LockCertificate, Key]:
    """Lock a module in place.

    Parameters in half precision are trained in float32 and come back in their own dtype.

    Args:
        model: The module.
        tensors: Its parameters and saved buffers by name, each once.
        config: The recipe.
        training: Data, losses and the rest.

    Returns:
        (certificate, key). Where an error is raised the module is as it was.
    """
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
    before = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
    residuals: dict[str, Tensor] = {}
    hashes: dict[str, TensorHashes] = {}
    with _all_or_nothing(model):
        stored = deform_stored(model, tensors, dtypes, config, training)
        for name, tensor in tensors.items():
            now = tensor.detach().cpu().to(dtypes[name]).contiguous()
            hashes[name] = TensorHashes(
                before=tensor_sha256(before[name]), after=tensor_sha256(now)
            )
            if as_bytes(now) != as_bytes(before[name]):
                residuals[name] = encode_residual(before[name], now)
        require_change(residuals)
    key = Key(method="deformation", config=config, residuals=residuals, hashes=hashes)
    certificate = build_certificate(
        stored.plan, key, config, files={}, source_name=type(model).__name__, calibrated=False,
        utility=stored.utility, training=stored.training,
    )  # fmt: skip
    if training.checkpoint is not None:
        training.checkpoint.unlink(missing_ok=True)
    return certificate, key


@contextmanager
def _all_or_nothing(model: nn.Module) -> Iterator[None]:
    """Widen half precision for the length of a block; put values back where it raises, and dtypes always."""
    original = copy_tensors(model)
    tensors = model_tensors(model)
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()}

    def narrow() -> None:
        for name, tensor in tensors.items():
            if dtypes[name] in HALF:
                tensor.grad = None  # in the other dtype
                tensor.data = tensor.data.to(dtypes[name])

    for name, tensor in tensors.items():
        if dtypes[name] in HALF:
            tensor.grad = None
            tensor.data = tensor.data.float()
    try:
        yield
    except BaseException:
        narrow()
        restore_tensors(model, original)
        raise
    narrow()
