"""Opening a model folder: what agrees is read, everything else is one clear error."""

from __future__ import annotations

import json
import math
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from helpers import entry, raw_file, snapshot, write_folder, write_index
from specdef.errors import CheckpointError
from specdef.weights.checkpoint import Checkpoint, TensorFile
from specdef.weights.folder import INDEX_NAME
from specdef.weights.rewrite import copy_other_files
from specdef.weights.tensor_bytes import as_bytes, as_tensor, tensor_sha256

A, B = {"a": torch.ones(2, 3)}, {"b": torch.zeros(4)}
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
SINGLE = {"model.safetensors": A}
SHARDED = {ONE: A, TWO: B}


def refused(folder: Path, match: str) -> CheckpointError:
    """Assert that a folder is refused, and return the error."""
    with pytest.raises(CheckpointError, match=match) as caught:
        Checkpoint.open(folder)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return caught.value


def test_a_single_file(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_folder(tmp_path, SINGLE, config={"model_type": "x"}))
    assert checkpoint.names == ("a",)
    assert "a" in checkpoint and "b" not in checkpoint
    assert checkpoint.config == {"model_type": "x"}
    assert (checkpoint.shapes, checkpoint.nbytes) == ({"a": (2, 3)}, 24)
    assert torch.equal(checkpoint.read("a"), A["a"])
    with pytest.raises(CheckpointError, match="no such tensor"):
        checkpoint.read("b")


def test_shards_behind_an_index(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(str(write_folder(tmp_path, SHARDED)))
    assert checkpoint.location == {"a": ONE, "b": TWO}
    assert checkpoint.config == {}
    assert torch.equal(checkpoint.read("b"), B["b"])


def test_one_file_of_another_name(tmp_path: Path) -> None:
    assert Checkpoint.open(write_folder(tmp_path, {"weights.safetensors": A})).names == ("a",)


def test_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "nowhere", tmp_path / "file", tmp_path / "file" / "below"):
        refused(path, "is not a folder")


def test_an_empty_folder(tmp_path: Path) -> None:
    refused(tmp_path, "holds no safetensors file")
    (tmp_path / "config.json").write_text("{}")
    refused(tmp_path, "holds no safetensors file")


def test_no_tensors(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(raw_file({"__metadata__": {"format": "pt"}}))
    refused(tmp_path, "holds no tensors")
    other = tmp_path / "index"
    other.mkdir()
    write_index(other, {})
    refused(other, "holds no tensors")


@pytest.mark.parametrize("lost", [ONE, TWO])
def test_a_missing_shard(lost: str, tmp_path: Path) -> None:
    write_folder(tmp_path, SHARDED)
    (tmp_path / lost).unlink()
    assert refused(tmp_path, "shard is missing").path == tmp_path / lost


def test_a_shard_that_is_a_folder_or_a_broken_link(tmp_path: Path) -> None:
    write_folder(tmp_path, SHARDED)
    (tmp_path / ONE).unlink()
    (tmp_path / ONE).mkdir()
    refused(tmp_path, "shard is missing")
    (tmp_path / ONE).rmdir()
    (tmp_path / ONE).symlink_to("nowhere")
    refused(tmp_path, "shard is missing")


def test_an_extra_shard(tmp_path: Path) -> None:
    write_folder(tmp_path, SHARDED)
    save_file(B, tmp_path / "model-00003-of-00003.safetensors")
    assert "00003-of-00003" in str(refused(tmp_path, "not named in the index"))


def test_shards_without_an_index(tmp_path: Path) -> None:
    write_folder(tmp_path, SHARDED, index=False)
    refused(tmp_path, "shards but no")


def test_a_truncated_shard(tmp_path: Path) -> None:
    write_folder(tmp_path, SHARDED)
    os.truncate(tmp_path / TWO, (tmp_path / TWO).stat().st_size - 1)
    assert refused(tmp_path, "the file has").path == tmp_path / TWO


@pytest.mark.parametrize(
    "name",
    ["../outside.safetensors", "sub/../../outside.safetensors", "/etc/passwd", "", ".", "..", "a\\b.safetensors",
     "..\\outside.safetensors", "C:\\outside.safetensors", "\0", "nul\0.safetensors", "x" * 5000 + ".safetensors",
     "./" + ONE, "sub//" + ONE, ONE + "/", "pytorch_model.bin", "config.json", "~/x.safetensors", "\ud800.safetensors"],
)  # fmt: skip
def test_an_index_that_points_anywhere_else(name: str, tmp_path: Path) -> None:
    save_file(B, tmp_path / "outside.safetensors")
    folder = write_folder(tmp_path / "model", SHARDED, config={})
    (folder / "pytorch_model.bin").write_bytes(b"")
    write_index(folder, {"a": ONE, "b": name})
    refused(folder, ".")


def test_an_index_with_an_absolute_path_into_the_folder(tmp_path: Path) -> None:
    write_folder(tmp_path, SHARDED)
    write_index(tmp_path, {"a": ONE, "b": str(tmp_path / TWO)})
    refused(tmp_path, "leaves the folder")


@pytest.mark.parametrize("what", ["model.safetensors", "config.json", "extra.txt", INDEX_NAME])
@pytest.mark.parametrize("absolute", [True, False])
def test_links_that_leave_the_folder(what: str, absolute: bool, tmp_path: Path) -> None:
    secret = write_folder(tmp_path / "secret", SINGLE, index=True, config={"secret": 1})
    (secret / "extra.txt").write_text("secret")
    folder = tmp_path / "model"
    folder.mkdir()
    if what not in ("model.safetensors", INDEX_NAME):
        save_file(A, folder / "model.safetensors")
    (folder / what).symlink_to(secret / what if absolute else Path("../secret") / what)
    with pytest.raises(CheckpointError, match="leaves the folder"):
        Checkpoint.open(folder).other_files()


def test_a_linked_folder_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "key.txt").write_text("secret")
    folder = write_folder(tmp_path / "model", SINGLE)
    (folder / "sub").symlink_to(tmp_path / "secret")
    assert Checkpoint.open(folder).other_files() == ([], [])


