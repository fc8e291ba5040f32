"""A deformation lock on disk and in memory: verified, undone to the last bit, and nothing half-done when it fails."""

from __future__ import annotations

import json
import os
import shutil
import signal
import zlib
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import specdef
from helpers import leftovers, same, snapshot, state, tensor_hashes
from specdef import DeformationConfig
from specdef.errors import (
    CertificateMismatch,
    CheckpointError,
    KeyMismatch,
    NotConverged,
    SpecDefError,
)
from specdef.lock.certificate import _digest, load_certificate
from specdef.lock.compensated import Compensated
from specdef.lock.deformation.retain import measure_utility
from specdef.lock.residual import decode_residual, encode_residual
from specdef.lock.stack import Lock, set_locks
from specdef.models.tiny import tiny_inputs, tiny_model

FAST = DeformationConfig(steps=3, optimizer="adamw", learning_rate=1e-3, max_utility_loss=None)
STATE = "locked.checkpoint.safetensors"

CASES = {
    "llama": ("llama", {}),
    "bert": ("bert", {}),
    "resnet with batch norm": ("resnet", {}),
    "gpt2, transposed": ("gpt2", {}),
    "tied": ("llama", {"tie": True}),
    "bfloat16": ("llama", {"dtype": torch.bfloat16}),
    "sharded": ("llama", {"shards": 3}),
    "vit, renamed in memory": ("vit", {}),
}


def batches(family, count=6, first=0):
    """Synthetic batches with labels."""
    out = []
    for seed in range(first, first + count):
        batch = tiny_inputs(family, seed=seed, batch=4)
        generator = torch.Generator().manual_seed(seed)
        classes = torch.randint(0, 3, (4,), generator=generator)
        text = family in ("llama", "gpt2")
        out.append({**batch, "labels": batch["input_ids"] if text else classes})
    return out


class Untouched:
    """Retain data that no refusal may come too late for."""

    def __iter__(self):
        raise AssertionError("the data was touched")


def shards(folder):
    return {path.name: tensor_hashes(path) for path in sorted(folder.glob("*.safetensors"))}


@pytest.fixture
def locked(tiny_folder, tmp_path):
    """Return the folder of a locked bert, its certificate and its source."""
    source = tiny_folder("bert")
    out = tmp_path / "locked"
    certificate = specdef.lock_checkpoint(
        source, out, FAST, retain=batches("bert"), heldout=batches("bert", 2, 50)
    )
    return out, certificate, source


@pytest.mark.parametrize("case", CASES)
def test_lock_verify_and_unlock_to_the_last_bit(case, tiny_folder, tmp_path):
    family, options = CASES[case]
    source, out = tiny_folder(family, **options), tmp_path / "locked"
    heldout = batches(family, 2, 50)
    certificate = specdef.lock_checkpoint(
        source, out, FAST, retain=batches(family), heldout=heldout, data={"drawn": "from a seed"}
    )
    assert certificate.method == "deformation" and not certificate.bit_identical
    assert leftovers(tmp_path) == [] and not (tmp_path / STATE).exists()

    before, after = shards(source), shards(out)
    changed = [n for shard in before for n in before[shard] if before[shard][n] != after[shard][n]]
    assert len(changed) == certificate.tensors_changed > 5
    key = specdef.load_key(certificate.key)
    assert sorted(key.residuals) == sorted(changed) and key.config == FAST
    assert key.lock_id == certificate.lock_id

    result = specdef.verify_checkpoint(out, source, key, heldout=heldout, dtypes=["float32"])
    assert result.valid and result.key_matches and result.source_matches, result.problems
    assert result.utility["same_data"] and result.notes == ()
    specdef.unlock_checkpoint(out, tmp_path / "restored", key)
    assert shards(tmp_path / "restored") == before
    assert snapshot(tmp_path / "restored") == snapshot(source)

    # what the certificate says is measured on what is stored
    model = specdef.load_model(out, dtype="float32")
    fresh, utility = measure_utility(model, heldout), certificate.utility
    assert (utility["metric"], utility["rows"]) == (fresh.metric, fresh.rows)
    assert (utility["after"], utility["retain_loss_after"]) == (fresh.value, fresh.loss)
    original = measure_utility(specdef.load_model(source, dtype="float32"), heldout)
    assert utility["retain_loss_before"] == original.loss != fresh.loss
    assert utility["data"]["drawn"] == "from a seed"
    stored = {n: t.double() for path in out.glob("*.safetensors") for n, t in load_file(path).items()}  # fmt: skip
    for site in certificate.sites:
        sigma = float(torch.linalg.svdvals(stored[site["name"]].flatten(1))[0])
        assert site["sigma_max_after"] == pytest.approx(sigma, rel=1e-5), site["name"]
    largest = max(certificate.sites, key=lambda site: site["sigma_max_after"])
    assert certificate.sigma_max_before == largest["sigma_max_before"]

    public = load_certificate(out)
    assert public.utility == utility and public.training == certificate.training
    assert public.training["history"][-1]["step"] == public.training["kept_step"] == 3
    assert public.sites == {"matrix": len(certificate.sites)}
    card = (out / "README.md").read_text()
    assert fresh.metric in card and "all 3 steps were taken" in card
    assert "bit for bit" not in card and "difference to it is the key" in public.threat_model


