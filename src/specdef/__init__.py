"""Lock open weights against training, audit the lock, predict convergence, diagnose alignment fragility.

Names are imported on first use, so that `import specdef` and `specdef --help` do not wait for torch.
"""

from __future__ import annotations

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from specdef.attacks.task import Budget as Budget
    from specdef.attacks.task import Setting as Setting
    from specdef.attacks.task import Task as Task
    from specdef.audit.audit import audit as audit
    from specdef.audit.report import AuditReport as AuditReport
    from specdef.curvature.density import SpectralDensity as SpectralDensity
    from specdef.curvature.density import spectral_density as spectral_density
    from specdef.curvature.eigenvalues import Eigenvalues as Eigenvalues
    from specdef.curvature.eigenvalues import top_eigenvalues as top_eigenvalues
    from specdef.curvature.linear import MatrixOperator as MatrixOperator
    from specdef.curvature.losses import ClassificationLoss as ClassificationLoss
    from specdef.curvature.losses import LMLoss as LMLoss
    from specdef.curvature.losses import MSELoss as MSELoss
    from specdef.curvature.operators import EmpiricalFisherOperator as EmpiricalFisherOperator
    from specdef.curvature.operators import GGNOperator as GGNOperator
    from specdef.curvature.operators import HessianOperator as HessianOperator
    from specdef.curvature.trace import trace as trace
    from specdef.errors import CertificateMismatch as CertificateMismatch
    from specdef.errors import CheckpointError as CheckpointError
    from specdef.errors import KeyMismatch as KeyMismatch
    from specdef.errors import NotConverged as NotConverged
    from specdef.errors import SecondOrderError as SecondOrderError
    from specdef.errors import SelectionError as SelectionError
    from specdef.errors import SpecDefError as SpecDefError
    from specdef.errors import StaleGraphError as StaleGraphError
    from specdef.fragility.callback import GuardCallback as GuardCallback
    from specdef.fragility.diagnose import fragility as fragility
    from specdef.fragility.guard import DriftGuard as DriftGuard
    from specdef.fragility.ranking import rank_tasks as rank_tasks
    from specdef.fragility.report import FragilityReport as FragilityReport
    from specdef.fragility.subspace import FisherSubspace as FisherSubspace
    from specdef.fragility.subspace import fisher_subspace as fisher_subspace
    from specdef.lock.authorised import authorised as authorised
    from specdef.lock.authorised import save_locked as save_locked
    from specdef.lock.certificate import LockCertificate as LockCertificate
    from specdef.lock.config import LockConfig as LockConfig
    from specdef.lock.deformation.config import DeformationConfig as DeformationConfig
    from specdef.lock.in_memory import LockedModel as LockedModel
    from specdef.lock.in_memory import lock_model as lock_model
    from specdef.lock.key import Key as Key
    from specdef.lock.key import load_key as load_key
    from specdef.lock.load import load_model as load_model
    from specdef.lock.lock import lock_checkpoint as lock_checkpoint
    from specdef.lock.lock import plan_lock as plan_lock
    from specdef.lock.restore import unlock_model as unlock_model
    from specdef.lock.unlock import unlock_checkpoint as unlock_checkpoint
    from specdef.lock.verify import Verification as Verification
    from specdef.lock.verify import verify_checkpoint as verify_checkpoint
    from specdef.rates.predict import Prediction as Prediction
    from specdef.rates.predict import predict_convergence as predict_convergence
    from specdef.spectral.topk import topk_svd as topk_svd

_HOME = {
    "specdef.attacks.task": ("Budget", "Setting", "Task"),
    "specdef.audit.report": ("AuditReport",),
    "specdef.curvature.density": ("SpectralDensity", "spectral_density"),
    "specdef.curvature.eigenvalues": ("Eigenvalues", "top_eigenvalues"),
    "specdef.curvature.linear": ("MatrixOperator",),
    "specdef.curvature.losses": ("ClassificationLoss", "LMLoss", "MSELoss"),
    "specdef.curvature.operators": ("EmpiricalFisherOperator", "GGNOperator", "HessianOperator"),
    "specdef.curvature.trace": ("trace",),
    "specdef.errors": (
        "CertificateMismatch", "CheckpointError", "KeyMismatch", "NotConverged", "SecondOrderError", "SelectionError",
        "SpecDefError", "StaleGraphError",
    ),
    "specdef.fragility.callback": ("GuardCallback",),
    "specdef.fragility.guard": ("DriftGuard",),
    "specdef.fragility.ranking": ("rank_tasks",),
    "specdef.fragility.report": ("FragilityReport",),
    "specdef.fragility.subspace": ("FisherSubspace", "fisher_subspace"),
    "specdef.lock.authorised": ("authorised", "save_locked"),
    "specdef.lock.certificate": ("LockCertificate",),
    "specdef.lock.config": ("LockConfig",),
    "specdef.lock.deformation.config": ("DeformationConfig",),
    "specdef.lock.in_memory": ("LockedModel", "lock_model"),
    "specdef.lock.key": ("Key", "load_key"),
    "specdef.lock.load": ("load_model",),
    "specdef.lock.lock": ("lock_checkpoint", "plan_lock"),
    "specdef.lock.restore": ("unlock_model",),
    "specdef.lock.unlock": ("unlock_checkpoint",),
    "specdef.lock.verify": ("Verification", "verify_checkpoint"),
    "specdef.rates.predict": ("Prediction", "predict_convergence"),
    "specdef.spectral.topk": ("topk_svd",),
}  # fmt: skip
_LAZY = {name: module for module, names in _HOME.items() for name in names}

_PACKAGES = ("audit", "fragility")  # which can be called

__all__ = sorted([*_LAZY, *_PACKAGES])  # pyright: ignore[reportUnsupportedDunderAll]
__version__ = version("specdef")


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return importlib.import_module(f"specdef.{name}")
    if name not in _LAZY:
        raise AttributeError(f"module 'specdef' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
