"""Copy a checkpoint with some tensors edited: streaming, shard by shard, block by block.

Where names, shapes and dtypes stay, headers are copied byte for byte and every tensor keeps its offset, so tensors are
written by several threads at once and memory is bounded by the block size, whatever the model's (FACTS 6.12). Only a
`ReplaceEdit` needs its whole tensor in memory.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from specdef.errors import CheckpointError
from specdef.weights.checkpoint import BLOCK_BYTES, Checkpoint, TensorFile
from specdef.weights.edit import Edit, ReplaceEdit
from specdef.weights.folder import INDEX_NAME
from specdef.weights.header import DTYPE_BITS, Header, build_header
from specdef.weights.tensor_bytes import TORCH_DTYPES, as_bytes, as_tensor

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all); library code never prints."""

_WORKERS = 2
"""Hashing dominates; more threads than two only add memory on the machines measured (dev/LOG.md, 2026-11-22)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorHashes:
    """SHA-256 of one tensor's bytes before and after an edit (hex)."""

    before: str
    after: str


def rewrite_tensors(
    source: Checkpoint,
    out: Path | None,
    edits: Mapping[str, Edit],
    *,
    progress: Progress | None = None,
    workers: int = _WORKERS,
) -> dict[str, TensorHashes]:
    """Write every shard of `source` into `out` with `edits` applied, and hash both sides.

    Cost: one read and one write of the checkpoint; workers * 2 blocks of memory.

    Args:
        source: The checkpoint read.
        out: Existing folder that gets the shards and the index; None writes nothing and only hashes.
        edits: Tensor name to what is done to it.
        progress: Told how far it is.
        workers: Threads.

    Returns:
        Tensor name to hashes, in the checkpoint's order.

    Raises:
        CheckpointError: A tensor cannot be read, holds NaN or Inf, or is not there for an edit.
        OutOfRange: A scaling does not fit.
    """
    for name, edit in edits.items():
        _check_fits(source, name, edit)
    headers = {shard: _new_header(header, edits) for shard, header in source.headers.items()}
    handles: dict[str, int] = {}
    stop = threading.Event()
    lock = threading.Lock()
    done = 0
    waiting = Counter(source.location.values())
    syncs: list[Future[None]] = []

    def advance(nbytes: int) -> None:
        nonlocal done
        with lock:
            done += nbytes
            if progress:
                progress(done, source.nbytes)

    def task(name: str) -> tuple[str, TensorHashes]:
        shard = source.location[name]
        sink = _Sink(handles.get(shard), headers[shard], name)
        edit = edits.get(name, ())
        try:
            with TensorFile(source, name) as file:
                if isinstance(edit, ReplaceEdit):
                    hashes = _replace(source, name, edit, sink)
                    advance(file.info.nbytes)
                else:
                    hashes = _stream(file, edit, sink, stop, advance)
        except BaseException:
            stop.set()  # here, so that no thread begins another tensor before the main thread wakes up
            raise
        with lock:
            waiting[shard] -= 1
            if not waiting[shard] and shard in handles:
                syncs.append(syncer.submit(os.fsync, handles[shard]))
        return name, hashes

    try:
        if out is not None:
            for shard, header in headers.items():
                handles[shard] = _create(out / shard, header)
        # One shard after the other, so that the disk takes in what is done while the next one is hashed; within a
        # shard the largest first, so that no thread is left with a large one at the end.
        order = sorted(source.names, key=lambda n: (source.location[n], -source.infos[n].nbytes))
        with ThreadPoolExecutor(1) as syncer, ThreadPoolExecutor(workers) as pool:
            try:
                futures = [pool.submit(task, name) for name in order]
                wait(futures, return_when=FIRST_EXCEPTION)
                for future in futures:
                    if future.done() and not future.cancelled() and future.exception():
                        future.result()
            except BaseException:
                stop.set()
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        results = dict(future.result() for future in futures)
        for sync in syncs:
            sync.result()
    finally:
        for handle in handles.values():
            os.close(handle)
    if out is not None and (source.folder / INDEX_NAME).exists():
        shutil.copyfile(source.folder / INDEX_NAME, out / INDEX_NAME)
    return {name: results[name] for name in source.names}


def copy_other_files(source: Checkpoint, out: Path) -> tuple[list[str], list[str]]:
    """Copy everything that is not weights: configuration, tokenizer, licence, card.

    Args:
        source: The checkpoint.
        out: Existing folder.

    Returns:
        (carried, dropped) relative paths; `dropped` are other copies of the weights.
    """
    carried, dropped = source.other_files()
    for name in carried:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source.folder / name, out / name)
    return carried, dropped


def check_finite(tensor: Tensor, name: str, path: Path) -> None:
    """Refuse NaN and Inf.

    Raises:
        CheckpointError: The tensor holds one.
    """
    # A sum is ten times cheaper than isfinite and not finite whenever an entry is not; the reverse can fail by
    # overflow, so it only decides whether to look closely.
    if not bool(tensor.sum().isfinite()) and not bool(tensor.isfinite().all()):
        raise CheckpointError(
            "holds NaN or Inf",
            path=path,
            tensor=name,
            hint="The checkpoint is damaged or was saved mid-divergence.",
        )


