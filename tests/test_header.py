"""The safetensors header parser, against the reference implementation and against hostile files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError

from helpers import entry, raw_file
from specdef.errors import CheckpointError
from specdef.weights.header import (
    DTYPE_BITS,
    MAX_HEADER_BYTES,
    Header,
    build_header,
    parse_header,
    read_header,
)
from specdef.weights.tensor_bytes import DTYPE_NAMES, TORCH_DTYPES

NAMES = st.text(min_size=1, max_size=12).filter(
    lambda name: name != "__metadata__" and not any("\ud800" <= c <= "\udfff" for c in name)
)
SHAPES = st.lists(st.integers(0, 4), max_size=4)
TENSORS = st.dictionaries(
    NAMES, st.tuples(st.sampled_from(sorted(TORCH_DTYPES)), SHAPES), min_size=0, max_size=6
)
METADATA = st.dictionaries(
    NAMES, NAMES, max_size=1
)  # of more than one the reference shuffles the order


def saved(tensors: dict[str, tuple[str, list[int]]], metadata: dict[str, str]) -> bytes:
    """Return the file the reference implementation writes."""
    values = {n: torch.zeros(s, dtype=TORCH_DTYPES[d]) for n, (d, s) in tensors.items()}
    return safetensors.torch.save(values, metadata or None)


def split(data: bytes) -> tuple[bytes, int]:
    """Return the header part of a file, and the file's size."""
    return data[: 8 + int.from_bytes(data[:8], "little")], len(data)


def assert_tiles(header: Header, size: int) -> None:
    """Assert that the tensors fill the file behind the header, each with the bytes its shape needs."""
    end = 0
    for name, info in header.tensors.items():
        assert info.name == name
        assert info.begin == end
        assert info.end >= info.begin
        assert 8 * info.nbytes == DTYPE_BITS[info.dtype] * torch.Size(info.shape).numel()
        end = info.end
    assert header.data_start + end == size


@given(TENSORS, METADATA)
@settings(deadline=None)
def test_what_the_reference_writes_is_read_back(
    tensors: dict[str, tuple[str, list[int]]], metadata: dict[str, str]
) -> None:
    data = saved(tensors, metadata)
    raw, size = split(data)
    header = parse_header(raw, size)
    entries = json.loads(raw[8:])
    assert header.raw == raw
    assert header.metadata == entries.pop("__metadata__", {}) == metadata
    assert {
        n: {"dtype": i.dtype, "shape": list(i.shape), "data_offsets": [i.begin, i.end]}
        for n, i in header.tensors.items()
    } == entries
    assert {n: (i.dtype, list(i.shape)) for n, i in header.tensors.items()} == {
        n: (d, s) for n, (d, s) in tensors.items()
    }
    assert_tiles(header, size)
    for name, tensor in safetensors.torch.load(data).items():
        assert DTYPE_NAMES[tensor.dtype] == header.tensors[name].dtype
        assert tuple(tensor.shape) == header.tensors[name].shape


@given(TENSORS, METADATA)
@settings(deadline=None)
def test_built_headers_are_those_of_the_reference(
    tensors: dict[str, tuple[str, list[int]]], metadata: dict[str, str]
) -> None:
    raw, size = split(saved(tensors, metadata))
    parsed = parse_header(raw, size)
    layout = {n: (i.dtype, i.shape) for n, i in parsed.tensors.items()}
    assert build_header(layout, metadata) == parsed  # raw included


@given(TENSORS, METADATA)
@settings(deadline=None)
def test_built_headers_are_read_back(
    tensors: dict[str, tuple[str, list[int]]], metadata: dict[str, str]
) -> None:
    # in any order, not only the one the reference chooses
    built = build_header({n: (d, tuple(s)) for n, (d, s) in tensors.items()}, metadata)
    size = built.data_start + max((i.end for i in built.tensors.values()), default=0)
    read = parse_header(built.raw, size)
    assert read.metadata == built.metadata
    assert set(read.tensors) == set(built.tensors)
    assert all(read.tensors[n] == built.tensors[n] for n in built.tensors)
    assert len(built.raw) % 8 == 0
    assert set(safetensors.torch.load(built.raw + bytes(size - built.data_start))) == set(tensors)


VALID = safetensors.torch.save(
    {
        "model.a.weight": torch.zeros(3, 4),
        "b": torch.zeros(5, dtype=torch.bfloat16),
        "mask": torch.zeros(2, 2, dtype=torch.bool),
        "scalar": torch.zeros((), dtype=torch.float64),
        "empty": torch.zeros(0, 7, dtype=torch.float16),
    },
    {"format": "pt"},
)


