"""The benchmark of calls runs, in its short form."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_the_short_form_runs() -> None:
    command = [sys.executable, "benchmarks/calls.py", "--short"]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "large, in place" in done.stdout