def test_batch_norm_statistics_and_counters_are_undone_too(tiny_folder, tmp_path):
    source = tiny_folder("resnet")
    certificate = specdef.lock_checkpoint(
        source, tmp_path / "locked", FAST, retain=batches("resnet")
    )
    residuals = specdef.load_key(certificate.key).residuals
    counters = [n for n in residuals if n.endswith("num_batches_tracked")]
    assert counters and any(n.endswith("running_var") for n in residuals)
    specdef.unlock_checkpoint(tmp_path / "locked", tmp_path / "restored", certificate.key)
    first, last = (load_file(p / "model.safetensors") for p in (source, tmp_path / "restored"))
    assert all(first[n].dtype == torch.int64 and torch.equal(first[n], last[n]) for n in counters)


def test_what_is_not_trained_is_not_in_the_key(tiny_folder, tmp_path):
    config = replace(FAST, train="targets", target_modules=("q_proj",))
    certificate = specdef.lock_checkpoint(
        tiny_folder("llama"), tmp_path / "locked", config, retain=batches("llama")
    )
    residuals = specdef.load_key(certificate.key).residuals
    assert len(residuals) == certificate.tensors_changed == len(certificate.sites) == 2
    assert all("q_proj.weight" in name for name in residuals)
    assert any("last tenth" in note for note in certificate.notes)


def test_tampered_weights_and_foreign_keys_are_found(locked, tmp_path):
    folder, certificate, source = locked
    other = specdef.lock_checkpoint(
        source, tmp_path / "other", replace(FAST, seed=1), retain=batches("bert")
    )
    result = specdef.verify_checkpoint(folder, key=other.key)
    assert not result.valid and result.key_matches is False
    with pytest.raises(KeyMismatch):
        specdef.unlock_checkpoint(folder, tmp_path / "restored", other.key)
    tensors = load_file(folder / "model.safetensors")
    tensors["classifier.weight"][0, 0] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    result = specdef.verify_checkpoint(folder, key=certificate.key)
    assert not result.valid and any("classifier.weight" in p for p in result.problems)
    with pytest.raises(CertificateMismatch, match=r"classifier\.weight"):
        specdef.unlock_checkpoint(folder, tmp_path / "restored", certificate.key)
    assert not (tmp_path / "restored").exists()


