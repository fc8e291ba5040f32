"""Load any locked or unlocked model folder into a transformers model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from specdef.errors import CheckpointError
from specdef.lock.compensated import MODEL_TYPE, insert_compensation
from specdef.lock.names import NameMap
from specdef.lock.stack import Lock, set_locks
from specdef.weights.checkpoint import Checkpoint
from specdef.weights.folder import BASE_CONFIG_NAME, CERTIFICATE_NAME, COMPENSATION_NAME, read_json


def load_model(
    path: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str = "cpu",
    architecture: str | None = None,
) -> nn.Module:
    """Load a model folder, with the inserted layers of a compensated lock where there are any.

    Never runs code from the folder and never unpickles.

    Args:
        path: Local model folder.
        dtype: "auto" keeps the checkpoint's dtype; else a torch dtype or its name.
        device: Where the model goes.
        architecture: Class in transformers, for a configuration that names none.

    Returns:
        The model in evaluation mode, of the class named by its configuration.

    Raises:
        CheckpointError: The folder is no model transformers can build, or lacks its compensation.
    """
    import transformers

    folder = Path(path)
    checkpoint = Checkpoint.open(folder)
    compensated = checkpoint.config.get("model_type") == MODEL_TYPE
    values = read_json(folder / BASE_CONFIG_NAME) if compensated else checkpoint.config
    architectures = values.get("architectures") or ([architecture] if architecture else [])
    classes = [getattr(transformers, name, None) for name in architectures]
    if not classes or classes[0] is None:
        raise CheckpointError(
            f"names the architecture {architectures or 'none'}, which transformers {transformers.__version__} lacks",
            path=folder / "config.json", hint="Update transformers; code from the folder is never run.",
        )  # fmt: skip
    kind: Any = classes[0]
    if isinstance(dtype, str) and dtype != "auto":
        dtype = getattr(torch, dtype)
    progress_bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        config = kind.config_class.from_dict(dict(values))
        model, report = kind.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"cannot be loaded ({error})", path=folder) from error
    finally:
        if progress_bars:
            transformers.utils.logging.enable_progress_bar()
    if report["missing_keys"]:
        raise CheckpointError(
            f"lacks {len(report['missing_keys'])} tensors of {architectures[0]}, among them "
            f"{sorted(report['missing_keys'])[0]}", path=folder, hint="The configuration and the weights do not belong together.",
        )  # fmt: skip
    if compensated:
        _insert(model, folder, checkpoint)
    if (folder / CERTIFICATE_NAME).exists():
        set_locks(model, _locks(read_json(folder / CERTIFICATE_NAME)))
    module: nn.Module = model.eval().to(device)
    return module


def _insert(model: nn.Module, folder: Path, checkpoint: Checkpoint) -> None:
    path = folder / COMPENSATION_NAME
    if not path.exists():
        raise CheckpointError("lacks its compensation", path=path, hint="Fetch the folder again.")
    layers = load_file(path)
    for name, matrix in layers.items():
        # A pair stored wider than the model keeps its own dtype: narrowed, it would no longer be the function.
        parameter = NameMap(model).tensor(name)
        if parameter.dtype != matrix.dtype:
            parameter.data = checkpoint.read(name).to(matrix.dtype)
    insert_compensation(model, layers)


def _locks(certificate: dict[str, Any]) -> tuple[Lock, ...]:
    """Return the locks a certificate names, the lowest first."""
    entries = [certificate.get("below"), certificate]
    return tuple(
        Lock(str(entry.get("method")), str(entry["lock_id"]))
        for entry in entries
        if isinstance(entry, dict) and entry.get("lock_id")
    )


def original_config(folder: Path) -> dict[str, Any]:
    """Return the configuration of the model itself, also of a compensated folder."""
    path = folder / BASE_CONFIG_NAME
    return (
        read_json(path) if path.exists() else dict(json.loads((folder / "config.json").read_text()))
    )
