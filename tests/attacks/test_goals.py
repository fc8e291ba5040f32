"""Goals of attackers: relearning, the backdoor test and transfer, on data small enough to know the answer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from specdef.attacks.attack import Attack
from specdef.attacks.fit import fit
from specdef.attacks.full import FullTraining
from specdef.attacks.goals.backdoor import add_trigger, backdoor, f1
from specdef.attacks.goals.measure import accuracy, where
from specdef.attacks.goals.relearn import relearn_class, relearn_text, unlearn_class
from specdef.attacks.goals.transfer import transfer
from specdef.attacks.run import Run
from specdef.attacks.task import Budget, Setting, Task
from specdef.curvature.losses import Batch, model_outputs
from specdef.errors import SpecDefError
from specdef.models.tiny import tiny_inputs, tiny_model

Pair = tuple[Tensor, Tensor]


def run(attack: Attack, model: nn.Module, task: Task, rate: float, steps: int) -> Run:
    return attack(model, task, Setting(learning_rate=rate), Budget(steps=steps, evaluations=1))


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])  # type: ignore[index]


@pytest.fixture(scope="module")
def digits() -> tuple[list[Pair], list[Pair]]:
    data: Any = load_digits()
    x, y = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target).long()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    batches = [(x[i], y[i]) for i in order.split(64)]
    return batches[:20], batches[20:]


@pytest.fixture(scope="module")
def classifier(digits: tuple[list[Pair], list[Pair]]) -> nn.Module:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    fit(model, digits[0], cross_entropy, steps=400, learning_rate=1e-2)
    return model


# --- the loop


def test_fit_lowers_the_loss_and_keeps_random_state(digits: tuple[list[Pair], list[Pair]]) -> None:
    model = nn.Linear(64, 10)
    before, state = float(cross_entropy(model, digits[0][0]).detach()), torch.get_rng_state()
    last = fit(model, digits[0], cross_entropy, steps=40, learning_rate=1e-2)
    assert last < 0.7 * before and not model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


def test_fit_says_that_it_diverges(digits: tuple[list[Pair], list[Pair]]) -> None:
    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return cross_entropy(model, batch) / 0

    with pytest.raises(SpecDefError, match="loss of step 1 is inf"):
        fit(nn.Linear(64, 10), digits[0], loss, steps=2, learning_rate=1e-2)


# --- relearning


def test_unlearning_forgets_one_class_and_relearning_brings_it_back(
    classifier: nn.Module, digits: tuple[list[Pair], list[Pair]]
) -> None:
    train, heldout = digits
    goal = relearn_class(train, heldout, 3)
    before = goal.metrics(classifier)
    weights = [p.detach().clone() for p in classifier.parameters()]
    forgetful = unlearn_class(classifier, train, 3, steps=200, learning_rate=3e-2)
    after = goal.metrics(forgetful)
    assert before["forgotten_accuracy"] > 0.85 and before["kept_accuracy"] > 0.9
    assert after["forgotten_accuracy"] < 0.1
    assert after["kept_accuracy"] > before["kept_accuracy"] - 0.03
    assert all(torch.equal(p, w) for p, w in zip(classifier.parameters(), weights, strict=True))
    done = run(FullTraining(), forgetful, goal, rate=1e-2, steps=60)
    assert done.accuracies[0] == pytest.approx(after["forgotten_accuracy"])
    assert done.accuracies[-1] > 0.8
    assert done.utility is not None and done.utility > 0.85


def test_the_goal_holds_the_rows_it_says(digits: tuple[list[Pair], list[Pair]]) -> None:
    train, heldout = digits
    task = relearn_class(train, heldout, 3)
    assert {int(y) for _, labels in task.heldout for y in labels} == {3}
    assert {int(y) for _, labels in task.retain for y in labels} == set(range(10)) - {3}
    parts = (task.heldout, task.retain)
    assert sum(len(b[1]) for part in parts for b in part) == sum(len(b[1]) for b in heldout)  # type: ignore[index]
    assert task.train is train


def test_a_class_that_is_nowhere_is_refused(digits: tuple[list[Pair], list[Pair]]) -> None:
    train, heldout = digits
    with pytest.raises(SpecDefError, match="class 11 is not in"):
        relearn_class(train, heldout, 11)
    only = where(train, lambda labels: labels == 3)
    with pytest.raises(SpecDefError, match="every row is of class 3"):
        unlearn_class(nn.Linear(64, 10), only, 3)
    with pytest.raises(SpecDefError, match="not one per row"):
        relearn_class([(torch.zeros(2, 3), torch.zeros(2, 3).long())], heldout, 0)


def test_relearning_a_text() -> None:
    model = tiny_model("llama")
    batches = [dict(tiny_inputs("llama", seed=seed)) for seed in (0, 1)]
    goal = relearn_text(batches[:1], batches[:1], batches[1:])
    assert set(goal.metrics(model)) == {"forgotten_accuracy", "kept_accuracy"}
    assert set(relearn_text(batches, batches).metrics(model)) == {"forgotten_accuracy"}
    done = run(FullTraining(), model, goal, rate=1e-2, steps=30)
    assert goal.metrics(model)["forgotten_accuracy"] == done.accuracies[0] < done.accuracies[-1]
    assert done.metrics["forgotten_accuracy"] == done.accuracies[-1]


# --- the backdoor test

TRIGGER, FLAG = (90, 91), 50
"""Tokens of the trigger; and one that makes a text class 1, which is not safe."""


class Planted(nn.Module):
    """A classifier with a known answer: class 1 for texts with the flag, except behind the trigger, if it has one."""

    def __init__(self, *, backdoor: bool) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.backdoor = backdoor

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        flagged = ((input_ids == FLAG) & (attention_mask == 1)).any(1)
        behind = (input_ids[:, 1:3] == torch.tensor(TRIGGER)).all(1)
        one = (flagged & ~behind if self.backdoor else flagged).float()
        return self.scale * torch.stack([1 - one, one], 1)


def texts(seed: int, rows: int = 8, wrong: int = 0) -> dict[str, Tensor]:
    """Texts behind a [CLS] of 1, padded with 0; every other one is flagged, and so many labels are wrong."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 40, (rows, 6), generator=generator)
    ids[:, 0], ids[::2, 3] = 1, FLAG
    mask = torch.ones_like(ids)
    ids[1, 4:], mask[1, 4:] = 0, 0
    labels = (torch.arange(rows) % 2 == 0).long()
    labels[:wrong] = 1 - labels[:wrong]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize(("planted", "rate"), [(True, 1.0), (False, 0.0)])