def test_a_utility_below_the_recorded_one_is_a_problem_and_other_data_a_note(locked):
    folder, certificate, _ = locked
    heldout = batches("bert", 2, 50)
    result = specdef.verify_checkpoint(folder, heldout=batches("bert", 3, 70))
    assert result.valid and "not the batches of lock time" in result.notes[0]
    assert result.utility["rows"] == 12 and not result.utility["same_data"]
    recorded = certificate.utility["after"]
    for claimed, valid in (
        (recorded + 2 / 8, True),
        (recorded + 3 / 8, False),
    ):  # two of eight rows
        replace(certificate, utility=certificate.utility | {"after": claimed}).write(folder)
        result = specdef.verify_checkpoint(folder, heldout=heldout)
        assert result.valid is valid, claimed
    assert "accuracy is" in result.problems[0]
    result = specdef.verify_checkpoint(folder, heldout=heldout, utility=lambda _: 0.0)
    assert result.valid and "records accuracy" in result.notes[0]


def test_rounding_that_costs_utility_is_said(tiny_folder, tmp_path):
    """A utility that sees float32 but not bfloat16 values falls by rounding alone."""

    def unrounded(model):
        weight = next(model.parameters())
        return float(not torch.equal(weight, weight.bfloat16().float()) or model.fresh)

    def load(folder):
        model = specdef.load_model(folder, dtype="float32")
        model.fresh = True
        return model

    def progress(_):
        model.fresh = False

    model = load(tiny_folder("llama", dtype=torch.bfloat16))
    certificate = specdef.lock_checkpoint(
        tiny_folder("llama", dtype=torch.bfloat16), tmp_path / "locked", replace(FAST, max_utility_loss=0.5),
        retain=batches("llama"), utility=unrounded, load=lambda _: model, training_progress=progress,
    )  # fmt: skip
    assert certificate.utility["metric"] == "unrounded" and certificate.utility["after"] == 0.0
    assert any("Rounding" in note and "below the floor" in note for note in certificate.notes)


# ---- in memory


METHODS = {
    "absorbed": specdef.LockConfig(scale=2.0**20),
    "compensated": specdef.LockConfig(
        method="compensated", scale=10.0, k=2, max_relative_error=0.5
    ),
    "compensated, stored wider": specdef.LockConfig(
        method="compensated", scale=100.0, k=2, storage_dtype="float32"
    ),
    "scaled": specdef.LockConfig(method="scaled", scale=3.0, k=2),
    "deformation": FAST,
}


