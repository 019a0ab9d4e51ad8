"""Pages print what they say, each in a process of its own: some tell of all that is in one."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

EXAMPLES = {  # pages, and how many examples each has at least
    "arrays": 27,
    "asyncio": 6,
    "calls": 11,
    "copying": 4,
    "direct-file": 9,
    "events": 11,
    "finding-leaks": 20,
    "io-malloc": 9,
    "multiprocessing": 12,
    "queues": 11,
    "serving-files": 20,
    "shared-memory": 28,
    "snapshots": 9,
    "streams": 11,
    "zones": 16,
}


@pytest.mark.parametrize(("page", "least"), EXAMPLES.items())
def test_the_examples_run(page: str, least: int) -> None:
    command = [sys.executable, "-m", "doctest", f"docs/{page}.md"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (ROOT / f"docs/{page}.md").read_text().count(">>>") >= least
