"""Files and folders of data: what is read, which split, and errors that name file, line and what to do next."""

from __future__ import annotations

import builtins
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from specdef.data.batches import load_batches
from specdef.data.records import Records, read_records
from specdef.errors import SpecDefError
from specdef.models.tiny import tiny_model

ROWS = [{"text": "ab", "label": "0"}, {"text": 'c "d",\ne', "label": "1"}]


def content(records: Records) -> list[dict[str, Any]]:
    return [dict(records.rows[i]) for i in range(len(records))]


# --- files


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", '{"text": "ab", "label": "0"}\n\n{"text": "c \\"d\\",\\ne", "label": "1"}\r\n'),
        ("a.json", json.dumps(ROWS)),
        ("a.csv", 'text,label\nab,0\n"c ""d"",\ne",1\n'),
        ("a.tsv", 'text\tlabel\nab\t0\n\n"c ""d"",\ne"\t1\n'),
        ("a.CSV", '\ufeffsource text,label\nab,0\n"c ""d"",\ne",1\n'),
    ],
)
def test_every_type_gives_the_same_rows(tmp_path, name, text) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    records = read_records(tmp_path / name)
    first = "source text" if "source" in text else "text"
    assert records.columns == (first, "label")
    assert [tuple(row.values()) for row in content(records)] == [tuple(r.values()) for r in ROWS]
    assert records.column("label") == ["0", "1"]
    assert all(str(tmp_path / name) in records.places(i) for i in range(2))


def test_a_text_file_and_a_packaged_text_are_one_document(tmp_path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    assert content(read_records(tmp_path / "a.txt")) == [{"text": "one\n\ntwo"}]
    [row] = content(read_records("moby-dick"))
    assert "Ishmael" in row["text"]


def test_a_long_cell_is_read_and_the_modules_limit_left_alone(tmp_path) -> None:
    import csv

    limit = csv.field_size_limit()
    (tmp_path / "a.csv").write_text(f"text\n{'x' * 200_000}\n")
    assert len(content(read_records(tmp_path / "a.csv"))[0]["text"]) == 200_000
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        ("none.jsonl", None, "no such file or folder"),
        ("a" * 300 + ".jsonl", None, "no such file or folder"),
        ("empty.txt", b" \n", "holds no text"),
        ("empty.jsonl", b"\n", "no records"),
        ("empty.json", b"", "no records"),
        ("empty.csv", b"", "no records"),
        ("header.csv", b"text,label\n", "no records"),
        ("a.xml", b"<a/>", r"not read from \.xml files"),
        ("a", b"a", "without a suffix"),
        ("a.npz", b"", r"not read from \.npz files"),
        ("latin.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', "line 2: byte 0xe9 is not UTF-8"),
        ("latin.csv", b"text\na\n\xe9\n", "line 3: byte 0xe9 is not UTF-8"),
        ("broken.jsonl", b'{"text": "a"}\n\n{"text": \n', "line 3: not JSON"),
        ("list.jsonl", b'{"text": "a"}\n["b"]\n', "line 2: list instead of an object"),
        ("deep.jsonl", b"[" * 100_000, "line 1: not JSON"),
        ("one.json", b'{"text": "a"}', "one array of objects"),
        ("item.json", b'[{"text": "a"}, 3]', "item 2: int instead of an object"),
        ("wide.csv", b"text,label\na,0\nb,1,2\n", "line 3: 3 cells in a table of 2 columns"),
        ("short.tsv", b"text\tlabel\na\n", "line 2: 1 cells"),
        ("quote.csv", b'text,label\n"a" b,0\n', "line 2: not CSV"),
        ("open.csv", b'text,label\n"a,0\n', "line 2: not CSV"),
        ("twice.csv", b"text,text\na,b\n", "two columns have the same name"),
    ],
)
def test_unusable_files_are_refused_where_they_are_wrong(tmp_path, name, raw, message) -> None:
    path = tmp_path / name
    if raw is not None:
        path.write_bytes(raw)
    with pytest.raises(SpecDefError, match=message) as caught:
        read_records(path)
    assert str(path) in str(caught.value) and caught.value.hint


