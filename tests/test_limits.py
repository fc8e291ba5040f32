"""The experiment `limits`: the lock at any scale from one decomposition, the nets and their tasks, the verdicts, and a whole run."""

from __future__ import annotations

import copy
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from specdef.attacks.full import FullTraining
from specdef.curvature.losses import LMLoss
from specdef.errors import SpecDefError
from specdef.experiments import limits, limits_nets
from specdef.experiments.limits_language import BLOWN_UP, Problem, one_run
from specdef.experiments.limits_modalities import shares
from specdef.experiments.limits_nets import (
    bold,
    edges,
    make_modality,
    noisy,
    read_all,
    require_pictures,
    train_own,
)
from specdef.experiments.limits_report import comparisons, language_shares
from specdef.experiments.limits_setup import (
    DENOISER,
    EVERYWHERE,
    MODALITIES,
    SIZES,
    STYLE,
    VIT,
    decompose,
    lock_at,
    scaled_name,
)
from specdef.experiments.limits_tables import tables
from specdef.experiments.lock_table import SCRATCH, UNLOCKED
from specdef.experiments.paper.locks import ABSORBED, COMPENSATED
from specdef.experiments.paper.runs import PAPER, SWEEP
from specdef.experiments.paper.verdicts import FAILED, HELD, ONLY_THERE
from specdef.experiments.record import markdown
from specdef.lock.compensated import compensated_layers
from specdef.lock.config import LockConfig
from specdef.lock.deformation.retain import measure_utility
from specdef.lock.in_memory import lock_model
from specdef.models.tiny import tiny_inputs, tiny_model

TINY = SIZES["smoke"].pictures


def net() -> nn.Sequential:
    """Return two convolutions with seeded weights."""
    made = nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 3, padding=1))
    generator = torch.Generator().manual_seed(0)
    for p in made.parameters():
        p.data = torch.randn(p.shape, generator=generator) / 3
    return made.eval()


# the lock at any scale


