"""The page on zones prints what it says, in a process of its own: its table is of all zones."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_examples_run():
    command = [sys.executable, "-m", "doctest", "docs/zones.md"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (ROOT / "docs/zones.md").read_text().count(">>>") > 15
