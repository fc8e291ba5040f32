"""The table of optimisers: those of torch, those written here where torch has none, and those of heavyball."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from specdef.attacks.optimizers.adahessian import AdaHessian
from specdef.attacks.optimizers.decayed import LBFGS, Rprop
from specdef.attacks.optimizers.heavyball import heavyball
from specdef.attacks.optimizers.kfac import KFAC
from specdef.attacks.optimizers.layerwise import LAMB, LARS
from specdef.attacks.optimizers.lion import Lion
from specdef.attacks.optimizers.muon import MuonAdamW, tables_of
from specdef.attacks.optimizers.natural_gradient import LARGEST, NaturalGradient
from specdef.attacks.optimizers.shampoo import Shampoo
from specdef.attacks.optimizers.sophia import Sophia
from specdef.attacks.optimizers.spec import Build, OptimizerSpec
from specdef.attacks.optimizers.xmat import XMat
from specdef.attacks.task import Setting

Groups = list[dict[str, Any]]


def _plain(kind: type[torch.optim.Optimizer], **options: Any) -> Build:
    def build(model: nn.Module, groups: Groups, setting: Setting) -> torch.optim.Optimizer:
        return kind(groups, lr=setting.learning_rate, weight_decay=setting.weight_decay, **options)  # type: ignore[call-arg]

    return build


def _clipping(kind: type[torch.optim.Optimizer]) -> Build:
    """Build what computes its own gradients and has to clip them itself."""

    def build(model: nn.Module, groups: Groups, setting: Setting) -> torch.optim.Optimizer:
        return _plain(kind, max_grad_norm=setting.max_grad_norm)(model, groups, setting)

    return build


def _kfac(damping: float, *, relative: bool = False) -> Build:
    def build(model: nn.Module, groups: Groups, setting: Setting) -> torch.optim.Optimizer:
        return _plain(KFAC, model=model, damping=damping, relative=relative)(model, groups, setting)

    return build


def _muon(model: nn.Module, groups: Groups, setting: Setting) -> torch.optim.Optimizer:
    return _plain(MuonAdamW, tables=tables_of(model))(model, groups, setting)


def _natural(model: nn.Module, groups: Groups, setting: Setting) -> torch.optim.Optimizer:
    options = {"model": model, "max_grad_norm": setting.max_grad_norm}
    return _plain(NaturalGradient, **options)(model, groups, setting)


_FIRST_ORDER = (
    OptimizerSpec(
        name="sgd", tier=2, source="torch.optim.SGD", learning_rates=(1e-3, 1.0), build=_plain(torch.optim.SGD),
    ),
    OptimizerSpec(
        name="momentum", tier=2, source="torch.optim.SGD, momentum 0.9", learning_rates=(1e-4, 1e-1),
        build=_plain(torch.optim.SGD, momentum=0.9),
    ),
    OptimizerSpec(
        name="adam", tier=2, source="Kingma & Ba 2015", learning_rates=(1e-5, 1e-2),
        build=_plain(torch.optim.Adam, fused=True),
    ),
    OptimizerSpec(
        name="adamw", tier=2, source="Loshchilov & Hutter 2019", learning_rates=(1e-5, 1e-2),
        build=_plain(torch.optim.AdamW, fused=True),
    ),
    OptimizerSpec(
        name="nadam", tier=2, source="Dozat 2016", learning_rates=(1e-5, 1e-2),
        build=_plain(torch.optim.NAdam, decoupled_weight_decay=True),
    ),
    OptimizerSpec(
        name="radam", tier=2, source="Liu et al. 2020, arXiv 1908.03265", learning_rates=(1e-5, 1e-2),
        build=_plain(torch.optim.RAdam, decoupled_weight_decay=True),
    ),
    OptimizerSpec(
        name="adamax", tier=2, source="Kingma & Ba 2015, section 7.1", learning_rates=(1e-5, 1e-2),
        build=_plain(torch.optim.Adamax),
    ),
    OptimizerSpec(
        name="rmsprop", tier=2, source="torch.optim.RMSprop", learning_rates=(1e-5, 1e-2),
        build=_plain(torch.optim.RMSprop),
    ),
    OptimizerSpec(
        name="adagrad", tier=2, source="Duchi et al. 2011", learning_rates=(1e-4, 1e-1),
        build=_plain(torch.optim.Adagrad),
    ),
    OptimizerSpec(
        name="adadelta", tier=2, source="Zeiler 2012", learning_rates=(1e-2, 10.0), build=_plain(torch.optim.Adadelta),
    ),
    OptimizerSpec(
        name="adafactor", tier=2, source="Shazeer & Stern 2018; rates relative to the weights",
        learning_rates=(1e-4, 1e-1), build=_plain(torch.optim.Adafactor),
    ),
    OptimizerSpec(
        name="rprop", tier=2, source="Riedmiller & Braun 1993; the rate is its first step", learning_rates=(1e-6, 1e-2),
        build=_plain(Rprop),
    ),
    OptimizerSpec(
        name="lion", tier=2, source="Chen et al. 2023, arXiv 2302.06675", learning_rates=(1e-6, 1e-3), build=_plain(Lion),
    ),
    OptimizerSpec(
        name="lamb", tier=2, source="You et al. 2020, arXiv 1904.00962", learning_rates=(1e-4, 1e-1), build=_plain(LAMB),
    ),
    OptimizerSpec(
        name="lars", tier=2, source="You et al. 2017, arXiv 1708.03888", learning_rates=(1e-4, 1e-1), build=_plain(LARS),
    ),
)  # fmt: skip

_PRECONDITIONED = (
    OptimizerSpec(
        name="muon", tier=4, source="Jordan et al. 2024; AdamW for what is no matrix, rates matched as in arXiv 2502.16982",
        learning_rates=(1e-5, 1e-2), build=_muon,
    ),
    OptimizerSpec(
        name="shampoo", tier=4, source="Gupta et al. 2018, arXiv 1802.09568", learning_rates=(1e-5, 1e-1),
        build=_plain(Shampoo),
    ),
    OptimizerSpec(
        name="kl-shampoo", tier=4, source="Lin et al. 2025, arXiv 2509.03378 (heavyball)", learning_rates=(1e-5, 1e-2),
        build=heavyball("KLShampoo"), library="heavyball",
    ),
    OptimizerSpec(
        name="soap", tier=4, source="Vyas et al. 2024, arXiv 2409.11321 (heavyball)", learning_rates=(1e-5, 1e-2),
        build=heavyball("SOAP"), library="heavyball",
    ),
    OptimizerSpec(
        name="kron", tier=4, source="PSGD: Li 2015, arXiv 1512.04202 (heavyball)", learning_rates=(1e-5, 1e-2),
        build=heavyball("PSGDKron", "q_dtype"), library="heavyball",
    ),
    OptimizerSpec(
        name="xmat", tier=4, source="PSGD: Li 2022, arXiv 2211.04422", learning_rates=(1e-3, 1.0), build=_clipping(XMat),
        closure="graph", relative_cost=3.0,
    ),
    OptimizerSpec(
        name="sophia", tier=4, source="Liu et al. 2023, arXiv 2305.14342 (Sophia-H)", learning_rates=(1e-6, 1e-2),
        build=_clipping(Sophia), closure="graph", relative_cost=1.2,
    ),
    OptimizerSpec(
        name="adahessian", tier=4, source="Yao et al. 2021, arXiv 2006.00719", learning_rates=(1e-4, 1.0),
        build=_clipping(AdaHessian), closure="graph", relative_cost=3.0,
    ),
    OptimizerSpec(
        name="lbfgs", tier=4, source="Liu & Nocedal 1989; 4 iterations on every batch, strong Wolfe", learning_rates=(1e-3, 1.0),
        build=_plain(LBFGS), closure="gradient", relative_cost=5.0,
    ),
    *(
        OptimizerSpec(
            name=f"kfac-{damping}", tier=4, source=f"Martens & Grosse 2015, arXiv 1503.05671, damping {damping}",
            learning_rates=(1e-4, 1.0), build=_kfac(float(damping)), relative_cost=1.5,
        )
        for damping in ("1e-1", "1e-3", "1e-6")
    ),
    OptimizerSpec(
        name="kfac-relative", tier=4,
        source="Martens & Grosse 2015, arXiv 1503.05671, damping 1e-3 of weights in the scales of their rows and columns",
        learning_rates=(1e-4, 1.0), build=_kfac(1e-3, relative=True), relative_cost=1.5,
    ),
    OptimizerSpec(
        name="natural-gradient", tier=4, source="Amari 1998; Gauss-Newton form, exact, damping 1e-2 of weights in the scales of their rows and columns", learning_rates=(1e-3, 1.0),
        build=_natural, closure="graph", relative_cost=10.0, largest=LARGEST,
    ),
)  # fmt: skip

OPTIMIZERS: dict[str, OptimizerSpec] = {s.name: s for s in (*_FIRST_ORDER, *_PRECONDITIONED)}
