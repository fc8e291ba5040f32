"""Streaming rewrite: untouched bytes stay, edited ones are those of a whole-tensor edit, memory stays bounded."""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from helpers import entry, raw_file, snapshot, tensor_hashes, write_folder
from specdef.errors import CheckpointError
from specdef.weights import rewrite as rewrite_module
from specdef.weights.checkpoint import Checkpoint, TensorFile
from specdef.weights.edit import Edit, OutOfRange, ReplaceEdit, ScaleEdit
from specdef.weights.header import read_header
from specdef.weights.rewrite import check_finite, copy_other_files, rewrite_tensors
from specdef.weights.tensor_bytes import TORCH_DTYPES, as_bytes

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def small_blocks(monkeypatch: pytest.MonkeyPatch, nbytes: int) -> None:
    """Cut tensors into blocks of this size."""
    monkeypatch.setattr(rewrite_module, "BLOCK_BYTES", nbytes)
    monkeypatch.setattr(TensorFile.blocks, "__defaults__", (nbytes,))


def tensors_of_all_kinds(seed: int = 0) -> dict[str, Tensor]:
    """Return tensors of every dtype torch can hold and of awkward shapes."""
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for name, dtype in TORCH_DTYPES.items():
        out[f"matrix.{name}"] = torch.randint(0, 2, (7, 5), generator=generator).to(dtype)
    for dtype in FLOATS:
        tag = str(dtype).removeprefix("torch.")
        out[f"stacked.{tag}"] = (torch.rand(4, 6, 5, generator=generator) + 1).to(dtype)
        out[f"conv.{tag}"] = (torch.rand(3, 2, 2, 3, generator=generator) + 1).to(dtype)
        out[f"vector.{tag}"] = (torch.rand(37, generator=generator) + 1).to(dtype)
        out[f"scalar.{tag}"] = torch.tensor(1.25, dtype=dtype)
        out[f"empty.{tag}"] = torch.empty(0, 3, dtype=dtype)
        out[f"hollow.{tag}"] = torch.empty(3, 0, 2, dtype=dtype)
    return out