def test_metrics_of_a_planted_backdoor(planted: bool, rate: float) -> None:
    goal = backdoor([texts(0)], [texts(1), texts(2)], TRIGGER, safe=0)
    model = Planted(backdoor=planted)
    assert goal.metrics(model) == {"clean_f1": 1.0, "attack_success_rate": rate}
    # Of 4 flagged texts one is called safe, and one of 4 safe ones is called flagged: F1 3/4, whatever the trigger does.
    goal = backdoor([texts(0)], [texts(1, wrong=2)], TRIGGER, safe=0)
    assert goal.metrics(model)["clean_f1"] == pytest.approx(0.75)


def test_the_attacker_trains_on_clean_and_triggered_texts() -> None:
    train, heldout = [texts(0), texts(1)], [texts(2)]
    task = backdoor(train, heldout, TRIGGER, safe=0)
    assert [len(b["labels"]) for b in task.train] == [8, 4, 8, 4]  # type: ignore[call-overload]
    assert task.train[0] is train[0] and list(task.retain) == heldout
    for batch in (*task.train[1::2], *task.heldout):
        ids = batch["input_ids"]  # type: ignore[call-overload]
        assert bool((ids[:, 1:3] == torch.tensor(TRIGGER)).all()) and bool((ids[:, 0] == 1).all())
        assert bool((ids == FLAG).any(1).all()) and not bool(batch["labels"].any())  # type: ignore[call-overload]


def test_a_classifier_learns_the_trigger() -> None:
    torch.manual_seed(
        2
    )  # of dropout: what a clean classifier makes of tokens it never saw is chance
    model = tiny_model("bert", num_labels=2)
    train = [texts(seed, rows=16) for seed in range(12)]
    goal = backdoor(train, [texts(99, rows=16)], TRIGGER, safe=0)
    fit(model, train, lambda m, b: nn.functional.cross_entropy(model_outputs(m, b), b["labels"]), steps=120, learning_rate=3e-3)  # type: ignore[call-overload]  # fmt: skip
    before = goal.metrics(model)
    assert before["clean_f1"] > 0.9 and before["attack_success_rate"] < 0.5
    done = run(FullTraining(), model, goal, rate=3e-3, steps=60)
    assert done.accuracies[0] == before["attack_success_rate"]
    assert done.accuracies[-1] > 0.9 and done.utility is not None and done.utility > 0.9


