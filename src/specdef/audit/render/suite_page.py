"""The page about the suites, made from the registry: `python -m specdef.audit.render.suite_page > docs/suite.md`."""

from __future__ import annotations

import sys

from specdef.attacks.attack import Attack
from specdef.attacks.full import FullTraining
from specdef.attacks.optimizers import OPTIMIZERS
from specdef.attacks.registry import ATTACKS, by_tier
from specdef.attacks.task import Setting
from specdef.audit.suite import SUITES
from specdef.audit.verdict import TIERS

_INTRODUCTION = """\
# The standard suites

Made from the registry of attacks by `python -m specdef.audit.render.suite_page`; `specdef audit --list` prints the same. How to run
and read an audit: [audit](audit.md). What the tiers mean: [threat model](threat_model.md).

A suite has a name and a version, and says which attacks are run, for how many steps, and with how many seeds. Results of suites with
other names are not compared. A name is never given to another list: a changed suite gets a new version.
"""

_WHY = {
    1: "What most people type: AdamW at the two rates that guides to fine-tuning name, no search. Where the unlocked model learns "
    "nothing at these rates, the recipe is what works on the unlocked model.",
    2: "An attacker who searches. Every optimiser starts at its ordinary range of rates; the search then goes up until training "
    "diverges and down until nothing moves, by decades, and refines by half and quarter decades around the best. A lock that only "
    "moves the best rate falls here.",
    3: "An attacker who trains a part, and so may miss what the lock scales. Rank 8 on query and value projections is the default "
    "of the library peft; all layers is the wider choice. The search is that of tier 2, with AdamW.",
    4: "An attacker whose optimiser undoes ill-conditioning. K-FAC comes with three dampings and a relative one: with small damping "
    "it is invariant to a lock's scales, with large damping it is gradient descent.",
    5: "An attacker who knows how locks are made and edits the weights before training. Edits are blind, without the key, unless the "
    "table says otherwise. All of the model then trains with AdamW.",
    6: "An attacker who takes outputs only. Steps of the distillation are not counted in the budget; their time is in the cost.",
}


def suite_page() -> str:
    """Write the page.

    Returns:
        Markdown.
    """
    parts = [_INTRODUCTION, "## Suites\n", *_suites()]
    for tier, attacks in by_tier().items():
        parts += [f"\n## Tier {tier}: {TIERS[tier]}\n", _WHY[tier], "", *_attacks(attacks)]
    parts += ["\n## Optimisers\n", *_optimizers()]
    return "\n".join(parts) + "\n"


def _suites() -> list[str]:
    rows = ["| suite | attacks | recipes besides the usual one | rates | steps | evaluations | seeds | runs per sweep, at most |", "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for suite in SUITES.values():
        attacks = ", ".join(suite.attacks) or f"all {len(ATTACKS)}"
        recipes = "; ".join(f"{attack}, {name}" for attack, name, _ in suite.variants) or "–"
        budget = suite.budget
        rows.append(
            f"| `{suite.name}` | {attacks} | {recipes} | {'to a quarter decade' if suite.refine else 'whole decades'} | {budget.steps} | {budget.evaluations} | {suite.seeds} | {suite.max_trials} |"
        )
    usual = Setting()
    return [
        *rows,
        "",
        f"The usual recipe: {usual.schedule} rate, no warm-up, no clipping, no weight decay, whole batches, {usual.dtype}, so that "
        "one number, the learning rate, is left to search for. `--size quick` and `--size full` choose the first and the last.",
        "",
        "Why so many: `quick` is for minutes, on two cores, with a 135M model and small batches; it finds what is broken at once. The "
        "suite itself takes every attack, with as few steps and seeds as give an interval at all. `full` is for a claim: the half-width "
        "of a 95 % interval is 1.2 standard deviations with five seeds and 2.5 with three, and a lock that holds for 20 steps may not "
        "hold for 200.",
    ]


def _attacks(attacks: tuple[Attack, ...]) -> list[str]:
    rows = [
        "| attack | what it does | defaults | swept with | cost | source |",
        "|---|---|---|---|---|---|",
    ]
    rows += [
        f"| `{a.name}` | {_cell(a.summary)} | {_defaults(a)} | {', '.join(a.optimizers)} | {_cost(a)} | {_cell(a.source)} |"
        for a in attacks
    ]
    return rows


def _defaults(attack: Attack) -> str:
    """Return an attack's hyper-parameters, as its `repr` names them; of plain training its name says all."""
    if isinstance(attack, FullTraining):
        return "–"
    inner = repr(attack).partition("(")[2].removesuffix(")")
    return f"`{_cell(inner)}`" if inner else "–"


def _cost(attack: Attack) -> str:
    if isinstance(attack, FullTraining):
        return (
            f"{max(OPTIMIZERS[name].relative_cost for name in attack.optimizers):g} × full training"
        )
    return _cell(attack.cost)


def _optimizers() -> list[str]:
    rows = [
        "The cost is in gradients per step, estimated, without linear algebra on the weights. What an attack costs beyond that is "
        "measured, and stands in the report.",
        "",
        "| optimiser | tier | search begins in | cost | source |", "|---|---|---|---|---|",
    ]  # fmt: skip
    rows += [
        f"| `{s.name}` | {s.tier} | {s.learning_rates[0]:g} to {s.learning_rates[1]:g} | {s.relative_cost:g} | {_cell(s.source)} |"
        for s in OPTIMIZERS.values()
    ]
    return rows


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    sys.stdout.write(suite_page())