def check(path: Path, data: bytes) -> None:
    """Assert that a file is either refused with the one error, or read as something that tiles it."""
    path.write_bytes(data)
    try:
        header = read_header(path)
    except CheckpointError as error:
        assert error.path == path
        assert error.hint
        str(error).encode()
    else:
        assert_tiles(header, len(data))
        json.dumps(list(header.tensors), ensure_ascii=False).encode()


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("header") / "model.safetensors"


def test_every_truncation_is_refused(scratch: Path) -> None:
    for size in range(len(VALID)):
        scratch.write_bytes(VALID[:size])
        with pytest.raises(CheckpointError):
            read_header(scratch)
    scratch.write_bytes(VALID + b"\0")
    with pytest.raises(CheckpointError, match="the file has"):
        read_header(scratch)


def test_every_single_byte_of_the_header_may_be_wrong(scratch: Path) -> None:
    raw, _ = split(VALID)
    for position in range(len(raw)):
        for value in (0, 0x22, 0x39, 0xFF):
            data = bytearray(VALID)
            data[position] = value
            check(scratch, bytes(data))


@given(st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), max_size=8))
@settings(deadline=None, max_examples=300)
def test_mutations_are_refused_or_tile_the_file(
    scratch: Path, mutations: list[tuple[int, int]]
) -> None:
    data = bytearray(VALID)
    for position, value in mutations:
        data[position] = value
    check(scratch, bytes(data))