class _Sink:
    """Where one tensor's bytes go: a place in an open shard, or nowhere."""

    def __init__(self, handle: int | None, header: Header, name: str) -> None:
        self._handle = handle
        self._offset = header.data_start + header.tensors[name].begin

    def write(self, data: memoryview, offset: int) -> None:
        if self._handle is None:
            return
        done = 0
        while done < len(data):
            done += os.pwrite(self._handle, data[done:], self._offset + offset + done)


def _stream(
    file: TensorFile,
    edits: tuple[object, ...],
    sink: _Sink,
    stop: threading.Event,
    advance: Callable[[int], None],
) -> TensorHashes:
    info = file.info
    before = hashlib.sha256()
    after = hashlib.sha256() if edits else before
    for prefix, start, rows, offset in file.blocks():
        if stop.is_set():
            break
        buffer = _buffer(rows * info.nbytes // _rows(file.shape, len(prefix)))
        file.read_into(buffer, offset)
        before.update(buffer)
        if info.is_float:
            shape = (rows, *info.shape[len(prefix) + 1 :]) if info.shape else ()
            block = as_tensor(buffer, info.dtype, shape)
            check_finite(block, info.name, file._path)
            for edit in edits:
                edit.apply(block, name=info.name, prefix=prefix, start=start)  # type: ignore[attr-defined]
        if edits:
            after.update(buffer)
        sink.write(buffer, offset)
        advance(len(buffer))
    return TensorHashes(before=before.hexdigest(), after=after.hexdigest())


_reused = threading.local()


def _buffer(nbytes: int) -> memoryview:
    """Return this thread's buffer: fresh memory for every block would be zeroed by the kernel first."""
    if not nbytes:
        return memoryview(b"")
    if len(getattr(_reused, "memory", b"")) < nbytes:
        _reused.memory = bytearray(max(nbytes, BLOCK_BYTES))
    return memoryview(_reused.memory)[:nbytes]


def _rows(shape: tuple[int, ...], axis: int) -> int:
    """Return how many rows a tensor has along `axis`, all leading indices taken together."""
    rows = 1
    for n in shape[: axis + 1]:
        rows *= n
    return max(rows, 1)


def _replace(source: Checkpoint, name: str, edit: ReplaceEdit, sink: _Sink) -> TensorHashes:
    old = source.read(name)
    check_finite(old, name, source.folder / source.location[name])
    before = hashlib.sha256(as_bytes(old)).hexdigest()
    new = edit.compute(old)
    new = new.to(TORCH_DTYPES[edit.dtype]) if edit.dtype else new
    if new.shape != old.shape or not (edit.dtype or new.dtype == old.dtype):
        raise ValueError(
            f"{name}: an edit must keep {old.dtype} {tuple(old.shape)}, got {new.dtype} {tuple(new.shape)}."
        )
    data = as_bytes(new)
    sink.write(data, 0)
    return TensorHashes(before=before, after=hashlib.sha256(data).hexdigest())


def _new_header(header: Header, edits: Mapping[str, Edit]) -> Header:
    dtypes = {
        name: edit.dtype
        for name in header.tensors
        if isinstance(edit := edits.get(name), ReplaceEdit) and edit.dtype
    }
    if not dtypes:
        return header
    layout = {n: (dtypes.get(n, info.dtype), info.shape) for n, info in header.tensors.items()}
    # Wider dtypes first, then by name, as safetensors writes them: every tensor stays aligned to its own width, and
    # changing a dtype back restores the file.
    order = sorted(layout, key=lambda n: (list(DTYPE_BITS).index(layout[n][0]), n))
    return build_header({n: layout[n] for n in order}, header.metadata)


def _check_fits(source: Checkpoint, name: str, edit: Edit) -> None:
    """Refuse an edit of a place the checkpoint has not: it would be skipped in silence, block by block."""
    info = source.info(name)
    if isinstance(edit, ReplaceEdit) or not edit:
        return
    if not info.is_float:
        raise CheckpointError(
            f"{info.dtype} values cannot be scaled", path=source.folder, tensor=name
        )
    for scaling in edit:
        index = {**dict(enumerate(scaling.lead)), scaling.axis: scaling.position}
        fits = len(index) == len(scaling.lead) + 1 and all(
            0 <= axis < len(info.shape) and 0 <= position < info.shape[axis]
            for axis, position in index.items()
        )
        if not fits:
            raise CheckpointError(
                f"shape {info.shape} has no slice {scaling.position} on axis {scaling.axis}",
                path=source.folder,
                tensor=name,
                hint="The key or plan belongs to another model.",
            )


def _create(path: Path, header: Header) -> int:
    size = header.data_start + max((info.end for info in header.tensors.values()), default=0)
    path.parent.mkdir(parents=True, exist_ok=True)  # the index may name shards in sub-folders
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        if size:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(handle, 0, size)  # a full disk is met here, before any work
            else:
                os.ftruncate(handle, size)
        os.pwrite(handle, header.raw, 0)
    except BaseException:
        os.close(handle)
        raise
    return handle
