"""The page on snapshots prints what it says, and the benchmark runs."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_the_examples_run():
    command = [sys.executable, "-m", "doctest", "docs/snapshots.md"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (ROOT / "docs/snapshots.md").read_text().count(">>>") > 8


@pytest.mark.slow
def test_the_benchmark_runs():
    command = [sys.executable, "benchmarks/snapshot.py", "--short"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode in (0, 1), done.stderr  # what it says of speed is the machine's
    assert "times as fast as copied by hand" in done.stdout, done.stderr
