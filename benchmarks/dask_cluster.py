"""What does Dask save when workers of one host hand arrays over as handles?

A cluster of five worker processes of one thread each, over TCP on the loopback, as LocalCluster
makes them. A task on one of them makes an array of 256 MiB; what is timed is, from `submit` to the
result in the client, a task that reads a byte of every page:

* pair: on one other worker;
* broadcast: on each of the four other workers, at once.

Ways, rounds of which alternate in the one cluster:

* plain: `np.empty`, no plugin: bytes over TCP;
* memdesc: `md.empty`, and `Plugin()`: handles;
* copy: `np.empty`, and `Plugin(copy=True)`: the owner copies it once, then handles.

Memory is the PSS of all workers together while they hold the array, less what it was before. What
holds: the sums are equal; a broadcast takes at most a fifth of the time; after it the array is in
memory once (memdesc), or twice (copy), where plain Dask has it five times.
"""

from __future__ import annotations

import argparse
import gc
import logging
import tempfile
import time
from typing import Any

import numpy as np
from common import finish, summary
from distributed import Client, LocalCluster, wait

import memdesc as md

MIB = 1 << 20
WAYS = ("plain", "memdesc", "copy")


def make(nbytes: int, way: str) -> Any:
    array = md.empty(nbytes, "u1") if way == "memdesc" else np.empty(nbytes, "u1")
    array[:] = np.arange(256, dtype="u1").repeat(nbytes // 256)
    return array


def read(array: Any) -> int:
    return int(array[::4096].sum(dtype="u8"))


def pss() -> int:
    gc.collect()
    md.recycler.trim()
    with open("/proc/self/smaps_rollup") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("Pss:"))


class Workers:
    """A cluster, and what is done with it; never more than one way at a time."""

    def __init__(self, others: int, folder: str) -> None:
        self.cluster = LocalCluster(
            n_workers=others + 1,
            threads_per_worker=1,
            processes=True,
            dashboard_address=":0",
            host="127.0.0.1",
            memory_limit=0,
            local_directory=folder,
            silence_logs=logging.ERROR,
        )
        self.client = Client(self.cluster)
        self.owner, *self.others = list(self.client.scheduler_info(n_workers=-1)["workers"])

    def go(self, way: str) -> None:
        """Have the plugin of a way, or none; connections are made anew then."""
        if way == "plain":
            self.client.unregister_worker_plugin("memdesc")
        else:
            self.client.register_plugin(md.interop.dask.Plugin(copy=way == "copy"))
        self.run(MIB, way, len(self.others))

    def run(self, nbytes: int, way: str, others: int) -> dict[str, Any]:
        """Once to so many others: seconds, bytes of memory, the sums."""
        before = self.memory()
        array = self.client.submit(make, nbytes, way, workers=[self.owner], pure=False)
        wait(array)
        start = time.perf_counter()
        told = [
            self.client.submit(read, array, workers=[worker], pure=False)
            for worker in self.others[:others]
        ]
        sums = self.client.gather(told)
        seconds = time.perf_counter() - start
        result = {"seconds": seconds, "nbytes": self.memory() - before, "sums": sums}
        del array, told
        while any(self.client.has_what().values()):
            time.sleep(0.01)
        return result

    def memory(self) -> int:
        return sum(self.client.run(pss).values())

    def close(self) -> None:
        self.client.close()
        self.cluster.close()


def measure(nbytes: int, others: int, rounds: int, folder: str) -> dict[str, Any]:
    workers = Workers(others, folder)
    workers.client.register_plugin(md.interop.dask.Plugin())
    told: dict[str, dict[str, list[dict[str, Any]]]] = {"pair": {}, "broadcast": {}}
    for _ in range(rounds):
        for way in WAYS:
            workers.go(way)
            for task, count in (("pair", 1), ("broadcast", others)):
                told[task].setdefault(way, []).append(workers.run(nbytes, way, count))
    workers.close()
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nbytes", type=int, default=256 * MIB)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--short", action="store_true", help="small arrays, to see that it runs")
    arguments, _ = parser.parse_known_args()
    nbytes, others, rounds = arguments.nbytes, 4, arguments.rounds
    if arguments.short:
        nbytes, others, rounds = 16 * MIB, 2, 1
    with tempfile.TemporaryDirectory() as folder:
        told = measure(nbytes, others, rounds, folder)
    results: dict[str, Any] = {"nbytes": nbytes, "others": others}
    for task, ways in told.items():
        results[task] = {
            name: {
                "ms": summary([one["seconds"] * 1e3 for one in ones]),
                "arrays in memory": summary([one["nbytes"] / nbytes for one in ones]),
            }
            for name, ones in ways.items()
        }
        for name, row in results[task].items():
            print(
                f"{task:10} {name:8} {row['ms']['median']:9.1f} ms   "
                f"the array is in memory {row['arrays in memory']['median']:5.2f} times"
            )
    runs = [run for ways in told.values() for ones in ways.values() for run in ones]
    sums = {one for run in runs for one in run["sums"]}
    median = {
        (task, name): {what: results[task][name][what]["median"] for what in row}
        for task in told
        for name, row in results[task].items()
    }
    slack = 1.15 + 8 * MIB / nbytes
    once = median["broadcast", "memdesc"]["arrays in memory"]
    twice = median["broadcast", "copy"]["arrays in memory"]
    checks = {
        "the sums are equal": len(sums) == 1,
        "broadcast: a fifth of the time at most": median["broadcast", "memdesc"]["ms"] * 5
        <= median["broadcast", "plain"]["ms"],
        "broadcast: the array is in memory once": once <= slack,
        "broadcast of a copy: twice": twice <= 1 + slack,
    }
    finish("dask_cluster", __doc__ or "", results, checks)


if __name__ == "__main__":
    main()
