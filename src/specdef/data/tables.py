"""Tables of other libraries: CSV through the standard library, Parquet and `save_to_disk` through `datasets`."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from specdef.data.texts import decode_file
from specdef.errors import SpecDefError

DATASETS_HINT = 'Run `pip install "specdef[data]"`, or convert the data to .jsonl or .csv.'

_MAX_CELL = 1 << 30  # the module's own limit, 128 KiB, is shorter than many documents


def read_csv(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Read a table whose first line names the columns.

    Args:
        path: A `.csv` file (commas) or a `.tsv` file (tabs), quoted as usual.

    Yields:
        (row, where it stands).

    Raises:
        SpecDefError: A row has more or fewer cells than the first line, or the quoting is broken.
    """
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    limit = csv.field_size_limit(_MAX_CELL)
    try:
        reader = csv.reader(io.StringIO(decode_file(path), newline=""), delimiter=delimiter, strict=True)  # fmt: skip
        names: list[str] | None = None
        for cells in reader:
            where = f"{path}, line {reader.line_num}"
            if not cells:
                continue
            if names is None:
                names = [name.strip() for name in cells]
                if len(set(names)) < len(names):
                    raise SpecDefError(
                        f"{where}: two columns have the same name ({', '.join(names)}).",
                        hint="The first line of the table names its columns.",
                    )
                continue
            if len(cells) != len(names):
                raise SpecDefError(
                    f"{where}: {len(cells)} cells in a table of {len(names)} columns.",
                    hint="Quote cells that hold the delimiter, a quote or a line break.",
                )
            yield dict(zip(names, cells, strict=True)), where
    except csv.Error as error:
        raise SpecDefError(
            f"{path}, line {reader.line_num}: not CSV ({error}).",
            hint="Quote cells that hold the delimiter, a quote or a line break; double quotes inside.",
        ) from error
    finally:
        csv.field_size_limit(limit)


def read_parquet(files: list[Path]) -> tuple[Any, dict[str, tuple[str, ...]]]:
    """Read Parquet files of the same columns.

    Args:
        files: The files, in order.

    Returns:
        (a `datasets.Dataset` whose pictures are left as bytes, names of classes by column).

    Raises:
        SpecDefError: `datasets` is not installed, a file is damaged, or the columns differ.
    """
    datasets = _datasets(files[0])
    import pyarrow
    import pyarrow.parquet

    tables = []
    for path in files:
        try:
            tables.append(datasets.Dataset(pyarrow.parquet.read_table(path)))
        except (pyarrow.ArrowException, OSError, ValueError, TypeError, KeyError) as error:
            raise SpecDefError(
                f"{path}: not a readable Parquet file ({_first_line(error)}).",
                hint="Fetch or write it again.",
            ) from error
    try:
        return _undecoded(datasets, datasets.concatenate_datasets(tables))
    except ValueError as error:
        raise SpecDefError(
            f"{files[0].parent}: the files have different columns ({_first_line(error)}).",
            hint="Name one file of it.",
        ) from error


def read_saved(folder: Path, split: str | None) -> tuple[Any, dict[str, tuple[str, ...]]]:
    """Read what `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote.

    Args:
        folder: The folder.
        split: Which part of a `DatasetDict`; None takes "train", or the only one.

    Returns:
        (a `datasets.Dataset` whose pictures are left as bytes, names of classes by column).

    Raises:
        SpecDefError: `datasets` is not installed, the folder is damaged, or it has no such split.
    """
    datasets = _datasets(folder)
    try:
        loaded = datasets.load_from_disk(str(folder))
    except Exception as error:  # damaged Arrow files raise many kinds, and all mean the same here
        raise SpecDefError(
            f"{folder}: the data set cannot be read ({_first_line(error)}).",
            hint="Write it again with save_to_disk.",
        ) from error
    if isinstance(loaded, datasets.DatasetDict):
        parts = list(loaded)
        name = split or ("train" if "train" in parts or len(parts) != 1 else parts[0])
        if name not in parts:
            raise SpecDefError(
                f"{folder}: no split {name!r}; there are {', '.join(parts)}.",
                hint="Name one of these splits.",
            )
        loaded = loaded[name]
    elif split is not None:
        raise SpecDefError(
            f"{folder}: the data set has no splits, {split!r} was asked for.",
            hint="Leave the split out.",
        )
    return _undecoded(datasets, loaded)


def _datasets(path: Path) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise SpecDefError(
            f"{path}: reading it needs the package datasets, which is not installed.",
            hint=DATASETS_HINT,
        ) from error
    return datasets


def _undecoded(datasets: Any, table: Any) -> tuple[Any, dict[str, tuple[str, ...]]]:
    """Keep pictures as bytes: `datasets` would open whatever path or address a row names, also over the network."""
    names: dict[str, tuple[str, ...]] = {}
    for column, feature in table.features.items():
        if isinstance(feature, datasets.Image):
            table = table.cast_column(column, datasets.Image(decode=False))
        elif isinstance(feature, datasets.ClassLabel) and feature.names:
            names[column] = tuple(feature.names)
    return table, names


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
