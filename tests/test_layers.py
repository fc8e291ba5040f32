"""Imports point one way, heavy libraries stay out of light modules, and files stay short: read from the source itself."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import specdef

ROOT = Path(specdef.__file__).parent
LAYERS_OF_A_LOCK = ("errors", "weights", "spectral", "symmetries")

# layer -> layers it may import besides itself, from the bottom up: a row names only rows above it. The parts not
# written yet have their rows already. models and data are for experiments, the command line and tests.
LAYERS: dict[str, tuple[str, ...]] = {
    "errors": (),
    "weights": ("errors",),
    "spectral": ("errors",),
    "symmetries": ("errors",),
    "curvature": ("errors", "weights", "spectral"),
    "rates": (*LAYERS_OF_A_LOCK, "curvature"),
    "lock": (*LAYERS_OF_A_LOCK, "curvature"),
    "fragility": (*LAYERS_OF_A_LOCK, "curvature", "rates"),
    "attacks": (*LAYERS_OF_A_LOCK, "curvature", "rates", "lock", "fragility"),
    "audit": (*LAYERS_OF_A_LOCK, "curvature", "rates", "lock", "fragility", "attacks"),
    "specdef": (*LAYERS_OF_A_LOCK, "curvature", "rates", "lock", "fragility", "attacks", "audit"),
    "data": ("errors", "weights"),
    "models": ("errors", "weights", "data"),
    "cli": (
        *(*LAYERS_OF_A_LOCK, "curvature", "rates", "lock", "fragility", "attacks", "audit"),
        *("specdef", "data", "models"),
    ),
    "experiments": (
        *(*LAYERS_OF_A_LOCK, "curvature", "rates", "lock", "fragility", "attacks", "audit"),
        *("specdef", "data", "models", "cli"),
    ),
}

# Libraries outside the standard one, for the layers that promise to do with few; the rest may use what pyproject declares.
LIBRARIES: dict[str, tuple[str, ...]] = {
    "specdef": (),
    "errors": (),
    "symmetries": (),
    "weights": ("torch", "numpy"),
    "spectral": ("torch", "numpy"),
}

# module -> libraries that importing it must not load, not even through what it imports.
UNLOADED = {
    "specdef": ("torch", "transformers"),
    "specdef.cli.app": ("torch", "transformers"),
    "specdef.symmetries": ("torch", "transformers"),
    "specdef.weights.rewrite": ("transformers",),
    "specdef.spectral": ("transformers",),
}

MAX_LINES = 300
MAX_LINES_WITH_A_REASON = 420
LONG = {
    "symmetries/find.py": "one walk over a checkpoint's names, with every refusal where it is noticed",
    "weights/rewrite.py": "one stream from source to output, with the checks at each step",
    "lock/lock.py": "the order plan, rewrite, key, certificate, on disk and in memory",
    "lock/verify.py": "every statement of a certificate, checked in the order it is cheap to",
    "cli/lock.py": "as many options as the recipe has fields, each with its help",
    "experiments/demo.py": "a script read from top to bottom",
}

FILES = sorted(ROOT.rglob("*.py"))


def layer(module: str) -> str:
    """Return the layer of a module of the package: `lock` of `specdef.lock.key`, `specdef` of the package itself."""
    return [*module.split("."), ""][1] or "specdef"


def module_name(path: Path) -> str:
    parts = ("specdef", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(source: str, module: str, *, package: bool = False) -> list[tuple[int, str]]:
    """List (line, module) of every import, wherever it stands: in functions and under TYPE_CHECKING too."""
    found: list[tuple[int, str]] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parts = module.split(".")
            above = parts[: len(parts) - node.level + package] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            # `from specdef import lock` is an import of the layer, `from specdef import Key` one of the package.
            found += [
                (
                    node.lineno,
                    f"specdef.{a.name}" if base == "specdef" and a.name in LAYERS else base,
                )
                for a in node.names
            ]
        elif isinstance(node, ast.Call) and node.args:
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            target = node.args[0]
            if name in ("import_module", "__import__") and isinstance(target, ast.Constant):
                found.append((node.lineno, str(target.value)))
    return found


def violations(source: str, module: str, *, package: bool = False) -> list[str]:
    """Say which imports of a module's source the tables forbid."""
    here = layer(module)
    if here not in LAYERS:
        return [f"{module}: layer {here} has no row in LAYERS"]
    wrong = []
    for line, target in imports(source, module, package=package):
        top = target.split(".")[0]
        if top == "specdef":
            forbidden = layer(target) not in (here, *LAYERS[here])
        else:
            libraries = LIBRARIES.get(here)
            forbidden = (
                libraries is not None
                and top not in sys.stdlib_module_names
                and top not in libraries
            )
        if forbidden:
            wrong.append(f"{module}:{line} imports {target}")
    return wrong


