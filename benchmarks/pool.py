"""What do two changed lines make of a program that maps a function over large arrays by a Pool?

The program makes 100 arrays of 16 MiB, fills them, and has `multiprocessing.Pool(2).map` read every
byte of each. Its two lines are the import, with `install()`, and `np.empty`, which becomes
`md.empty`. What is timed is `map`, with arrays that are there and workers that run:

* plain: the arrays are pickled, written to a pipe, read and unpickled;
* memdesc: as handles; each worker maps the pages, reads them and lets go of them;
* results: the other way round, workers make the arrays and the program reads them. For comparison;
  nothing is asked of it.

Rounds of all of them alternate, in processes of their own. What holds: at least 10 times faster;
no more than one array at a time is mapped in a worker, and it makes no copy (RssShmem, RssAnon);
the sums are equal. The memory of the program is told by its PSS.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import finish, summary

MIB = 1 << 20

PROGRAM = """
import json, os, sys, time
from multiprocessing import get_context
import numpy as np

ARRAYS, NBYTES, METHOD, WAY = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]

def sizes(path):
    lines = [line.split() for line in open(path) if line.startswith(("Rss", "Pss:"))]
    return {line[0].rstrip(":"): int(line[1]) << 10 for line in lines}

def read(array):
    total = int(array.view("u8").sum())
    return total, os.getpid(), sizes("/proc/self/status")

def make(number):
    array = np.empty(NBYTES, "u1")
    array[:] = number % 251
    return array

def none(_):
    time.sleep(0.05)
    return sizes("/proc/self/status")

if __name__ == "__main__":
    with get_context(METHOD).Pool(2) as pool:
        before = pool.map(none, range(4), chunksize=1)  # the workers run
        if WAY == "results":
            start = time.perf_counter()
            made = pool.map(make, range(ARRAYS), chunksize=1)
            took = time.perf_counter() - start
            told = [(int(array.view("u8").sum()), 0, {}) for array in made]
        else:
            arrays = [make(number) for number in range(ARRAYS)]
            start = time.perf_counter()
            told = pool.map(read, arrays, chunksize=1)
            took = time.perf_counter() - start
        seen = [size for _, _, size in told if size]
        print(json.dumps({
            "seconds": took,
            "sums": [total for total, _, _ in told],
            "anonymous": max((size["RssAnon"] for size in seen), default=0)
                - min(size["RssAnon"] for size in before),
            "shared": max((size["RssShmem"] for size in seen), default=0)
                - min(size["RssShmem"] for size in before),
            "pss": sizes("/proc/self/smaps_rollup")["Pss"],
        }))
"""

CHANGES = (
    (
        "import numpy as np\n",
        "import numpy as np, memdesc as md; md.interop.multiprocessing.install()\n",
    ),
    ("np.empty(", "md.empty("),
)


def changed(program: str) -> str:
    for old, new in CHANGES:
        assert program.count(old) == 1
        program = program.replace(old, new)
    return program


def run(program: Path, arrays: int, nbytes: int, method: str, way: str) -> dict[str, Any]:
    command = [sys.executable, str(program), str(arrays), str(nbytes), method, way]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    if done.returncode:
        raise SystemExit(done.stderr)
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def measure(
    folder: Path, arrays: int, nbytes: int, method: str, rounds: int
) -> dict[str, dict[str, list[dict[str, Any]]]]:
    programs = {"plain": folder / "plain.py", "memdesc": folder / "changed.py"}
    programs["plain"].write_text(PROGRAM)
    programs["memdesc"].write_text(changed(PROGRAM))
    told: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for _ in range(rounds):
        for way in ("arguments", "results"):
            for name, program in programs.items():
                one = run(program, arrays, nbytes, method, way)
                told.setdefault(way, {}).setdefault(name, []).append(one)
    return told


def summed(told: dict[str, list[dict[str, Any]]], arrays: int) -> dict[str, Any]:
    row: dict[str, Any] = {
        name: {
            "ms an array": summary([one["seconds"] / arrays * 1e3 for one in ones]),
            **{key: max(one[key] for one in ones) for key in ("anonymous", "shared", "pss")},
        }
        for name, ones in told.items()
    }
    pairs = zip(told["plain"], told["memdesc"], strict=True)
    row["times faster"] = summary(
        [ours["seconds"] and a["seconds"] / ours["seconds"] for a, ours in pairs]
    )
    return row


def main() -> None:
    import tempfile

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arrays", type=int, default=100)
    parser.add_argument("--nbytes", type=int, default=16 * MIB, help="of each")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--method", default="fork", help="fork, spawn or forkserver")
    parser.add_argument("--short", action="store_true", help="few arrays, to see that it runs")
    arguments, _ = parser.parse_known_args()
    arrays, rounds = (6, 1) if arguments.short else (arguments.arrays, arguments.rounds)
    nbytes = 2 * MIB if arguments.short else arguments.nbytes
    with tempfile.TemporaryDirectory() as folder:
        told = measure(Path(folder), arrays, nbytes, arguments.method, rounds)
    results = {way: summed(ones, arrays) for way, ones in told.items()}
    results["arrays"], results["nbytes"], results["method"] = arrays, nbytes, arguments.method
    for way in ("arguments", "results"):
        row = results[way]
        for name in ("plain", "memdesc"):
            one = row[name]
            text = f"{one['ms an array']['median']:8.2f} ms an array"
            if way == "arguments":
                text += (
                    f"   a worker: {one['anonymous'] / MIB:6.1f} MiB private, "
                    f"{one['shared'] / MIB:6.1f} MiB shared more"
                )
            print(f"{way:10} {name:8} {text}   the program: PSS {one['pss'] / MIB:7.1f} MiB")
        print(f"{way:10} {row['times faster']['median']:.1f} times faster")
    ours = results["arguments"]["memdesc"]
    slack = 4 * MIB
    everything = [one for ones in told["arguments"].values() for one in ones]
    checks = {
        "the sums are equal": all(one["sums"] == everything[0]["sums"] for one in everything),
        "arguments: at least 10 times faster": results["arguments"]["times faster"]["median"] >= 10,
        "a worker has one array mapped at a time": ours["shared"] <= nbytes + slack,
        "a worker makes no copy": ours["anonymous"] <= slack,
    }
    finish("pool", __doc__ or "", results, checks)


if __name__ == "__main__":
    main()