@given(st.integers(0, len(VALID)), st.integers(0, 64), st.binary(max_size=64))
@settings(deadline=None, max_examples=300)
def test_splices_are_refused_or_tile_the_file(
    scratch: Path, start: int, length: int, patch: bytes
) -> None:
    check(scratch, VALID[:start] + patch + VALID[start + length :])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["dtype", "shape", "data_offsets", "__metadata__", "a", "b"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(JSON, st.binary(max_size=16))
@settings(deadline=None, max_examples=300)
def test_any_json_is_refused_or_tiles_the_file(scratch: Path, value: Any, data: bytes) -> None:
    check(scratch, raw_file(value, data))


FIELD = (
    JSON
    | st.sampled_from(["F32", "BF16", "F4", "BOOL"])
    | st.lists(st.integers(-2, 2**70), max_size=3)
)


@given(FIELD, FIELD, FIELD)
@settings(deadline=None, max_examples=300)
@example("F32", [1], [0, 4])
@example(["F32"], [1], [0, 4])
@example({}, [1], [0, 4])
def test_any_entry_is_refused_or_tiles_the_file(
    scratch: Path, dtype: Any, shape: Any, offsets: Any
) -> None:
    value = {"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}
    check(scratch, raw_file(value, bytes(4)))


@given(st.binary(max_size=200))
@settings(deadline=None)
def test_noise_is_refused(scratch: Path, data: bytes) -> None:
    check(scratch, data)


@given(JSON)
@settings(deadline=None, max_examples=200)
def test_nothing_is_accepted_that_the_reference_refuses(value: Any) -> None:
    data = raw_file(value)
    try:
        parse_header(*split(data))
    except CheckpointError:
        return
    safetensors.torch.load(data)


ONE = entry("F32", [1], 0, 4)
LIES: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "too short"),
    "seven bytes": (bytes(7), "too short"),
    "length 2^63": (raw_file({"a": ONE}, bytes(4), length=2**63), "claims"),
    "length 2^64 - 1": (raw_file({"a": ONE}, bytes(4), length=2**64 - 1), "claims"),
    "length one too large": (raw_file({"a": ONE}, b"", length=len(json.dumps({"a": ONE})) + 1), "claims"),
    "length too small": (raw_file({"a": ONE}, bytes(4), length=10), "JSON"),
    "length zero": (raw_file(b""), "JSON object"),
    "ends behind the file": (raw_file({"a": entry("F32", [2], 0, 8)}, bytes(4)), "the file has"),
    "ends before the file does": (raw_file({"a": ONE}, bytes(5)), "the file has"),
    "far out of range": (
        raw_file({"a": entry("F32", [1], 2**40, 2**40 + 4)}, bytes(4)), "hole"),
    "overlap": (
        raw_file({"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 4, 12)}, bytes(12)), "overlaps"),
    "same bytes twice": (raw_file({"a": ONE, "b": ONE}, bytes(4)), "overlaps"),
    "hole": (raw_file({"a": ONE, "b": entry("F32", [1], 8, 12)}, bytes(12)), "hole"),
    "hole at the start": (raw_file({"a": entry("F32", [1], 4, 8)}, bytes(8)), "hole"),
    "negative shape": (raw_file({"a": entry("F32", [-1], 0, 4)}, bytes(4)), "non-negative"),
    "two negatives": (raw_file({"a": entry("F32", [-1, -1], 0, 4)}, bytes(4)), "non-negative"),
    "negative offset": (raw_file({"a": entry("F32", [1], -4, 0)}, bytes(4)), "rising"),
    "falling offsets": (raw_file({"a": entry("F32", [1], 4, 0)}, bytes(4)), "rising"),
    "three offsets": (raw_file({"a": ONE | {"data_offsets": [0, 4, 8]}}, bytes(4)), "rising"),
    "no offsets": (raw_file({"a": {"dtype": "F32", "shape": [1]}}, bytes(4)), "alone"),
    "fourth field": (raw_file({"a": ONE | {"stride": [1]}}, bytes(4)), "alone"),
    "bool length": (raw_file({"a": ONE | {"shape": [True]}}, bytes(4)), "non-negative"),
    "bool offset": (raw_file({"a": entry("U8", [1], 0, 1) | {"data_offsets": [False, True]}}, b"0"), "rising"),
    "float length": (raw_file({"a": ONE | {"shape": [1.0]}}, bytes(4)), "non-negative"),
    "float offset": (raw_file({"a": ONE | {"data_offsets": [0, 4.0]}}, bytes(4)), "rising"),
    "string length": (raw_file({"a": ONE | {"shape": ["1"]}}, bytes(4)), "non-negative"),
    "shape is a number": (raw_file({"a": ONE | {"shape": 1}}, bytes(4)), "non-negative"),
    "shape is null": (raw_file({"a": ONE | {"shape": None}}, bytes(4)), "non-negative"),
    # 2^32 * 2^32 is 0 in 64 bits, which would fill [0, 0]
    "product overflows to 0": (raw_file({"a": entry("U8", [2**32, 2**32], 0, 0)}), "does not fill"),
    "product overflows to 4": (
        raw_file({"a": entry("U8", [2**33 + 2, 2**63 + 2], 0, 4)}, bytes(4)), "non-negative"),
    "bits overflow": (raw_file({"a": entry("F64", [2**29, 2**32], 0, 0)}), "does not fill"),
    "2000 axes": (raw_file({"a": ONE | {"shape": [1] * 2000}}, bytes(4)), "non-negative"),
    "wrong size": (raw_file({"a": entry("F32", [2], 0, 4)}, bytes(4)), "does not fill"),
    "half a byte": (raw_file({"a": entry("F4", [1], 0, 1)}, b"0"), "does not fill"),
    "unknown dtype": (raw_file({"a": entry("F31", [1], 0, 4)}, bytes(4)), "unknown dtype"),
    "lower-case dtype": (raw_file({"a": entry("f32", [1], 0, 4)}, bytes(4)), "unknown dtype"),
    "dtype is a list": (raw_file({"a": ONE | {"dtype": ["F32"]}}, bytes(4)), "unknown dtype"),
    "dtype is a number": (raw_file({"a": ONE | {"dtype": 32}}, bytes(4)), "unknown dtype"),
    "entry is a list": (raw_file({"a": []}), "alone"),
    "entry is null": (raw_file({"a": None}), "alone"),
    "header is a list": (raw_file([]), "JSON object"),
    "header is a number": (raw_file(b"7"), "JSON object"),
    "leading space": (raw_file(b" {}"), "JSON object"),
    "byte order mark": (raw_file(b"\xef\xbb\xbf{}"), "JSON object"),
    "two objects": (raw_file(b"{}{}"), "not valid JSON"),
    "not UTF-8": (raw_file(b'{"\xff": {}}'), "not valid JSON"),
    "UTF-16": (raw_file(json.dumps({"a": ONE}).encode("utf-16"), bytes(4)), "JSON object"),
    "half a surrogate pair": (raw_file({"\ud800": ONE}, bytes(4)), "not valid JSON"),
    "half a pair in metadata": (raw_file({"__metadata__": {"a": "\udc00"}}), "__metadata__"),
    "duplicate tensor": (
        raw_file(b'{"a":' + json.dumps(ONE).encode() + b',"a":' + json.dumps(ONE).encode() + b"}", bytes(4)),
        "duplicate key"),
    "duplicate field": (
        raw_file(b'{"a":{"dtype":"F32","dtype":"F64","shape":[1],"data_offsets":[0,4]}}', bytes(4)),
        "duplicate key"),
    "duplicate metadata": (raw_file(b'{"__metadata__":{"a":"b","a":"c"}}'), "duplicate key"),
    "deep list": (raw_file(b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"), "not valid JSON"),
    "deep object": (raw_file(b'{"a":' * 200_000 + b"0" + b"}" * 200_000), "not valid JSON"),
    "endless number": (raw_file(b'{"a":' + b"9" * 100_000 + b"}"), "not valid JSON"),
    "metadata is a list": (raw_file({"__metadata__": []}), "__metadata__"),
    "metadata is null": (raw_file({"__metadata__": None}), "__metadata__"),
    "metadata of numbers": (raw_file({"__metadata__": {"a": 1}}), "__metadata__"),
    "metadata nested": (raw_file({"__metadata__": {"a": {"b": "c"}}}), "__metadata__"),
}  # fmt: skip


@pytest.mark.parametrize("name", LIES)
def test_lying_headers_are_refused(name: str, scratch: Path) -> None:
    data, message = LIES[name]
    scratch.write_bytes(data)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(scratch)
    assert caught.value.exit_code == 2
    assert caught.value.path == scratch
    assert len(str(caught.value)) < 1000 + len(str(scratch))


def test_accepted_oddities(scratch: Path) -> None:
    for data in (
        raw_file({}),
        raw_file(b"{}      "),
        raw_file({"__metadata__": {}}),
        raw_file({"": entry("F32", [], 0, 4)}, bytes(4)),
        raw_file({"a": entry("F4", [2], 0, 1)}, b"0"),
        raw_file({"b": entry("U8", [1], 1, 2), "a": entry("U8", [1], 0, 1)}, b"01"),
        raw_file({"z": entry("F32", [0, 2**40], 0, 0)}),
        raw_file({"e": entry("U8", [0], 1, 1), "a": entry("U8", [1], 0, 1)}, b"0"),
        raw_file({"a": entry("F32", [1] * 64, 0, 4)}, bytes(4)),
    ):
        scratch.write_bytes(data)
        assert_tiles(read_header(scratch), len(data))


def test_offset_order_is_file_order(scratch: Path) -> None:
    scratch.write_bytes(raw_file({"b": entry("U8", [1], 1, 2), "a": entry("U8", [1], 0, 1)}, b"01"))
    assert list(read_header(scratch).tensors) == ["a", "b"]


def test_dtypes_are_all_the_format_names() -> None:
    for dtype, bits in DTYPE_BITS.items():
        data = raw_file({"a": entry(dtype, [8], 0, bits)}, bytes(bits))
        assert parse_header(*split(data)).tensors["a"].nbytes == bits
        safetensors.deserialize(data)
    with pytest.raises(SafetensorError):
        safetensors.deserialize(raw_file({"a": entry("F31", [8], 0, 31)}, bytes(31)))


@pytest.mark.parametrize("kind", ["missing", "folder", "pipe", "dangling link", "file as folder"])
def test_what_is_no_file_is_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)  # opening it would wait for a writer
    elif kind == "dangling link":
        path.symlink_to("nowhere")
    elif kind == "file as folder":
        path.write_bytes(VALID)
        path = path / "model.safetensors"
    with pytest.raises(CheckpointError):
        read_header(path)


def test_no_more_is_read_or_allocated_than_the_file_holds(tmp_path: Path) -> None:
    # in a process that may allocate little more than it has: a buffer of the claimed size would not fit. The header
    # needs no torch, which keeps the process small.
    for i, length in enumerate((2**63, MAX_HEADER_BYTES, MAX_HEADER_BYTES - 1, 2**33)):
        (tmp_path / f"{i}.safetensors").write_bytes(raw_file({"a": ONE}, bytes(4), length=length))
    sparse = tmp_path / "sparse.safetensors"
    sparse.write_bytes(raw_file(b"{", length=MAX_HEADER_BYTES + 1))
    os.truncate(sparse, 2**33)
    code = (
        "import resource, sys; from pathlib import Path\n"
        "from specdef.weights.header import read_header\n"
        "from specdef.errors import CheckpointError\n"
        "pages = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (pages + 2**25, pages + 2**25))\n"
        "for path in sorted(Path(sys.argv[1]).iterdir()):\n"
        "    try: read_header(path)\n"
        "    except CheckpointError: print(path.name)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert len(done.stdout.split()) == 5, done.stderr
