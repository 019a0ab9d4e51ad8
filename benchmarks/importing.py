"""How long does `import memdesc` take, beyond an interpreter that imports nothing?

Whole processes, started one after the other in turns and timed from outside:

* nothing: `python -c pass`;
* memdesc: `import memdesc`, which brings the face alone;
* a buffer: the first `BufferMemoryDescriptor`, made and let go, with all that it brings;
* a connection, a service: `memdesc.connect` and `memdesc.Service` looked up, which bring msgspec;
* for comparison SharedMemory, made and destroyed; `multiprocessing.connection`; msgspec; numpy.

What holds: the median of what `import memdesc` takes more than the nothing of the same round is at
most 30 ms, and NumPy is not imported. The time is that on the wall; the CPU's, which a busy machine
does not change as much, is kept beside it, and the least of it, which others disturb least.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from typing import Any

from common import finish, summary

WAYS = {
    "nothing": "pass",
    "memdesc": "import memdesc",
    "a buffer": "import memdesc; memdesc.BufferMemoryDescriptor(4096).close()",
    "a connection": "import memdesc; memdesc.connect",
    "a service": "import memdesc; memdesc.Service",
    "SharedMemory": "from multiprocessing.shared_memory import SharedMemory as S; "
    "s = S(create=True, size=4096); s.close(); s.unlink()",
    "mp.connection": "import multiprocessing.connection",
    "msgspec": "import msgspec",
    "numpy": "import numpy",
}
IGNORED = ("PYTHONDONTWRITEBYTECODE", "PYTHONPROFILEIMPORTTIME", "MEMDESC_DEBUG")
MOST = 30.0
"""Milliseconds."""


def surroundings(folder: str) -> dict[str, str]:
    """As where a package is installed: what was compiled once is kept. A folder of our own for it
    makes that so whatever the environment and the rights here are.
    """
    kept = {name: value for name, value in os.environ.items() if name not in IGNORED}
    return {**kept, "PYTHONPYCACHEPREFIX": folder}


def run(code: str, environment: dict[str, str]) -> tuple[float, float]:
    """Milliseconds on the wall, and of the CPU."""
    start = time.perf_counter()
    pid = os.posix_spawn(sys.executable, [sys.executable, "-c", code], environment)
    _, status, usage = os.wait4(pid, 0)
    took = time.perf_counter() - start
    if status:
        raise SystemExit(f"{code!r} failed")
    return took * 1e3, (usage.ru_utime + usage.ru_stime) * 1e3


def measure(rounds: int) -> dict[str, Any]:
    samples: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        environment = surroundings(folder)
        for code in WAYS.values():  # once before it counts: files are cached, and compiled
            run(code, environment)
        for _ in range(rounds):
            for way, code in WAYS.items():
                samples[way].append(run(code, environment))
    nothing = samples["nothing"]
    results: dict[str, Any] = {}
    for way, taken in samples.items():
        more = [one[0] - base[0] for one, base in zip(taken, nothing, strict=True)]
        cpu = [one[1] - base[1] for one, base in zip(taken, nothing, strict=True)]
        results[way] = {
            "wall_ms": summary([wall for wall, _ in taken]),
            "more_wall_ms": summary(more),
            "more_cpu_ms": summary(cpu),
            "least_more_cpu_ms": min(one[1] for one in taken) - min(one[1] for one in nothing),
            "samples": taken,
        }
    return results


def modules() -> set[str]:
    """What `import memdesc` imports, as `-X importtime` lists it."""
    command = [sys.executable, "-X", "importtime", "-c", WAYS["memdesc"]]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    return {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--short", action="store_true", help="few rounds, to see that it runs")
    arguments, _ = parser.parse_known_args()
    results = measure(3 if arguments.short else arguments.rounds)
    for way, row in results.items():
        wall, more, cpu = row["wall_ms"], row["more_wall_ms"], row["more_cpu_ms"]
        least = row["least_more_cpu_ms"]
        print(
            f"{way:13} {wall['median']:6.1f} ms   {more['median']:6.1f} ms more "
            f"({more['p10']:.1f} to {more['p90']:.1f}), of the CPU {cpu['median']:6.1f} ms, "
            f"least {least:.1f}"
        )
    brought = modules()
    checks = {
        f"import memdesc: at most {MOST:.0f} ms more than nothing": (
            results["memdesc"]["more_wall_ms"]["median"] <= MOST
        ),
        "NumPy is not imported": "memdesc" in brought and "numpy" not in brought,
    }
    finish("importing", __doc__ or "", results, checks)


if __name__ == "__main__":
    main()
