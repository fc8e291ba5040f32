"""The audit of a training lock: sweeps of every attack beside its control, flags, and a verdict by threat tier.

The package can be called: `specdef.audit(locked, original, task)` is `specdef.audit.audit.audit`, which would otherwise be
hidden by the package of the same name.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    def __call__(self, *arguments: Any, **options: Any) -> Any:
        from specdef.audit.audit import audit

        return audit(*arguments, **options)


sys.modules[__name__].__class__ = _Callable
