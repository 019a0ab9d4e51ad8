"""How much memory do processes need that read one large array, and how fast is it there?

A file of 1 GiB, `memdesc serve` of it as a program, and four programs that read all of it, each
by `md.connect(name)["array"]`. Against four programs that each `numpy.load` it, as they would
without (in turn, since the machine may not have room for all), and four that `numpy.load` it with
`mmap_mode="r"`, which share the page cache.

The four are programs that know nothing of each other, and, a second time, workers that one program
forked once it had imported what they need, as web servers do.

What holds: the memory of all processes together, interpreters and all, as the kernel reckons it
(Pss of everything that they have mapped, with huge pages), stays below 1.1 of the file; the array
is there once; every reader's sum is the right one.
Swaps: versions come as fast as they load, while a reader checks that all arrays are of one version.
"""

from __future__ import annotations

import argparse
import compileall
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from common import finish, summary

import memdesc as md

MIB = 1 << 20
SERVE = [sys.executable, "-c", "from memdesc.cli import main; main()", "serve", "--json", "--quiet"]
READ = """
import os, sys, time
import numpy as np
way, where, workers = sys.argv[1], sys.argv[2], int(sys.argv[3])
if way == "memdesc":
    import memdesc as md
    md.connect  # imports
for _ in range(workers):
    if not os.fork():
        break
else:
    if workers or way == "nothing":
        print(os.getpid(), flush=True)
        sys.stdin.read()
        for _ in range(workers):
            os.wait()
        sys.exit()
begun = time.perf_counter()
if way == "memdesc":
    array = md.connect(where, timeout=60)["large"]
else:
    array = np.load(where, mmap_mode="r" if way == "mmap" else None)
first = array[0]
there = time.perf_counter() - begun
total = int(array.sum())
# In one write: the lines of several go through one pipe.
os.write(1, f"{os.getpid()} {there} {time.perf_counter() - begun} {total}\\n".encode())
sys.stdin.read()
"""


