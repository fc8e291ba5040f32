"""Bad models, keys and certificates: one clear error or a named problem, the right exit code, nothing half-written."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from helpers import leftovers, raw_file, snapshot
from specdef import (
    CertificateMismatch,
    CheckpointError,
    Key,
    KeyMismatch,
    LockConfig,
    SelectionError,
    SpecDefError,
    Verification,
    load_key,
    lock_checkpoint,
    unlock_checkpoint,
    verify_checkpoint,
)
from specdef.models.tiny import save_tiny
from specdef.weights.atomic import atomic_file
from specdef.weights.folder import CERTIFICATE_NAME, COMPENSATION_NAME, INDEX_NAME
from specdef.weights.header import read_header

METHODS = {
    "absorbed": LockConfig(),
    "compensated": LockConfig(method="compensated", scale=100.0, k=4, num_layers=1),
    "scaled": LockConfig(method="scaled", scale=100.0, k=4, num_layers=1),
}
WEIGHTS = "model.safetensors"
SMALL: dict[str, Any] = {"num_hidden_layers": 1}


@dataclass(frozen=True)
class Locked:
    """A tiny model, locked."""

    source: Path
    folder: Path
    key: Path


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Make two models of the same shape."""
    root = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("first", "second")):
        save_tiny("llama", root / name, seed=seed, **SMALL)
        (root / name / "tokenizer.json").write_text('{"version": "1.0"}')
    return {name: root / name for name in ("first", "second")}


@pytest.fixture(scope="module")
def locks(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Locked]:
    root = tmp_path_factory.mktemp("locks")
    out = {}
    for method, config in METHODS.items():
        for model, source in models.items():
            name = method if model == "first" else f"{method} second"
            certificate = lock_checkpoint(source, root / name, config)
            out[name] = Locked(source, root / name, Path(certificate.key))
    return out


@pytest.fixture(params=sorted(METHODS))
def locked(request: pytest.FixtureRequest, locks: dict[str, Locked], tmp_path: Path) -> Locked:
    """Return a copy of a lock of each method, to damage."""
    original = locks[request.param]
    shutil.copytree(original.folder, tmp_path / "locked")
    shutil.copy(original.key, tmp_path / "key.safetensors")
    return Locked(original.source, tmp_path / "locked", tmp_path / "key.safetensors")


def assert_verify_and_unlock_refuse(
    locked: Locked, names: str, unlock_error: type[SpecDefError] = CertificateMismatch
) -> None:
    """Assert that verification names what is wrong, with or without the key, and that nothing is unlocked."""
    for key in (None, locked.key):
        verification = verify_checkpoint(locked.folder, key=key)
        assert not verification.valid
        assert any(names in problem for problem in verification.problems), verification.problems
    assert_unlock_refuses(locked, unlock_error)


def assert_unlock_refuses(locked: Locked, expected: type[SpecDefError]) -> SpecDefError:
    """Assert that unlocking is refused and leaves nothing."""
    out = locked.folder.with_name("restored")
    before = snapshot(locked.folder.parent)
    with pytest.raises(expected) as caught:
        unlock_checkpoint(locked.folder, out, locked.key)
    assert caught.value.exit_code == (1 if isinstance(caught.value, CertificateMismatch) else 2)
    assert not out.exists()
    assert snapshot(locked.folder.parent) == before
    assert leftovers(locked.folder.parent) == []
    return caught.value


def flip(path: Path, position: int, mask: int = 1) -> None:
    """Flip bits of one byte of a file."""
    data = bytearray(path.read_bytes())
    data[position] ^= mask
    path.write_bytes(data)


# --- the undamaged case, so that what follows can fail for one reason only


def test_undamaged(locked: Locked) -> None:
    verification = verify_checkpoint(locked.folder, key=locked.key)
    assert (verification.valid, verification.key_matches) == (True, True)
    out = locked.folder.with_name("restored")
    assert unlock_checkpoint(locked.folder, out, locked.key).sha256_equal
    assert snapshot(out) == snapshot(locked.source)