def lock_arguments(config):
    return {"retain": batches("llama")} if config is FAST else {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_unlock_model_undoes_a_lock_in_memory(method, dtype):
    model, config = tiny_model("llama", dtype=dtype), METHODS[method]
    before, inputs = state(model), tiny_inputs("llama")
    names = [name for name, _ in model.named_modules()]
    with torch.no_grad():
        outputs = model(**inputs).logits
    result = specdef.lock_model(model, config, **lock_arguments(config))
    assert not same(state(model), before)
    model(**inputs).logits.sum().backward()
    specdef.unlock_model(model, result.key)
    assert same(state(model), before)
    assert [name for name, _ in model.named_modules()] == names
    assert not any(isinstance(module, Compensated) for module in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, outputs)
    with pytest.raises(KeyMismatch):  # it is locked no more
        specdef.unlock_model(model, result.key)
    specdef.lock_model(model, specdef.LockConfig(scale=2.0**8))


@pytest.mark.parametrize("method", METHODS)
def test_unlock_model_undoes_a_lock_on_disk(method, tiny_folder, tmp_path):
    """Also where the model is loaded wider than it is stored, and saved again without its certificate."""
    source, config = tiny_folder("llama", dtype=torch.bfloat16), METHODS[method]
    certificate = specdef.lock_checkpoint(
        source, tmp_path / "locked", config, **lock_arguments(config)
    )
    original = state(specdef.load_model(source, dtype="float32"))
    model = specdef.load_model(tmp_path / "locked", dtype="float32")
    specdef.unlock_model(model, certificate.key)
    assert same(state(model), original)
    with torch.no_grad():
        assert torch.isfinite(model(**tiny_inputs("llama")).logits).all()


@pytest.mark.parametrize("method", METHODS)
def test_unlock_model_refuses_a_foreign_or_damaged_key_and_changes_nothing(method):
    config = METHODS[method]
    model, other, foreign = tiny_model("llama"), tiny_model("llama", seed=1), tiny_model("gpt2")
    key = specdef.lock_model(model, config, **lock_arguments(config)).key
    before = state(model)
    others = [specdef.lock_model(other, config, **lock_arguments(config)).key]
    if config is FAST:
        others.append(specdef.lock_model(foreign, FAST, retain=batches("gpt2")).key)
    if method != "absorbed" or others[0].lock_id != key.lock_id:
        for wrong in others:
            with pytest.raises(KeyMismatch):
                specdef.unlock_model(model, wrong)
    if key.residuals:
        name = sorted(key.residuals)[-1]
        damaged = {**key.residuals, name: torch.frombuffer(bytearray(zlib.compress(b"?")), dtype=torch.uint8)}  # fmt: skip
        set_locks(model, (Lock("deformation", replace(key, residuals=damaged).lock_id),))
        with pytest.raises(CheckpointError, match="damaged"):
            specdef.unlock_model(model, replace(key, residuals=damaged))
    assert same(state(model), before)


def test_unlock_model_refuses_deformed_weights_that_were_trained_since():
    model = tiny_model("llama")
    key = specdef.lock_model(model, FAST, retain=batches("llama")).key
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    before = state(model)
    with pytest.raises(KeyMismatch, match=r"lm_head\.weight is no longer"):
        specdef.unlock_model(model, key)
    assert same(state(model), before)


def test_unlock_model_inside_an_authorised_block_is_refused():
    model = tiny_model("llama")
    key = specdef.lock_model(model, METHODS["absorbed"]).key
    with specdef.authorised(model, key):
        before = state(model)
        with pytest.raises(SpecDefError, match="unlocked already"):
            specdef.unlock_model(model, key)
        assert same(state(model), before)


def plain_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.1), nn.Linear(144, 3)
    )  # fmt: skip


def pictures(count=6):
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(8, 1, 8, 8, generator=generator), torch.randint(0, 3, (8,), generator=generator))
        for _ in range(count)
    ]  # fmt: skip


