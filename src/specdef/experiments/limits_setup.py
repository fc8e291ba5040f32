"""What the `limits` experiment runs, and the lock of arXiv 2602.18868 at any scale from one decomposition."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import nn

from specdef.experiments.lock_table import UNLOCKED
from specdef.experiments.paper.locks import ABSORBED, COMPENSATED
from specdef.lock.compensated import insert_compensation, module_path
from specdef.lock.config import LockConfig
from specdef.lock.in_memory import model_config, unique_tensors
from specdef.lock.plan import Projection
from specdef.lock.projected import compensation, plan_projected, scaled_matrix
from specdef.weights.source import MemorySource

SCALE = 1e4
"""The paper's."""
EVERYWHERE = f"{COMPENSATED}, C adapted too"
"""LoRA as peft puts it into a model whose inserted layers are layers like others."""

LM = "SmolLM2"
DENOISER, STYLE, VIT = "denoiser", "style transfer", "ViT"
MODALITIES = (DENOISER, STYLE, VIT)

OPTIMIZERS = {"adamw": 1e-3, "sophia": 1e-4, "muon": 1e-3, "adahessian": 1e-3}
"""Learning rates at which the unlocked small nets learn; the paper names the optimisers, and its rates only for language models."""
LIMITS = ("merge", "freeze-inserted", "layer-injection", "factor-expansion")
"""What the paper proves or concedes to undo the lock."""