def test_exit_codes() -> None:
    assert CertificateMismatch("x").exit_code == 1
    for error in (CheckpointError, SelectionError, SpecDefError, KeyMismatch):
        assert error("x").exit_code == 2


# --- changed models


def test_one_changed_byte_of_every_tensor(locked: Locked) -> None:
    path = locked.folder / WEIGHTS
    header = read_header(path)
    clean = path.read_bytes()
    for name, info in header.tensors.items():
        flip(path, header.data_start + info.begin + info.nbytes // 2)
        verification = verify_checkpoint(locked.folder)
        assert [p for p in verification.problems if name in p], name
        assert not verification.valid
        path.write_bytes(clean)
    flip(path, len(clean) - 1)
    last = list(header.tensors)[-1]
    assert_verify_and_unlock_refuse(locked, last)


@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "tokenizer.json", COMPENSATION_NAME]
)
@pytest.mark.parametrize("change", ["edited", "removed"])
def test_a_changed_file(name: str, change: str, locked: Locked) -> None:
    path = locked.folder / name
    if not path.exists():
        pytest.skip("this lock has no such file")
    if change == "removed":
        path.unlink()
    elif name == COMPENSATION_NAME:
        flip(path, -1)
    else:
        path.write_text(path.read_text() + "\n")
    try:
        verification = verify_checkpoint(locked.folder)
    except CheckpointError as error:
        assert name in str(error)
    else:
        assert not verification.valid
        assert any(name in problem for problem in verification.problems)


def test_a_changed_config_is_not_unlocked(locked: Locked) -> None:
    path = locked.folder / "config.json"
    path.write_text(path.read_text().replace("{", '{"hidden_act": "relu",', 1))
    assert_verify_and_unlock_refuse(locked, "config.json", SpecDefError)


def test_an_edited_model_card_is_fine(locked: Locked) -> None:
    (locked.folder / "README.md").write_text("edited")
    assert verify_checkpoint(locked.folder, key=locked.key).valid


@pytest.mark.parametrize(
    "change",
    ["dropped tensor", "added tensor", "renamed tensor", "swapped tensors", "other dtype", "other shape", "metadata",
     "truncated", "lying header"],
)  # fmt: skip
def test_a_changed_layout(change: str, locked: Locked) -> None:
    path = locked.folder / WEIGHTS
    tensors = load_file(path)
    first, second = "model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight"
    metadata = {"format": "pt"}
    names = first
    match change:
        case "dropped tensor":
            del tensors[first]
        case "added tensor":
            tensors[names := "backdoor.weight"] = torch.ones(2, 2)
        case "renamed tensor":
            tensors["model.layers.0.mlp.gate.weight"] = tensors.pop(first)
        case "swapped tensors":
            tensors[first], tensors[second] = tensors[second], tensors[first]
        case "other dtype":
            tensors[first] = tensors[first].view(torch.int32)  # the same bytes
        case "other shape":
            tensors[first] = tensors[first].reshape(-1, 2)  # the same bytes
        case "metadata":
            metadata["format"] = "tf"
            names = WEIGHTS
    if change == "truncated":
        path.write_bytes(path.read_bytes()[:-4])
    elif change == "lying header":
        path.write_bytes(raw_file(b"{}", bytes(8), length=2**60))
    else:
        save_file(tensors, path, metadata=metadata)
    for key in (None, locked.key):
        try:
            verification = verify_checkpoint(locked.folder, key=key)
        except CheckpointError as error:
            assert WEIGHTS in str(error) or names in str(error)
        else:
            assert not verification.valid
            problems = " ".join(verification.problems)
            assert names in problems or WEIGHTS in problems
    assert_unlock_refuses(locked, SpecDefError)


