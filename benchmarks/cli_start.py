"""Time of `specdef --help`, beside an empty interpreter: python benchmarks/cli_start.py."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path


def seconds(command: list[str], repeats: int) -> list[float]:
    """Time a command in processes of its own, the first one (cold cache) left out."""
    out = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        out.append(time.perf_counter() - began)
    return out[1:]


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cli_start.json"))
    options = parser.parse_args()
    help_ = statistics.median(seconds([sys.executable, "-m", "specdef.cli.app", "--help"], 9))
    empty = statistics.median(seconds([sys.executable, "-c", "pass"], 9))
    report = {"help_seconds": help_, "interpreter_seconds": empty, "ratio": help_ / empty}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(report)


if __name__ == "__main__":
    main()
