"""The demo end to end on a tiny model: everything it promises holds, and its numbers and plot are written."""

from __future__ import annotations

import json
import math

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from specdef.attacks.run import Run
from specdef.attacks.task import Setting
from specdef.data.texts import load_text
from specdef.experiments import demo
from specdef.models.tiny import save_tiny


@pytest.fixture
def folder(tmp_path):
    """A tiny llama with a byte-pair tokenizer of its own."""
    save_tiny("llama", tmp_path / "model", vocab_size=300)
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<unk>", "<s>", "</s>"]
    tokenizer.train_from_iterator(
        [load_text("sotu")], trainers.BpeTrainer(vocab_size=300, special_tokens=special)
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    fast.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_demo_holds_what_it_promises(folder, tmp_path, capsys):
    out = tmp_path / "runs"
    assert (
        demo.main(["--model", str(folder), "--out", str(out), "--steps", "4", "--length", "16"])
        == 0
    )
    numbers = json.loads((out / "demo.json").read_text())
    assert numbers["held"] and numbers["same_text"] and numbers["verify"]["bit_identical"]
    assert numbers["unlock"]["sha256_equal"] and numbers["sites"] > 0
    assert len(numbers["control"]) == len(demo.CONTROL_RATES)
    assert numbers["control"][0]["losses"][0] == pytest.approx(numbers["locked"][0]["losses"][0])
    assert (out / "demo.png").stat().st_size > 10_000
    printed = capsys.readouterr()
    assert (
        "bit-identical" in printed.err
        and "What this does not stop" in printed.err
        and not printed.out
    )
    # a second run starts from the first one's leftovers
    assert (
        demo.main(["--model", str(folder), "--out", str(out), "--steps", "2", "--length", "16"])
        == 0
    )


def test_gain_share_is_of_the_controls_gain():
    def run(*losses):
        return Run(
            attack="full-adamw", setting=Setting(), seed=0, steps=tuple(range(len(losses))), losses=losses,
            accuracies=(math.nan,) * len(losses), status="finished",
        )  # fmt: skip

    assert demo.gain_share([run(4.0, 3.0), run(4.0, 2.0)], [run(4.0, 3.5), run(4.0, 9.0)]) == 0.25
    assert (
        demo.gain_share([run(4.0, 2.0)], [run(4.0, 5.0)]) == 0.0
    )  # the start itself counts: no gain is never below 0