@settings(deadline=None, max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip
@given(place=st.floats(0, 1, exclude_max=True), mask=st.integers(1, 255), header=st.booleans())
def test_any_flipped_byte_of_the_weights_is_detected(
    place: float, mask: int, header: bool, flipped: Callable[[int, int], Verification | None]
) -> None:
    size = len(flipped.raw) if header else flipped.size  # type: ignore[attr-defined]
    position = int(place * size)
    verification = flipped(position, mask)
    assert verification is None or not verification.valid


def test_flipped_bytes_all_over_the_header_are_detected(
    flipped: Callable[[int, int], Verification | None],
) -> None:
    raw, missed = flipped.raw, []  # type: ignore[attr-defined]
    dtypes = [i for i in range(len(raw)) if raw[i : i + 3] == b"F32"]
    for position in [*range(0, len(raw), 4), *dtypes]:
        # 0x0F takes F32 to I32
        mask = 0x0F if raw[position] == ord("F") else (0x01, 0x04, 0x10)[position % 3]
        verification = flipped(position, mask)
        if verification is not None and verification.valid:
            missed.append((position, mask))
    assert missed == []


@pytest.fixture(scope="module")
def flipped(
    locks: dict[str, Locked], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[int, int], Verification | None]]:
    """Return a function that verifies the model with one byte flipped; None where it cannot be opened at all."""
    folder = tmp_path_factory.mktemp("flipped") / "locked"
    shutil.copytree(locks["absorbed"].folder, folder)
    path = folder / WEIGHTS
    clean = path.read_bytes()

    def verify(position: int, mask: int) -> Verification | None:
        data = bytearray(clean)
        data[position] ^= mask
        path.write_bytes(data)
        try:
            return verify_checkpoint(folder)
        except CheckpointError:
            return None

    verify.raw = read_header(path).raw  # type: ignore[attr-defined]
    verify.size = len(clean)  # type: ignore[attr-defined]
    yield verify
    path.write_bytes(clean)
    assert verify_checkpoint(folder).valid


# --- wrong and damaged keys


@pytest.mark.parametrize("other", ["same method", "other method"])
def test_the_key_of_another_model(
    other: str, locked: Locked, locks: dict[str, Locked], request: pytest.FixtureRequest
) -> None:
    method = request.node.callspec.params["locked"]
    wrong = locks[
        f"{method} second"
        if other == "same method"
        else {"absorbed": "scaled", "compensated": "absorbed", "scaled": "compensated"}[method]
    ]
    verification = verify_checkpoint(locked.folder, key=wrong.key)
    assert (verification.valid, verification.key_matches) == (False, False)
    assert any("key" in problem for problem in verification.problems)
    error = assert_unlock_refuses(Locked(locked.source, locked.folder, wrong.key), KeyMismatch)
    assert error.hint


def test_a_key_that_is_no_key(locked: Locked) -> None:
    cases: dict[str, Callable[[Path], object]] = {
        "missing": lambda p: p.unlink(missing_ok=True),
        "empty": lambda p: p.write_bytes(b""),
        "text": lambda p: p.write_text("my key"),
        "weights": lambda p: shutil.copy(locked.folder / WEIGHTS, p),
        "no metadata": lambda p: save_file({"scalings": torch.zeros(1, 5)}, p),
    }
    for make in cases.values():
        make(locked.key)
        with pytest.raises(CheckpointError, match=r"key\.safetensors"):
            verify_checkpoint(locked.folder, key=locked.key)
        assert_unlock_refuses(locked, CheckpointError)
    locked.key.unlink()
    locked.key.mkdir()
    assert_unlock_refuses(locked, CheckpointError)


def same_transformation(a: Key, b: Key) -> bool:
    """Say whether two keys restore the same bytes."""
    return (
        a.lock_id == b.lock_id
        and a.residuals.keys() == b.residuals.keys()
        and all(torch.equal(a.residuals[name], b.residuals[name]) for name in a.residuals)
        and a.hashes == b.hashes
    )


