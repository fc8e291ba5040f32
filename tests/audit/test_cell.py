"""Cells from hand-made sweeps: shares, intervals, censoring, statuses and flags."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from tests.audit_toys import run_at

from specdef.attacks.run import Run
from specdef.audit.cell import Cell, Reference, learns, make_cell
from specdef.audit.flags import ADVICE, FLAGS
from specdef.audit.grid import Sweep
from specdef.audit.study import SweepResult
from specdef.audit.verdict import TIERS, overall, tier_verdict

REFERENCE = Reference(start=2.0, steps=4)


def sweep(best: float, *, seed: int = 0, fast: bool = True, rates: tuple[float, ...] = (), **fields: Any) -> SweepResult:  # fmt: skip
    """A sweep whose middle rate ends at `best`, with an end on either side."""
    middle = best + 0.0 if fast else 2.0 - 0.25 * (2.0 - best)
    runs = (
        run_at(1e-4, (2.0,) * 5, seed=seed, **fields),
        run_at(1e-3, (2.0, middle, middle, middle, best), seed=seed, **fields),
        run_at(1e-2, (2.0, math.inf), seed=seed, status="diverged"),
    )
    return SweepResult(runs=runs, sweep=Sweep(rates=rates))


def cell(locked: list[SweepResult], control: list[SweepResult], reference: Reference = REFERENCE) -> Cell:  # fmt: skip
    return make_cell("toy", 2, "adamw", locked, control, reference)


CONTROL = [sweep(1.0, seed=s) for s in range(3)]


def test_shares_and_their_interval_are_over_seeds() -> None:
    found = cell([sweep(b) for b in (1.7, 1.8, 1.9)], CONTROL)
    assert found.recovered == pytest.approx(0.2)
    assert found.recovered_interval == pytest.approx((-0.0484, 0.4484), abs=1e-3)
    assert (found.locked, found.control, found.start) == pytest.approx((1.8, 1.0, 2.0))
    assert (found.learning_rate, found.steps, found.seeds, found.trials) == (1e-3, 1, 3, 9)  # fmt: skip
    assert found.status == "weakened"


@pytest.mark.parametrize(
    ("best", "status"),
    [((1.95, 1.96, 1.94), "held"), ((1.0, 1.1, 1.2), "broken"), ((1.7, 1.7, 1.7), "weakened"),
     ((2.0, 2.0, 1.72), "held"), ((2.0, 2.0, 1.5), "weakened"), ((1.97,), "held"), ((1.4,), "broken")],
)  # fmt: skip
def test_statuses(best: tuple[float, ...], status: str) -> None:
    found = cell([sweep(b) for b in best], CONTROL[: len(best)])
    assert found.status == status


def test_runs_that_died_with_their_worker_are_told() -> None:
    died = replace(sweep(1.9), lost=2)
    assert "2 run(s) died" in cell([died], CONTROL[:1]).notes[0]
    assert not cell([sweep(1.9)], CONTROL[:1]).notes


def test_a_lock_that_leaves_the_attacker_above_the_start_gives_back_nothing_and_no_less() -> None:
    # the start is what a constant guess reaches: worse than it is as good as not having attacked
    found = cell([sweep(40.0), sweep(30.0, seed=1)], [sweep(1.0), sweep(1.0, seed=1)])
    assert found.recovered == 0.0
    assert found.recovered_interval == (0.0, 0.0)
    assert found.status == "held"


def test_a_slowdown_is_a_ratio_where_the_target_is_met_and_a_bound_where_it_is_not() -> None:
    slow = cell([sweep(1.0, fast=False)] * 3, CONTROL)
    assert (slow.slowdown, slow.slowdown_censored) == (4.0, False)
    never = cell([sweep(1.9)] * 3, CONTROL)
    assert (never.slowdown, never.slowdown_censored) == (4.0, True)
    mixed = cell([sweep(1.0), sweep(1.9), sweep(1.9)], CONTROL)
    assert (mixed.slowdown, mixed.slowdown_censored) == (4.0, True)  # no mean over unfinished runs
    most = cell([sweep(1.0), sweep(1.0), sweep(1.9)], CONTROL)
    assert (most.slowdown, most.slowdown_censored) == (1.0, False)


@pytest.mark.parametrize(
    ("best", "counts"),
    [((1.0,), True), ((1.97,), False), ((1.9, 1.9, 1.9), True), ((1.9, 2.0, 2.0), False), ((2.0,), False)],
)  # fmt: skip
def test_a_control_must_learn_beyond_a_threshold_and_the_noise_of_seeds(
    best: tuple[float, ...], counts: bool
) -> None:
    assert learns([sweep(b) for b in best], 2.0) is counts


def test_a_cell_without_a_control_that_learns_is_invalid_whatever_the_locked_side_did() -> None:
    for locked in ([], [sweep(2.0)], [sweep(0.5)]):
        found = cell(locked, [sweep(1.99)])
        assert found.status == "invalid" and "control-not-broken" in found.flags
        assert found.recovered is None and found.slowdown is None
        assert len(found.advice) == len(found.flags)


def test_one_seed_whose_control_fails_does_not_decide() -> None:
    locked = [sweep(1.98, seed=s) for s in range(6)]
    control = [*(sweep(1.0, seed=s) for s in range(5)), sweep(2.0, seed=5)]
    found = cell(locked, control)
    assert found.recovered == pytest.approx(0.02 / (5 / 6))
    assert found.status == "held"
    assert (
        found.slowdown == 4.0 and found.slowdown_censored
    )  # not the 1 of a control without a gain


def test_losses_that_are_never_finite_are_no_trouble() -> None:
    gone = SweepResult(runs=(run_at(1e-3, (math.inf,), status="diverged", steps=(0,)),), sweep=Sweep())  # fmt: skip
    for control in ([gone, gone], [sweep(1.0), gone], [sweep(1.0), sweep(1.0), gone]):
        assert cell([sweep(1.8)] * len(control), control).status == "invalid"
    json.dumps(cell([gone, gone], CONTROL[:2]).to_dict(), allow_nan=False)


def test_a_seed_that_diverged_everywhere_is_no_seed_that_held() -> None:
    gone = SweepResult(runs=(run_at(1e-3, (2.0, math.inf), status="diverged"),), sweep=Sweep())
    for locked in ([gone, sweep(1.98)], [sweep(1.98), gone]):
        found = cell(locked, CONTROL[:2])
        assert found.status == "invalid" and "diverged-everywhere" in found.flags
    assert (
        cell([gone, sweep(1.0), sweep(1.0)], CONTROL).status == "broken"
    )  # it got in all the same


def test_rates_of_an_attacks_own_may_be_close() -> None:
    rates = (5e-5, 6e-5)
    near = SweepResult(runs=tuple(run_at(r, (2.0, 1.9)) for r in rates), sweep=Sweep(rates=rates))
    assert cell([near], CONTROL[:1]).status == "weakened"


def test_a_sweep_that_diverged_everywhere_proves_nothing() -> None:
    gone = SweepResult(runs=(run_at(1e-3, (2.0, math.inf), status="diverged"),), sweep=Sweep())
    found = cell([gone], CONTROL[:1])
    assert found.status == "invalid" and found.flags == ("diverged-everywhere",)
    recipe = SweepResult(runs=gone.runs, sweep=Sweep(rates=(1e-3,)))
    assert cell([recipe], CONTROL[:1]).status == "held"  # it was asked about this rate


def test_a_best_rate_at_the_edge_of_the_sweep_is_flagged() -> None:
    full = sweep(1.8)
    for kept in (full.runs[1:], full.runs[:2]):
        edge = SweepResult(runs=kept, sweep=Sweep())
        assert "best-at-edge" in cell([edge], CONTROL[:1]).flags
        fixed = SweepResult(runs=kept, sweep=Sweep(rates=(1e-3,)))
        assert "best-at-edge" not in cell([fixed], CONTROL[:1]).flags
    assert cell([full], CONTROL[:1]).flags == ()


def test_rounding_that_holds_is_flagged() -> None:
    assert cell([sweep(1.95, swamped=0.8)], CONTROL[:1]).flags == ("rounding-does-the-work",)
    assert cell([sweep(1.0, swamped=0.8)], CONTROL[:1]).flags == ()
    assert cell([sweep(1.95, swamped=0.2)], CONTROL[:1]).flags == ()


def test_a_useless_model_is_flagged_and_does_not_pass() -> None:
    useless = Reference(start=2.0, steps=4, useless=True, utility_original=0.9, utility_locked=0.1)
    found = cell([sweep(2.0)], CONTROL[:1], useless)
    assert found.status == "invalid" and "utility-already-lost" in found.flags
    assert found.utility == {"original": 0.9, "locked": 0.1, "attacked": None}
    assert cell([sweep(1.0)], CONTROL[:1], useless).status == "broken"
    tiers = [tier_verdict(2, [found])]
    assert tiers[0].status == "not tested" and "own work" in tiers[0].reason
    assert "proves nothing" in overall(tiers, useless=True)


@pytest.mark.parametrize(("scratch", "flagged"), [(1.8, True), (1.84, True), (1.9, False), (1.5, True), (2.5, False), (None, False)])  # fmt: skip
def test_an_attack_no_better_than_fresh_weights_is_told(scratch: float | None, flagged: bool) -> None:  # fmt: skip
    found = cell([sweep(1.8)], CONTROL[:1], Reference(start=2.0, steps=4, scratch=scratch))
    assert ("scratch-reached" in found.flags) is flagged
    assert found.scratch == scratch


def test_a_cell_is_json() -> None:
    text = json.dumps(cell([sweep(1.7)], CONTROL[:1]).to_dict(), allow_nan=False)
    keys = {"attack", "tier", "optimizer", "learning_rate", "steps", "locked", "control", "recovered", "slowdown", "status", "flags"}  # fmt: skip
    assert keys <= set(json.loads(text))


def test_every_flag_has_one_sentence_of_advice() -> None:
    assert set(ADVICE) == set(FLAGS)
    assert all(text.endswith(".") and text.count(".") == 1 for text in ADVICE.values())


def made(status: Any, recovered: float | None = None, tier: int = 2, attack: str = "a") -> Cell:
    return Cell(attack=attack, tier=tier, optimizer="adamw", status=status, recovered=recovered)


def test_a_tier_is_as_strong_as_the_best_attack_on_it() -> None:
    cells = [made("held", 0.05), made("broken", 0.9, attack="b"), made("weakened", 0.3), made("broken", 1.0, tier=3)]  # fmt: skip
    tier = tier_verdict(2, cells)
    assert (tier.status, tier.attack, tier.cells) == ("broken", "b", 3)
    assert tier_verdict(2, [made("held", 0.05), made("weakened", 0.3)]).status == "weakened"
    assert tier_verdict(2, [made("held", 0.05), made("invalid")]).status == "held at this budget"


@pytest.mark.parametrize("status", ["invalid", "not applicable", "pruned by tier"])
def test_what_was_not_measured_is_not_a_pass(status: Any) -> None:
    tier = tier_verdict(2, [made(status)])
    assert tier.status == "not tested" and tier.reason
    assert tier_verdict(4, [made(status)]).reason == "no attack was run"


def test_a_tier_that_held_says_how_much_of_it_was_invalid() -> None:
    tier = tier_verdict(2, [made("held", 0.05), made("invalid"), made("not applicable")])
    assert (tier.status, tier.cells, tier.invalid) == ("held at this budget", 1, 1)


def test_every_broken_tier_is_in_the_verdict() -> None:
    cells = [made("broken", 0.9, 2), made("broken", 0.8, 3), made("broken", 0.7, 5)]
    text = overall([tier_verdict(tier, cells) for tier in (2, 3, 5)])
    assert text.startswith("Broken at tier 2 ") and text.endswith("Broken at tiers 3, 5 too.")


def test_the_verdict_says_all_there_is() -> None:
    cells = [made("held", 0.01, 1), made("broken", 0.93, 2, "b"), made("weakened", 0.2, 3)]
    text = overall([tier_verdict(tier, cells) for tier in TIERS])
    assert "Broken at tier 2 (tuned training): b with adamw recovers 93%" in text
    assert "Weakened at tier 3." in text and "Held at this budget at tier 1." in text
    assert "Not tested: tiers 4, 5, 6." in text


def test_runs_of_a_sweep_are_the_ones_counted() -> None:
    assert isinstance(sweep(1.0).best, Run) and sweep(1.0).steps_run == 9
