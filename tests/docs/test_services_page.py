"""What docs/services.md shows is what happens."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_page_runs() -> None:
    command = [sys.executable, "-m", "doctest", "docs/services.md"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


def test_it_shows_something() -> None:
    assert (ROOT / "docs/services.md").read_text().count(">>>") > 15