def test_the_lock_multiplies_the_top_singular_values_and_keeps_the_function() -> None:
    original = net().double()
    x = torch.randn(3, 2, 5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    locked = lock_at(original, decompose(original, k=2, target_modules=("0",)), 1e3)
    assert list(compensated_layers(locked)) == ["0"]
    before, after = (torch.linalg.svdvals(m.get_submodule("0").get_parameter("weight").flatten(1)) for m in (original, locked))  # fmt: skip
    assert torch.allclose(after[:2], 1e3 * before[:2])
    assert torch.allclose(after[2:], before[2:])
    assert torch.allclose(locked(x), original(x), atol=1e-10)
    assert not compensated_layers(original)


def test_one_decomposition_gives_what_lock_model_makes() -> None:
    original = tiny_model("llama")
    config = LockConfig(method="compensated", scale=100.0, k=4, num_layers=2)
    expected = lock_model(copy.deepcopy(original), config).model
    locked = lock_at(original, decompose(original, k=4, num_layers=2), 100.0)
    assert locked.state_dict().keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(tensor, locked.state_dict()[name]), name


def test_no_scale_is_refused() -> None:
    original = tiny_model("llama", dtype=torch.bfloat16)
    projections = decompose(original, k=4, num_layers=2)
    with pytest.raises(SpecDefError):
        lock_model(copy.deepcopy(original), LockConfig(method="compensated", scale=1e6, k=4))
    assert lock_at(original, projections, 1e6).dtype == torch.bfloat16  # type: ignore[comparison-overlap]


def test_columns_of_other_scales() -> None:
    assert scaled_name(1e3) == "compensated 1e3"
    assert scaled_name(1e6) == "compensated 1e6"


# the small nets


def test_edges_of_a_step_are_where_it_is() -> None:
    picture = torch.zeros(1, 1, 6, 6)
    picture[..., 3:] = 1
    found = edges(picture)[0, 0]
    assert torch.allclose(found[2], torch.tensor([0, 0, 1.0, 1, 0, found[2, 5]]))
    assert edges(torch.zeros(1, 1, 4, 4)).max() == 0


def test_a_broad_brush_makes_a_dot_a_square() -> None:
    picture = torch.zeros(1, 1, 5, 5)
    picture[0, 0, 2, 2] = 0.5
    expected = torch.zeros(5, 5)
    expected[1:4, 1:4] = 0.5
    assert torch.equal(bold(picture)[0, 0], expected)


def test_noise_has_the_level_the_last_channel_says() -> None:
    pictures = torch.zeros(4, 1, 64, 64)
    given, clean = noisy(pictures, 4, torch.Generator().manual_seed(0))
    assert clean.shape == (4, 16, 16, 16) and given.shape == (4, 17, 16, 16)
    levels = given[:, -1, 0, 0]
    assert bool(((levels >= 0.2) & (levels <= 1)).all())
    assert torch.allclose(given[:, :-1].flatten(1).std(1), levels, rtol=0.05)
    assert clean.abs().max() == 0


@pytest.mark.parametrize("name", MODALITIES)
def test_a_modality_fits_its_net_and_is_seeded(name: str) -> None:
    splits = read_all(TINY, 0)
    state = torch.get_rng_state()
    first, second = (make_modality(name, TINY, splits, 3) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert len(first.own) == TINY.rows // limits_nets.BATCH
    assert len(first.new) == TINY.steps
    for batches in (first.own, first.own_test, first.new, first.new_test):
        assert math.isfinite(measure_utility(first.model, batches[:1]).loss)
    assert first.quantity == ("accuracy" if name == VIT else "loss")
    before = measure_utility(first.model, first.own_test).loss
    train_own(first, first.model, 2, 0)
    assert measure_utility(first.model, first.own_test).loss < before


def test_a_modality_without_a_name() -> None:
    with pytest.raises(ValueError, match="denoiser"):
        make_modality("music", TINY, {}, 0)


def test_pictures_of_attackers_and_tests_are_apart() -> None:
    splits = read_all(TINY, 0)
    own, tests = splits["own"][0].flatten(1), splits["own test"][0].flatten(1)
    assert not (own[:, None] == tests[None]).all(2).any()
    assert splits["new"][0].mean() > 0.5 > splits["own"][0].mean()  # negatives


def test_missing_pictures_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits_nets, "FASHION", tmp_path / "nowhere")
    with pytest.raises(SpecDefError, match="nowhere") as error:
        limits.run(tmp_path / "out", size="cpu")
    assert "apt-get" in error.value.hint
    assert not (tmp_path / "out").exists()
    require_pictures(TINY)


# the language model's runs


def test_a_run_that_blows_up_ends_early() -> None:
    from specdef.attacks.task import Task

    model = tiny_model("llama")
    batch = {n: v for n, v in tiny_inputs("llama", seed=1).items()}
    task = Task(name="t", train=[batch], heldout=[batch], loss=LMLoss())
    start = measure_utility(model, task.heldout, LMLoss()).loss
    known = Problem(original=model, task=task, start=start, calibration=(), utility=(), projections={})  # fmt: skip
    settings = SIZES["smoke"].language
    wild = one_run(FullTraining(), model, 10.0, settings, 0, known)
    assert wild["status"] == "diverged"
    assert wild["last_step"] < settings.steps
    assert wild["loss"] == pytest.approx(start) and wild["steps"] == 0
    assert wild["final_loss"] > start + BLOWN_UP
    calm = one_run(FullTraining(), model, 1e-3, settings, 0, known)
    assert calm["status"] == "finished" and calm["loss"] < start
    assert calm["added_parameters"] == 0


def _run(lock: str, part: str, rate: float, loss: float | None, **more: Any) -> dict[str, Any]:
    return {
        "seed": 0, "part": part, "lock": lock, "attack": "full-adamw", "learning_rate": rate, "start_loss": 4.0, "loss": loss, "final_loss": loss,
        "start_accuracy": 0.3, "accuracy": 0.4, "steps": 6, "last_step": 6, "status": "finished", "added_parameters": 50, "parameters": 100,
        "prepare_seconds": 0.5, **more,
    }  # fmt: skip


RUNS = [
    _run(UNLOCKED, "paper", 1e-6, 3.99), _run(UNLOCKED, "paper", 1e-5, 3.5), _run(UNLOCKED, "sweep", 1e-4, 3.0),
    _run(COMPENSATED, "paper", 1e-6, 4.0, final_loss=6.0), _run(COMPENSATED, "paper", 1e-5, 4.0, final_loss=None),
    _run(COMPENSATED, "sweep", 1e-8, 3.2), _run(ABSORBED, "paper", 1e-5, 4.0), _run(ABSORBED, "sweep", 1e-14, 3.95),
    _run(UNLOCKED, "paper", 1e-3, 3.1, attack="lora-all"), _run(COMPENSATED, "paper", 1e-3, 3.1, attack="lora-all"),
    _run(EVERYWHERE, "paper", 1e-3, 4.0, attack="lora-all"), _run(EVERYWHERE, "sweep", 1e-6, 3.6, attack="lora-all"),
    _run(COMPENSATED, "limit", 1e-4, 3.0, attack="merge"), _run(COMPENSATED, "limit", 1e-4, 3.8, attack="layer-injection"),
]  # fmt: skip


def test_shares_of_the_language_model_are_of_the_best_unlocked_gain() -> None:
    found = language_shares(RUNS)
    assert found[UNLOCKED, "full-adamw", PAPER] == pytest.approx(0.5)
    assert found[UNLOCKED, "full-adamw", SWEEP] == pytest.approx(1.0)
    assert found[COMPENSATED, "full-adamw", PAPER] == pytest.approx(0.0)
    assert found[COMPENSATED, "full-adamw", SWEEP] == pytest.approx(0.8)
    assert found[COMPENSATED, "merge", SWEEP] == pytest.approx(1.0)
    assert (COMPENSATED, "merge", PAPER) not in found


def _planted() -> tuple[list[dict[str, Any]], dict[str, Any]]:
    utility = [
        {"seed": 0, "dtype": dtype, "scale": scale, "accuracy": accuracy, "loss": 4.0, "tokens": 99}
        for dtype, scale, accuracy in (
            ("float32", 1.0, 0.3), ("float32", 1e4, 0.295), ("bfloat16", 1.0, 0.3), ("bfloat16", 1e3, 0.28), ("bfloat16", 1e4, 0.0),
        )
    ]  # fmt: skip
    locks = [
        {"modality": m, "seed": 0, "model": m, "lock": COMPENSATED, "metric": "accuracy" if m == VIT else "negative loss",
         "utility_before": 0.9, "utility_after": 0.88, "loss_before": 1.0, "loss_after": 1.005, "seconds": 1.0, "scale": 1e4}
        for m in MODALITIES
    ]  # fmt: skip
    edits = [{"model": DENOISER, "seed": 0, "attack": "layer-injection", "parameters": 10, "added_share": 2.5, "seconds": 0.1}]  # fmt: skip

    def key(attack: str, at: str, lock: str, model: str = DENOISER, optimizer: str = "adamw") -> tuple[str, ...]:  # fmt: skip
        return model, attack, optimizer, at, lock

    found = {
        key("full-adamw", PAPER, UNLOCKED): 0.05, key("full-adamw", SWEEP, UNLOCKED): 0.9,
        key("full-adamw", PAPER, COMPENSATED): 0.0, key("full-adamw", SWEEP, COMPENSATED): 0.8,
        key("full-adamw", SWEEP, scaled_name(1e6)): 0.02, key("full-adamw", SWEEP, scaled_name(1e3)): 0.95,
        key("full-sophia", PAPER, COMPENSATED, optimizer="sophia"): 0.0, key("full-sophia", SWEEP, COMPENSATED, optimizer="sophia"): 0.05,
        key("full-muon", PAPER, COMPENSATED, optimizer="muon"): 0.5, key("full-muon", SWEEP, COMPENSATED, optimizer="muon"): 0.5,
        key("layer-injection", SWEEP, COMPENSATED): 0.7,
        key("lora-all", SWEEP, UNLOCKED, VIT): 0.9, key("lora-all", SWEEP, COMPENSATED, VIT): 0.6,
    }  # fmt: skip
    curvature = [
        {"seed": 0, "scale": s, "original": 1.0, "trainable": s**2, "frozen": 0.9, "bound": 0.5, "inserted_block": s**2}
        for s in (10.0, 100.0)
    ]  # fmt: skip
    compared = comparisons(
        {"runs": RUNS, "utility": utility}, {"rows": [], "locks": locks, "edits": edits}, found, curvature
    )  # fmt: skip
    return compared, {"runs": RUNS, "utility": utility, "shares": found}


@pytest.mark.parametrize(
    ("quantity", "verdict"),
    [
        ("SmolLM2, unlocked, AdamW at 1e-06: learns", FAILED),
        ("SmolLM2, unlocked, AdamW at 1e-05: learns", HELD),
        ("SmolLM2, compensated, AdamW at 1e-06: diverges", HELD),
        ("SmolLM2, compensated, AdamW at 1e-05: diverges", HELD),
        ("SmolLM2, compensated: resists full training", ONLY_THERE),
        ("SmolLM2, absorbed max: resists full training", HELD),
        (f"SmolLM2, {EVERYWHERE}: resists LoRA", ONLY_THERE),
        ("SmolLM2, compensated: resists LoRA", FAILED),
        ("SmolLM2, utility at scale 1e4 in float32", HELD),
        ("SmolLM2, utility at scale 1e4 in bfloat16", FAILED),
        ("ViT, compensated 1e4: utility kept", FAILED),
        ("style transfer, compensated 1e4: utility kept", HELD),
        ("denoiser, compensated: resists AdamW", ONLY_THERE),
        ("denoiser, compensated: sophia does not bypass it", HELD),
        ("denoiser, compensated: muon does not bypass it", FAILED),
        ("ViT, compensated: resists LoRA", FAILED),
        ("SmolLM2, merge undoes the compensated lock", HELD),
        ("SmolLM2, layer-injection undoes the compensated lock", FAILED),
        ("denoiser, layer-injection undoes the compensated lock", HELD),
        ("cost of layer injection", FAILED),
        ("denoiser: a scale of 1e6 stops what learns at small rates", HELD),
        ("denoiser: at scale 1e3 the attacker is better off", HELD),
        ("lambda_max of the Hessian under the compensated lock (small MLP)", HELD),
    ],
)
def test_verdicts_follow_from_the_numbers(quantity: str, verdict: str) -> None:
    (found,) = (c for c in _planted()[0] if c["quantity"] == quantity)
    assert found["verdict"] == verdict


def test_notes_say_what_qualifies_a_verdict() -> None:
    notes = {c["quantity"]: c["note"] for c in _planted()[0]}
    assert "gains 1% of its best" in notes["SmolLM2, unlocked, AdamW at 1e-06: learns"]
    assert "from scale 1000" in notes["SmolLM2, utility at scale 1e4 in bfloat16"]
    assert "5% of its best at the usual rate" in notes["denoiser, compensated: resists AdamW"]


def test_the_tables_hold_every_run() -> None:
    _, planted = _planted()
    lines = tables({n: planted[n] for n in ("runs", "utility")}, planted["shares"])
    assert sum("| full-adamw |" in line for line in lines) == 8
    assert any("diverged" in line for line in lines)  # a last loss that was not finite
    assert any(line.startswith("| full-muon") and "50.0 %" in line for line in lines)


def test_shares_leave_fresh_weights_out() -> None:
    cell = {"model": STYLE, "attack": "full-adamw", "optimizer": "adamw", "at": SWEEP, "lock": UNLOCKED, "recovered": {"mean": 1.0}}  # fmt: skip
    cells = [cell, {**cell, "lock": SCRATCH}, {**cell, "lock": COMPENSATED, "recovered": None}]
    found = shares(cells, MODALITIES)
    assert found == {
        (STYLE, "full-adamw", "adamw", SWEEP, UNLOCKED): 1.0,
        (STYLE, "full-adamw", "adamw", SWEEP, COMPENSATED): None,
    }


def test_sizes_are_json() -> None:
    for settings in SIZES.values():
        assert asdict(settings)["pictures"]["data"] in ("mnist", "digits")


# a whole run


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def test_smoke_an_interrupted_run_goes_on(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPECDEF_CACHE", str(cache))
    first: list[str] = []

    def stop(line: str) -> None:
        first.append(line)
        if line.startswith(VIT):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        limits.run(tmp_path / "stopped", size="smoke", progress=stop)
    assert not (tmp_path / "stopped").exists()
    second: list[str] = []
    record = limits.run(tmp_path, size="smoke", progress=second.append)
    assert not any("SmolLM2" in line for line in second)
    assert not any("training the original" in line and VIT not in line for line in second)
    assert not any("with adamw at" in line and VIT not in line for line in second)
    assert {"limits.json", "limits.png"} <= {p.name for p in tmp_path.iterdir()}
    assert not [p for p in cache.rglob("limits-*") if p.is_file() and p.suffix != ".lock"]
    assert {"command", "versions", "settings", "seconds", "claims", "comparisons", "table", "data"} <= record.keys()  # fmt: skip
    assert len(record["claims"]) == len(record["comparisons"])
    quantities = {c["quantity"] for c in record["comparisons"]}
    assert {f"{m}, {lock}: resists AdamW" for m in MODALITIES for lock in (COMPENSATED, "deformation", ABSORBED)} <= quantities  # fmt: skip
    assert "layer-injection" in markdown("limits", record)
    runs = record["data"]["language"]["runs"]
    assert {r["lock"] for r in runs} == {UNLOCKED, COMPENSATED, ABSORBED, EVERYWHERE}
    start = {round(r["start_loss"], 2) for r in runs}
    assert len(start) == 1  # locks leave the function as it is
    curvature = record["data"]["curvature"]
    assert curvature[1]["inserted_block"] / curvature[0]["inserted_block"] == pytest.approx(100, rel=0.01)  # fmt: skip
    for row in curvature:
        assert row["bound"] <= row["trainable"]
        assert row["frozen"] == pytest.approx(row["original"], rel=0.1)
    measured = record["data"]["rows"]
    assert any(r["at"] == SWEEP and r["lock"] == COMPENSATED and r["model"] == STYLE for r in measured)  # fmt: skip
