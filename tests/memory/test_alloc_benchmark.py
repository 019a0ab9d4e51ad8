"""The benchmark of allocating runs; what it says of speed is the machine's."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_benchmark_runs_and_its_memory_is_usable() -> None:
    command = [sys.executable, "benchmarks/alloc.py", "--short"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    faults = dict(re.findall(r"^(\S.*?)  .* (\d+) faults after$", done.stdout, re.M))
    assert {"base, fresh", "base, again, zeroed", "base, again, undefined"} <= set(faults)
    # 1024 base pages were filled; that they were there already is the whole point.
    assert all(int(count) < 100 for count in faults.values()), faults