def test_damaged_keys_restore_nothing_wrong(locked: Locked) -> None:
    clean = locked.key.read_bytes()
    good = load_key(locked.key)
    start = read_header(locked.key).data_start
    positions = [*range(0, start, start // 60), *range(start, len(clean), max(1, (len(clean) - start) // 60))]  # fmt: skip
    out = locked.folder.with_name("restored")
    tried = 0
    for position in positions:
        flip(locked.key, position, 0x10 if position % 2 else 0x01)
        try:
            key = load_key(locked.key)
        except CheckpointError as error:
            assert locked.key.name in str(error)
        else:
            if not same_transformation(key, good):
                # read as a key all the same: then unlocking has to notice, or not to need the damaged part
                tried += 1
                try:
                    unlock_checkpoint(locked.folder, out, locked.key)
                except (CheckpointError, KeyMismatch, CertificateMismatch):
                    assert not out.exists()
                else:
                    assert snapshot(out) == snapshot(locked.source)
                    shutil.rmtree(out)
        locked.key.write_bytes(clean)
    assert leftovers(locked.folder.parent) == []
    assert tried > 0  # the hashes, at the least, are read without being part of the key's identity


@pytest.mark.parametrize("cut", [0.1, 0.5, 0.9, 1.1])
def test_truncated_and_padded_keys(cut: float, locked: Locked) -> None:
    data = locked.key.read_bytes()
    locked.key.write_bytes((data + bytes(len(data)))[: int(cut * len(data))])
    assert_unlock_refuses(locked, CheckpointError)


@pytest.mark.parametrize("locked", ["absorbed", "compensated"], indirect=True)
@pytest.mark.parametrize(
    "field,value",
    [(field, value) for field in ("names", "hashes", "config", "method", "lock_id", "format")
     for value in (None, "", "null", "[]", "{}", "3", '["x"]', '{"x": 1}', '{"x": [1]}', "{")],
)  # fmt: skip
def test_keys_whose_metadata_is_wrong(field: str, value: str | None, locked: Locked) -> None:
    with safe_open(locked.key, "pt") as file:
        metadata = dict(file.metadata())
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if value is None:
        del metadata[field]
    else:
        metadata[field] = value
    save_file(tensors, locked.key, metadata)
    out = locked.folder.with_name("restored")
    try:
        unlock_checkpoint(locked.folder, out, locked.key)
    except SpecDefError as error:
        assert str(error)
        assert not out.exists()
    else:
        assert field in ("hashes", "config")  # hashes and recipe are for the record
        assert snapshot(out) == snapshot(locked.source)


# --- tampered certificates


def certificate_values(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / CERTIFICATE_NAME).read_text()))


