"""A model with what prepares its inputs: the three kinds of models whose curvature is analysed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specdef.data.batches import TASKS, Task
from specdef.errors import CheckpointError
from specdef.lock.load import load_model
from specdef.weights.folder import BASE_CONFIG_NAME, read_json

if TYPE_CHECKING:
    import torch
    from torch import nn

# Without one of these, transformers makes an empty tokenizer for many families, and says nothing.
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "spm.model", "sentencepiece.bpe.model",
    "tekken.json", "vocab.bpe", "merges.txt",
)  # fmt: skip
_PICTURE_FILE = "preprocessor_config.json"

_MAPPINGS: dict[Task, str] = {
    "causal-lm": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "sequence-classification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "image-classification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskModel:
    """A model ready to be run on data.

    Args:
        model: In evaluation mode.
        processor: Its tokenizer or image processor; None for pictures without a `preprocessor_config.json`.
        task: What it is trained to do.
        folder: Where it was read from.
    """

    model: nn.Module
    processor: Any
    task: Task
    folder: Path


def load_task_model(
    folder: str | Path,
    *,
    original: str | Path | None = None,
    task: str | None = None,
    dtype: str | torch.dtype = "float32",
    device: str = "cpu",
) -> TaskModel:
    """Load a model folder, locked or not, with its tokenizer or image processor.

    Local files only; code from the folder is never run.

    Args:
        folder: Local model folder.
        original: Folder of the unlocked model, whose tokenizer is taken where a locked folder has none.
        task: What the model is trained to do. Default: what its architecture says; needed only where its configuration names
            no architecture.
        dtype: torch dtype or its name; "auto" keeps the checkpoint's.
        device: Where the model goes.

    Returns:
        The model and what belongs to it.

    Raises:
        ValueError: `task` is unknown.
        CheckpointError: The folder is no model, of another kind than these three or than `task`, or has no tokenizer.
    """
    folder = Path(folder)
    if task is not None and task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}.")
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            "is no model folder: it has no config.json", path=folder, hint="Name a Hugging Face model folder."
        )  # fmt: skip
    base = folder / BASE_CONFIG_NAME  # of a compensated folder
    found, architecture = _task(
        read_json(base if base.exists() else folder / "config.json"), folder, task
    )
    model: Any = load_model(folder, dtype=dtype, device=device, architecture=architecture)
    processor = load_processor(
        folder, model.config, found, original=Path(original) if original else None
    )
    config = model.config
    if found == "sequence-classification" and getattr(config, "pad_token_id", None) is None:
        # GPT-like classifiers find the last token of a padded text by it, and refuse batches without.
        config.pad_token_id = processor.pad_token_id
    return TaskModel(model=model, processor=processor, task=found, folder=folder)


def load_processor(folder: Path, config: Any, task: Task, *, original: Path | None = None) -> Any:
    """Load the tokenizer or image processor of a model folder.

    Args:
        folder: The model's folder.
        config: The model's transformers config.
        task: What the model is trained to do.
        original: Folder to look in where `folder` has none.

    Returns:
        The tokenizer or image processor; None for pictures without a `preprocessor_config.json`.

    Raises:
        CheckpointError: There is no tokenizer, or its files are damaged.
    """
    pictures = task == "image-classification"
    files = (_PICTURE_FILE,) if pictures else _TOKENIZER_FILES
    for place in [folder, *([original] if original else [])]:
        if any((place / name).is_file() for name in files):
            break
    else:
        if pictures:
            return None
        raise CheckpointError(
            "has no tokenizer (tokenizer.json, tokenizer.model or vocab.*)", path=folder,
            hint="Copy the tokenizer files of the original model into the folder.",
        )  # fmt: skip

    from transformers import AutoImageProcessor, AutoTokenizer

    kind = AutoImageProcessor if pictures else AutoTokenizer
    # A compensated folder has a model_type of its own, so the config is passed on.
    options = {} if pictures else {"config": config}
    try:
        return kind.from_pretrained(place, local_files_only=True, trust_remote_code=False, **options)  # fmt: skip
    except (
        Exception
    ) as error:  # damaged files raise whatever the parsers raise, and all mean the same here
        what = "image processor" if pictures else "tokenizer"
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"the {what} cannot be loaded ({reason[:200]})", path=place,
            hint="Fetch its files again; code from the folder is never run.",
        ) from error  # fmt: skip


def _task(config: dict[str, Any], folder: Path, task: str | None) -> tuple[Task, str | None]:
    """Return what a model is trained to do, and its class where only `task` tells."""
    from transformers.models.auto import modeling_auto

    tables: dict[Task, dict[str, Any]] = {
        name: dict(getattr(modeling_auto, mapping)) for name, mapping in _MAPPINGS.items()
    }
    architecture = (config.get("architectures") or [None])[0]
    kind = config.get("model_type", "")
    for found, table in tables.items():
        if task not in (None, found):
            continue
        if architecture is None and task is not None and kind in table:
            name = table[kind]
            return found, name if isinstance(name, str) else name[0]
        names = {name for value in table.values() for name in ([value] if isinstance(value, str) else value)}  # fmt: skip
        if architecture in names:
            return found, None
    what = (
        f"the architecture {architecture}"
        if architecture
        else f"no architecture and the model_type {kind!r}"
    )
    raise CheckpointError(
        f"names {what}, which is no {task or 'model of a kind that is analysed'}", path=folder / "config.json",
        hint=f"Use a model with the head it was trained with; analysed are: {', '.join(TASKS)}. Where the configuration "
        "names no architecture, say which of these it is.",
    )  # fmt: skip
