"""An absorbed lock on top of a deformation: neither undoes the other, and the two keys undo them one by one, to the last bit."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

import specdef
from helpers import every_call, leftovers, same, snapshot, state
from specdef import DeformationConfig, LockConfig
from specdef.attacks.structural.clip_spectrum import ClipSpectrum
from specdef.attacks.structural.known_scale import KnownScale
from specdef.attacks.structural.rebalance import rebalance
from specdef.attacks.structural.rebalance_clip import RebalanceClip
from specdef.attacks.task import Task
from specdef.errors import CertificateMismatch, CheckpointError, KeyMismatch, SpecDefError
from specdef.lock.certificate import load_certificate
from specdef.lock.files import other_files_sha256
from specdef.lock.stack import ON_TOP, Lock, locks
from specdef.lock.verify import compare_outputs
from specdef.models.tiny import tiny_inputs, tiny_model
from specdef.weights.folder import CERTIFICATE_BELOW_NAME, CERTIFICATE_NAME

FAST = DeformationConfig(
    steps=4, optimizer="adamw", learning_rate=1e-2, max_utility_loss=None, retain_weight=0.1
)
ABSORBED = LockConfig()

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "bfloat16": ("llama", {"dtype": torch.bfloat16}),
    "tied, sharded": ("llama", {"tie": True, "shards": 3}),
    "resnet": ("resnet", {}),
}


def batches(family: str, count: int = 4) -> list[dict[str, torch.Tensor]]:
    """Synthetic batches with labels."""
    out = []
    for seed in range(count):
        batch = tiny_inputs(family, seed=seed, batch=4)
        generator = torch.Generator().manual_seed(seed)
        classes = torch.randint(0, 3, (4,), generator=generator)
        out.append({**batch, "labels": batch["input_ids"] if family == "llama" else classes})
    return out


class Stack(NamedTuple):
    """A model, the same deformed, and that with an absorbed lock on top. Tests only read them."""

    model: Path
    deformed: Path
    both: Path
    lower: specdef.LockCertificate
    upper: specdef.LockCertificate


@pytest.fixture(scope="module")
def stack(tiny_folder, tmp_path_factory):
    """Return a function from a case to its folders."""
    made: dict[str, Stack] = {}

    def make(case: str = "llama") -> Stack:
        if case not in made:
            family, options = CASES[case]
            place = tmp_path_factory.mktemp("stack")
            model = shutil.copytree(tiny_folder(family, **options), place / "model")
            (model / "README.md").write_text("# A model\n\nof ours")  # no line end: bytes count
            lower = specdef.lock_checkpoint(model, place / "deformed", FAST, retain=batches(family))
            upper = specdef.lock_checkpoint(place / "deformed", place / "both", ABSORBED)
            made[case] = Stack(model, place / "deformed", place / "both", lower, upper)
        return made[case]

    return make


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for path in sorted(folder.glob("*.safetensors")) for n, t in load_file(path).items()}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_two_locks_are_undone_one_by_one_to_the_last_bit(stack, case, tmp_path) -> None:
    model, deformed, both, lower, upper = stack(case)
    first = specdef.unlock_checkpoint(both, tmp_path / "a", upper.key)
    assert first.sha256_equal and first.still_locked == "deformation"
    assert snapshot(tmp_path / "a") == snapshot(deformed)  # certificate and card included
    second = specdef.unlock_checkpoint(tmp_path / "a", tmp_path / "b", lower.key)
    assert second.sha256_equal and second.still_locked == ""
    assert snapshot(tmp_path / "b") == snapshot(model)
    assert snapshot(both) != snapshot(deformed) != snapshot(model)


@pytest.mark.parametrize("case", CASES)
def test_neither_lock_undoes_the_other(stack, case) -> None:
    model, deformed, both, lower, upper = stack(case)
    for dtype in ("float32", "bfloat16"):
        assert compare_outputs(both, deformed, dtype).bit_identical, dtype
    # every scale of the upper lock is there, on the deformed weights
    before, after, key = tensors(deformed), tensors(both), specdef.load_key(upper.key)
    assert len(upper.sites) > 1 and set(key.scalings) == {n for n in before if not torch.equal(before[n], after[n])}  # fmt: skip
    for name, edits in key.scalings.items():
        scaled = before[name].clone()
        for edit in edits:
            assert edit.exponent != 0
            edit.apply(scaled, name=name)
        assert torch.equal(scaled, after[name]), name
    # and what the lower lock raised is still raised once those scales are balanced away, without the key
    grown = {site["name"] for site in lower.sites if site["scale"] > 1.05}
    assert len(grown) > len(lower.sites) / 2
    kept = {}
    for place in (model, both):
        loaded = specdef.load_model(place, dtype="float32")
        assert rebalance(loaded) > 0
        kept[place] = {
            name: float(torch.linalg.svdvals(p.detach().flatten(1))[0])
            for name, p in loaded.named_parameters()
            if p.ndim > 1
        }
    ratios = [kept[both][n] / kept[model][n] for n in grown if n in kept[model]]
    assert len(ratios) > len(grown) / 2 and min(ratios) > 1, ratios


@pytest.mark.parametrize("case", ["llama", "resnet"])
def test_balancing_gives_what_it_gives_of_the_deformed_model(stack, case) -> None:
    found = []
    for place in stack(case)[1:3]:
        loaded = specdef.load_model(place, dtype="float32")
        rebalance(loaded)
        found.append(state(loaded))
    balanced_both, balanced = found[1], found[0]
    exact = [torch.equal(balanced[name], balanced_both[name]) for name in balanced]
    assert sum(exact) >= 0.8 * len(exact)
    # a scaled channel may be another one than the median; the rest is then an octave off, in a few tensors
    for name, tensor in balanced.items():
        torch.testing.assert_close(
            balanced_both[name], tensor, rtol=1.0, atol=float(tensor.abs().max())
        )


def test_certificate_and_card_name_both(stack) -> None:
    _, deformed, both, lower, upper = stack()
    public, below = load_certificate(both), load_certificate(both, CERTIFICATE_BELOW_NAME)
    assert public.method == "absorbed" and public.lock_id == upper.lock_id != lower.lock_id
    assert public.below == upper.below and public.below["method"] == "deformation"
    assert public.below["lock_id"] == lower.lock_id == below.lock_id
    assert public.below["sha256"] == public.files[CERTIFICATE_BELOW_NAME]
    assert (both / CERTIFICATE_BELOW_NAME).read_bytes() == (
        deformed / CERTIFICATE_NAME
    ).read_bytes()
    assert public.utility == lower.utility and public.bit_identical
    assert "re-balancing" in public.threat_model and "clipping" in public.threat_model
    assert any("Both keys" in note and "deformation" in note for note in public.notes)
    card = (both / "README.md").read_text()
    assert card.startswith((deformed / "README.md").read_text())
    assert card.count("specdef:begin") == 2
    assert card.index(lower.lock_id[:16]) < card.index(upper.lock_id[:16])
    assert specdef.load_model(both)._specdef_locks == (Lock("deformation", lower.lock_id), Lock("absorbed", upper.lock_id))  # fmt: skip
    # of one lock nothing of this is said
    assert lower.below == {} and not (deformed / CERTIFICATE_BELOW_NAME).exists()


def test_verify_tells_which_original_it_is(stack, tiny_folder) -> None:
    model, deformed, both, lower, upper = stack()
    top = specdef.verify_checkpoint(both, deformed, upper.key)
    assert top.valid and top.bit_identical and top.source_matches and top.key_matches, top.problems
    assert (top.method, top.below, top.original_of, top.notes) == ("absorbed", "deformation", "absorbed", ())  # fmt: skip
    bottom = specdef.verify_checkpoint(both, model, dtypes=["float32"])
    assert bottom.valid and bottom.source_matches and not bottom.bit_identical, bottom.problems
    assert bottom.original_of == "deformation" and "beneath" in bottom.notes[0]
    other = specdef.verify_checkpoint(both, tiny_folder("mistral"), dtypes=["float32"])
    assert not other.valid and other.source_matches is False and other.original_of is None
    again = specdef.verify_checkpoint(both, heldout=batches("llama")[-1:])
    assert again.valid and again.utility["recorded"] == lower.utility["after"]
    assert again.utility["value"] == pytest.approx(lower.utility["after"], rel=1e-6)


def test_a_wrong_key_names_the_lock_on_top(stack, tmp_path) -> None:
    _, deformed, both, lower, upper = stack()
    with pytest.raises(KeyMismatch, match=r"\(absorbed\) is on top of that") as error:
        specdef.unlock_checkpoint(both, tmp_path / "out", lower.key)
    assert "lock on top" in error.value.hint
    with pytest.raises(
        KeyMismatch, match=r"\(absorbed\), the model was locked as .*\(deformation\)"
    ):
        specdef.unlock_checkpoint(deformed, tmp_path / "out", upper.key)
    found = specdef.verify_checkpoint(both, key=lower.key)
    assert not found.valid and found.key_matches is False and "is on top" in found.problems[0]
    assert list(tmp_path.iterdir()) == []


def test_in_memory_the_locks_are_undone_in_their_order() -> None:
    model, inputs = tiny_model("llama"), tiny_inputs("llama")
    original = state(model)
    lower = specdef.lock_model(model, FAST, retain=batches("llama"))
    deformed = state(model)
    with torch.no_grad():
        expected = model(**inputs).logits
    upper = specdef.lock_model(model, ABSORBED)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, expected)
    assert upper.certificate.below == {"method": "deformation", "lock_id": lower.key.lock_id}
    assert [lock.method for lock in locks(model)] == ["deformation", "absorbed"]
    both = state(model)
    with pytest.raises(KeyMismatch, match="an absorbed lock is on top"):
        specdef.unlock_model(model, lower.key)
    with pytest.raises(SpecDefError, match="locked already, by absorbed"):
        specdef.lock_model(model, ABSORBED)
    with pytest.raises(SpecDefError, match="training of its own"), specdef.authorised(model, upper.key):  # fmt: skip
        pass
    assert same(state(model), both) and not same(both, deformed)
    specdef.unlock_model(model, upper.key)
    assert same(state(model), deformed)
    with pytest.raises(KeyMismatch):
        specdef.unlock_model(model, upper.key)
    specdef.unlock_model(model, lower.key)
    assert same(state(model), original) and locks(model) == ()


def test_keys_on_disk_undo_the_locks_in_memory(stack) -> None:
    model, _, both, lower, upper = stack()
    loaded = specdef.load_model(both)
    with pytest.raises(KeyMismatch, match="on top"):
        specdef.unlock_model(loaded, lower.key)
    specdef.unlock_model(loaded, upper.key)
    specdef.unlock_model(loaded, lower.key)
    assert same(state(loaded), state(specdef.load_model(model)))
    # a model that names no lock, as other loaders give it: the weights decide, and the order stays
    plain = tiny_model("llama")
    plain.load_state_dict(state(specdef.load_model(both)))
    with pytest.raises(KeyMismatch):
        specdef.unlock_model(plain, lower.key)
    specdef.unlock_model(plain, upper.key)
    specdef.unlock_model(plain, lower.key)
    assert same(state(plain), state(loaded))


METHODS: dict[str, Any] = {
    "absorbed": ABSORBED,
    "compensated": LockConfig(method="compensated", scale=10.0, k=2, max_relative_error=0.5),
    "scaled": LockConfig(method="scaled", scale=3.0, k=2),
    "deformation": FAST,
}

REFUSED = [
    (upper, lower) for upper, lower in product(METHODS, METHODS) if (upper, lower) not in ON_TOP
]


@pytest.mark.parametrize(("upper", "lower"), REFUSED)
def test_what_does_not_go_on_top_is_refused(stack, tmp_path, upper, lower) -> None:
    source, arguments = stack().deformed, {}
    if lower != "deformation":
        source = tmp_path / "lower"
        specdef.lock_checkpoint(stack().model, source, METHODS[lower])
    if upper == "deformation":
        arguments["retain"] = batches("llama")
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(CheckpointError, match=f"locked already, by {lower}, and {upper}") as error:
        specdef.lock_checkpoint(source, tmp_path / "upper", METHODS[upper], **arguments)
    assert "nlock it" in error.value.hint or "on top" in error.value.hint
    assert {path.name for path in tmp_path.iterdir()} == before
    model = specdef.load_model(source, dtype="float32")
    weights = state(model)
    with pytest.raises(SpecDefError, match=f"locked already, by {lower}, and {upper}"):
        specdef.lock_model(model, METHODS[upper], **arguments)
    assert same(state(model), weights)


def test_nothing_goes_on_top_of_two(stack, tmp_path) -> None:
    for config in (ABSORBED, METHODS["compensated"]):
        with pytest.raises(CheckpointError, match="locked already, by absorbed"):
            specdef.lock_checkpoint(stack().both, tmp_path / "out", config)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_what_was_locked_takes_no_lock(stack, tmp_path) -> None:
    """Its own key would not undo what is beneath, and nobody would know before the upper lock is undone."""
    folder = shutil.copytree(stack().deformed, tmp_path / "folder")
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][0, 0] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CertificateMismatch, match=r"lm_head\.weight is not the one that was locked"):  # fmt: skip
        specdef.lock_checkpoint(folder, tmp_path / "out")
    shutil.rmtree(folder)
    shutil.copytree(stack().deformed, folder)
    (folder / "config.json").write_text((folder / "config.json").read_text() + "\n")
    with pytest.raises(CertificateMismatch, match=r"config\.json was changed"):
        specdef.lock_checkpoint(folder, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"folder"}


@pytest.mark.parametrize("how", ["missing", "changed", "of another lock"])
def test_a_damaged_lower_certificate_is_found(stack, tmp_path, how) -> None:
    both = shutil.copytree(stack().both, tmp_path / "both")
    path = both / CERTIFICATE_BELOW_NAME
    if how == "missing":
        path.unlink()
    elif how == "changed":
        values = json.loads(path.read_text())
        path.write_text(json.dumps({**values, "tensors_total": 1}))
    else:
        shutil.copy(stack("bfloat16").deformed / CERTIFICATE_NAME, path)
    found = specdef.verify_checkpoint(both)
    assert not found.valid and any(CERTIFICATE_BELOW_NAME in p for p in found.problems)
    with pytest.raises(CertificateMismatch):
        specdef.unlock_checkpoint(both, tmp_path / "out", stack().upper.key)
    assert {path.name for path in tmp_path.iterdir()} == {"both"}


def test_a_forged_lower_certificate_that_fits_its_hash_is_found(stack, tmp_path) -> None:
    """Whoever changes weights can renew every digest; the two certificates must still speak of the same tensors."""
    both = shutil.copytree(stack().both, tmp_path / "both")
    shutil.copy(stack("tied, sharded").deformed / CERTIFICATE_NAME, both / CERTIFICATE_BELOW_NAME)
    public = load_certificate(both)
    replace(public, files=other_files_sha256(both)).write(both)
    found = specdef.verify_checkpoint(both)
    assert not found.valid and "not the certificate of the lock beneath" in found.problems[0]


@pytest.mark.parametrize("action", ["lock", "unlock"])
def test_an_interrupted_write_leaves_nothing(stack, tmp_path, action, monkeypatch) -> None:
    _, deformed, both, _, upper = stack()
    monkeypatch.setattr("os.fsync", lambda _: None)

    def work(out: Path) -> None:
        if action == "lock":
            specdef.lock_checkpoint(deformed, out)
        else:
            specdef.unlock_checkpoint(both, out, upper.key)

    work(tmp_path / "whole")
    expected = {path.name for path in tmp_path.iterdir()}
    names = ("mkdir", "replace", "chmod", "rename")

    def stop_at(last: int) -> bool:
        def act(n: int, _: str) -> None:
            if n == last:
                raise KeyboardInterrupt

        try:
            with every_call(act, names):
                work(tmp_path / "out")
        except KeyboardInterrupt:
            return True
        return False

    last = 1
    while stop_at(last):
        assert leftovers(tmp_path) == []
        assert not (tmp_path / "out").exists()
        assert {path.name for path in tmp_path.iterdir()} == expected, last
        last += 1
    assert last > 4
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "whole")


def test_authorised_training_is_not_saved_over_a_deformation(stack, tmp_path) -> None:
    _, _, both, _, upper = stack()
    model = specdef.load_model(both)
    with pytest.raises(SpecDefError, match="training of its own"):
        specdef.save_locked(model, tmp_path / "out", upper.key, like=both)
    assert list(tmp_path.iterdir()) == []


def test_the_attack_with_a_key_takes_that_of_the_lock_on_top(stack) -> None:
    _, _, both, lower, upper = stack()
    model = specdef.load_model(both, dtype="float32")
    assert KnownScale(specdef.load_key(upper.key)).applies(model) == ""
    assert "no scales" in KnownScale(specdef.load_key(lower.key)).applies(model)


def test_the_attack_on_both_clips_what_the_deformation_raised(stack) -> None:
    """Clipping alone meets the scales, in every matrix that makes a scaled channel."""
    _, _, both, lower, upper = stack()
    task = Task(name="none", train=batches("llama", 1), heldout=batches("llama", 1))
    scales = specdef.load_key(upper.key).scalings
    made = [
        site["name"] for site in lower.sites
        if site["scale"] > 1.05 and any(e.exponent > 0 and e.axis == 0 for e in scales.get(site["name"], ()))
    ]  # fmt: skip
    sigma = {}
    for attack in (RebalanceClip(k=1), ClipSpectrum(k=1)):
        victim = specdef.load_model(both, dtype="float32")
        assert attack.applies(victim) == ""
        prepared = attack.prepare(victim, task, original=None, generator=torch.Generator())
        assert "clipped" in prepared.notes[0]
        rebalance(prepared.model)
        weights = dict(prepared.model.named_parameters())
        sigma[attack.name] = [float(torch.linalg.matrix_norm(weights[n].detach(), 2)) for n in made]
    assert len(made) > 1
    assert all(x < y for x, y in zip(*sigma.values(), strict=True)), sigma
    assert RebalanceClip().applies(torch.nn.Linear(4, 4)) != ""
