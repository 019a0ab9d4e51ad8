"""The benchmark of GPUs runs; what it says of speed is the machine's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from fake_driver import FakeDriver

from memdesc.dma import CudaDevice

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_benchmark_runs_or_says_why_not() -> None:
    done = subprocess.run(
        [sys.executable, "benchmarks/gpu.py", "--short"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.stderr == ""
    if "nothing was measured" in done.stdout:
        assert done.returncode == 0
    else:
        assert done.returncode in (0, 1)
        assert "holds: the bytes are those that the other process wrote" in done.stdout


@pytest.mark.slow
def test_what_it_measures_is_what_two_processes_share(
    fake: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the fake driver: the bytes of the other process go there and come back."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu

    fake.allows_pageable = True
    monkeypatch.setitem(sys.modules, "torch", None)
    device = CudaDevice(driver=fake)
    results, equal, whose = gpu.measure(device, [5000, 1 << 16], rounds=1, at_least=1 << 16)
    assert (equal, whose) == (True, "cudaHostAlloc")
    assert len(results) == 2
    for rows in results.values():
        assert rows["memdesc"]["n"] == 2
        assert rows["of pinned"] > 0
