"""Alignment fragility: will a fine-tune on harmless data undo what a model was aligned to, and when?

The package can be called: `specdef.fragility(model, aligned, task, …)` is `specdef.fragility.diagnose.fragility`, which
would otherwise be hidden by the package of the same name.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    def __call__(self, *arguments: Any, **options: Any) -> Any:
        from specdef.fragility.diagnose import fragility

        return fragility(*arguments, **options)


sys.modules[__name__].__class__ = _Callable
