"""The benchmark of disks runs; what it says of speed is the machine's."""

import subprocess
import sys
from pathlib import Path

import pytest
from disk_tools import a_file, needs_direct, needs_uring

from memdesc.dma import DirectFile

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_benchmark_runs(tmp_path: Path) -> None:
    needs_uring()
    with DirectFile(a_file(tmp_path, 1)) as disk:
        needs_direct(disk)
    command = [sys.executable, "benchmarks/disk.py", "--short", "--folder", str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode in (0, 1), done.stderr
    assert "holds: the bytes are those of the file" in done.stdout
    assert done.stderr == ""
