"""The benchmark of streams runs; what it says of speed is the machine's."""

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_benchmark_runs() -> None:
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        pytest.skip("the headers of this Python are not installed")
    command = [sys.executable, "benchmarks/stream", "--short"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    for row in ("4 KiB 1 readers copied   stream", "1,024 KiB 2 readers computed C ring"):
        assert row in done.stdout
