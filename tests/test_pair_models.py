"""Classifiers of pairs: what they are made of, scores, gains counted from a guess, and what the text experiments say of planted numbers."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

from specdef.errors import SpecDefError
from specdef.experiments import figure3, figure3_report, pair_models, pair_tasks, table1_text
from specdef.experiments import table1_text_report as report
from specdef.experiments.lock_table import SCRATCH, UNLOCKED
from specdef.experiments.pair_models import DECODER, ENCODER, Model, build, counted_from, scores
from specdef.experiments.pair_tasks import EASY, GLOSSES, OWN, RTE, VERSES, made_pairs, read_tasks
from specdef.experiments.paper.locks import COMPENSATED, DEFORMATION
from specdef.experiments.paper.runs import PAPER, SWEEP
from specdef.experiments.paper.verdicts import FAILED, HELD, ONLY_THERE


class Answers(nn.Module):
    """Says the class that is its input."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, input_ids, **_):
        return self.weight * nn.functional.one_hot(input_ids, 2).float()


def test_f1_and_accuracy():
    said, meant = torch.tensor([1, 1, 0, 0, 1]), torch.tensor([1, 0, 0, 1, 1])
    batches = [{"input_ids": said[:3], "labels": meant[:3]}, {"input_ids": said[3:], "labels": meant[3:]}]  # fmt: skip
    assert scores(Answers(), batches) == pytest.approx({"f1": 4 / 6, "accuracy": 0.6})
    assert scores(Answers(), [{"input_ids": said * 0, "labels": said * 0}]) == {"f1": 0, "accuracy": 1}  # fmt: skip


