"""Shared by the tests of locks: hand-made safetensors, snapshots of folders and models, and a server that forks locks to be killed.

Run as a script it is that server: it imports torch once, then forks for every request, so that a hundred killed locks
cost seconds and no fork happens in a process that has threads.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

torch.set_num_threads(1)


def raw_file(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    """Return a file with any header: a value for JSON, or the bytes themselves; `length` lies about its size."""
    body = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(body) if length is None else length).to_bytes(8, "little") + body + data


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    """Return a header entry."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def write_folder(
    folder: Path,
    shards: Mapping[str, Mapping[str, torch.Tensor]],
    *,
    index: bool | None = None,
    config: Mapping[str, Any] | None = None,
) -> Path:
    """Write shards by file name, an index where there are several (or as told), and a config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, tensors in shards.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        save_file(dict(tensors), folder / name, metadata={"format": "pt"})
    if index if index is not None else len(shards) > 1:
        weight_map = {tensor: name for name, tensors in shards.items() for tensor in tensors}
        write_index(folder, weight_map)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_index(folder: Path, weight_map: Any) -> None:
    """Write an index with any weight_map."""
    text = json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(text)


def snapshot(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file below a folder."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def tensor_hashes(path: Path) -> dict[str, str]:
    """Return the SHA-256 of every tensor's bytes as safetensors itself finds them."""
    from safetensors import deserialize

    return {
        name: hashlib.sha256(bytes(value["data"])).hexdigest()
        for name, value in deserialize(path.read_bytes())
    }


def state(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of a model's state."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    """Tell whether the same names hold the same values in the same dtypes."""
    return first.keys() == second.keys() and all(
        first[n].dtype == second[n].dtype and torch.equal(first[n], second[n]) for n in first
    )


def leftovers(folder: Path) -> list[str]:
    """Return the names of unfinished outputs in a folder."""
    return sorted(path.name for path in folder.iterdir() if ".specdef-" in path.name)


WRITING = ("mkdir", "open", "posix_fallocate", "pwrite", "fsync", "rename", "replace", "chmod", "rmdir", "unlink")  # fmt: skip


@contextlib.contextmanager
def every_call(
    act: Callable[[int, str], None], names: tuple[str, ...] = WRITING, *, after: bool = False
) -> Iterator[None]:
    """Call `act(n, name)` before (or after) the n-th call, from 1, of these functions of `os`; "open" is for writing."""
    import builtins
    import io

    lock, count = threading.Lock(), 0

    def hook(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def hooked(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            mode = kwargs.get("mode", args[1] if len(args) > 1 else "r")
            if name == "open" and not (
                mode & (os.O_WRONLY | os.O_RDWR)
                if isinstance(mode, int)
                else set(mode) & set("wxa+")
            ):
                return real(*args, **kwargs)
            with lock:
                count += 1
                n = count
            if not after:
                act(n, name)
            try:
                return real(*args, **kwargs)
            finally:
                if after:
                    act(n, name)

        return hooked

    real: dict[tuple[Any, str], Any] = {(os, name): getattr(os, name) for name in names}
    if "open" in names:
        real[io, "open"] = real[builtins, "open"] = builtins.open
    try:
        for (module, name), function in real.items():
            setattr(module, name, hook(name, function))
        yield
    finally:
        for (module, name), function in real.items():
            setattr(module, name, function)


class ForkServer:
    """Runs locks and unlocks in forked children that are stopped at a chosen point."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        )

    def run(self, **request: Any) -> dict[str, Any]:
        """Fork, run, and return `status` ("done", "error", "interrupted", "killed"), `message`, `calls` and `seconds`.

        Args:
            **request: `action` ("lock" or "unlock"), `source`, `out`, `key`; to stop it, `signal` with `call` (before the
                writing call of that number; after it with `after`), `tear` (in the middle of the pwrite of that number)
                or `delay` (seconds).
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request, default=str) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the fork server died"
        return dict(json.loads(answer))

    def close(self) -> None:
        """End the server."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()


def _serve() -> None:
    import specdef

    # A shell without job control starts what runs in the background deaf to SIGINT, and children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in specdef.__all__:  # everything imported before the first fork
        getattr(specdef, name)
    for line in sys.stdin:
        request = json.loads(line)
        readable, writable = os.pipe()
        began = time.perf_counter()
        pid = os.fork()
        if pid == 0:
            os.close(readable)
            _child(request, writable)
        os.close(writable)
        if "delay" in request:
            time.sleep(request["delay"])
            os.kill(pid, request["signal"])
        with os.fdopen(readable) as pipe:
            text = pipe.read()
        _, status = os.waitpid(pid, 0)
        seconds = time.perf_counter() - began
        killed = os.WIFSIGNALED(status)
        answer = {"status": "killed"} if killed or not text else json.loads(text)
        print(json.dumps({**answer, "seconds": seconds}), flush=True)


def _child(request: dict[str, Any], writable: int) -> None:
    import specdef

    calls = 0
    tears = 0
    real_pwrite = os.pwrite

    def act(n: int, _name: str) -> None:
        nonlocal calls
        calls = n
        if n == request.get("call"):
            os.kill(os.getpid(), request["signal"])

    def tear(handle: int, data: memoryview, offset: int) -> int:
        nonlocal tears
        tears += 1
        if tears == request["tear"]:
            real_pwrite(handle, data[: len(data) // 2], offset)
            os.kill(os.getpid(), request["signal"])
        return real_pwrite(handle, data, offset)

    def work() -> None:
        if request["action"] == "lock":
            config = specdef.LockConfig(**request.get("config", {}))
            specdef.lock_checkpoint(
                request["source"], request["out"], config, key_path=request["key"]
            )
        else:
            specdef.unlock_checkpoint(request["source"], request["out"], request["key"])

    answer = {"status": "done", "message": ""}
    try:
        if "tear" in request:
            os.pwrite = tear  # type: ignore[assignment]
        os.fsync = lambda _handle: (
            None
        )  # a killed process loses nothing the kernel has, and syncing takes most of the time
        with every_call(act, after=request.get("after", False)):
            work()
    except KeyboardInterrupt:
        answer = {"status": "interrupted", "message": ""}
    except specdef.SpecDefError as error:
        answer = {"status": "error", "message": str(error)}
    except BaseException as error:
        answer = {"status": "crashed", "message": repr(error)}
    with contextlib.suppress(KeyboardInterrupt):
        os.write(writable, json.dumps({**answer, "calls": calls}).encode())
    os._exit(0)


if __name__ == "__main__":
    _serve()
