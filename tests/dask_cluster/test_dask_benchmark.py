"""The benchmark of Dask runs; what it says of speed is the machine's."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("distributed", reason="Dask's distributed is not installed")

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_benchmark_of_dask_runs() -> None:
    command = [sys.executable, "benchmarks/dask_cluster.py", "--short"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode in (0, 1), done.stderr
    assert "holds: the sums are equal" in done.stdout
    assert "holds: broadcast: the array is in memory once" in done.stdout
    assert "holds: broadcast of a copy: twice" in done.stdout
