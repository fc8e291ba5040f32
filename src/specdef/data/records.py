"""Records of a data file or folder, each a mapping from column names to values: nothing is tokenised or decoded here."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from specdef.data.packaged import NAMES, packaged_rows
from specdef.data.tables import read_csv, read_parquet, read_saved
from specdef.data.texts import decode_file
from specdef.errors import SpecDefError

FILE_TYPES = (".txt", ".jsonl", ".json", ".csv", ".tsv", ".parquet", ".npz")
"""Suffixes of single files."""

IMAGE_TYPES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
"""Suffixes of pictures in class folders."""

_FOLDER_TYPES = (".jsonl", ".csv", ".tsv", ".parquet", ".txt")


@dataclass(frozen=True, slots=True, kw_only=True)
class Records:
    """Rows with named columns, and where each came from.

    Args:
        source: File or folder, for messages.
        columns: Names of the columns, in order of appearance.
        rows: A list of mappings, or a `datasets.Dataset`; a column that a row lacks is None or absent there.
        places: Says where row i stands, such as "a.jsonl, line 3".
        class_names: Column -> names of its classes, where the data set states them.
        chat: Whether prompts are questions to an assistant, so that they go through a chat template where there is one.
    """

    source: str
    columns: tuple[str, ...]
    rows: Any  # list[dict[str, Any]] | datasets.Dataset
    places: Callable[[int], str]
    class_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    chat: bool = False

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.rows)

    def column(self, name: str) -> list[Any]:
        """Return the values of a column, None where a row lacks it."""
        if isinstance(self.rows, list):
            return [row.get(name) for row in self.rows]
        return list(self.rows[name])  # a `datasets.Dataset` reads one column without the others


def read_records(data: str | Path, *, split: str | None = None) -> Records:
    """Read a data file or folder, or packaged data.

    Args:
        data: Name of packaged data (`packaged.NAMES`); a file (`FILE_TYPES` but `.npz`); a folder written by
            `datasets.save_to_disk`; a folder of `.jsonl`, `.csv`, `.tsv`, `.parquet` or `.txt` files of one type; or
            one of pictures in class folders.
        split: Part of a folder, such as "test". Default: "train" where the folder has such a part, else all of it.

    Returns:
        The records, at least one. Pictures are left as files or bytes under "image".

    Raises:
        SpecDefError: There is no such file, it cannot be read, holds nothing or has an unknown type.
    """
    path = Path(data)
    packaged = data in NAMES
    if not (packaged or os.path.exists(path)):  # Path.exists raises where a name is too long
        raise SpecDefError(
            f"{path}: there is no such file or folder.",
            hint=f"Give a path, or the name of packaged data ({', '.join(NAMES)}), or mnist. Data sets of the hub "
            "are not fetched: load one with `datasets` and write it with save_to_disk.",
        )
    if path.is_dir() and not packaged:
        return _folder(path, split)
    if split is not None:
        raise SpecDefError(
            f"{path}: a single file has no split {split!r}.",
            hint="Name a folder, or leave the split out.",
        )
    if packaged:
        rows = packaged_rows(str(data))
        listed = _listed(str(data), [(row, f"{data}, row {i}") for i, row in enumerate(rows, 1)])
        return replace(listed, chat="prompt" in listed.columns)
    return _files(path, [path])


def _folder(folder: Path, split: str | None) -> Records:
    """Read a folder of one of the three kinds."""
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        return _from_table(str(folder), *read_saved(folder, split))
    found = [path for path in sorted(folder.rglob("*")) if path.is_file() and not _hidden(path, folder)]  # fmt: skip
    pictures = [path for path in found if path.suffix.lower() in IMAGE_TYPES]
    if pictures:
        return _pictures(folder, _of_split(folder, pictures, split))
    # Most folders hold a README; it is no data.
    files = [path for path in found if path.suffix.lower() in _FOLDER_TYPES]
    if not files:
        names = ", ".join(path.name for path in found[:5]) or "nothing"
        raise SpecDefError(
            f"{folder}: no data in this folder; it holds {names}.",
            hint="Expected: the output of datasets.save_to_disk, .jsonl, .csv, .tsv, .parquet or .txt files, or pictures "
            "in one folder per class.",
        )
    files = _of_split(folder, files, split)
    kinds = sorted({path.suffix.lower() for path in files})
    if len(kinds) > 1:
        raise SpecDefError(
            f"{folder}: files of several types, {', '.join(kinds)}.", hint="Name one file of it."
        )
    return _files(folder, files)


def _hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _of_split(folder: Path, files: list[Path], split: str | None) -> list[Path]:
    """Keep the files of a split: it begins a file's name, or names a folder on the way to it."""

    def belongs(path: Path, name: str) -> bool:
        *folders, stem = path.relative_to(folder).with_suffix("").parts
        return name in folders or re.fullmatch(rf"{re.escape(name)}([-_.].*)?", stem) is not None

    kept = [path for path in files if belongs(path, split or "train")]
    if split is not None and not kept:
        names = ", ".join(str(path.relative_to(folder)) for path in files[:5])
        raise SpecDefError(
            f"{folder}: no file of the split {split!r} among {len(files)}, such as {names}.",
            hint="A split begins a file's name (test.jsonl, test-00000.parquet) or names a folder (test/…).",
        )
    return kept or files