def test_a_hub_name_is_not_fetched(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SpecDefError, match="someone/data: there is no such file") as caught:
        read_records("someone/data")
    assert "save_to_disk" in caught.value.hint


# --- folders


def test_files_of_a_folder_are_read_in_order(tmp_path) -> None:
    for name in ("b", "a"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": name}) + "\n")
    (tmp_path / "README.md").write_text("# data")
    (tmp_path / ".hidden.csv").write_text("text\nx\n")
    records = read_records(tmp_path)
    assert [row["text"] for row in content(records)] == ["a", "b"]
    assert records.places(1) == f"{tmp_path / 'b.jsonl'}, line 1"


@pytest.mark.parametrize(
    ("names", "split", "read"),
    [
        (["train.csv", "test.csv", "training.csv"], None, ["train.csv"]),
        (["train.csv", "test.csv"], "test", ["test.csv"]),
        (["data/train-00.csv", "data/train-01.csv", "data/test-00.csv"], None, ["data/train-00.csv", "data/train-01.csv"]),
        (["train/0.csv", "validation/0.csv"], "validation", ["validation/0.csv"]),
        (["part1.csv", "part2.csv"], None, ["part1.csv", "part2.csv"]),
    ],
)  # fmt: skip
def test_the_split_is_taken_from_the_names(tmp_path, names, split, read) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"text\n{name}\n")
    assert [row["text"] for row in content(read_records(tmp_path, split=split))] == read


@pytest.mark.parametrize(
    ("names", "split", "message"),
    [
        ([], None, "no data in this folder; it holds nothing"),
        (["README.md", "config.json"], None, "it holds README.md, config.json"),
        (["a.csv", "b.jsonl"], None, r"several types, \.csv, \.jsonl"),
        (["train.csv"], "test", "no file of the split 'test' among 1, such as train.csv"),
    ],
)
def test_folders_that_cannot_be_read(tmp_path, names, split, message) -> None:
    for name in names:
        (tmp_path / name).write_text("text\nx\n")
    with pytest.raises(SpecDefError, match=message) as caught:
        read_records(tmp_path, split=split)
    assert str(tmp_path) in str(caught.value) and caught.value.hint


def test_a_file_has_no_splits(tmp_path) -> None:
    (tmp_path / "a.csv").write_text("text\nx\n")
    with pytest.raises(SpecDefError, match="a single file has no split 'test'"):
        read_records(tmp_path / "a.csv", split="test")


# --- what needs the package datasets


@pytest.fixture
def hf(monkeypatch) -> Iterator[Any]:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    yield datasets
    datasets.enable_progress_bars()


def dataset(hf: Any, *, values: tuple[int, ...] = (0, 80, 160, 240), path: str | None = None) -> Any:  # fmt: skip
    """Pictures of one colour, in classes by the name of which a model counts the other way round."""
    images = []
    for value in values:
        stream = io.BytesIO()
        Image.new("L", (4, 4), value).save(stream, "PNG")
        images.append({"bytes": None if path else stream.getvalue(), "path": path})
    features = hf.Features({"img": hf.Image(), "label": hf.ClassLabel(names=["cat", "dog"])})
    labels = [i % 2 for i in range(len(values))]
    return hf.Dataset.from_dict({"img": images, "label": labels}, features=features)


@pytest.mark.parametrize("form", ["saved", "splits", "parquet"])
def test_pictures_of_a_data_set(hf, tmp_path, form) -> None:
    data = tmp_path / "data"
    if form == "saved":
        dataset(hf).save_to_disk(data)
    elif form == "splits":
        hf.DatasetDict(test=dataset(hf, values=(0,)), train=dataset(hf)).save_to_disk(data)
    else:
        data.mkdir()
        dataset(hf).to_parquet(data / "train-00000-of-00001.parquet")
    records = read_records(data)
    assert records.class_names == {"label": ("cat", "dog")}
    assert records.column("label") == [0, 1, 0, 1] and records.places(2) == f"{data}, row 2"
    plain = tiny_model("vit").config
    names = {"id2label": {0: "Dog", 1: "Cat"}, "label2id": {"Dog": 0, "Cat": 1}, "num_labels": 2}
    named = tiny_model("vit", **names).config
    for config, turned in ((plain, 0), (named, 1)):
        [batch] = load_batches(
            data, config, None, task="image-classification", batch_size=4, num_batches=1
        )
        grey = (batch["pixel_values"][:, 0, 0, 0] * 255 / 80).round().long()
        assert batch["labels"].tolist() == ((grey + turned) % 2).tolist()


