"""Locks and unlocks stopped in the middle: the old state or the complete new one, and a second run that succeeds."""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from helpers import ForkServer, leftovers, snapshot
from specdef import load_key, lock_checkpoint, verify_checkpoint
from specdef.models.tiny import save_tiny


@dataclass
class Place:
    """A model, its locked copy, and a server that locks and unlocks in children.

    Args:
        root: Folder of everything.
        server: Runs the children.
        states: Files of the model and of its locked copy.
        calls: Writing calls an undisturbed action makes.
        seconds: How long it takes.
    """

    root: Path
    server: ForkServer
    states: dict[str, dict[str, str]]
    calls: dict[str, int]
    seconds: dict[str, float]

    def stop(self, action: str, name: str, **how: Any) -> dict[str, Any]:
        """Run an action whose output has this name, and stop it."""
        return self.server.run(action=action, **self.paths(action, name), **how)

    def paths(self, action: str, name: str) -> dict[str, Path]:
        """Return source, out and key of an action."""
        if action == "lock":
            return {
                "source": self.root / "source",
                "out": self.root / name,
                "key": self.root / f"{name}.key.safetensors",
            }
        return {
            "source": self.root / "locked",
            "out": self.root / name,
            "key": self.root / "locked.key.safetensors",
        }

    def check(self, action: str, name: str) -> bool:
        """Assert that the output is absent or complete and everything else as it was; return whether it is there."""
        paths = self.paths(action, name)
        assert snapshot(self.root / "source") == self.states["source"]
        if paths["key"].exists():
            load_key(paths["key"])
        if not paths["out"].exists():
            return False
        if action == "lock":
            assert snapshot(paths["out"]) == self.states["locked"]
            verification = verify_checkpoint(paths["out"], key=paths["key"])
            assert verification.valid, verification.problems
            assert verification.key_matches
        else:
            assert snapshot(paths["out"]) == self.states["source"]
        return True

    def run_again(self, action: str, name: str) -> None:
        """Assert that a second run completes the first, or finds it complete, and clears up behind it."""
        there = self.paths(action, name)["out"].exists()
        again = self.stop(action, name)
        if there:
            assert again["status"] == "error"
            assert "already exists" in again["message"]
        else:
            assert again["status"] == "done", again
        assert self.check(action, name)
        assert leftovers(self.root) == []


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    root = tmp_path_factory.mktemp("kill")
    save_tiny("llama", root / "source", shards=2, num_hidden_layers=1)
    (root / "source" / "tokenizer.json").write_text("{}")
    (root / "source" / "README.md").write_text("# A model\n")
    (root / "source" / "sub").mkdir()
    (root / "source" / "sub" / "extra.txt").write_text("extra")
    lock_checkpoint(root / "source", root / "locked")
    server = ForkServer()
    states = {name: snapshot(root / name) for name in ("source", "locked")}
    place = Place(root, server, states, {}, {})
    for action in ("lock", "unlock"):
        done = place.stop(action, f"{action}ed-whole")
        assert done["status"] == "done", done
        assert place.check(action, f"{action}ed-whole")
        place.calls[action], place.seconds[action] = done["calls"], done["seconds"]
    yield place
    server.close()


@pytest.mark.slow
@pytest.mark.parametrize("action", ["lock", "unlock"])
def test_killed_before_every_call_that_writes(action: str, place: Place) -> None:
    seen = []
    for call in range(1, place.calls[action] + 1):
        name = f"{action}-kill-{call}"
        assert place.stop(action, name, call=call, signal=signal.SIGKILL)["status"] == "killed"
        seen.append((place.check(action, name), bool(leftovers(place.root))))
        place.run_again(action, name)
    # nothing, then unfinished work beside the target, then the whole: each was met
    assert {(False, False), (False, True)} <= set(seen)
    assert [there for there, _ in seen] == sorted(there for there, _ in seen)
    assert (True, True) not in seen


@pytest.mark.parametrize("action", ["lock", "unlock"])
def test_killed_in_the_middle_of_a_write(action: str, place: Place) -> None:
    for tear in (1, 2, 3, 5, 8, 11):
        name = f"{action}-tear-{tear}"
        assert place.stop(action, name, tear=tear, signal=signal.SIGKILL)["status"] == "killed"
        assert not place.check(action, name)
        assert leftovers(place.root)
        place.run_again(action, name)


@pytest.mark.slow
@pytest.mark.parametrize("action", ["lock", "unlock"])
def test_killed_at_random_times(action: str, place: Place) -> None:
    draw = random.Random(0)
    killed, longest = 0, place.seconds[action]
    for number in range(25):
        name = f"{action}-random-{number}"
        delay = draw.uniform(0, longest)
        answer = place.stop(action, name, delay=delay, signal=signal.SIGKILL)
        # follow the machine's speed, so that most runs are met before they end
        killed, longest = (
            (killed + 1, longest * 1.1) if answer["status"] == "killed" else (killed, longest * 0.8)
        )
        place.check(action, name)
        place.run_again(action, name)
    assert killed >= 5


@pytest.mark.slow
@pytest.mark.parametrize("action", ["lock", "unlock"])
def test_interrupted_after_every_call_that_writes(action: str, place: Place) -> None:
    for call in range(1, place.calls[action] + 1):
        name = f"{action}-interrupt-{call}"
        answer = place.stop(action, name, call=call, after=True, signal=signal.SIGINT)
        assert answer["status"] == "interrupted", answer
        there = place.check(action, name)
        assert leftovers(place.root) == []  # it cleared up itself
        if call % 10 == 0 or there:
            place.run_again(action, name)


@pytest.mark.parametrize("action", ["lock", "unlock"])
def test_interrupted_at_random_times(action: str, place: Place) -> None:
    draw = random.Random(1)
    for number in range(10):
        name = f"{action}-random-interrupt-{number}"
        delay = draw.uniform(0, 1.1 * place.seconds[action])
        # whatever it answers: torch turns an interrupt inside its own C++ code into some error of another type
        place.stop(action, name, delay=delay, signal=signal.SIGINT)
        place.check(action, name)
        assert leftovers(place.root) == []


def test_killed_again_and_again(place: Place) -> None:
    # every run is killed a little later than the one before, at the same place
    calls = place.calls["lock"]
    for call in range(5, calls, calls // 8):
        answer = place.stop("lock", "again", call=call, signal=signal.SIGKILL)
        if answer["status"] != "killed":
            break
        assert (
            len(leftovers(place.root)) <= 2
        )  # each run removes what the one before left: folder and key
        if place.check("lock", "again"):
            break
    place.run_again("lock", "again")


def test_a_kill_leaves_a_key_that_was_there_readable(place: Place) -> None:
    paths = place.paths("lock", "keep")
    paths["key"].write_bytes((place.root / "locked.key.safetensors").read_bytes())
    for call in range(place.calls["lock"] // 2, place.calls["lock"] + 1, 3):
        place.stop("lock", "keep", call=call, signal=signal.SIGKILL)
        load_key(paths["key"])
        if place.check("lock", "keep"):
            break
    place.run_again("lock", "keep")