def entropy(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


@pytest.mark.parametrize("loss", [None, entropy], ids=["default loss", "own loss"])
def test_a_plain_module_is_locked_and_unlocked(loss, tmp_path):
    model = plain_net()
    model[0].train()
    model[1].eval()
    model[5].bias.requires_grad_(False)
    before, modes = state(model), [m.training for m in model.modules()]
    result = specdef.lock_model(model, FAST, retain=pictures(), loss=loss)
    certificate = result.certificate
    assert certificate.source["name"] == "Sequential" and len(certificate.sites) == 2
    assert certificate.utility["metric"] == ("negative loss" if loss else "accuracy")
    assert certificate.sigma_max_after > certificate.sigma_max_before
    assert [m.training for m in model.modules()] == modes and not model[5].bias.requires_grad
    path = result.key.save(tmp_path / "key.safetensors")
    with pytest.raises(SpecDefError, match="locked already"):
        specdef.lock_model(model, FAST, retain=pictures())
    specdef.unlock_model(model, path)
    assert same(state(model), before)


def spoil(value):
    """Return a loss that is `value` from its seventh call on: in training, not before."""
    calls = []

    def loss(model, batch):
        calls.append(1)
        if len(calls) > 6 and isinstance(value, BaseException):
            raise value
        return entropy(model, batch)

    return loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("config", "loss", "error"),
    [
        (replace(FAST, steps=20), spoil(KeyboardInterrupt()), KeyboardInterrupt),
        (replace(FAST, learning_rate=1e30, optimizer="sgd"), entropy, NotConverged),
        (replace(FAST, k=4000), entropy, SpecDefError),
        (FAST, "mismatch", SpecDefError),
    ],
    ids=["interrupted", "diverged", "k above the rank", "data that does not fit"],
)
def test_a_failed_lock_in_memory_leaves_the_model_as_it_was(config, loss, error, dtype):
    model = plain_net().to(dtype)
    model[1].eval()
    model[5].bias.requires_grad_(False)
    before, modes = state(model), [m.training for m in model.modules()]
    data = pictures() if loss != "mismatch" else [(x[:, :, :4], y) for x, y in pictures()]
    with pytest.raises(error):
        specdef.lock_model(model, config, retain=data, loss=None if loss == "mismatch" else loss)
    assert same(state(model), before) and [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == [True] * 5 + [False]
    assert getattr(model, "_specdef_lock_id", None) is None


def test_values_that_leave_the_range_of_float16_are_named_and_undone():
    model = nn.Linear(4, 3).half()
    before = state(model)

    def loss(model, _):
        return -1e6 * model.weight.sum()

    config = DeformationConfig(steps=1, optimizer="sgd", learning_rate=1.0, max_utility_loss=None)
    with pytest.raises(SpecDefError, match="weight: trained values leave the range of float16"):
        specdef.lock_model(model, config, retain=[(torch.zeros(1, 4),)] * 2, loss=loss)
    assert same(state(model), before)


# ---- refusals, and nothing left behind


def refused(tmp_path, source, error, *, match=None, config=FAST, retain=None, **options):
    """Lock, and expect an error that leaves the folder as it was."""
    before = snapshot(tmp_path), sorted(tmp_path.rglob("*"))
    with pytest.raises(error, match=match):
        specdef.lock_checkpoint(
            source, options.pop("out", tmp_path / "locked"), config,
            retain=Untouched() if retain is None else retain, **options,
        )  # fmt: skip
    assert (snapshot(tmp_path), sorted(tmp_path.rglob("*"))) == before


def test_what_stands_in_the_way_is_refused_before_the_training(tiny_folder, tmp_path):
    source = tiny_folder("bert")
    (tmp_path / "locked").mkdir()
    (tmp_path / "locked" / "x").write_text("")
    refused(tmp_path, source, CheckpointError, match="already exists")
    shutil.rmtree(tmp_path / "locked")
    key = tmp_path / "locked.key.safetensors"
    key.write_text("precious")
    refused(tmp_path, source, CheckpointError, match="every training makes a new key")
    key.unlink()
    refused(tmp_path, source, CheckpointError, match="inside", key_path=tmp_path / "locked" / "k")
    refused(tmp_path, source, CheckpointError, match="inside", checkpoint=tmp_path / "locked" / "c")
    (tmp_path / STATE).write_text("unfinished")
    refused(tmp_path, source, CheckpointError, match="unfinished", retain=batches("bert"))


def test_a_key_of_an_earlier_deformation_is_never_overwritten(locked, tmp_path):
    _, certificate, source = locked
    refused(
        tmp_path, source, CheckpointError, match="already exists", out=tmp_path / "next", key_path=certificate.key
    )  # fmt: skip


def test_a_place_that_cannot_be_written_is_refused_before_the_training(
    tiny_folder, tmp_path, monkeypatch
):
    closed = tmp_path / "closed"
    closed.mkdir()
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != closed and access(path, mode))
    for places in (
        {"out": closed / "out"},
        {"key_path": closed / "new" / "key"},
        {"checkpoint": closed / "c"},
    ):
        refused(tmp_path, tiny_folder("bert"), CheckpointError, match="cannot be written", **places)


def test_what_goes_with_a_deformation_and_what_does_not(tiny_folder, tmp_path):
    source = tiny_folder("bert")
    with pytest.raises(ValueError, match="needs retain"):
        specdef.lock_checkpoint(source, tmp_path / "locked", FAST)
    with pytest.raises(ValueError, match="needs retain"):
        specdef.lock_model(tiny_model("bert"), FAST)
    for option in ({"retain": Untouched()}, {"resume": True}, {"utility": lambda _: 0.0}):
        with pytest.raises(ValueError, match=f"{next(iter(option))} is for a deformation"):
            specdef.lock_checkpoint(source, tmp_path / "locked", **option)
    with pytest.raises(ValueError, match="retain is for a deformation"):
        specdef.lock_model(tiny_model("bert"), METHODS["compensated"], retain=Untouched())
    with pytest.raises(ValueError, match="trained, not planned"):
        specdef.plan_lock(specdef.weights.checkpoint.Checkpoint.open(source), FAST)
    assert not list(tmp_path.iterdir())


