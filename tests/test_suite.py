"""What surrounds the tests: one failure is one, and the pool of huge pages is always put back."""

from __future__ import annotations

import fcntl
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import huge_pool
import pytest
from huge_pool import POOL, huge_pages

HERE = Path(__file__).parent
FAILING = """
import os

class Holder:
    def __init__(self):
        self.ends = os.pipe()
        self.itself = self
    def __del__(self):
        print("\\ngone", flush=True)

def test_that_fails_and_holds_on():
    holder = Holder()
    assert not holder

def test_that_holds_on_in_its_fixture(broken):
    pass

def test_that_counts():
    print("\\nnext", flush=True)
"""
BROKEN = """
import pytest
from test_here import Holder

@pytest.fixture
def broken():
    yield
    holder = Holder()
    assert not holder
"""
FILLING = """
import os
from huge_pool import POOL, free_pages, huge_pages
with huge_pages(free_pages() + 1):
    print(POOL.read_text(), flush=True)
    os._exit(1)  # as a timeout ends a test
"""


@pytest.mark.slow
def test_what_a_failed_test_holds_goes_before_the_next(tmp_path: Path) -> None:
    (tmp_path / "test_here.py").write_text(FAILING)
    (tmp_path / "broken.py").write_text(BROKEN)
    own = ["-c", "/dev/null", "--rootdir", tmp_path, "-p", "no:cacheprovider", "-s", "-q"]
    command = [sys.executable, "-m", "pytest", *own, "-p", "conftest", "-p", "broken", tmp_path]
    done = run(command, f"{HERE}:{tmp_path}")
    words = re.findall(r"^(gone|next)$", done.stdout, re.MULTILINE)
    assert words == ["gone", "gone", "next"], done.stdout + done.stderr


@pytest.mark.timeout(200)  # it waits for the pool twice
def test_the_pool_is_put_back_by_who_ends_in_the_midst() -> None:
    if not POOL.exists():
        pytest.skip("this kernel has no pool of huge pages")
    pool, _ = huge_pool._locks()
    fcntl.flock(pool, fcntl.LOCK_UN)
    done = run([sys.executable, "-c", FILLING], f"{HERE}")
    with huge_pages(0):  # not before whoever has to put it back has done so
        after = int(POOL.read_text())
    if not done.stdout:
        pytest.skip(done.stderr.splitlines()[-1])
    assert after < int(done.stdout)


def run(command: list[Any], path: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=100, check=False
    )
