"""Every benchmark runs, in its short form, and what it claims of memory holds.

What it says of speed is the machine's: a claim of that may fail here. Those that need a GPU are
tested beside what they measure.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from memdesc import _core
from memdesc.dma import DirectFile

ROOT = Path(__file__).resolve().parents[1]

SAYS = {
    "alloc.py": ["base, fresh", "base, again, zeroed", "base, again, undefined"],
    "calls.py": ["large, in place"],
    "crossing.py": ["copy_between"],
    "dask_cluster.py": [
        "holds: the sums are equal",
        "holds: broadcast: the array is in memory once",
        "holds: broadcast of a copy: twice",
    ],
    "disk.py": ["holds: the bytes are those of the file"],
    "importing.py": ["holds: NumPy is not imported"],
    "pool.py": ["holds: the sums are equal", "holds: a worker has one array mapped at a time"],
    "queue": [
        "rate 64, queue, batches",
        "hop one CPU, queue, as it comes",
        "million messages",
    ],
    "serve.py": ["holds: "] * 5,
    "snapshot.py": ["times as fast as copied by hand"],
    "stream": ["4 KiB 1 readers copied   stream", "1,024 KiB 2 readers computed C ring"],
    "table.py": ["holds: the sums are equal", "holds: one copy for all readers"],
    "zone.py": ["alloc + free of 256 bytes"],
}
"""What each prints, and as often."""

CLAIM_NO_SPEED = {"alloc.py", "calls.py", "serve.py", "stream"}
LIBRARIES = {"dask_cluster.py": "distributed", "table.py": "pyarrow"}
WITH_FOLDER = {"disk.py", "serve.py"}
ELSEWHERE = {"common.py", "dataloader.py", "gpu.py", "handover.py", "results", "small.py"}


@pytest.mark.slow
@pytest.mark.parametrize("name", SAYS)
def test_it_runs(name: str, tmp_path: Path) -> None:
    skip_where_it_can_not(name, tmp_path)
    command = [sys.executable, f"benchmarks/{name}", "--short"]
    if name in WITH_FOLDER:
        command += ["--folder", str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=110, check=False
    )
    assert done.returncode in ((0,) if name in CLAIM_NO_SPEED else (0, 1)), done.stderr
    assert done.stderr == "" or name == "dask_cluster.py"  # Dask tells of its ends there
    for line in SAYS[name]:
        assert done.stdout.count(line) >= SAYS[name].count(line), line
    if name == "alloc.py":
        # 1024 base pages were filled; that they were there already is the whole point.
        faults = dict(re.findall(r"^(\S.*?)  .* (\d+) faults after$", done.stdout, re.M))
        assert faults, done.stdout
        assert all(int(count) < 100 for count in faults.values()), faults


def test_each_is_among_them() -> None:
    made = {path.name for path in (ROOT / "benchmarks").iterdir() if path.name[0] not in "_."}
    assert made == {*SAYS, *ELSEWHERE}


def skip_where_it_can_not(name: str, folder: Path) -> None:
    if name in LIBRARIES:
        pytest.importorskip(LIBRARIES[name])
    if name == "disk.py":
        try:
            _core.open_uring(1, 1, 0).close()
        except OSError as error:
            pytest.skip(f"no io_uring here: {error}")
        (folder / "tried").write_bytes(b"1")
        with DirectFile(folder / "tried") as disk:
            if disk._file.direct < 0:
                pytest.skip(f"no O_DIRECT here: {disk._file.why_buffered}")
    if name == "stream":
        if shutil.which("gcc") is None:
            pytest.skip("gcc is not installed")
        if not Path(sysconfig.get_path("include"), "Python.h").exists():
            pytest.skip("the headers of this Python are not installed")