def scaled_name(scale: float) -> str:
    """Return the column of the compensated lock at another scale than the paper's."""
    return f"{COMPENSATED} 1e{math.log10(scale):.0f}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Language:
    """The language model, its text and what is tried.

    Args:
        tiny: A tiny random model in place of SmolLM2.
        steps: Of an attack.
        evaluations: Of the held-out loss on the way.
        train: Rows to learn from, one per step in turn.
        batch_size: Rows of a step.
        heldout: Batches the attack is judged on.
        utility: Batches utility is measured on, of the same text and drawn apart.
        length: Tokens of a row.
        calibration: Batches for the absorbed lock.
        k: Singular values scaled.
        num_layers: Blocks locked.
        paper_rates: Learning rates of the paper's table.
        sweep: Further rates by model: down to where nothing moves.
        lora_rate: Usual rate of LoRA.
        lora_sweep: Further rates by model.
        limit_rates: Rates for layer injection; what removes C trains at the unlocked model's best.
        scales: Scales by precision, for the utility.
    """

    tiny: bool = False
    steps: int
    evaluations: int
    train: int
    batch_size: int = 1
    heldout: int = 4
    utility: int = 12
    length: int = 64
    calibration: int = 8
    k: int = 25
    num_layers: int = 5
    paper_rates: tuple[float, ...] = (1e-6, 1e-5, 3e-5)
    sweep: Mapping[str, tuple[float, ...]] = field(
        default_factory=lambda: {
            UNLOCKED: (1e-3, 1e-4), COMPENSATED: (1e-7, 1e-8, 1e-9, 1e-10), ABSORBED: (1e-11, 1e-14, 1e-17, 1e-19),
        }
    )  # fmt: skip
    lora_rate: float = 1e-3
    lora_sweep: Mapping[str, tuple[float, ...]] = field(
        default_factory=lambda: {UNLOCKED: (1e-4,), EVERYWHERE: (1e-5, 1e-6, 1e-7)}
    )
    limit_rates: tuple[float, ...] = (1e-4, 1e-5)
    scales: Mapping[str, tuple[float, ...]] = field(
        default_factory=lambda: dict.fromkeys(("float32", "bfloat16"), (1e1, 1e2, 1e3, 1e4, 1e5, 1e6))
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Pictures:
    """The small nets, their pictures and what is tried on them.

    Args:
        data: "mnist" to begin with and Fashion-MNIST for attackers, or scikit-learn's "digits" and their negatives.
        side: Height and width.
        patch: Side of the squares that become channels (convolutions) or tokens (ViT).
        width: Channels, and of the ViT's tokens.
        blocks: Of the ViT.
        k: Singular values scaled.
        rows: Pictures the originals are trained on.
        epochs: Passes over them, of the convolutional nets.
        vit_epochs: Of the ViT.
        tests: Pictures that measure.
        deformation_batches: Batches the deformation is trained on.
        deformation_epochs: Passes over them.
        steps: Of an attack.
        evaluations: Of the held-out loss on the way.
        batch_size: Pictures of a step.
        scales: Of the compensated lock, beside the paper's.
        optimizers: Swept beside AdamW, by net.
        limits: Tried, by net.
        lora: Whether LoRA is swept, on the ViT.
        swept: Nets whose attacks are swept over learning rates.
    """

    data: Literal["mnist", "digits"] = "mnist"
    side: int = 28
    patch: int = 4
    width: int = 48
    blocks: int = 5
    k: int = 25
    rows: int = 19_200
    epochs: int = 1
    vit_epochs: int = 2
    tests: int = 250
    deformation_batches: int = 40
    deformation_epochs: int = 2
    steps: int = 30
    evaluations: int = 3
    batch_size: int = 16
    scales: tuple[float, ...] = (1e3, 1e6)
    optimizers: Mapping[str, tuple[str, ...]] = field(
        default_factory=lambda: {m: ("sophia", "muon", "adahessian") for m in (DENOISER, VIT)}
    )
    limits: Mapping[str, tuple[str, ...]] = field(
        default_factory=lambda: {DENOISER: LIMITS, STYLE: ("merge", "layer-injection"), VIT: LIMITS}
    )
    lora: bool = True
    swept: tuple[str, ...] = MODALITIES


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How much is run.

    Args:
        language: The language model.
        pictures: The further modalities.
        curvature: Scales at which lambda_max is measured.
    """

    language: Language
    pictures: Pictures
    curvature: tuple[float, ...] = (1e1, 1e2, 1e3, 1e4)


SIZES = {
    "cpu": Settings(
        language=Language(steps=6, evaluations=3, train=6),
        pictures=Pictures(),
    ),
    "full": Settings(
        language=Language(
            steps=120, evaluations=12, train=120, batch_size=4, heldout=32, utility=64, length=128, calibration=32, num_layers=10,
            sweep={
                UNLOCKED: (1e-2, 1e-3, 1e-4, 1e-7), COMPENSATED: tuple(10.0**-i for i in range(7, 13)),
                ABSORBED: tuple(10.0**-i for i in range(7, 21)),
            },
            lora_sweep={UNLOCKED: (1e-2, 1e-4, 1e-5), COMPENSATED: (1e-2, 1e-4, 1e-5), EVERYWHERE: tuple(10.0**-i for i in range(4, 10))},
            limit_rates=(1e-4, 3e-5, 1e-5, 1e-6),
        ),
        pictures=Pictures(
            rows=57_600, epochs=5, vit_epochs=10, tests=2000, steps=300, evaluations=10, batch_size=32, deformation_batches=1000,
            deformation_epochs=3, width=64,
            optimizers={m: ("sophia", "muon", "adahessian") for m in MODALITIES}, limits=dict.fromkeys(MODALITIES, LIMITS),
        ),
        curvature=(1e1, 1e2, 1e3, 1e4, 1e5),
    ),
    "smoke": Settings(
        language=Language(
            tiny=True, steps=6, evaluations=2, train=6, heldout=2, utility=2, length=24, calibration=1, k=4, num_layers=2,
            paper_rates=(1e-3, 1e-2), sweep={UNLOCKED: (), COMPENSATED: (1e-6,), ABSORBED: (1e-12,)},
            lora_sweep={EVERYWHERE: (1e-6,)}, limit_rates=(1e-3,), scales={"float32": (1e2, 1e4), "bfloat16": (1e2, 1e4)},
        ),
        pictures=Pictures(
            data="digits", side=8, patch=2, width=16, blocks=1, k=6, rows=960, epochs=8, vit_epochs=8, tests=200, deformation_batches=3, deformation_epochs=1,
            steps=24, evaluations=2, scales=(), optimizers={STYLE: ("sophia",)}, limits={STYLE: ("merge", "layer-injection")},
            lora=False, swept=(STYLE,),
        ),
        curvature=(1e1, 1e2),
    ),
}  # fmt: skip


def decompose(
    model: nn.Module, *, k: int, num_layers: int = 5, target_modules: tuple[str, ...] | None = None
) -> dict[str, Projection]:
    """Decompose the matrices that the compensated lock takes, once for every scale.

    Args:
        model: A transformers model, or a module whose linear layers and convolutions are named by `target_modules`.
        k: Singular values to scale.
        num_layers: Blocks, evenly spread.
        target_modules: Names; None means all.

    Returns:
        The projection of every matrix, at the paper's scale.
    """
    settings = {} if getattr(model, "config", None) is None else model_config(model)
    config = LockConfig(
        method="compensated", scale=SCALE, k=k, num_layers=num_layers, target_modules=target_modules,
        max_relative_error=math.inf,
    )  # fmt: skip
    return dict(plan_projected(MemorySource(unique_tensors(model), settings), config).projections)


def lock_at(model: nn.Module, projections: Mapping[str, Projection], scale: float) -> nn.Module:
    """Lock a copy of a model, however much its rounding then costs: W~ = (I + (scale - 1) U U^T) W, C = I - (1 - 1/scale) U U^T.

    Differs from `lock_model` in refusing no scale.

    Args:
        model: The original, or a copy in another precision.
        projections: Of `decompose`.
        scale: The multiplier.

    Returns:
        The locked copy, in the dtype of the model.
    """
    victim = copy.deepcopy(model)
    inserted = {}
    for name, known in projections.items():
        projection = replace(known, scale=scale)
        weight = victim.get_submodule(module_path(victim, name)).get_parameter("weight")
        weight.data = scaled_matrix(weight.detach(), projection).to(weight.dtype)
        inserted[name] = compensation(projection).to(weight.dtype)
    insert_compensation(victim, inserted)
    return victim.eval()
