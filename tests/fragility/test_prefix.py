"""Frozen leading blocks remember what they gave, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import specdef
from specdef.fragility.prefix import remembered_prefix
from specdef.models.tiny import tiny_inputs, tiny_model


class Counting(nn.Module):
    def __init__(self, block, calls):
        super().__init__()
        self.block, self.calls = block, calls

    def forward(self, x, **options):
        self.calls.append(x)
        return self.block(x, **options)


class Stack(nn.Module):
    """Three blocks in a list, the middle one of which is fine-tuned."""

    def __init__(self):
        super().__init__()
        self.calls = [[], [], []]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layers = nn.ModuleList(Counting(nn.Linear(4, 4).double(), c) for c in self.calls)

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def rows(seed, count=5):
    return torch.randn(count, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_leading_block_runs_once_for_each_batch():
    net = Stack()
    aligned = [(rows(1), torch.zeros(5, 4, dtype=torch.float64))]
    task = [(rows(2), rows(3))]
    specdef.fragility(
        net, aligned, task, learning_rate=1e-2, steps=10, params=["layers.1"], observe=True
    )
    first, second, third = (len(calls) for calls in net.calls)
    assert first == 2 and second > 20 and third > 20


def test_other_inputs_are_computed_and_the_model_is_given_back():
    net = Stack()
    x, y = rows(1), rows(2)
    plain = [net(x), net(y)]
    with remembered_prefix(net, ["layers.1.block.weight"]) as count:
        assert count == 1
        for _ in range(2):
            assert torch.equal(net(x), plain[0]) and torch.equal(net(y), plain[1])
        before = len(net.calls[0])
        # An input that requires a gradient goes through the block itself.
        z = x.clone().requires_grad_()
        net(z).sum().backward()
        assert z.grad is not None and len(net.calls[0]) == before + 1
    assert all("forward" not in vars(layer) for layer in net.layers)


def test_nothing_remembers_where_the_first_block_is_tuned():
    with remembered_prefix(Stack(), ["layers.0.block.weight"]) as count:
        assert count == 0


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma", "mixtral", "gpt_oss"])
def test_language_models_give_what_they_gave(family):
    net = tiny_model(family)
    layers = "transformer.h" if family == "gpt2" else "model.layers"
    inputs = [tiny_inputs(family, seed=seed) for seed in (0, 1)]
    inputs[1]["attention_mask"][0, -3:] = 0
    with torch.no_grad():
        plain = [net(**x).logits for x in inputs]
        with remembered_prefix(net, [f"{layers}.1.mlp.weight"]) as count:
            assert count == 1
            for _ in range(2):
                assert all(
                    torch.equal(net(**x).logits, y) for x, y in zip(inputs, plain, strict=True)
                )