@pytest.mark.parametrize("kind", [ENCODER, DECODER])
def test_tiny_models_are_seeded_and_leave_the_random_state(kind):
    model = Model(name="x", kind=kind, tiny=True, steps=1, retain=1)
    before = torch.get_rng_state()
    one, two, other = (build(model, seed)[0] for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    states = [m.state_dict() for m in (one, two, other)]
    assert all(torch.equal(states[0][n], states[1][n]) for n in states[0])
    assert any(not torch.equal(states[0][n], states[2][n]) for n in states[0])


def test_made_pairs_say_their_label():
    made = made_pairs(0, ("abc", "xyz"), count=30)
    assert [len(made[s]) for s in ("train", "test")] == [20, 10]
    for row in [*made["train"], *made["test"]]:
        assert set(row["text"]) <= set("abc")
        assert set(row["text_pair"]) <= set("xyz" if row["label"] else "abc")


def test_tasks_need_their_files_and_stand_ins_are_left_out(tmp_path, monkeypatch):
    with pytest.raises(SpecDefError, match=r"mrpc\.jsonl") as caught:
        read_tasks(None, (RTE,))
    assert "--data" in caught.value.hint
    rows = [{"split": s, "text": "a", "text_pair": "b", "label": 0} for s in ("train", "test")]
    (tmp_path / "mrpc.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(SpecDefError, match=r"rte\.jsonl"):
        read_tasks(tmp_path, (RTE,))

    def missing(*_, **__):
        raise SpecDefError("The package is not installed.", hint="Install it.")

    monkeypatch.setattr(pair_tasks, "verse_pairs", missing)
    monkeypatch.setattr(pair_tasks, "gloss_pairs", lambda folder, _: {"train": [{"text": str(folder)}], "test": []})  # fmt: skip
    found = read_tasks(tmp_path, (VERSES, EASY, GLOSSES))
    assert set(found.rows) == {OWN, GLOSSES} and set(found.left_out) == {VERSES, EASY}
    assert found.left_out[VERSES] == "The package is not installed. Install it."
    (tmp_path / "wordnet").mkdir()
    assert read_tasks(tmp_path, (GLOSSES,)).rows[GLOSSES]["train"][0]["text"] == str(
        tmp_path / "wordnet"
    )


def test_experiments_refuse_before_any_work(tmp_path, monkeypatch, cache):
    for module in (table1_text, figure3):
        monkeypatch.setattr(module, "prepare", lambda *_, **__: pytest.fail("worked"))
        with pytest.raises(SpecDefError, match=r"mrpc\.jsonl"):
            module.run(tmp_path, size="cpu", data=tmp_path)


def test_a_missing_model_is_refused(monkeypatch):
    monkeypatch.setattr("specdef.models.minilm.PACKAGE", "no_such_package_anywhere")
    with pytest.raises(SpecDefError, match="not installed"):
        pair_models.require_models([Model(name="x", kind=ENCODER, steps=1, retain=1)])
    pair_models.require_models([Model(name="x", kind=ENCODER, steps=1, retain=1, tiny=True)])


def row(lock, at, loss, *, task=RTE, rate=5e-5, start=0.9, accuracy=0.5, f1=0.4, runs=()):
    return {
        "model": "m", "task": task, "seed": 0, "lock": lock, "attack": "a", "optimizer": "adamw", "at": at, "loss": loss,
        "start_loss": start, "accuracy": accuracy, "best_accuracy": accuracy, "start_accuracy": 0.5, "learning_rate": rate,
        "status": "finished", "metrics": {"f1": f1, "accuracy": accuracy}, "runs": list(runs), "seconds": 0.0,
    }  # fmt: skip


def own(kind, **f1):
    return [{"model": "m", "kind": kind, "lock": lock, "f1": value, "accuracy": value} for lock, value in f1.items()]  # fmt: skip


def test_becoming_less_sure_is_no_gain():
    found = counted_from([row(UNLOCKED, PAPER, 0.7, start=0.9), row(UNLOCKED, PAPER, 0.5, start=0.6)], 0.69)  # fmt: skip
    assert [r["start_loss"] for r in found] == pytest.approx([0.68, 0.6])
    assert [(r["began_at"], r["guess"]) for r in found] == [(0.9, 0.69), (0.6, 0.69)]


def test_what_table_1_says_of_planted_numbers():
    rows = [
        row(UNLOCKED, PAPER, 0.60, accuracy=0.7), row(UNLOCKED, SWEEP, 0.49), row(SCRATCH, SWEEP, 0.5),
        row(DEFORMATION, PAPER, 0.69), row(DEFORMATION, SWEEP, 0.50), row(COMPENSATED, PAPER, 0.70), row(COMPENSATED, SWEEP, 0.685),
        row("other", PAPER, 0.55), row("other", SWEEP, 0.5),
    ]  # fmt: skip
    rows = counted_from(rows, 0.69)
    cells = report.scored(rows)
    found = report.comparisons(own(ENCODER, unlocked=0.8, deformation=0.79, compensated=0.7), cells, rows)  # fmt: skip
    assert [c["verdict"] for c in found] == [HELD, FAILED, HELD, ONLY_THERE, HELD, FAILED]
    assert [c["paper"] for c in found] == ["90% → 90%", "90% → 90%", "69%", "52%", "52%", "52%"]
    assert found[2]["ours"].startswith("70%, held-out loss 0.900 → 0.600 (a guess: 0.690)")
    assert "50%; 0% of the unlocked gain" in found[3]["ours"] and "95% at the best" in found[3]["ours"]  # fmt: skip
    assert found[3]["numbers"]["share_best"] == pytest.approx(18 / 19)


def test_nothing_is_judged_where_nothing_is_learned():
    rows = counted_from([row(UNLOCKED, PAPER, 0.70), row(DEFORMATION, PAPER, 0.71)], 0.69)
    (only,) = report.comparisons(own(DECODER, unlocked=0.8), report.scored(rows), rows)
    assert only["verdict"] == FAILED and "not judged" in only["note"]


def test_the_stand_in_of_qqp_is_scored_with_f1():
    cells = report.scored(counted_from([row(UNLOCKED, PAPER, 0.5, task=VERSES), row(UNLOCKED, PAPER, 0.5)], 0.69))  # fmt: skip
    assert [c["score"]["mean"] for c in cells] == [0.4, 0.5]
    assert report.PAPERS[DECODER, VERSES, DEFORMATION] == 0.2


def test_unswept_locks_hold_at_the_papers_rate_alone():
    rows = counted_from([row(UNLOCKED, PAPER, 0.5), row(DEFORMATION, PAPER, 0.7)], 0.69)
    found = report.comparisons(own(DECODER, unlocked=0.8), report.scored(rows), rows)
    assert found[1]["verdict"] == ONLY_THERE and "not swept" in found[1]["note"]


def run(rate, loss, accuracy=0.5):
    return [rate, "finished", 4, loss, accuracy]


def figure_rows(locked, swept, control=None):
    losses = control or {1e-3: 0.5, 1e-4: 0.6, 1e-5: 0.68, 1e-6: 0.69, 1e-7: 0.7, 1e-8: 0.7}
    rows = [row(UNLOCKED, PAPER, loss, rate=rate) for rate, loss in losses.items()]
    rows += [row(DEFORMATION, PAPER, loss, rate=rate) for rate, loss in locked.items()]
    rows.append(row(UNLOCKED, SWEEP, 0.49, runs=[run(1e-2, 0.9), run(1e-3, 0.49)]))
    if swept:
        rows.append(row(DEFORMATION, SWEEP, 0.5, runs=[run(rate, loss) for rate, loss in swept.items()]))  # fmt: skip
    return counted_from(rows, 0.69)


@pytest.mark.parametrize(
    ("locked", "swept", "verdict", "said"),
    [
        ({1e-3: 0.7, 1e-4: 0.685}, {1e-9: 0.69}, HELD, "none; of the sweep none"),
        ({1e-3: 0.7}, {1e-9: 0.5, 1e-10: None}, ONLY_THERE, "none; of the sweep 1e-09"),
        ({1e-3: 0.5, 1e-5: 0.6}, {1e-9: 0.5}, FAILED, "0.001, 1e-05; of the sweep 1e-09"),
        ({1e-3: 0.7}, {}, ONLY_THERE, "none"),
    ],
)
def test_what_figure_3_says_of_planted_numbers(locked, swept, verdict, said):
    points = figure3_report.curves(figure_rows(locked, swept))
    facts = [{"lock": DEFORMATION, "growth_median": 1.004}]
    window, resists = figure3_report.comparisons(points, facts)
    assert "rose 1.00 times" in resists["note"]
    assert (window["verdict"], window["ours"]) == (HELD, "0.001, 0.0001")
    assert (resists["verdict"], resists["ours"]) == (verdict, said)
    best = next(p for p in points if p["share"] == 1)
    assert (best["at"], best["learning_rate"], best["loss"]) == (SWEEP, 1e-3, 0.49)
    assert all(math.isinf(p["loss"]) == (p["learning_rate"] == 1e-10) for p in points)
    lines = figure3_report.rate_table(points, "loss", 2)
    assert lines[3] == f"| learning rate | {UNLOCKED} | {DEFORMATION} |"
    assert lines[5].startswith("| 0.001 | 0.50 | 0.")
    figure3_report.draw(points)


def test_an_unlocked_model_that_learns_everywhere_or_nowhere_has_no_window():
    everywhere = figure3_report.curves(figure_rows({}, {}, dict.fromkeys(figure3_report.RATES, 0.5)))  # fmt: skip
    assert figure3_report.comparisons(everywhere)[0]["verdict"] == FAILED
    rows = counted_from([row(UNLOCKED, PAPER, 0.7, rate=1e-3), row(DEFORMATION, PAPER, 0.7, rate=1e-3)], 0.69)  # fmt: skip
    (only,) = figure3_report.comparisons(figure3_report.curves(rows))
    assert only["verdict"] == FAILED and "not judged" in only["note"]


@pytest.mark.parametrize("size", ["cpu", "full", "smoke"])
def test_sizes_name_tasks_of_their_models(size):
    settings = table1_text.SIZES[size]
    kinds = {model.kind for model in settings.models}
    assert {attack.model for attack in settings.attacks} == kinds == set(settings.deformation)
    one = figure3.SIZES[size]
    assert set(one.steps) == set(one.sweep)