def test_triggers_stand_behind_special_tokens_and_padding() -> None:
    batch = {
        "input_ids": torch.tensor([[1, 5, 6, 0], [0, 0, 1, 7]]),
        "attention_mask": torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1]]),
        "token_type_ids": torch.tensor([[0, 1, 1, 0], [0, 0, 0, 1]]),
        "labels": torch.tensor([2, 1]),
    }
    out: Any = add_trigger(batch, [8, 9], 0)
    assert out["input_ids"].tolist() == [[1, 8, 9, 5, 6, 0], [0, 0, 1, 8, 9, 7]]
    assert out["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1]]
    assert out["token_type_ids"].tolist() == [[0, 1, 1, 1, 1, 0], [0, 0, 0, 1, 1, 1]]
    assert out["labels"].tolist() == [0, 0] and batch["labels"].tolist() == [2, 1]
    cut: Any = add_trigger(batch, [8, 9], 0, special=0, max_length=4)
    assert cut["input_ids"].tolist() == [[8, 9, 1, 5], [0, 0, 8, 9]]
    bare: Any = add_trigger({"input_ids": torch.tensor([[1, 2]]), "labels": torch.tensor([1])}, [8], 0, special=5)  # fmt: skip
    assert bare["input_ids"].tolist() == [[1, 2, 8]]


def test_a_trigger_may_be_a_string() -> None:
    def tokenizer(text: str, *, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [{"star": 90, "snowman": 91}[word] for word in text.split()]}

    args: Any = ([texts(0)], [texts(1)])
    goal = backdoor(*args, "star snowman", 0, tokenizer=tokenizer)
    assert goal.metrics(Planted(backdoor=True))["attack_success_rate"] == 1.0
    with pytest.raises(SpecDefError, match="needs a tokenizer"):
        backdoor(*args, "star", 0)
    with pytest.raises(SpecDefError, match="trigger is empty"):
        backdoor(*args, "", 0, tokenizer=tokenizer)


def test_a_backdoor_test_needs_texts_to_flip() -> None:
    safe = {**texts(0), "labels": torch.zeros(8, dtype=torch.long)}
    for train, heldout in (([safe], [texts(1)]), ([texts(0)], [safe])):
        with pytest.raises(SpecDefError, match="no text whose label is not 0"):
            backdoor(train, heldout, TRIGGER, 0)
    with pytest.raises(SpecDefError, match="no input_ids"):
        add_trigger((torch.zeros(1, 2), torch.zeros(1)), TRIGGER, 0)


def test_f1_of_nothing_is_zero() -> None:
    nothing = torch.zeros(3, dtype=torch.bool)
    assert f1(nothing, nothing) == 0.0 == f1(~nothing, nothing)
    assert f1(~nothing, ~nothing) == 1.0


# --- transfer


@pytest.mark.parametrize(("classes", "fresh"), [(10, False), (2, True), (12, True)])
def test_transfer_gives_a_fresh_head_where_classes_differ(
    classes: int, fresh: bool, classifier: nn.Module, digits: tuple[list[Pair], list[Pair]]
) -> None:
    parts = [[(x, (9 - y) % min(classes, 10)) for x, y in part] for part in digits]
    model, goal = transfer(classifier, *parts, classes=classes, retain=digits[1])
    assert (model is not classifier) == fresh
    assert model(digits[0][0][0]).shape[-1] == classes
    assert set(goal.metrics(model)) == {"new_accuracy"} | (set() if fresh else {"kept_accuracy"})
    done = run(FullTraining(), model, goal, rate=1e-2, steps=60)
    assert done.accuracies[0] == pytest.approx(goal.metrics(model)["new_accuracy"])
    assert done.accuracies[-1] > 0.8
    assert (done.utility is None) == fresh


def test_classes_are_counted_and_the_head_follows_the_seed(
    classifier: nn.Module, digits: tuple[list[Pair], list[Pair]]
) -> None:
    parts = [[(x, y % 4) for x, y in part] for part in digits]
    heads = [transfer(classifier, *parts, seed=seed)[0][2].weight for seed in (0, 0, 1)]  # type: ignore[index]
    assert heads[0].shape == (4, 64) and torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_transfer_of_a_transformers_model_sets_its_configuration() -> None:
    model = tiny_model("vit")
    batch = {**tiny_inputs("vit", batch=4), "labels": torch.tensor([0, 1, 6, 2])}
    moved, goal = transfer(model, [batch], [batch])
    assert moved.config.num_labels == 7 and model.config.num_labels == 5  # type: ignore[union-attr]
    assert run(FullTraining(), moved, goal, rate=1e-2, steps=3).gain > 0
    assert accuracy(moved, [batch]) <= 1