def write_certificate(folder: Path, values: dict[str, Any], *, forge: bool) -> None:
    """Write a certificate; forged, its own checksum is made to fit."""
    if forge:
        values = {name: value for name, value in values.items() if name != "sha256"}
        text = json.dumps(values, sort_keys=True, separators=(",", ":"))
        values["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (folder / CERTIFICATE_NAME).write_text(json.dumps(values))


def changed(value: Any) -> Any:
    """Return another value of the same kind."""
    match value:
        case bool():
            return not value
        case int():
            return value + 1
        case float():
            return 2 * value + 1  # one more is the same number above 2^53
        case str():
            return f"{value}x"
        case list():
            return [*value, "x"]
        case dict():
            return {**value, "x": "y"}
    return 0


def test_every_field_of_the_certificate_is_protected(locked: Locked) -> None:
    values = certificate_values(locked.folder)
    assert len(values) > 15
    for field in values:
        write_certificate(locked.folder, values | {field: changed(values[field])}, forge=False)
        if field == "format":
            with pytest.raises(CheckpointError, match="not a certificate of this version"):
                verify_checkpoint(locked.folder)
            assert_unlock_refuses(locked, CheckpointError)
        else:
            assert_verify_and_unlock_refuse(locked, "certificate was changed")
        removed = {name: value for name, value in values.items() if name != field}
        write_certificate(locked.folder, removed, forge=False)
        assert_unlock_refuses(locked, SpecDefError)
    added = {**values, "extra": 1}
    write_certificate(locked.folder, added, forge=False)
    assert_verify_and_unlock_refuse(locked, "certificate was changed")


def test_forged_hashes_do_not_fit_the_weights(locked: Locked) -> None:
    values = certificate_values(locked.folder)
    name = "model.layers.0.mlp.gate_proj.weight"
    for part in ("sha256", "sha256_original"):
        row = values["tensors"][name] | {part: "0" * 64}
        forged = values | {"tensors": values["tensors"] | {name: row}}
        write_certificate(locked.folder, forged, forge=True)
        if part == "sha256":
            assert_verify_and_unlock_refuse(locked, name)
        else:  # that takes the key to notice
            verification = verify_checkpoint(locked.folder, key=locked.key)
            assert (verification.valid, verification.key_matches) == (False, False)
            assert_unlock_refuses(locked, CertificateMismatch)
    forged = values | {"files": values["files"] | {"config.json": "0" * 64}}
    write_certificate(locked.folder, forged, forge=True)
    assert any("config.json" in p for p in verify_checkpoint(locked.folder).problems)
    write_certificate(locked.folder, values | {"lock_id": "0" * 64}, forge=True)
    assert verify_checkpoint(locked.folder, key=locked.key).key_matches is False
    assert_unlock_refuses(locked, KeyMismatch)


@pytest.mark.parametrize("locked", ["compensated"], indirect=True)
@pytest.mark.parametrize("wrong", [None, [], {}, "x", 3, True, [1], {"x": 1}, {"x": {}}], ids=repr)
def test_forged_fields_of_the_wrong_kind_are_one_clear_error(wrong: Any, locked: Locked) -> None:
    values = certificate_values(locked.folder)
    for field in values:
        if field in ("sha256", "format"):
            continue
        write_certificate(locked.folder, values | {field: wrong}, forge=True)
        try:
            verification = verify_checkpoint(locked.folder, key=locked.key)
        except SpecDefError as error:
            assert str(error)
        else:
            if field in ("tensors", "lock_id"):
                assert not verification.valid, field
        out = locked.folder.with_name("restored")
        try:
            unlock_checkpoint(locked.folder, out, locked.key)
        except SpecDefError:
            assert not out.exists()
        else:
            assert field not in ("tensors", "lock_id")
            shutil.rmtree(out)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 10**5, "\x00"])
def test_a_certificate_that_is_none(text: str, locked: Locked) -> None:
    (locked.folder / CERTIFICATE_NAME).write_text(text)
    with pytest.raises(CheckpointError, match="JSON"):
        verify_checkpoint(locked.folder)
    assert_unlock_refuses(locked, CheckpointError)
    (locked.folder / CERTIFICATE_NAME).unlink()
    with pytest.raises(CheckpointError, match="no specdef certificate"):
        verify_checkpoint(locked.folder)
    assert_unlock_refuses(locked, CheckpointError)


# --- models that cannot be locked


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def edit_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