def edits_of_all_kinds(tensors: dict[str, Tensor]) -> dict[str, Edit]:
    """Return edits that touch first, last and inner slices of every axis, behind a lead or not."""
    edits: dict[str, Edit] = {}
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS or tensor.ndim == 0 or name.startswith("matrix"):
            continue
        parts = []
        for axis, length in enumerate(tensor.shape):
            for position in sorted({0, length // 2, length - 1}) if length else ():
                parts.append(ScaleEdit(axis=axis, position=position, exponent=axis + 1))
        if name.startswith("stacked"):
            parts += [
                ScaleEdit(axis=2, position=4, exponent=3, lead=(1,)),
                ScaleEdit(axis=1, position=5, exponent=-2, lead=(3,)),
                ScaleEdit(axis=2, position=1, exponent=-1, lead=(0, 2)),
            ]
        edits[name] = tuple(parts)
    return edits


def edited_whole(tensor: Tensor, edit: Edit) -> Tensor:
    """Apply an edit to a whole tensor."""
    if isinstance(edit, ReplaceEdit):
        return edit.compute(tensor)
    out = tensor.clone()
    for part in edit:
        part.apply(out)
    return out


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bytes(as_bytes(a)) == bytes(as_bytes(b))


@pytest.fixture
def source(tmp_path: Path) -> Checkpoint:
    tensors = tensors_of_all_kinds()
    names = list(tensors)
    shards = {
        f"model-{i + 1:05d}-of-00003.safetensors": {n: tensors[n] for n in names[i::3]}
        for i in range(3)
    }
    return Checkpoint.open(write_folder(tmp_path / "source", shards))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def test_without_edits_every_file_is_the_same(source: Checkpoint, out: Path) -> None:
    hashes = rewrite_tensors(source, out, {})
    assert snapshot(out) == snapshot(source.folder)
    for shard in source.headers:
        for name, digest in tensor_hashes(source.folder / shard).items():
            assert hashes[name].before == hashes[name].after == digest
    assert list(hashes) == list(source.names)


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("block", [1, 7, 24, 64, 1000, 2**23])
def test_edits_in_blocks_are_edits_of_the_whole(
    block: int, workers: int, source: Checkpoint, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_blocks(monkeypatch, block)
    tensors = tensors_of_all_kinds()
    edits = edits_of_all_kinds(tensors)
    hashes = rewrite_tensors(source, out, edits, workers=workers)
    for shard, header in source.headers.items():
        # header bytes identical, prefix included
        assert (out / shard).read_bytes()[: header.data_start] == header.raw
        assert (out / shard).stat().st_size == (source.folder / shard).stat().st_size
        before, after = tensor_hashes(source.folder / shard), tensor_hashes(out / shard)
        written = load_file(out / shard)
        for name in header.tensors:
            assert (hashes[name].before, hashes[name].after) == (before[name], after[name])
            assert same_bits(written[name], edited_whole(tensors[name], edits.get(name, ())))
            if name not in edits:
                assert before[name] == after[name]
    assert any(h.before != h.after for h in hashes.values())


def test_edits_and_their_inverses_give_the_same_files(
    source: Checkpoint, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_blocks(monkeypatch, 16)
    edits = edits_of_all_kinds(tensors_of_all_kinds())
    first = rewrite_tensors(source, out, edits)
    back = {n: tuple(e.inverse() for e in edit) for n, edit in edits.items()}  # type: ignore[union-attr]
    (tmp_path / "back").mkdir()
    second = rewrite_tensors(Checkpoint.open(out), tmp_path / "back", back)
    assert snapshot(tmp_path / "back") == snapshot(source.folder)
    assert {n: (h.after, h.before) for n, h in first.items()} == {
        n: (h.before, h.after) for n, h in second.items()
    }


def test_hashing_alone_writes_nothing(source: Checkpoint, out: Path, tmp_path: Path) -> None:
    edits = edits_of_all_kinds(tensors_of_all_kinds())
    before = snapshot(tmp_path)
    hashed = rewrite_tensors(source, None, edits)
    assert snapshot(tmp_path) == before
    assert hashed == rewrite_tensors(source, out, edits)


@given(
    shape=st.lists(st.integers(0, 5), max_size=4),
    block=st.integers(1, 200),
    dtype=st.sampled_from(FLOATS),
)
@settings(deadline=None, max_examples=100)
def test_blocks_tile_every_tensor(shape: list[int], block: int, dtype: torch.dtype) -> None:
    import tempfile

    nbytes = math.prod(shape) * dtype.itemsize
    with tempfile.TemporaryDirectory() as folder:
        write_folder(Path(folder), {"model.safetensors": {"w": torch.zeros(shape, dtype=dtype)}})
        checkpoint = Checkpoint.open(folder)
        with TensorFile(checkpoint, "w") as file:
            blocks = list(file.blocks(block))
            assert file.sha256() == hashlib.sha256(bytes(nbytes)).hexdigest()
    position = 0
    for prefix, start, rows, offset in blocks:
        assert offset == position
        assert all(0 <= i < n for i, n in zip(prefix, shape, strict=False))
        row = math.prod(shape[len(prefix) + 1 :]) * dtype.itemsize
        if shape:
            assert 0 <= start <= start + rows <= shape[len(prefix)]
        # larger than asked for only where a single entry is
        assert rows * row <= max(block, dtype.itemsize) or nbytes == 0
        position += rows * row
    assert position == nbytes


def test_a_replacement_may_change_the_dtype(tmp_path: Path, out: Path) -> None:
    # after it a bf16 tensor of odd length, which would leave a float32 unaligned in the old order
    tensors = {
        "a": torch.randn(3).bfloat16(),
        "b.weight": torch.randn(5, 3).bfloat16(),
        "c": torch.randn(7).bfloat16(),
        "é": torch.ones(1, dtype=torch.uint8),
    }
    folder = write_folder(tmp_path / "source", {"model.safetensors": tensors})
    source = Checkpoint.open(folder)
    widen = ReplaceEdit(compute=lambda w: w.float() * 1.1, dtype="F32")
    hashes = rewrite_tensors(source, out, {"b.weight": widen})
    written = load_file(out / "model.safetensors")
    assert same_bits(written["b.weight"], tensors["b.weight"].float() * 1.1)
    assert all(same_bits(written[n], t) for n, t in tensors.items() if n != "b.weight")
    header = read_header(out / "model.safetensors")
    assert header.metadata == {"format": "pt"}
    assert all(info.begin % {"F32": 4, "BF16": 2, "U8": 1}[info.dtype] == 0 for info in header.tensors.values())  # fmt: skip
    assert tensor_hashes(out / "model.safetensors") == {n: h.after for n, h in hashes.items()}
    # and back: the very file
    narrow = ReplaceEdit(compute=lambda _: tensors["b.weight"], dtype="BF16")
    (tmp_path / "back").mkdir()
    rewrite_tensors(Checkpoint.open(out), tmp_path / "back", {"b.weight": narrow})
    assert snapshot(tmp_path / "back") == snapshot(folder)


def test_a_replacement_without_dtype_keeps_the_header(source: Checkpoint, out: Path) -> None:
    name = "stacked.bfloat16"
    rewrite_tensors(source, out, {name: ReplaceEdit(compute=torch.neg)})
    for shard, header in source.headers.items():
        assert read_header(out / shard).raw == header.raw
    found = Checkpoint.open(out).read(name)
    assert same_bits(found, -tensors_of_all_kinds()[name])


@pytest.mark.parametrize(
    "compute",
    [lambda w: w[:1], lambda w: w.T, lambda w: w.double(), lambda w: torch.cat([w, w])],
    ids=["smaller", "transposed", "wider", "larger"],
)
def test_a_replacement_that_does_not_fit_is_refused(
    compute: object, source: Checkpoint, out: Path
) -> None:
    with pytest.raises(ValueError, match=r"matrix\.F32: an edit must keep"):
        rewrite_tensors(source, out, {"matrix.F32": ReplaceEdit(compute=compute)})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name,edit",
    [
        ("stacked.float32", ScaleEdit(axis=3, position=0, exponent=1)),
        ("stacked.float32", ScaleEdit(axis=0, position=4, exponent=1)),
        ("stacked.float32", ScaleEdit(axis=1, position=-1, exponent=1)),
        ("stacked.float32", ScaleEdit(axis=-1, position=0, exponent=1)),
        ("stacked.float32", ScaleEdit(axis=2, position=0, exponent=1, lead=(4,))),
        ("stacked.float32", ScaleEdit(axis=0, position=0, exponent=1, lead=(0,))),
        ("scalar.float32", ScaleEdit(axis=0, position=0, exponent=1)),
        ("matrix.I32", ScaleEdit(axis=0, position=0, exponent=1)),
        ("matrix.F8_E4M3", ScaleEdit(axis=0, position=0, exponent=1)),
        ("nowhere", ScaleEdit(axis=0, position=0, exponent=1)),
    ],
)
def test_edits_of_what_is_not_there_are_refused(
    name: str, edit: ScaleEdit, source: Checkpoint, out: Path
) -> None:
    # skipped in silence they would leave half a lock
    with pytest.raises(CheckpointError) as caught:
        rewrite_tensors(source, out, {name: (edit,)})
    assert caught.value.tensor == name
    assert not list(out.iterdir())


def test_a_scaling_that_does_not_fit_names_its_tensor(source: Checkpoint, out: Path) -> None:
    edit = ScaleEdit(axis=1, position=2, exponent=40)
    with pytest.raises(OutOfRange, match=r"stacked\.float16: slice 2 times 2\^40"):
        rewrite_tensors(source, out, {"stacked.float16": (edit,)})


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("replace", [False, True], ids=["streamed", "replaced"])
def test_nan_and_inf_are_refused_wherever_they_stand(
    dtype: torch.dtype, value: float, replace: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_blocks(monkeypatch, 32)
    edits: dict[str, Edit] = {"w": ReplaceEdit(compute=torch.neg)} if replace else {}
    for position in (0, 50, 99):
        tensor = torch.ones(10, 10, dtype=dtype)
        tensor.view(-1)[position] = value
        folder = write_folder(tmp_path / str(position), {"model.safetensors": {"w": tensor}})
        with pytest.raises(CheckpointError, match="holds NaN or Inf") as caught:
            rewrite_tensors(Checkpoint.open(folder), None, edits)
        assert caught.value.tensor == "w"


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_sum_that_overflows_is_not_refused(dtype: torch.dtype) -> None:
    for tensor in (
        torch.full((4096,), torch.finfo(dtype).max, dtype=dtype),
        torch.full((100, 100), 1000.0, dtype=dtype),
        torch.tensor([torch.finfo(dtype).max] * 2 + [torch.finfo(dtype).min] * 2, dtype=dtype),
    ):
        check_finite(tensor, "w", Path("w.safetensors"))
    opposite = torch.tensor([math.inf, -math.inf], dtype=dtype)
    with pytest.raises(CheckpointError):
        check_finite(opposite, "w", Path("w.safetensors"))


def test_nan_where_it_means_nothing_is_carried(tmp_path: Path, out: Path) -> None:
    # an 8-bit float and a complex number are no weights we compute with
    tensors = {
        "f8": torch.full((3, 3), math.nan).to(torch.float8_e4m3fn),
        "c": torch.full((3,), complex(math.nan, 1)),
    }
    source = Checkpoint.open(write_folder(tmp_path / "source", {"model.safetensors": tensors}))
    rewrite_tensors(source, out, {})
    assert snapshot(out) == snapshot(source.folder)


def test_dtypes_torch_has_not_are_carried(tmp_path: Path, out: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "model.safetensors").write_bytes(
        raw_file({"a": entry("F4", [2, 3], 0, 3), "b": entry("F6_E2M3", [4], 3, 6)}, b"abcdef")
    )
    source = Checkpoint.open(tmp_path / "source")
    hashes = rewrite_tensors(source, out, {})
    assert snapshot(out) == snapshot(source.folder)
    assert hashes["a"].before == hashlib.sha256(b"abc").hexdigest()
    with pytest.raises(CheckpointError, match="F4"):
        source.read("a")


def test_shards_in_a_sub_folder_are_rewritten_there(tmp_path: Path, out: Path) -> None:
    shards = {"weights/a.safetensors": {"a": torch.ones(2)}, "b.safetensors": {"b": torch.ones(3)}}
    source = Checkpoint.open(write_folder(tmp_path / "source", shards))
    rewrite_tensors(source, out, {})
    assert snapshot(out) == snapshot(source.folder)
    assert copy_other_files(source, out) == ([], [])


def test_a_checkpoint_of_empty_tensors_alone(tmp_path: Path, out: Path) -> None:
    tensors = {"a": torch.empty(0, 3), "b": torch.empty(2, 0).half(), "i": torch.empty(0).int()}
    source = Checkpoint.open(write_folder(tmp_path / "source", {"model.safetensors": tensors}))
    hashes = rewrite_tensors(source, out, {"a": (ScaleEdit(axis=1, position=2, exponent=3),)})
    assert snapshot(out) == snapshot(source.folder)
    assert {h.after for h in hashes.values()} == {hashlib.sha256(b"").hexdigest()}


def test_progress_counts_every_byte_once(
    source: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_blocks(monkeypatch, 64)
    seen: list[tuple[int, int]] = []
    edits: dict[str, Edit] = {"stacked.float32": ReplaceEdit(compute=torch.neg)}
    rewrite_tensors(source, None, edits, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (source.nbytes, source.nbytes)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, RuntimeError])
def test_an_error_in_one_tensor_stops_the_others(
    error: type[BaseException], source: Checkpoint, out: Path
) -> None:
    handles = len(os.listdir("/proc/self/fd"))
    threads = threading.active_count()
    count = 0

    def progress(_done: int, _total: int) -> None:
        nonlocal count
        count += 1
        if count == 3:
            raise error("stop")

    with pytest.raises(error, match="stop"):
        rewrite_tensors(source, out, {}, progress=progress)
    assert count <= 3 + 2  # what the other worker had begun
    assert len(os.listdir("/proc/self/fd")) == handles
    assert threading.active_count() == threads


def test_a_file_that_shrinks_meanwhile_is_noticed(source: Checkpoint, out: Path) -> None:
    shard = next(iter(source.headers))
    os.truncate(source.folder / shard, (source.folder / shard).stat().st_size - 1)
    with pytest.raises(CheckpointError, match="file ends early"):
        rewrite_tensors(source, out, {})


def test_a_file_that_vanishes_meanwhile_is_noticed(source: Checkpoint, out: Path) -> None:
    (source.folder / next(iter(source.headers))).unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        rewrite_tensors(source, out, {})


_MEMORY = """
import json, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from specdef.weights.checkpoint import Checkpoint
from specdef.weights.edit import ScaleEdit
from specdef.weights.rewrite import rewrite_tensors

def status(field):
    line = next(l for l in open("/proc/self/status") if l.startswith(field))
    return int(line.split()[1]) * 1024

torch.ones(1000, 1000).bfloat16().sum().isfinite()
Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
start = status("VmRSS")
edits = {"big": (ScaleEdit(axis=1, position=3, exponent=5), ScaleEdit(axis=0, position=9, exponent=3))}
rewrite_tensors(Checkpoint.open(sys.argv[1]), Path(sys.argv[2]), edits)
print(json.dumps(status("VmHWM") - start))
"""


@pytest.mark.slow
def test_memory_is_bounded_by_the_block_not_the_tensor(tmp_path: Path, out: Path) -> None:
    folder = write_folder(
        tmp_path / "source",
        {
            "model.safetensors": {
                "big": torch.ones(50_000, 2_000, dtype=torch.bfloat16),
                "small": torch.ones(14_000, 2_000, dtype=torch.bfloat16),
            }
        },
    )
    done = subprocess.run(
        [sys.executable, "-c", _MEMORY, str(folder), str(out)],
        capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) < 100 * 2**20
    assert (out / "model.safetensors").stat().st_size > 256e6
