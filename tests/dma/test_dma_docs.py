"""The page on disks prints what it says."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_examples_run() -> None:
    command = [sys.executable, "-m", "doctest", "docs/direct-file.md"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (ROOT / "docs/direct-file.md").read_text().count(">>>") > 8
