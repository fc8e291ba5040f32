"""Sampling slices of tensors: the same from a folder as from memory, and true to the tensor."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import write_folder
from specdef.errors import CheckpointError
from specdef.weights import source as source_module
from specdef.weights.checkpoint import Checkpoint, TensorFile
from specdef.weights.source import SAMPLE_READS, FolderSource, MemorySource

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.fixture
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("source")


@given(st.data())
@settings(deadline=None, max_examples=60)
def test_all_entries_of_small_tensors(data: st.DataObject) -> None:
    import tempfile

    shape = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    axis = data.draw(st.integers(0, len(shape) - 1))
    length = data.draw(st.integers(0, axis))
    lead = tuple(data.draw(st.integers(0, n - 1)) for n in shape[:length])
    dtype = data.draw(st.sampled_from(DTYPES))
    tensor = torch.arange(math.prod(shape)).reshape(shape).to(dtype)
    expected = tensor[lead].movedim(axis - length, 0).reshape(shape[axis], -1)
    with tempfile.TemporaryDirectory() as folder:
        write_folder(
            Path(folder), {"model.safetensors": {"pad": torch.zeros(3, dtype=dtype), "w": tensor}}
        )
        found = FolderSource(Checkpoint.open(folder)).lines("w", axis, lead)
    assert found.dtype == dtype
    assert torch.equal(found, expected)
    assert torch.equal(MemorySource({"w": tensor}, {}).lines("w", axis, lead), expected)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("lead", [(), (2,)], ids=["all", "one expert"])
def test_samples_of_large_tensors_are_entries_of_the_right_slice(
    axis: int, lead: tuple[int, ...], scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if len(lead) > axis:
        pytest.skip("the lead axes come before the axis")
    shape = (3, 80, 90)
    tensor = torch.arange(math.prod(shape), dtype=torch.float64).reshape(shape)
    write_folder(scratch, {"model.safetensors": {"w": tensor}})
    monkeypatch.setattr(source_module, "EXACT_ELEMENTS", 500)
    lines = FolderSource(Checkpoint.open(scratch)).lines("w", axis, lead)
    whole = tensor[lead].movedim(axis - len(lead), 0).flatten(1)
    assert lines.shape[0] == shape[axis]
    assert min(SAMPLE_READS, whole.shape[1]) <= lines.shape[1] < whole.shape[1]
    for sample, line in zip(lines.tolist(), whole.tolist(), strict=True):
        assert len(set(sample)) == len(sample)
        assert set(sample) <= set(line)


def test_the_mean_square_of_a_sample_is_that_of_the_slice(scratch: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    gains = torch.linspace(0.5, 4, 1500)
    tensor = torch.randn(1500, 1400, generator=generator) * gains[:, None]
    write_folder(scratch, {"model.safetensors": {"w": tensor}})
    source = FolderSource(Checkpoint.open(scratch))
    rows = source.lines("w", 0, ()).square().mean(1).sqrt() / gains
    # sixty-four Gaussians: 1 / sqrt(2 * 64) = 9 % per row, five standard errors for the worst of 1500
    assert rows.sub(1).abs().max() < 0.45
    assert rows.mean() == pytest.approx(1, abs=0.02)
    columns = source.lines("w", 1, ())
    assert columns.shape == (1400, SAMPLE_READS)
    picked = tensor[[(2 * i + 1) * 1500 // (2 * SAMPLE_READS) for i in range(SAMPLE_READS)]]
    assert torch.equal(columns, picked.T)


def test_a_column_is_sampled_without_reading_the_whole_tensor(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(scratch, {"model.safetensors": {"w": torch.zeros(1500, 1400)}})
    read = 0
    real = TensorFile.read_into

    def counted(self: TensorFile, buffer: memoryview, offset: int) -> None:
        nonlocal read
        read += len(buffer)
        real(self, buffer, offset)

    monkeypatch.setattr(TensorFile, "read_into", counted)
    FolderSource(Checkpoint.open(scratch)).lines("w", 1, ())
    assert read == SAMPLE_READS * 1400 * 4


def test_memory_and_folder_agree_on_everything_else(scratch: Path) -> None:
    tensors = {"a": torch.randn(3, 4), "b": torch.randn(2).bfloat16(), "s": torch.tensor(2.0)}
    write_folder(scratch, {"model.safetensors": tensors}, config={"model_type": "llama"})
    folder = FolderSource(Checkpoint.open(scratch))
    memory = MemorySource(tensors, {"model_type": "llama"})
    assert folder.config == memory.config
    assert set(folder.names) == set(memory.names)
    assert folder.shapes == memory.shapes
    for name in tensors:
        assert folder.dtype(name) == memory.dtype(name)
        assert torch.equal(folder.read(name), memory.read(name))
    for source in (folder, memory):
        with pytest.raises(CheckpointError, match="no such tensor"):
            source.read("missing")


def test_reading_from_memory_gives_a_copy() -> None:
    tensor = torch.ones(2, requires_grad=True)
    copy = MemorySource({"w": tensor}, {}).read("w")
    copy.zero_()
    assert not copy.requires_grad
    assert tensor.tolist() == [1, 1]
