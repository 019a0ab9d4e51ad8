"""How soon do 1 and 4 other processes compute with a table of 256 MiB, and what memory is that?

A program has a PyArrow table of three columns: floats, integers, texts. Its readers are running,
and were given a small one in the same way. From there on: it gives the table to each of them, and
each reads all of it (a sum of each column). What is timed is until the first reader, and until the
last one, has told its sums; what is counted is the memory that all of them have mapped more than
before (Pss: shared pages are counted once), while all readers still have the table. The lengths of
the texts, which a reader sums, are memory of its own: an eighth of the table.

* pickle: the table itself through a multiprocessing.Pipe to each;
* stream: an Arrow IPC stream through a pipe to each, read as it comes;
* file: an Arrow IPC file in /dev/shm, memory-mapped by each; somebody has to delete it, and nobody
  does if the program is killed;
* memdesc: `to_descriptor`, a handle to each, `table`, with all of its validation;
* trusted: the same without validation;
* handle: `to_descriptor`, then the table of that itself through the Pipe, as a handle.

Rounds of all of them alternate, with new readers each time. What holds: the sums are equal; there
is one copy for all readers together; none of them makes one of its own; and nothing that copies for
each reader gives it the table sooner.
"""

from __future__ import annotations

import argparse
import multiprocessing as mp
import os
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from common import finish, summary

from memdesc.interop import arrow
from memdesc.interop.multiprocessing import installed

MIB = 1 << 20
SPAWN = mp.get_context("spawn")


def make_table(nbytes: int) -> pa.Table:
    rows = nbytes // 32
    numbers = pc.random(rows, initializer=1)
    texts = pa.array([f"{n:012d}" for n in range(1000)]).take(
        pc.cast(pc.multiply(numbers, 999), pa.int64(), safe=False)
    )
    return pa.table({"price": numbers, "volume": range(rows), "symbol": texts})


def sums(table: pa.Table) -> list[float]:
    lengths = pc.utf8_length(table.column("symbol"))  # looks at every byte of the texts
    return [pc.sum(one).as_py() for one in (table["price"], table["volume"], lengths)]