def _files(source: Path, files: list[Path]) -> Records:
    """Read files of one type."""
    suffix = files[0].suffix.lower()
    if suffix == ".parquet":
        return _from_table(str(source), *read_parquet(files))
    readers: dict[str, Callable[[Path], Iterator[tuple[dict[str, Any], str]]]] = {
        ".txt": _txt, ".jsonl": _jsonl, ".json": _json, ".csv": read_csv, ".tsv": read_csv,
    }  # fmt: skip
    if suffix not in readers:
        raise SpecDefError(
            f"{source}: data is not read from {suffix + ' files' if suffix else 'a file without a suffix'}.",
            hint=f"Give a file of type {', '.join(FILE_TYPES)}.",
        )
    records = _listed(str(source), [row for path in files for row in readers[suffix](path)])
    if suffix == ".txt" and not any(row["text"].strip() for row in records.rows):
        raise SpecDefError(f"{source}: the file holds no text.", hint="Name a file with text in it.")  # fmt: skip
    return records


def _listed(source: str, rows: list[tuple[dict[str, Any], str]]) -> Records:
    """Return records of rows that lie in memory, each with its place."""
    if not rows:
        raise SpecDefError(f"{source}: no records in it.", hint="Name a file with data in it.")
    columns = tuple(dict.fromkeys(name for row, _ in rows for name in row))
    return Records(
        source=source,
        columns=columns,
        rows=[row for row, _ in rows],
        places=lambda i: rows[i][1],
    )


def _from_table(source: str, table: Any, class_names: dict[str, tuple[str, ...]]) -> Records:
    """Return records of a `datasets.Dataset`, whose rows are read one at a time."""
    if not len(table):
        raise SpecDefError(f"{source}: no records in it.", hint="Name a data set with rows.")
    return Records(
        source=source,
        columns=tuple(table.column_names),
        rows=table,
        places=lambda i: f"{source}, row {i}",
        class_names=class_names,
    )


def _pictures(folder: Path, files: list[Path]) -> Records:
    """List pictures; the class of each is the name of the folder it lies in."""
    loose = [path for path in files if path.parent == folder]
    if loose:
        raise SpecDefError(
            f"{loose[0]}: a picture outside any class folder.",
            hint="Put the pictures of each class into a folder with its name.",
        )
    return _listed(
        str(folder), [({"image": path, "label": path.parent.name}, str(path)) for path in files]
    )


def _txt(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield the whole file as one document."""
    yield {"text": decode_file(path)}, str(path)


def _jsonl(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield one object per line; blank lines are skipped."""
    # Not str.splitlines: a JSON string may hold U+2028, which is no line end here.
    for number, line in enumerate(decode_file(path).split("\n"), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            yield _object(_parse(line, where), where), where


def _json(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield the objects of one array."""
    content = decode_file(path)
    if not content.strip():
        return
    values = _parse(content, str(path))
    if not isinstance(values, list):
        raise SpecDefError(
            f"{path}: a .json file must hold one array of objects.",
            hint="Write [{…}, {…}], or one object per line into a .jsonl file.",
        )
    for number, value in enumerate(values, start=1):
        where = f"{path}, item {number}"
        yield _object(value, where), where


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SpecDefError(
            f"{where}: not JSON ({error}).",
            hint='A .jsonl file has one JSON object per line, such as {"text": "…"}.',
        ) from error


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise SpecDefError(
            f"{where}: {type(value).__name__} instead of an object.",
            hint='Each record is an object such as {"text": "…"}.',
        )
    return value