GATE = "model.layers.0.mlp.gate_proj.weight"
DAMAGE: dict[str, Callable[[Path], object]] = {
    "NaN": lambda f: edit_tensors(f, lambda t: t[GATE].view(-1)[7].fill_(math.nan)),
    "Inf": lambda f: edit_tensors(f, lambda t: t[GATE].view(-1)[7].fill_(-math.inf)),
    "NaN in a tensor no lock touches": lambda f: edit_tensors(
        f, lambda t: t["model.embed_tokens.weight"][0].fill_(math.nan)
    ),
    "empty folder": lambda f: [p.unlink() for p in f.iterdir()],
    "no weights": lambda f: (f / WEIGHTS).unlink(),
    "truncated weights": lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-1]),
    "lying header": lambda f: (f / WEIGHTS).write_bytes(raw_file(b"{}", length=2**63)),
    "single file and index": lambda f: (f / INDEX_NAME).write_text('{"weight_map": {}}'),
    "missing shard": lambda f: [
        (f / WEIGHTS).unlink(),
        (f / INDEX_NAME).write_text('{"weight_map": {"a": "model-00001-of-00001.safetensors"}}'),
    ],
    "index outside": lambda f: [
        (f / WEIGHTS).rename(f.parent / "outside.safetensors"),
        (f / INDEX_NAME).write_text('{"weight_map": {"a": "../outside.safetensors"}}'),
    ],
    "link outside": lambda f: (f / "vocab.txt").symlink_to("/etc/hostname"),
    "broken link": lambda f: (f / "vocab.txt").symlink_to("nowhere"),
    "quantised": lambda f: edit_config(f, quantization_config={"quant_method": "gptq"}),
    "fp8": lambda f: edit_tensors(f, lambda t: t.update({GATE: t[GATE].to(torch.float8_e4m3fn)})),
    "no config": lambda f: (f / "config.json").unlink(),
    "empty config": lambda f: (f / "config.json").write_text("{}"),
    "broken config": lambda f: (f / "config.json").write_text("{"),
    "binary config": lambda f: (f / "config.json").write_bytes(bytes(range(256))),
    "unknown family": lambda f: edit_config(f, model_type="made-up"),
    "family of a wrong kind": lambda f: edit_config(f, model_type=["llama"]),
    "family is a number": lambda f: edit_config(f, model_type=3),
    "layers missing": lambda f: edit_config(f, num_hidden_layers=7),
    "sizes of a wrong kind": lambda f: edit_config(f, hidden_size="x", num_attention_heads=[]),
    "no heads": lambda f: edit_config(f, num_attention_heads=0, num_key_value_heads=0, head_dim=0),
    "negative heads": lambda f: edit_config(f, num_attention_heads=-4, head_dim=-12),
    "tensors of other shapes": lambda f: edit_tensors(
        f, lambda t: t.update({GATE: t[GATE][:-1].clone()})
    ),
    "scalars": lambda f: edit_tensors(f, lambda t: t.update({GATE: torch.tensor(1.0)})),
    "empty tensors": lambda f: edit_tensors(f, lambda t: t.update({n: v[:0] for n, v in t.items()})),
    "integers": lambda f: edit_tensors(f, lambda t: t.update({n: v.int() for n, v in t.items()})),
    "zero matrices": lambda f: edit_tensors(f, lambda t: [v.zero_() for v in t.values()]),
    "subnormal": lambda f: edit_tensors(f, lambda t: [v.mul_(1e-40) for v in t.values()]),
    "huge": lambda f: edit_tensors(f, lambda t: [v.fill_(3e38) for v in t.values()]),
}  # fmt: skip


# What a method can live with: it locks, and then it has to be right.
TOLERATED = {
    "absorbed": {"layers missing", "tensors of other shapes"},
    # a projection needs matrices, not the configuration that says how they are wired
    "compensated": {"layers missing", "tensors of other shapes", "empty config", "unknown family", "scalars",
        "family of a wrong kind", "family is a number", "sizes of a wrong kind", "no heads", "negative heads", "subnormal"},
    "scaled": {"layers missing", "tensors of other shapes", "empty config", "unknown family", "scalars", "no config",
        "family of a wrong kind", "family is a number", "sizes of a wrong kind", "no heads", "negative heads", "subnormal"},
}  # fmt: skip


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("damage", DAMAGE)
def test_locking_a_damaged_model(
    damage: str, method: str, models: dict[str, Path], tmp_path: Path
) -> None:
    source = tmp_path / "model"
    shutil.copytree(models["first"], source)
    DAMAGE[damage](source)
    place = tmp_path / "place"
    place.mkdir()
    before = snapshot(source)
    try:
        lock_checkpoint(source, place / "out", METHODS[method])
    except SpecDefError as error:
        assert error.exit_code == 2
        assert len(str(error)) < 2000
        assert list(place.iterdir()) == []
    else:
        assert damage in TOLERATED[method]
        assert verify_checkpoint(place / "out", key=place / "out.key.safetensors").valid
    assert snapshot(source) == before


