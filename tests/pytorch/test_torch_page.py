"""The page on PyTorch prints what it says, and the example and the benchmark run."""

from __future__ import annotations

import doctest
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="PyTorch is not installed in this environment")

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_examples_of_the_page_run() -> None:
    done = doctest.testfile(str(ROOT / "docs/torch.md"), module_relative=False)
    assert done.failed == 0
    assert done.attempted >= 14


@pytest.mark.slow
def test_the_example_learns(capfd: pytest.CaptureFixture[str]) -> None:
    example = ROOT / "examples/dataloader"
    runpy.run_path(str(example / "train.py"), run_name="__main__")
    assert capfd.readouterr() == ((example / "expected.txt").read_text(), "")


@pytest.mark.slow
def test_the_benchmark_runs() -> None:
    done = subprocess.run(
        [sys.executable, "benchmarks/dataloader.py", "--short"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "holds: every sample arrived, with its bytes" in done.stdout
