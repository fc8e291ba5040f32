"""Tiny language models, adapters, and several tasks ranked."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

import specdef
from specdef.models.tiny import tiny_inputs, tiny_model

from .toys import regression


def lm_batches(seed, count=1):
    return [tiny_inputs("gpt2", seed=seed + i, batch=2, length=10) for i in range(count)]


@pytest.fixture(scope="module")
def report():
    net = tiny_model("gpt2").double()
    return specdef.fragility(
        net, lm_batches(1, 2), lm_batches(5, 2), learning_rate=1e-3, steps=12, params=["transformer.h.1"],
        max_rank=4, observe=True, model_name="tiny", aligned_name="a", task_name="t",
    )  # fmt: skip


def test_a_language_model(report):
    assert report.observed.band_coverage == 1.0 and report.observed.error_factor < 0.02
    assert report.parameters["count"] == report.subspace.vectors.shape[1]
    assert all(name.startswith("transformer.h.1") for name in report.parameters["names"])
    assert report.cost["hessian_products"] == 18
    assert report.cost["fisher_products"] <= 24 + 8 + 8 + 1


def test_the_dictionary_has_the_contract_keys(report):
    found = report.to_dict()
    for key in (
        "rank",
        "lambda_min",
        "initial_overlap",
        "gamma",
        "forecast",
        "observed",
        "exponent",
    ):
        assert key in found
    json.dumps(found, allow_nan=False)
    forecast = found["forecast"]
    lengths = {len(forecast[name]) for name in ("steps", "alignment", "low", "high", "taylor", "quartic", "in_subspace", "stochastic")}  # fmt: skip
    assert len(lengths) == 1 and {"threshold", "steps", "low", "high"} == set(
        forecast["time_to_threshold"]
    )
    assert found["model"] == "tiny" and found["task"] == "t" and found["optimizer"]["name"] == "sgd"


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft asks for it
def test_adapters_start_with_the_subspace_in_b():
    """B = 0: what A does is not seen, so the Fisher matrix and the gradient lie in B's coordinates alone."""
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = get_peft_model(
            tiny_model("llama"),
            LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.0),
        ).double()
    aligned, task = [tiny_inputs("llama", seed=1)], [tiny_inputs("llama", seed=2)]
    report = specdef.fragility(
        net, aligned, task, learning_rate=1e-2, steps=10, max_rank=3, observe=True
    )
    names = report.parameters["names"]
    assert names and all("lora_" in name for name in names)
    sizes = dict(net.named_parameters())
    start = 0
    for name in names:
        part = report.subspace.vectors[:, start : start + sizes[name].numel()]
        start += sizes[name].numel()
        assert (float(part.norm()) < 1e-3) == ("lora_A" in name), name
    assert report.gamma > 0 and report.observed.status == "completed"


# --- ranking -----------------------------------------------------------------------------------------------------------


def ranked(scales, observe=True):
    reports = []
    for scale in scales:
        report = regression(scale=scale).diagnose(
            1e-3, 15, observe=observe, task_name=f"scale {scale}"
        )
        reports.append(report)
    return reports


def test_tasks_are_ranked_as_planted():
    ranking = specdef.rank_tasks(ranked([1.0, 3.0, 0.3, 2.0]))
    assert [task.task for task in ranking.tasks] == [
        "scale 3.0",
        "scale 2.0",
        "scale 1.0",
        "scale 0.3",
    ]
    assert (
        ranking.spearman == pytest.approx(1.0)
        and ranking.p_value is None
        and ranking.num_tasks == 4
    )
    json.dumps(ranking.to_dict(), allow_nan=False)


def test_no_correlation_without_every_run():
    reports = ranked([1.0, 2.0])
    assert specdef.rank_tasks([reports[0], replace(reports[1], observed=None)]).spearman is None
    assert specdef.rank_tasks(reports[:1]).spearman is None
    five = specdef.rank_tasks([replace(r, task=str(i)) for i, r in enumerate(reports * 3)])
    assert five.p_value is not None


def test_reports_that_do_not_belong_together():
    one, two = ranked([1.0, 2.0], observe=False)
    with pytest.raises(ValueError, match="at least one"):
        specdef.rank_tasks([])
    with pytest.raises(ValueError, match="agree on aligned"):
        specdef.rank_tasks([one, replace(two, aligned="other")])
    with pytest.raises(ValueError, match="agree on steps"):
        specdef.rank_tasks([one, replace(two, steps=3)])
