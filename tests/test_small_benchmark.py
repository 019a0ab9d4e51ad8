"""The benchmark of small operations runs, in its short form."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_the_short_form_runs() -> None:
    command = [sys.executable, "benchmarks/small.py", "--short"]
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "open a share, map it  memdesc" in done.stdout