def test_links_in_a_circle(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", SINGLE)
    (folder / "config.json").symlink_to("config.json")
    refused(folder, ".")


def test_the_layout_of_the_hub_cache(tmp_path: Path) -> None:
    # models--org--name/{blobs, snapshots/REVISION}: everything in a snapshot is a link to a blob
    plain = write_folder(tmp_path / "plain", SHARDED, config={"model_type": "x"})
    (plain / "tokenizer.json").write_text("{}")
    (plain / "sub").mkdir()
    (plain / "sub" / "config.json").write_text("{}")
    repo = tmp_path / "models--org--name"
    snapshot_folder = repo / "snapshots" / "0123abcd"
    (repo / "blobs").mkdir(parents=True)
    for number, path in enumerate(sorted(p for p in plain.rglob("*") if p.is_file())):
        blob = repo / "blobs" / f"{number:064x}"
        blob.write_bytes(path.read_bytes())
        link = snapshot_folder / path.relative_to(plain)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    checkpoint = Checkpoint.open(snapshot_folder)
    assert torch.equal(checkpoint.read("b"), B["b"])
    (tmp_path / "out").mkdir()
    carried, dropped = copy_other_files(checkpoint, tmp_path / "out")
    assert (carried, dropped) == (["config.json", "tokenizer.json", "sub/config.json"], [])
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
    # but no link to the blobs of another model
    (snapshot_folder / "other.txt").symlink_to("../../../models--org--other/blobs/0")
    with pytest.raises(CheckpointError, match="leaves the folder"):
        checkpoint.other_files()


@pytest.mark.parametrize(
    "weight_map,match",
    [
        ({"a": TWO, "b": ONE}, "index says"),
        ({"a": ONE, "b": TWO, "c": TWO}, "the shards say nothing"),
        ({"a": ONE, "c": TWO}, "index says|says nothing"),
        ({"b": TWO}, "not named in the index"),
        ([], "no weight_map"),
        (None, "no weight_map"),
        ("model.safetensors", "no weight_map"),
        ({"a": ONE, "b": 2}, "no weight_map"),
        ({"a": [ONE]}, "no weight_map"),
    ],
)
def test_an_index_that_disagrees(weight_map: Any, match: str, tmp_path: Path) -> None:
    write_folder(tmp_path, SHARDED)
    write_index(tmp_path, weight_map)
    refused(tmp_path, match)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"weight_map"', "\ufeff{}", "[" * 10**5])
def test_an_index_that_is_no_index(text: str, tmp_path: Path) -> None:
    write_folder(tmp_path, SHARDED)
    (tmp_path / INDEX_NAME).write_text(text, encoding="utf-8")
    refused(tmp_path, "JSON|weight_map")


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    write_folder(tmp_path, {ONE: {**A, "c": torch.ones(1)}, TWO: {**A, **B}})
    error = refused(tmp_path, f"stands in {ONE} and in {TWO}")
    assert error.tensor == "a"


def test_a_single_file_and_an_index(tmp_path: Path) -> None:
    write_folder(tmp_path, {**SHARDED, **SINGLE}, index=False)
    write_index(tmp_path, {"a": ONE, "b": TWO})
    refused(tmp_path, "holds both")


class Malicious:
    """Unpickled, it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt"])
def test_pickles_are_never_opened(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / name).write_bytes(pickle.dumps(Malicious(tmp_path / "owned")))
    assert "save_pretrained" in refused(folder, rf"only pickled ones \({name}\)").hint
    # nor beside a good model, nor in the place of one
    write_folder(folder, SINGLE)
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.other_files() == ([], [name])
    (folder / "model.safetensors").write_bytes((folder / name).read_bytes())
    refused(folder, ".")
    assert not (tmp_path / "owned").exists()
    pickle.loads((folder / name).read_bytes())  # it would have
    assert (tmp_path / "owned").exists()


def test_an_adapter_alone(tmp_path: Path) -> None:
    write_folder(tmp_path, {"adapter_model.safetensors": A})
    assert "Merge" in refused(tmp_path, "none of which is a whole model").hint


def test_several_files_and_no_index(tmp_path: Path) -> None:
    write_folder(tmp_path, {"x.safetensors": A, "y.safetensors": B}, index=False)
    refused(tmp_path, "none of which is a whole model")


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b"null", b"3", b'"text"', bytes(100), b"\xff\xfe{\0}\0", b'{"a": 1} x', b"[" * 10**5,
     b'{"a": ' + b"9" * 10**5 + b"}"],
    ids=lambda data: repr(data[:12]),
)  # fmt: skip
def test_a_broken_config(data: bytes, tmp_path: Path) -> None:
    write_folder(tmp_path, SINGLE)
    (tmp_path / "config.json").write_bytes(data)
    assert refused(tmp_path, "JSON").path == tmp_path / "config.json"


@pytest.mark.parametrize("name", ["config.json", INDEX_NAME])
@pytest.mark.parametrize("kind", ["folder", "pipe", "dangling link"])
def test_json_that_is_no_file(name: str, kind: str, tmp_path: Path) -> None:
    write_folder(tmp_path, SHARDED, config={})
    (tmp_path / name).unlink()
    {
        "folder": lambda p: p.mkdir(),
        "pipe": os.mkfifo,
        "dangling link": lambda p: p.symlink_to("nowhere"),
    }[kind](tmp_path / name)
    refused(tmp_path, ".")


def test_a_pipe_in_the_place_of_the_weights(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    refused(tmp_path, "regular file")


def quantised(kind: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    plain = torch.ones(4, 4)
    byte = torch.ones(4, 4, dtype=torch.uint8)
    return {
        "gptq": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, {"w.weight": plain}),
        "unnamed": ({"quantization_config": {"bits": 4}}, {"w.weight": plain}),
        "text": ({"quantization_config": "fp8"}, {"w.weight": plain}),
        "list": ({"quantization_config": [1]}, {"w.weight": plain}),
        "compressed": ({"compression_config": {"format": "x"}}, {"w.weight": plain}),
        "fp8 weight": ({}, {"w.weight": plain.to(torch.float8_e4m3fn)}),
        "fp8 stacked": ({}, {"experts.down_proj": plain[None].to(torch.float8_e5m2)}),
        "int8 weight": ({}, {"w.weight": plain.to(torch.int8)}),
        "uint8 weight": ({}, {"w.weight": byte}),
        "scales": ({}, {"w.weight": plain.to(torch.int8), "w.scales": plain}),
        "scales alone": ({}, {"w.scales": plain}),
        "qweight": ({}, {"w.qweight": plain.to(torch.int32)}),
        "mxfp4": ({}, {"gate_up_proj_blocks": byte, "gate_up_proj_scales": byte.clone()}),
        "bitsandbytes": ({}, {"w.weight.absmax": plain, "w.weight.quant_state.x": byte}),
        "int8 bitsandbytes": ({}, {"w.weight": plain.to(torch.int8), "w.SCB": plain}),
        "fp8 scale": ({}, {"w.weight_scale_inv": plain}),
    }[kind]


@pytest.mark.parametrize(
    "kind",
    ["gptq", "unnamed", "text", "list", "compressed", "fp8 weight", "fp8 stacked", "int8 weight", "uint8 weight",
     "scales", "scales alone", "qweight", "mxfp4", "bitsandbytes", "int8 bitsandbytes", "fp8 scale"],
)  # fmt: skip
def test_quantised_weights_are_refused(kind: str, tmp_path: Path) -> None:
    config, tensors = quantised(kind)
    checkpoint = Checkpoint.open(
        write_folder(tmp_path, {"model.safetensors": tensors}, config=config)
    )
    with pytest.raises(CheckpointError, match="is quantised") as caught:
        checkpoint.require_float()
    assert "float checkpoint" in caught.value.hint


def test_what_only_looks_quantised_is_not(tmp_path: Path) -> None:
    tensors = {
        "attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.uint8),
        "attn.masked_bias": torch.tensor(True),
        "logit_scale": torch.tensor(1.0),
        "position_ids": torch.arange(4)[None],
        "w.weight": torch.ones(2, 2, dtype=torch.float16),
        "scale.weight": torch.ones(2),
    }
    config = {"quantization_config": None}
    write_folder(tmp_path, {"model.safetensors": tensors}, config=config)
    Checkpoint.open(tmp_path).require_float()


def test_other_files(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", SHARDED, config={"model_type": "x"})
    carried = ["LICENSE", "README.md", "config.json", "generation_config.json", "merges.txt", "tokenizer.json",
               "tokenizer.model", "vocab.pt.txt", "1_Pooling/config.json", "sub/deep/er/tokenizer.json"]  # fmt: skip
    dropped = ["consolidated.safetensors", "consolidated-00001-of-00005.safetensors", "pytorch_model.bin",
               "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json", "tf_model.h5", "MODEL.GGUF",
               "flax_model.msgpack", "model.fp16.safetensors", "training_args.bin", "model.safetensors.gz",
               "model.bin.bak", "onnx/model.onnx", "onnx/model.onnx_data", "onnx/model.onnx.data",
               "original/consolidated.00.pth", "sub/model.safetensors"]  # fmt: skip
    hidden = [".git/objects/pack.bin", ".cache/huggingface/x.metadata", ".specdef-old"]
    for name in [*carried, *dropped, *hidden]:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name != "config.json":
            path.write_bytes(name.encode())
    (folder / ".gitattributes").write_text("*.bin filter=lfs")
    out = tmp_path / "out"
    out.mkdir()
    found = copy_other_files(Checkpoint.open(folder), out)
    assert sorted(found[0]) == sorted([*carried, ".gitattributes"])
    assert sorted(found[1]) == sorted(dropped)
    # exactly these, with their bytes
    assert snapshot(out) == {n: h for n, h in snapshot(folder).items() if n in found[0]}


@pytest.mark.parametrize("kind", ["dangling link", "pipe"])
def test_other_files_that_cannot_be_copied(kind: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path, SINGLE)
    if kind == "pipe":
        os.mkfifo(folder / "tokenizer.json")
    else:
        (folder / "tokenizer.json").symlink_to("nowhere")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: is a broken link or no ordinary"):
        Checkpoint.open(folder).other_files()


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32", "F64", "I64", "BOOL", "C64", "F8_E4M3"])
@pytest.mark.parametrize("shape", [[], [0], [3], [2, 0, 3], [2, 3, 4]])
def test_bytes_to_tensor_and_back(dtype: str, shape: list[int], tmp_path: Path) -> None:
    from specdef.weights.header import DTYPE_BITS

    nbytes = math.prod(shape) * DTYPE_BITS[dtype] // 8
    data = bytes(i % 2 for i in range(nbytes))
    (tmp_path / "model.safetensors").write_bytes(raw_file({"w": entry(dtype, shape, 0, nbytes)}, data))  # fmt: skip
    checkpoint = Checkpoint.open(tmp_path)
    tensor = checkpoint.read("w")
    assert list(tensor.shape) == shape
    assert bytes(as_bytes(tensor)) == data
    with TensorFile(checkpoint, "w") as file:
        assert file.sha256() == tensor_sha256(tensor)


def test_unknown_dtypes_cannot_be_read() -> None:
    with pytest.raises(CheckpointError, match="F6_E2M3"):
        as_tensor(bytearray(3), "F6_E2M3", (4,))


def test_opening_reads_no_tensor(tmp_path: Path) -> None:
    # a sparse file of 200 GB opens at once
    begin = len(raw_file({"w": entry("F32", [50_000_000_000], 0, 200_000_000_000)}))
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw_file({"w": entry("F32", [50_000_000_000], 0, 200_000_000_000)}))
    os.truncate(path, begin + 200_000_000_000)
    assert Checkpoint.open(tmp_path).nbytes == 200_000_000_000


def test_names_of_any_script(tmp_path: Path) -> None:
    name = "schicht.größe.重み"
    write_folder(tmp_path, {"model.safetensors": {name: torch.ones(1)}})
    (tmp_path / "config.json").write_text(json.dumps({"ü": "ß"}, ensure_ascii=False), "utf-8")
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.names == (name,)
    assert checkpoint.config == {"ü": "ß"}