def test_what_is_in_the_way_of_a_lock(models: dict[str, Path], tmp_path: Path) -> None:
    source = models["first"]
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    before = snapshot(tmp_path)
    for out in ("file", "full", "link", "file/below"):
        with pytest.raises(CheckpointError, match=r"already exists|cannot be written"):
            lock_checkpoint(source, tmp_path / out)
    with pytest.raises(CheckpointError, match="inside the locked folder"):
        lock_checkpoint(source, tmp_path / "out", key_path=tmp_path / "out" / "key")
    with pytest.raises(CheckpointError):
        lock_checkpoint(source, tmp_path / "out", key_path=tmp_path / "full")  # a folder
    with pytest.raises(CheckpointError):
        lock_checkpoint(source, tmp_path / "out", key_path=tmp_path / "file" / "key")
    with pytest.raises(CheckpointError):
        lock_checkpoint(source, tmp_path / "out", key_path=tmp_path / "file")  # somebody's file
    assert snapshot(tmp_path) == before
    assert leftovers(tmp_path) == []
    (tmp_path / "empty").mkdir()
    lock_checkpoint(source, tmp_path / "empty")
    assert verify_checkpoint(tmp_path / "empty").valid


def test_the_key_of_another_lock_is_not_overwritten(
    models: dict[str, Path], locked: Locked, tmp_path: Path
) -> None:
    before = locked.key.read_bytes()
    with pytest.raises(CheckpointError, match="key of another lock"):
        lock_checkpoint(models["second"], tmp_path / "out", key_path=locked.key)
    assert locked.key.read_bytes() == before
    assert not (tmp_path / "out").exists()
    assert leftovers(tmp_path) == []


def test_a_locked_model_is_not_locked_again(locked: Locked, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="locked already"):
        lock_checkpoint(locked.folder, tmp_path / "out")


def test_the_key_is_for_its_owner_alone(locks: dict[str, Locked]) -> None:
    for lock in locks.values():
        assert lock.key.stat().st_mode & 0o077 == 0


def test_a_lock_that_fails_late_leaves_no_key(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a key without its lock blocks the next one ("is the key of another lock")
    import os

    def rename(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(CheckpointError, match="No space left"):
        lock_checkpoint(models["first"], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_no_weights_of_the_original_stay_beside_the_lock(
    models: dict[str, Path], tmp_path: Path
) -> None:
    source = tmp_path / "model"
    shutil.copytree(models["first"], source)
    for name in ("consolidated.safetensors", "pytorch_model.bin", "onnx/model.onnx"):
        (source / name).parent.mkdir(exist_ok=True)
        shutil.copy(source / WEIGHTS, source / name)
    certificate = lock_checkpoint(source, tmp_path / "out")
    assert set(certificate.dropped) == {"consolidated.safetensors", "pytorch_model.bin", "onnx/model.onnx"}  # fmt: skip
    original = hashlib.sha256((source / WEIGHTS).read_bytes()).hexdigest()
    assert original not in snapshot(tmp_path / "out").values()


def test_verify_of_what_is_no_lock(models: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no specdef certificate"):
        verify_checkpoint(models["first"])
    with pytest.raises(CheckpointError, match="is not a folder"):
        verify_checkpoint(tmp_path / "nowhere")


def test_the_original_of_another_model_is_noticed(locks: dict[str, Locked]) -> None:
    lock, other = locks["absorbed"], locks["absorbed second"]
    verification = verify_checkpoint(lock.folder, other.source, lock.key, dtypes=("float32",))
    assert (verification.valid, verification.source_matches) == (False, False)
    assert verification.key_matches
    good = verify_checkpoint(lock.folder, lock.source, lock.key, dtypes=("float32",))
    assert (good.valid, good.source_matches, good.bit_identical) == (True, True, True)


def test_keys_are_written_whole_or_not_at_all(locks: dict[str, Locked], tmp_path: Path) -> None:
    key = load_key(locks["compensated"].key)
    path = key.save(tmp_path / "key")
    before = path.read_bytes()
    with pytest.raises(RuntimeError, match="stop"), atomic_file(path) as work:
        work.write_bytes(before[:100])
        raise RuntimeError("stop")
    assert path.read_bytes() == before
    assert same_transformation(load_key(key.save(path)), key)  # its own key may be written again
