"""Lock a folder by deformation: load, train, round, write the tensors that changed, key, certificate."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from specdef.errors import CheckpointError, SpecDefError
from specdef.lock.card import write_card
from specdef.lock.certificate import LockCertificate, build_certificate
from specdef.lock.deformation.config import DeformationConfig
from specdef.lock.deformation.stored import HALF, Stored, Training, deform_stored, require_change
from specdef.lock.files import other_files_sha256
from specdef.lock.key import Key
from specdef.lock.load import load_model
from specdef.lock.names import NameMap
from specdef.lock.residual import encode_residual
from specdef.weights.atomic import atomic_folder
from specdef.weights.checkpoint import Checkpoint
from specdef.weights.edit import ReplaceEdit
from specdef.weights.folder import CERTIFICATE_NAME
from specdef.weights.rewrite import Progress, check_finite, copy_other_files, rewrite_tensors
from specdef.weights.tensor_bytes import TORCH_DTYPES, as_bytes

STATE_SUFFIX = ".checkpoint.safetensors"
"""Behind the name of the output: the state of a training that was interrupted."""


def deform_checkpoint(
    checkpoint: Checkpoint,
    out: Path,
    config: DeformationConfig,
    training: Training,
    *,
    key_path: Path,
    source_name: str = "",
    progress: Progress | None = None,
    status: Callable[[str], None] | None = None,
) -> LockCertificate:
    """Lock an open folder into a new one.

    Cost: the training, and one read of the checkpoint before and after it; memory of the model, its optimiser and the key.

    Args:
        checkpoint: The folder, lockable.
        out: Folder to create, free.
        config: The recipe.
        training: Data, losses and the rest.
        key_path: Where the key goes.
        source_name: Name of the model in the certificate.
        progress: Called with (bytes done, bytes in all) while the result is written.
        status: Told what is being worked on.

    Returns:
        The certificate.

    Raises:
        CheckpointError: A file is in the way, or something cannot be read or written.
        SpecDefError: The model, or the data for it, cannot be trained; transformers merges its tensors in memory.
        NotConverged: Training led to nothing that may be kept.
    """
    state = training.checkpoint or out.with_name(out.name + STATE_SUFFIX)
    _require_places(out, key_path, state)
    if status:
        status("loading")
    load = training.load or load_trainable
    model = load(checkpoint.folder)
    require_wide(model)
    tensors = stored_tensors(model, checkpoint)
    dtypes = {name: TORCH_DTYPES[checkpoint.info(name).dtype] for name in tensors}
    if status:
        status("training")
    stored = deform_stored(
        model, tensors, dtypes, config, replace(training, checkpoint=state), status
    )
    if status:
        status("writing")
    saved = False
    try:
        with atomic_folder(out) as work:
            certificate, key = _write(
                checkpoint, work, tensors, stored, config, source_name, progress
            )
            key.save(key_path)
            saved = True
    except BaseException:
        # a key without its lock would block the next one; one that is not ours is another model's original
        if saved and not (out / CERTIFICATE_NAME).exists():
            with suppress(OSError):
                key_path.unlink()
        raise
    state.unlink(missing_ok=True)
    return certificate


def load_trainable(folder: Path) -> nn.Module:
    """Load a folder in float32, in float64 where that is what it holds."""
    wide = any(info.dtype == "F64" for info in Checkpoint.open(folder).infos.values())
    return load_model(folder, dtype="float64" if wide else "float32")


def require_wide(model: nn.Module) -> None:
    """Refuse to train in half precision, where a step is lost in rounding.

    Raises:
        SpecDefError: A parameter is in bfloat16 or float16.
    """
    narrow = [name for name, p in model.named_parameters() if p.dtype in HALF]
    if narrow:
        raise SpecDefError(
            f"{narrow[0]} was loaded in half precision",
            hint="Load the model in float32; what is stored keeps its dtype.",
        )


def stored_tensors(model: nn.Module, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Find every tensor of a folder in the model that was loaded from it.

    A tensor of the folder that the model leaves alone (an old position table) is passed over; a tensor of the model that
    has none of its own in the folder is not.

    Args:
        model: The model, just loaded.
        checkpoint: Its folder.

    Returns:
        Name in the folder to the model's own tensor.

    Raises:
        SpecDefError: Tensors are merged, split or changed in loading.
        CheckpointError: A tensor holds NaN or Inf.
    """
    names, out = NameMap(model), {}
    unknown: SpecDefError | None = None
    for name in checkpoint.names:
        value = checkpoint.read(name)
        if value.is_floating_point():
            check_finite(value, name, checkpoint.folder / checkpoint.location[name])
        try:
            tensor = names.tensor(name)
        except SpecDefError as error:
            unknown = unknown or error
            continue
        if tensor.shape != value.shape or not torch.equal(
            tensor.detach().cpu(), value.to(tensor.dtype)
        ):
            raise SpecDefError(
                f"{name} is not in memory what it is on disk",
                hint="The model changes its weights in loading; lock it with --method absorbed or compensated.",
            )
        out[name] = tensor
    found = {id(tensor) for tensor in out.values()}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in found:
            raise unknown or SpecDefError(
                f"{name} of {type(model).__name__} is not in the folder",
                hint="The configuration and the weights do not belong together.",
            )
    return out


def _require_places(out: Path, key_path: Path, state: Path) -> None:
    """Refuse what could not be written once the training is done.

    Raises:
        CheckpointError: A file is in the way, inside the output, or its folder cannot be written.
    """
    if os.path.lexists(key_path):
        raise CheckpointError(
            "already exists, and every training makes a new key", path=key_path,
            hint="Name another --key; a lost key is a lost original.",
        )  # fmt: skip
    if state.resolve() == key_path.resolve():
        raise CheckpointError(
            "is to be the key and the state of the training at once", path=state, hint="Name another --checkpoint."
        )  # fmt: skip
    if state.resolve().is_relative_to(out.resolve()):
        raise CheckpointError(
            "lies inside the locked folder", path=state, hint="Keep the state of the training elsewhere."
        )  # fmt: skip
    for path in (out, key_path, state):
        place = path.absolute().parent
        while not place.exists():
            place = place.parent
        if not os.access(place, os.W_OK | os.X_OK):
            raise CheckpointError(
                "cannot be written", path=path, hint="The place is read-only: name another one."
            )


def _write(
    checkpoint: Checkpoint,
    work: Path,
    tensors: dict[str, Tensor],
    stored: Stored,
    config: DeformationConfig,
    source_name: str,
    progress: Progress | None,
) -> tuple[LockCertificate, Key]:
    residuals: dict[str, Tensor] = {}

    def replaced(name: str) -> ReplaceEdit:
        def compute(old: Tensor) -> Tensor:
            new = tensors[name].detach().cpu().to(old.dtype).contiguous()
            if as_bytes(new) != as_bytes(old):
                residuals[name] = encode_residual(old, new)
            return new

        return ReplaceEdit(compute=compute)

    hashes = rewrite_tensors(
        checkpoint, work, {name: replaced(name) for name in tensors}, progress=progress, workers=1
    )
    require_change(residuals)
    _, dropped = copy_other_files(checkpoint, work)
    key = Key(method="deformation", config=config, residuals=residuals, hashes=hashes)
    certificate = build_certificate(
        stored.plan, key, config, files=other_files_sha256(work), calibrated=False, dropped=dropped,
        source_name=source_name or checkpoint.folder.resolve().name, utility=stored.utility, training=stored.training,
    )  # fmt: skip
    write_card(work, certificate)
    certificate.write(work)
    return certificate, key
