"""The classifier of digits in small: it learns, it is saved as an ordinary folder, and the same data reach it later."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from idx_files import blobs, write_split
from specdef.data.batches import load_batches
from specdef.errors import CheckpointError, SpecDefError
from specdef.models import mnist_resnet
from specdef.models.mnist_resnet import main, train_mnist_resnet

SMALL: dict[str, Any] = {"rows": 320, "epochs": 2, "hidden_sizes": [8, 16], "depths": [1, 1]}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_split(tmp_path_factory.mktemp("idx") / "data", "train", *blobs(400))
    return write_split(folder, "t10k", *blobs(100, seed=1))


def load(folder: Path) -> Any:
    from transformers import AutoModelForImageClassification

    return AutoModelForImageClassification.from_pretrained(folder)


def test_it_learns(data: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    options = SMALL | {"rows": 400, "epochs": 6}
    record = train_mnist_resnet(tmp_path / "out", data=data, progress=lines.append, **options)
    assert record["accuracy"] >= 0.95  # by chance 0.25
    first, *_, last = record["history"]
    assert last["loss"] < first["loss"] / 2 and last["accuracy"] == record["accuracy"]
    assert record["test_rows"] == 100 and record["seconds"] > 0
    assert json.loads(json.dumps(record)) == record
    assert lines[-1].startswith("epoch 6 of 6: loss") and "test accuracy" in lines[-1]


def test_load_batches_gives_what_it_was_trained_on(data: Path, tmp_path: Path) -> None:
    """No resizing, no processor: the saved folder has the accuracy of the record, on the same numbers."""
    out = tmp_path / "out"
    record = train_mnist_resnet(out, data=data, **SMALL)
    assert 0.3 < record["accuracy"] < 0.9  # not yet perfect: a difference would show
    assert {path.name for path in out.iterdir()} == {"config.json", "model.safetensors"}
    model = load(out)
    config = model.config
    assert config.architectures == ["ResNetForImageClassification"]
    assert (config.num_labels, config.num_channels, config.image_size) == (4, 1, 12)
    [batch] = load_batches(
        data, config, None, task="image-classification", batch_size=100, num_batches=1, split="test"
    )  # fmt: skip
    images, labels = blobs(100, seed=1)
    trained_on, _ = mnist_resnet._batch((images, labels), np.arange(100))
    rows = {row.numpy().tobytes() for row in batch["pixel_values"]}
    assert rows == {row.numpy().tobytes() for row in trained_on} and len(rows) == 100
    with torch.no_grad():
        right = model(batch["pixel_values"]).logits.argmax(dim=1) == batch["labels"]
    assert float(right.double().mean()) == pytest.approx(record["accuracy"])


def test_the_same_seed_gives_the_same_model(data: Path, tmp_path: Path) -> None:
    torch.manual_seed(7)
    state = torch.get_rng_state()
    models = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train_mnist_resnet(tmp_path / name, data=data, seed=seed, **SMALL | {"rows": 64})
        assert torch.equal(torch.get_rng_state(), state)
        models.append((tmp_path / name / "model.safetensors").read_bytes())
        torch.rand(1)  # another global state changes nothing
        state = torch.get_rng_state()
    assert models[0] == models[1] != models[2]


def test_every_epoch_takes_the_rows_in_another_order(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, seen = mnist_resnet._batch, []

    def watched(split: Any, rows: Any) -> Any:
        seen.append(rows.tolist())
        return real(split, rows)

    monkeypatch.setattr(mnist_resnet, "_batch", watched)
    train_mnist_resnet(tmp_path / "out", data=data, **SMALL | {"rows": 96})
    epochs = [seen[0:3], seen[4:7]]  # behind each, one batch of the test
    rows = [sorted(row for batch in epoch for row in batch) for epoch in epochs]
    assert rows[0] == rows[1] and len(set(rows[0])) == 96
    assert {frozenset(batch) for batch in epochs[0]} != {frozenset(batch) for batch in epochs[1]}


def test_the_default_is_resnet_18() -> None:
    with torch.device("meta"):
        model = mnist_resnet._new_model((28, 28), 10, (64, 128, 256, 512), (2, 2, 2, 2))
        other = mnist_resnet._new_model((28, 14), 10, (4,), (1,))
    assert sum(parameter.numel() for parameter in model.parameters()) == 11_175_370
    assert model.config.image_size == 28 and other.config.image_size == [28, 14]


# --- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": 31}, "rows must be at least 32, got 31"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"depths": [1]}, "hidden_sizes and depths"),
        ({"hidden_sizes": [], "depths": []}, "hidden_sizes and depths"),
        ({"hidden_sizes": [8, 0]}, "hidden_sizes and depths"),
    ],
)
def test_wrong_numbers(data: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train_mnist_resnet(tmp_path / "out", data=data, **SMALL | options)
    assert not list(tmp_path.iterdir())


def test_wrong_data(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for name, rows, message in (
        (tmp_path / "none", 64, "no folder of IDX files"),
        (data, 401, "400 pictures to train on; 401 were asked for"),
        (write_split(tmp_path / "train", "train", *blobs(64)), 64, "no split 'test'"),
        (write_split(write_split(tmp_path / "sizes", "train", *blobs(64)), "test", *blobs(9, side=10)), 64, "pixels to train on"),
    ):  # fmt: skip
        with pytest.raises(SpecDefError, match=message) as caught:
            train_mnist_resnet(out, data=name, **SMALL | {"rows": rows})
        assert caught.value.hint and not out.exists()


def test_an_existing_folder_is_refused_before_training(data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="already exists"):
        train_mnist_resnet(tmp_path, data=data, **SMALL | {"rows": 100_000})


def test_training_that_fails_saves_nothing(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mnist_resnet, "LEARNING_RATE", 1e30)
    with pytest.raises(SpecDefError, match="loss is not finite"):
        train_mnist_resnet(tmp_path / "out", data=data, **SMALL)
    assert not list(tmp_path.iterdir())


# --- command


def test_command(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--data", str(data), "--rows", "64", "--epochs", "1", "--hidden-sizes", "4,8", "--depths", "1,1"]  # fmt: skip
    assert main([str(tmp_path / "a"), *options]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{tmp_path / 'a'}\n"
    assert captured.err.startswith("epoch 1 of 1: loss") and captured.err.count("\n") == 1
    assert load(tmp_path / "a").config.hidden_sizes == [4, 8]
    assert main([str(tmp_path / "b"), *options, "--json", "--seed", "3"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["rows"], record["epochs"], record["seed"]) == (64, 1, 3)
    for wrong in (["--data", str(tmp_path / "none")], ["--rows", "1"]):
        assert main([str(tmp_path / "c"), *options, *wrong]) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err