def mapped() -> int:
    """Bytes that this process has mapped, its part of those that it shares."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) << 10
    raise SystemExit("the kernel tells no Pss of this process")


# -- the ways: what the program does for each reader, and what the reader does ---------------------


def read_pickle(data: Connection) -> pa.Table:
    return data.recv()


def read_stream(data: Connection) -> pa.Table:
    with os.fdopen(os.dup(data.fileno()), "rb") as pipe:
        return pa.ipc.open_stream(pipe).read_all()


def read_file(data: Connection) -> pa.Table:
    return pa.ipc.open_file(pa.memory_map(data.recv())).read_all()


def read_memdesc(data: Connection) -> pa.Table:
    return arrow.table(data.recv())


def read_trusted(data: Connection) -> pa.Table:
    return arrow.table(data.recv(), trusted=True)


def give_pickle(table: pa.Table, readers: list[Connection], folder: str) -> None:
    for data in readers:
        data.send(table)


def give_stream(table: pa.Table, readers: list[Connection], folder: str) -> None:
    for data in readers:
        with os.fdopen(os.dup(data.fileno()), "wb") as pipe:
            with pa.ipc.new_stream(pipe, table.schema) as writer:
                writer.write_table(table)


def give_file(table: pa.Table, readers: list[Connection], folder: str) -> None:
    path = os.path.join(folder, f"{table.num_rows}.arrow")
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table)
    for data in readers:
        data.send(path)


def give_memdesc(table: pa.Table, readers: list[Connection], folder: str) -> Any:
    descriptor = arrow.to_descriptor(table)
    for data in readers:
        data.send(descriptor)
    return descriptor


def give_handle(table: pa.Table, readers: list[Connection], folder: str) -> Any:
    lying = arrow.table(arrow.to_descriptor(table), trusted=True)
    with installed():
        for data in readers:
            data.send(lying)
    return lying


WAYS: dict[str, tuple[Callable[..., Any], Callable[[Connection], pa.Table]]] = {
    "pickle": (give_pickle, read_pickle),
    "stream": (give_stream, read_stream),
    "file": (give_file, read_file),
    "memdesc": (give_memdesc, read_memdesc),
    "trusted": (give_memdesc, read_trusted),
    "handle": (give_handle, read_pickle),
}


def reader(way: str, data: Connection, answers: Connection) -> None:
    sums(WAYS[way][1](data))  # all is imported, and Arrow's threads run
    before = mapped()
    answers.send(None)
    table = WAYS[way][1](data)
    answers.send((sums(table), time.monotonic()))
    answers.recv()  # all readers have it
    answers.send(mapped() - before)
    answers.recv()


def run(way: str, table: pa.Table, count: int, folder: str) -> dict[str, Any]:
    pipes = [SPAWN.Pipe(duplex=False) for _ in range(count)]
    ends = [SPAWN.Pipe() for _ in range(count)]
    children = [
        SPAWN.Process(target=reader, args=(way, data, theirs), daemon=True)
        for (data, _), (_, theirs) in zip(pipes, ends, strict=True)
    ]
    for child in children:
        child.start()
    answers = [ours for ours, _ in ends]
    WAYS[way][0](table.slice(0, 1000), [send for _, send in pipes], folder)
    for one in answers:
        one.recv()
    before, start = mapped(), time.monotonic()
    kept = WAYS[way][0](table, [send for _, send in pipes], folder)
    told, waiting = [], list(answers)
    while waiting:
        for one in wait(waiting, 300):
            told.append(one.recv())  # type: ignore[union-attr]
            waiting.remove(one)  # type: ignore[arg-type]
    for one in answers:
        one.send(None)
    each = [one.recv() for one in answers]
    more = mapped() - before + sum(each)
    for one in answers:
        one.send(None)
    for child in children:
        child.join()
    del kept
    times = [at - start for _, at in told]
    return {"first": min(times), "last": max(times), "memory": more, "sums": [s for s, _ in told]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nbytes", type=int, default=256 * MIB, help="of the table, about")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--short", action="store_true", help="a small table, to see that it runs")
    arguments, _ = parser.parse_known_args()
    nbytes, rounds = (8 * MIB, 1) if arguments.short else (arguments.nbytes, arguments.rounds)
    counts = (1,) if arguments.short else (1, 4)
    table = make_table(nbytes)
    shm = os.statvfs("/dev/shm")
    ways = [way for way in WAYS if way != "file" or shm.f_bavail * shm.f_bsize > 2 * table.nbytes]
    told: dict[tuple[int, str], list[dict[str, Any]]] = {}
    # A short run is among tests, which look for what others leave in /dev/shm.
    with tempfile.TemporaryDirectory(dir=None if arguments.short else "/dev/shm") as folder:
        for _ in range(rounds):
            for count in counts:
                for way in ways:
                    told.setdefault((count, way), []).append(run(way, table, count, folder))
    results: dict[str, Any] = {"nbytes": table.nbytes, "rows": table.num_rows}
    for (count, way), ones in told.items():
        row = {key: summary([one[key] * 1e3 for one in ones]) for key in ("first", "last")}
        row["memory"] = summary([one["memory"] / table.nbytes for one in ones])
        results[f"{count} readers, {way}"] = row
        first, last, memory = (one["median"] for one in row.values())
        print(
            f"readers: {count}  {way:8} first sum after {first:8.1f} ms, the last after "
            f"{last:8.1f} ms   memory: {memory:5.2f} tables"
        )
    finish("table", __doc__ or "", results, checked(told, table, counts[-1]))


def checked(
    told: dict[tuple[int, str], list[dict[str, Any]]], table: pa.Table, count: int
) -> dict[str, bool]:
    def median(way: str, key: str) -> float:
        return summary([one[key] for one in told[count, way]])["median"]

    slack = 8 * MIB * (count + 1)
    expected = sums(table)
    every = [got for ones in told.values() for one in ones for got in one["sums"]]
    lengths = 4 * table.num_rows  # what utf8_length makes in each reader
    return {
        "the sums are equal": all(got == expected for got in every),
        "one copy for all readers": all(
            median(way, "memory") <= table.nbytes + count * lengths + slack
            for way in ("memdesc", "trusted", "handle")
        ),
        "sooner than a pickle or a stream": all(
            median(way, "last") < min(median("pickle", "last"), median("stream", "last"))
            for way in ("memdesc", "trusted", "handle")
        ),
    }


if __name__ == "__main__":
    main()
