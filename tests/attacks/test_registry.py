"""The table of attacks: each is named, sourced, and runs on a tiny model or says why it does not."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from torch import nn

from specdef.attacks.attack import Attack
from specdef.attacks.optimizers import OPTIMIZERS
from specdef.attacks.registry import ATTACKS, REFERENCE, by_tier, find
from specdef.attacks.structural import STRUCTURAL
from specdef.attacks.task import Budget, Setting, Task
from specdef.errors import SpecDefError
from specdef.models.tiny import tiny_model

NOT_ON_AN_UNLOCKED_LLAMA = {
    "only-last-four",
    "merge",
    "freeze-inserted",
    "known-scale",
    "base-diff",
}
"""Attacks on layers or scales that only a lock brings, or on an original that is not public."""


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    # so small that exact natural gradient takes no time
    sizes = {
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    return tiny_model("llama", **sizes, head_dim=4, vocab_size=16)


@pytest.fixture(scope="module")
def task() -> Task:
    batches = []
    for seed in (0, 1):
        ids = torch.randint(3, 16, (2, 5), generator=torch.Generator().manual_seed(seed))
        batches.append({"input_ids": ids, "labels": ids})
    return Task(name="random text", train=batches[:1], heldout=batches[1:], retain=batches[1:])


def test_names_are_the_attacks_own_and_none_is_lost() -> None:
    assert all(attack.name == name for name, attack in ATTACKS.items())
    counts = Counter(attack.name for attack in STRUCTURAL)
    assert max(counts.values()) == 1
    assert {*counts, "recipe", "distil", "lora", *(f"full-{name}" for name in OPTIMIZERS)} <= set(ATTACKS)  # fmt: skip
    assert REFERENCE.name not in ATTACKS
    assert len(set(map(repr, ATTACKS.values()))) == len(ATTACKS)


@pytest.mark.parametrize("attack", [*ATTACKS.values(), REFERENCE], ids=repr)
def test_every_attack_says_where_it_comes_from(attack: Attack) -> None:
    assert 1 <= attack.tier <= 6
    assert attack.source and attack.summary and "\n" not in attack.summary
    assert attack.optimizers and set(attack.optimizers) <= set(OPTIMIZERS)
    assert repr(attack).startswith(attack.name)


def test_representations_show_the_hyper_parameters() -> None:
    shown = [repr(attack) for attack in find(("lora", "distil", "only-norms", "ia3"))]
    assert shown == [
        "lora(dora=False, r=8, targets='attention')", "distil(learning_rate=0.001, steps=200)", "only-norms(part='norms')",
        "ia3()",
    ]  # fmt: skip


def test_every_tier_has_attacks_in_order() -> None:
    tiers = by_tier()
    assert list(tiers) == [1, 2, 3, 4, 5, 6]
    assert [attack.name for attacks in tiers.values() for attack in attacks] == list(ATTACKS)
    assert all(attack.tier == tier for tier, attacks in tiers.items() for attack in attacks)


def test_names_are_found_once_each_and_near_ones_are_given() -> None:
    assert [attack.name for attack in find(["merge", "lora", "merge"])] == ["merge", "lora"]
    with pytest.raises(SpecDefError, match=r"no attack is called 'lora-al'; nearest: lora-all"):
        find(["lora-al"])
    with pytest.raises(SpecDefError, match=r"no attack is called '#'$"):
        find(["#"])


def test_the_original_counts_as_public_only_where_that_is_said(llama: nn.Module) -> None:
    assert "public" in ATTACKS["base-diff"].applies(llama)
    assert not find(["base-diff"])[0].applies(llama)


@pytest.mark.parametrize("name", [*ATTACKS, REFERENCE.name])
def test_every_attack_runs_or_says_why_not(name: str, llama: nn.Module, task: Task) -> None:
    attack = ATTACKS.get(name, REFERENCE)
    reason = attack.applies(llama)
    missing = any(OPTIMIZERS[n].unusable(0) for n in attack.optimizers)
    assert bool(reason) == (name in NOT_ON_AN_UNLOCKED_LLAMA or missing)
    if reason:
        return
    before = [p.detach().clone() for p in llama.parameters()]
    run = attack(
        llama, task, Setting(optimizer=attack.optimizers[0], learning_rate=1e-5), Budget(steps=2, evaluations=1),
        original=llama,
    )  # fmt: skip
    assert run.status == "finished" and run.attack == name
    assert math.isfinite(run.start) and math.isfinite(run.best)
    assert run.trained_parameters > 0 and run.relative_cost > 0
    assert (run.utility is not None) == (run.gain > 0)
    assert all(torch.equal(p, b) for p, b in zip(llama.parameters(), before, strict=True))