def too_long(lines: dict[str, int]) -> list[str]:
    """Say which files are longer than they may be."""
    return [
        f"{name}: {count} lines"
        for name, count in lines.items()
        if count > (MAX_LINES_WITH_A_REASON if name in LONG else MAX_LINES)
    ]


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_point_one_way(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert not violations(source, module_name(path), package=path.name == "__init__.py")


def test_a_row_names_only_rows_above_it() -> None:
    above: list[str] = []
    for name, allowed in LAYERS.items():
        assert set(allowed) <= set(above), name
        above.append(name)


def test_names_imported_on_first_use_obey_too() -> None:
    homes = set(specdef._LAZY.values())
    assert homes and {layer(home) for home in homes} <= set(LAYERS["specdef"])
    for name, home in specdef._LAZY.items():
        assert hasattr(importlib.import_module(home), name)


@pytest.mark.parametrize(
    ("path", "added"),
    [
        ("weights/header.py", "import specdef.symmetries"),
        ("weights/header.py", "from specdef.lock.key import Key"),
        ("weights/header.py", "from specdef import Key"),
        ("weights/header.py", "from specdef import lock"),
        ("weights/header.py", "from ..lock import key"),
        ("weights/header.py", "from .. import lock"),
        ("weights/__init__.py", "from ..lock import key"),
        ("weights/source.py", "import transformers"),
        ("weights/source.py", "def f():\n    from transformers import AutoModel"),
        ("weights/source.py", "import importlib\nimportlib.import_module('transformers')"),
        ("spectral/topk.py", "import scipy.linalg"),
        ("spectral/topk.py", "from specdef.weights.checkpoint import Checkpoint"),
        ("spectral/topk.py", "from torch import nn\nimport transformers as t"),
        ("symmetries/find.py", "import torch"),
        ("symmetries/find.py", "if TYPE_CHECKING:\n    from torch import Tensor"),
        ("symmetries/find.py", "from specdef.weights.header import Header"),
        ("symmetries/families/llama.py", "from ...lock import key"),
        ("lock/key.py", "class A:\n    def f(self):\n        import specdef.cli.common"),
        ("lock/key.py", "from specdef.models.tiny import save_tiny"),
        ("lock/key.py", "from specdef.attacks.base import Attack"),
        ("models/tiny.py", "from specdef.lock.key import Key"),
        ("data/texts.py", "from specdef.models import tiny"),
        ("cli/app.py", "from specdef.experiments import demo"),
        ("errors.py", "from specdef.weights.header import Header"),
        ("__init__.py", "import torch"),
        ("__init__.py", "from .cli import app"),
    ],
)
def test_a_forbidden_import_is_found(path: str, added: str) -> None:
    source = (ROOT / path).read_text(encoding="utf-8")
    module, package = module_name(ROOT / path), path.endswith("__init__.py")
    assert not violations(source, module, package=package)
    assert len(violations(f"{source}\n{added}\n", module, package=package)) == 1


@pytest.mark.parametrize(
    ("path", "added"),
    [
        (
            "weights/header.py",
            "from . import checkpoint\nfrom .edit import ScaleEdit\nimport numpy",
        ),
        ("weights/header.py", "from ..errors import CheckpointError"),
        ("lock/key.py", "import specdef.spectral.topk, transformers"),
        ("attacks/new.py", "from specdef.lock.key import Key\nimport torch, json"),
        ("experiments/demo.py", "from specdef.cli.app import main"),
    ],
)
def test_an_allowed_import_is_not(path: str, added: str) -> None:
    assert not violations(added, module_name(ROOT / path))


def test_a_new_part_needs_a_row() -> None:
    assert violations("", "specdef.misc.helpers")


@pytest.mark.parametrize("module", UNLOADED)
def test_importing_loads_no_heavy_library(module: str) -> None:
    code = f"import sys, {module}; print(*[n for n in {UNLOADED[module]} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_the_check_for_loaded_libraries_sees_one() -> None:
    code = "import sys, specdef.spectral; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


def test_files_are_short() -> None:
    lines = {
        path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines())
        for path in FILES
    }
    assert not too_long(lines)
    # "Rarely": one file in ten at most.
    assert set(LONG) <= set(lines) and len(LONG) <= len(FILES) / 10
    name, other = "lock/key.py", next(iter(LONG))
    assert too_long(lines | {name: MAX_LINES + 1}) == [f"{name}: {MAX_LINES + 1} lines"]
    assert not too_long(lines | {other: MAX_LINES_WITH_A_REASON})
    assert too_long(lines | {other: MAX_LINES_WITH_A_REASON + 1})


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_a_file_opens_with_its_idea(path: Path) -> None:
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    assert text.split("\n\n")[0].rstrip().endswith((".", "?"))