def test_texts_of_a_data_set(hf, tmp_path) -> None:
    table = hf.Dataset.from_dict({"sentence": ["ab", "c"], "label": [0, 1]})
    table.save_to_disk(tmp_path / "saved")
    table.to_parquet(tmp_path / "a.parquet")
    for data in (tmp_path / "saved", tmp_path / "a.parquet"):
        assert content(read_records(data)) == [{"sentence": "ab", "label": 0}, {"sentence": "c", "label": 1}]  # fmt: skip


def test_a_picture_that_is_only_a_path_is_not_opened(hf, tmp_path) -> None:
    secret = tmp_path / "elsewhere.png"
    Image.new("L", (4, 4)).save(secret)
    table = dataset(hf, path=str(secret)).data.table
    pytest.importorskip("pyarrow.parquet").write_table(table, tmp_path / "a.parquet")
    with pytest.raises(SpecDefError, match=r"row .: no picture"):
        load_batches(
            tmp_path / "a.parquet", tiny_model("vit").config, None,
            task="image-classification", batch_size=1, num_batches=1,
        )  # fmt: skip


def test_data_sets_that_cannot_be_read(hf, tmp_path) -> None:
    hf.DatasetDict(a=dataset(hf), b=dataset(hf)).save_to_disk(tmp_path / "splits")
    dataset(hf).save_to_disk(tmp_path / "saved")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    (tmp_path / "mixed").mkdir()
    hf.Dataset.from_dict({"a": ["x"]}).to_parquet(tmp_path / "mixed" / "1.parquet")
    hf.Dataset.from_dict({"a": [1]}).to_parquet(tmp_path / "mixed" / "2.parquet")
    hf.Dataset.from_dict({"a": []}).to_parquet(tmp_path / "empty.parquet")
    for name, split, message in (
        ("splits", None, "no split 'train'; there are a, b"),
        ("splits", "c", "no split 'c'; there are a, b"),
        ("saved", "train", "has no splits"),
        ("bad.parquet", None, "not a readable Parquet file"),
        ("mixed", None, "different columns"),
        ("empty.parquet", None, "no records"),
    ):
        with pytest.raises(SpecDefError, match=message) as caught:
            read_records(tmp_path / name, split=split)
        assert str(tmp_path / name) in str(caught.value) and caught.value.hint
    next((tmp_path / "saved").glob("*.arrow")).write_bytes(b"damaged")
    with pytest.raises(SpecDefError, match="cannot be read"):
        read_records(tmp_path / "saved")


@pytest.mark.parametrize("name", ["a.parquet", "saved"])
def test_without_the_package_the_extra_is_named(tmp_path, monkeypatch, name) -> None:
    if name == "saved":
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.json").write_text("{}")
    else:
        (tmp_path / name).write_bytes(b"PAR1")
    importing = builtins.__import__

    def without(module: str, *args: Any, **kwargs: Any) -> Any:
        if module == "datasets":
            raise ImportError(module)
        return importing(module, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(SpecDefError, match="package datasets") as caught:
        read_records(tmp_path / name)
    assert "specdef[data]" in caught.value.hint


def test_the_page_names_every_column_and_file_type() -> None:
    from specdef.data import columns, images, records

    page = (Path(__file__).parents[1] / "docs" / "data.md").read_text(encoding="utf-8")
    names = {*columns.TEXT, *columns.LABEL, *columns.IMAGE, *columns.ROLES, *images.ARRAYS, *images.LABELS}  # fmt: skip
    names |= {name for pair in (*columns.TEXT_PAIR, *columns.PROMPT) for name in pair}
    assert not {name for name in names if not re.search(rf"\b{name}\b", page)}
    assert all(f"`{suffix}`" in page for suffix in records.FILE_TYPES)
