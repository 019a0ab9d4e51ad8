"""The benchmark of GPUs runs; what it says of speed is the machine's."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from fake_driver import FakeDriver
from fake_runtime import FakeRuntime

from memdesc.dma import CudaDevice
from memdesc.dma.cuda import driver as boundary
from memdesc.dma.cuda.driver import OUT_OF_MEMORY
from memdesc.errors import DeviceError

ROOT = Path(__file__).resolve().parents[2]
WAYS = ("to", "from")


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


@pytest.fixture
def gpu(fake: FakeDriver, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The benchmark, for which there is a GPU: the fake driver behind the boundary to CUDA."""
    pytest.importorskip("cuda.bindings.runtime")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import common
    import gpu

    fake.allows_pageable = True
    monkeypatch.setattr(boundary, "_import_runtime", lambda: FakeRuntime(fake))
    monkeypatch.setattr(boundary, "_loaded", None)
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(gpu, "SIZES", [5000, 1 << 16, 1 << 20])
    return gpu


@pytest.mark.slow
def test_all_of_it_against_the_fake_driver(
    gpu: ModuleType,
    fake: FakeDriver,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """The bytes of the other process go there and come back; what is saved is what was measured."""
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--save", "--rounds", "5", "--seconds", "0"])
    # A hundredth of the bytes: what copies here is a processor.
    measure = gpu.Bench.measure
    monkeypatch.setattr(
        gpu.Bench,
        "measure",
        lambda self, nbytes, rounds, at_least, seconds: measure(
            self, nbytes, rounds, 2 << 20, seconds
        ),
    )
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    saved = json.loads((tmp_path / "gpu.json").read_text())
    assert ended.value.code == (0 if all(saved["checks"].values()) else 1)
    assert saved["checks"]["the bytes are those that the other process wrote"]
    assert saved["checks"]["all sizes were measured"]
    results = saved["results"]
    assert (results["gpu"]["name"], results["pinned memory"]) == ("Fake 0", "cudaHostAlloc")
    cases = [f"{size / (1 << 20):g} MiB {way} the device" for size in gpu.SIZES for way in WAYS]
    assert set(cases) == set(results) - {"gpu", "pinned memory", "registering"}
    told = capsys.readouterr().out
    for case in cases:
        assert results[case]["memdesc"]["n"] == gpu.LEAST_ROUNDS  # the time was over
        for other in ("pinned", "pageable"):
            ratio = results[case][f"of {other}"]
            limit = 0.98 if other == "pinned" else 2.5
            assert saved["checks"][f"{case}: at least {limit} of {other}"] == (ratio >= limit)
        assert f"{case:28} memdesc" in told


@pytest.mark.slow
def test_what_there_is_no_memory_for_is_left_out(
    gpu: ModuleType, fake: FakeDriver, capsys: pytest.CaptureFixture[str]
) -> None:
    device = CudaDevice()
    fake.fail("register", OUT_OF_MEMORY, after=1)
    with gpu.bench(device, gpu.SIZES) as (made, possible):
        assert possible == gpu.SIZES[:2]
        assert made.equal(1 << 16)
    assert "1 MiB is left out" in capsys.readouterr().out
    assert fake.allocated == {}
    fake.fail("register", 700)
    with pytest.raises(DeviceError), gpu.bench(device, gpu.SIZES):
        pass
    fake.fail("register", OUT_OF_MEMORY)
    with pytest.raises(DeviceError), gpu.bench(device, [4096]):
        pass