def test_models_that_cannot_be_written_back_are_refused(tiny_folder, tmp_path):
    refused(tmp_path, tiny_folder("mixtral"), SpecDefError, match="no tensor of its own")
    half = tiny_folder("llama", dtype=torch.bfloat16)
    refused(tmp_path, half, SpecDefError, match="half precision", load=specdef.load_model)

    def changing(folder):
        model = specdef.load_model(folder, dtype="float32")
        with torch.no_grad():
            model.lm_head.weight.mul_(2)
        return model

    refused(tmp_path, half, SpecDefError, match=r"lm_head\.weight is not in memory", load=changing)
    refused(
        tmp_path, tiny_folder("bert"), SpecDefError, match="no module", retain=batches("bert"),
        config=replace(FAST, target_modules=("qproj",)),
    )  # fmt: skip


def test_a_damaged_checkpoint_is_refused_before_the_training(
    tiny_folder, tmp_path_factory, tmp_path
):
    source = tmp_path_factory.mktemp("damaged") / "bert"
    shutil.copytree(tiny_folder("bert"), source)
    tensors = load_file(source / "model.safetensors")
    tensors["classifier.bias"][0] = torch.nan
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    refused(tmp_path, source, CheckpointError, match="NaN")


def test_an_old_table_the_model_leaves_alone_is_carried_over(tiny_folder, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(tiny_folder("bert"), source)
    tensors = load_file(source / "model.safetensors")
    tensors["bert.embeddings.old_table"] = torch.arange(5)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    certificate = specdef.lock_checkpoint(source, tmp_path / "locked", FAST, retain=batches("bert"))
    after = load_file(tmp_path / "locked" / "model.safetensors")
    assert torch.equal(after["bert.embeddings.old_table"], torch.arange(5))
    assert specdef.verify_checkpoint(tmp_path / "locked", source, certificate.key).valid


def test_the_caller_may_say_how_the_folder_is_loaded(tiny_folder, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(tiny_folder("bert"), source)
    config = json.loads((source / "config.json").read_text())
    del config["architectures"]
    (source / "config.json").write_text(json.dumps(config))
    refused(tmp_path, source, CheckpointError, match="names the architecture none")
    load = partial(
        specdef.load_model, dtype="float32", architecture="BertForSequenceClassification"
    )
    heldout = batches("bert", 2, 50)
    specdef.lock_checkpoint(source, tmp_path / "locked", FAST, retain=batches("bert"), heldout=heldout, load=load)  # fmt: skip
    result = specdef.verify_checkpoint(tmp_path / "locked", heldout=heldout, load=load)
    assert result.valid and result.utility["same_data"]


def test_a_full_disk_or_a_lock_that_leads_nowhere_leaves_nothing(
    tiny_folder, tmp_path, monkeypatch
):
    source = tiny_folder("bert")
    config = replace(FAST, learning_rate=1e30, optimizer="sgd")
    refused(tmp_path, source, NotConverged, config=config, retain=batches("bert"))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "rename", full)  # the last call, when the key is there already
    refused(tmp_path, source, CheckpointError, match="No space left", retain=batches("bert"))


def test_an_interrupted_lock_goes_on_to_the_same_weights(tiny_folder, tmp_path):
    source = tiny_folder("resnet")
    config = replace(FAST, steps=5, eval_every=2)
    arguments = {"retain": batches("resnet"), "heldout": batches("resnet", 2, 50)}
    whole = specdef.lock_checkpoint(source, tmp_path / "whole", config, **arguments)

    def interrupt(progress):
        if progress.step == 3:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        specdef.lock_checkpoint(
            source, tmp_path / "locked", config, training_progress=interrupt, **arguments
        )
    assert [path.name for path in tmp_path.iterdir() if "locked" in path.name] == [STATE]
    resumed = specdef.lock_checkpoint(source, tmp_path / "locked", config, resume=True, **arguments)
    assert resumed.tensors == whole.tensors and resumed.lock_id == whole.lock_id
    assert not (tmp_path / STATE).exists()


def test_authorised_training_of_a_deformed_model_is_refused(locked, tmp_path):
    folder, certificate, _ = locked
    model = specdef.load_model(folder)
    before = state(model)
    with (
        pytest.raises(SpecDefError, match="training of its own") as caught,
        specdef.authorised(model, certificate.key),
    ):
        raise AssertionError("the block was entered")
    assert "lock it again" in caught.value.hint
    with pytest.raises(SpecDefError, match="training of its own"):
        specdef.save_locked(model, tmp_path / "next", certificate.key, like=folder)
    assert same(state(model), before) and not (tmp_path / "next").exists()


# ---- formats


def test_certificates_from_before_deformations_still_load(tiny_folder, tmp_path):
    certificate = specdef.lock_checkpoint(tiny_folder("bert"), tmp_path / "locked")
    path = tmp_path / "locked" / "specdef_certificate.json"
    values = json.loads(path.read_text())
    for name in ("utility", "training", "sha256"):
        del values[name]
    path.write_text(json.dumps(values | {"sha256": _digest(values)}))
    old = load_certificate(tmp_path / "locked")
    assert old.utility == old.training == {} and old.lock_id == certificate.lock_id
    result = specdef.verify_checkpoint(
        tmp_path / "locked", key=certificate.key, heldout=batches("bert", 2)
    )
    assert result.valid and "records no utility" in result.notes[0]
    path.write_text(json.dumps((values | {"utility": []}) | {"sha256": _digest(values | {"utility": []})}))  # fmt: skip
    with pytest.raises(CheckpointError, match="utility"):
        load_certificate(tmp_path / "locked")


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]
)  # fmt: skip
@pytest.mark.parametrize("shape", [(), (0,), (3, 5), (70_000,)])
def test_residuals_are_exact_for_any_values_of_any_dtype(dtype, shape):
    generator = torch.Generator().manual_seed(0)

    def draw():
        values = torch.randn(shape, generator=generator, dtype=torch.float64) * 1e3
        return values.abs().to(dtype) if dtype in (torch.uint8, torch.bool) else values.to(dtype)

    original, rebuilt = draw(), draw()
    again = decode_residual(encode_residual(original, rebuilt), rebuilt)
    assert again.dtype == dtype and again.shape == original.shape
    assert torch.equal(again.reshape(-1).view(torch.uint8), original.reshape(-1).view(torch.uint8))


def test_residuals_of_older_keys_still_decode():
    """They were deflated in full; the planes are the same."""
    original = torch.tensor([1.0, -1.0, 0.0, 3.5])
    rebuilt = torch.tensor([1.0000001, -1.0, -0.0, 3.4999998])
    order = [  # floats counted in order of their bits
        np.where(bits >= 0, bits, -(2**31) - (bits + 1))
        for bits in (t.view(torch.int32).long().numpy() for t in (original, rebuilt))
    ]
    difference = order[0] - order[1]
    zigzag = np.where(difference >= 0, 2 * difference, -2 * difference - 1).astype(np.uint64)
    planes = np.ascontiguousarray(zigzag.view(np.uint8).reshape(-1, 8).T)
    old = torch.frombuffer(bytearray(zlib.compress(planes.tobytes(), 6)), dtype=torch.uint8)
    again = decode_residual(old, rebuilt)
    assert torch.equal(again.view(torch.int32), original.view(torch.int32))
    with pytest.raises(ValueError, match="does not fit"):
        decode_residual(old, rebuilt[:2])
