"""Calibration: takes channels that are alive, and leaves the model as it found it."""

from __future__ import annotations

import torch

import specdef
from specdef.models.tiny import tiny_inputs, tiny_model

BATCHES = [
    tiny_inputs("resnet", seed=seed) | {"labels": torch.tensor([seed, 1])} for seed in range(2)
]


def test_a_channel_that_is_never_active_is_not_taken():
    """Its gradient is 0, so it looks most useless; but scaling it locks nothing."""
    model = tiny_model("resnet")
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.bias[2] = -100.0  # a dead ReLU
    certificate = specdef.lock_model(model, calibration=BATCHES).certificate
    sites = [site for site in certificate.sites if site["kind"] == "batchnorm"]
    assert sites and all(site["channel"] != 2 and site["score"] > 0 for site in sites)


def test_the_model_keeps_its_mode_and_its_statistics():
    model = tiny_model("resnet").train()
    before = {name: value.clone() for name, value in model.named_buffers()}
    specdef.lock_model(model, calibration=BATCHES)
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())
    assert all(module.training for module in model.modules())