def make_file(folder: Path, nbytes: int) -> tuple[Path, int]:
    array = np.arange(nbytes // 8, dtype="<i8")
    np.save(folder / "large.npy", array)
    with (folder / "large.npy").open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return folder / "large.npy", int(array.sum())


def memory_of(pids: list[int]) -> dict[str, int]:
    """Bytes that processes have together: in all, and of these in `files` and memfds."""
    found = {"all": 0, "array": 0}
    for pid in pids:
        ours = False
        for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
            name, _, value = line.partition(":")
            if " " in name:
                ours = "memdesc-files" in line or "large.npy" in line
            elif name in ("Pss", "Private_Hugetlb", "SwapPss"):
                nbytes = int(value.split()[0]) << 10
                found["all"] += nbytes
                found["array"] += nbytes * ours
            elif name == "Shared_Hugetlb":  # in no Pss
                nbytes = (int(value.split()[0]) << 10) // len(pids)
                found["all"] += nbytes
                found["array"] += nbytes * ours
    return found


@contextmanager
def readers(
    way: str, where: str, programs: int, workers: int = 0
) -> Iterator[dict[int, list[float]]]:
    """So many programs, or workers of each: by pid what each told of its reading, if it read."""
    started = [
        subprocess.Popen(
            [sys.executable, "-c", READ, way, where, str(workers)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(programs)
    ]
    try:
        found = {}
        for one in started * (workers + 1):
            assert one.stdout is not None
            pid, *words = one.stdout.readline().split()
            found[int(pid)] = [float(word) for word in words]
        yield found
    finally:
        for one in started:
            one.communicate()


def told(found: dict[int, list[float]]) -> dict[str, Any]:
    rows = [words for words in found.values() if words]
    return {
        "first_element_seconds": summary([row[0] for row in rows])["median"],
        "sum_seconds": summary([row[1] for row in rows])["median"],
        "sums": [int(row[2]) for row in rows],
    }


@contextmanager
def served(path: Path, *options: str) -> Iterator[tuple[int, dict[str, Any]]]:
    command = [*SERVE, "--name", "bench", *options, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        record = json.loads(process.stdout.readline())
        process.stdout.readline()  # serving
        try:
            yield process.pid, record
        finally:
            process.terminate()


def by_memdesc(path: Path, programs: int, workers: int = 0) -> dict[str, Any]:
    with served(path) as (pid, record), readers("memdesc", "bench", programs, workers) as found:
        memory = memory_of([pid, *found])
        server = memory_of([pid])
        memory["server_itself"] = server["all"] - server["array"]
    names = ("seconds", "way", "bounced_bytes", "huge_bytes")
    return told(found) | {"memory": memory, "load": {name: record[name] for name in names}}


def by_numpy(path: Path, way: str, most: int) -> dict[str, Any]:
    """With copies: one at a time, and its memory counted for all."""
    count = most if way == "mmap" else 1
    with readers(way, str(path), count) as found:
        memory = memory_of([*found])
    return told(found) | {"memory": {name: each * most // count for name, each in memory.items()}}


def swaps(folder: Path, seconds: float) -> dict[str, Any]:
    """Versions as fast as they load, and reads meanwhile: how many of each, and how many wrong."""
    names = ("a", "b", "c")

    def write(value: int) -> list[Path]:
        paths = [folder / f"{name}.npy" for name in names]
        for path in paths:
            np.save(folder / "new.npy", np.full(1 << 16, value))
            os.utime(folder / "new.npy", (0, 0))
            (folder / "new.npy").replace(path)
        return paths

    reader = subprocess.Popen(
        [sys.executable, "-c", SWAPPED], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with md.files.FileServer("swapped", write(1)) as server:
        assert reader.stdout is not None
        reader.stdout.readline()
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            write(server.version + 1)
            server.reload()
        out, _ = reader.communicate("x")
        reads, seen, wrong = map(int, out.split())
        return {"versions": server.version, "reads": reads, "seen": seen, "mixtures": wrong}


SWAPPED = """
import select, sys
import memdesc as md
reads, seen, wrong = 0, set(), 0
with md.connect("swapped", timeout=60) as connection:
    while not select.select([0], [], [], 0)[0]:
        arrays = connection.arrays()
        reads += 1
        seen.add(arrays.version)
        wrong += any((array != arrays.version).any() for array in arrays.values())
        if reads == 1:
            print(flush=True)
print(reads, len(seen), wrong)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true", help="a small file, to see that it runs")
    parser.add_argument("--folder", type=Path, help="on the disk to be read")
    arguments, _ = parser.parse_known_args()
    nbytes = (64 if arguments.short else 1024) * MIB
    count = 2 if arguments.short else 4
    results: dict[str, Any] = {"nbytes": nbytes, "readers": count}
    # What is installed has its bytecode; who compiles needs the memory for that too.
    compileall.compile_dir(Path(md.__file__).parent, quiet=1)
    with tempfile.TemporaryDirectory(dir=arguments.folder or ".") as name:
        os.environ["MEMDESC_RUNTIME_DIR"] = tempfile.mkdtemp(prefix="md-")
        path, total = make_file(Path(name), nbytes)
        results["memdesc"] = by_memdesc(path, count)
        results["forked"] = by_memdesc(path, 1, workers=count)
        for way in () if arguments.short else ("load", "mmap"):
            results[way] = by_numpy(path, way, count)
        results["swaps"] = swaps(Path(name), 0.3 if arguments.short else 10)
        os.rmdir(os.environ["MEMDESC_RUNTIME_DIR"])
    ways = [way for way in ("memdesc", "forked", "load", "mmap") if way in results]
    for way in ways:
        rows = results[way]
        print(
            f"{way:8} memory {rows['memory']['all'] / MIB:7.0f} MiB, of it the array "
            f"{rows['memory']['array'] / MIB:7.0f}; first element after "
            f"{rows['first_element_seconds'] * 1e3:8.2f} ms, sum after {rows['sum_seconds']:.2f} s"
        )
    ours = results["memdesc"]
    print(f"loaded: {ours['load']}\nswaps: {results['swaps']}")
    # A small file is outweighed by our own code in each process.
    most = nbytes + 96 * MIB if arguments.short else 1.1 * nbytes
    checks = {
        "memory of all together below 1.1 of the file": ours["memory"]["all"] < most,
        "also of workers": results["forked"]["memory"]["all"] < most,
        "the array is there once": ours["memory"]["array"] <= 1.01 * nbytes,
        "every sum is right": all(one == total for way in ways for one in results[way]["sums"]),
        "no mixture was seen": not results["swaps"]["mixtures"] and results["swaps"]["seen"] > 1,
    }
    finish("serve", __doc__ or "", results, checks)


if __name__ == "__main__":
    main()
