"""What processes of `multiprocessing` do with the tables that they are given, and give."""

from __future__ import annotations

import os
import signal
from typing import Any

import pyarrow as pa

import memdesc as md
from memdesc.interop import arrow, multiprocessing as handles


def inode_at(address: int) -> int:
    """The inode of what lies at an address; 0: private memory."""
    with open("/proc/self/maps") as maps:
        for line in maps:
            span, _rights, _offset, _device, inode = line.split()[:5]
            start, end = (int(part, 16) for part in span.split("-"))
            if start <= address < end:
                return int(inode)
    raise AssertionError("it lies nowhere")


def inodes_of(table: Any) -> set[int]:
    """What the buffers of a table lie in."""
    chunks = [chunk for column in table.columns for chunk in column.chunks]
    return {inode_at(one.address) for chunk in chunks for one in chunk.buffers() if one}


def look(table: Any) -> tuple[int, set[int], int, Any]:
    """What a receiver sees of it, what it has allocated for that, and a part of it back."""
    before = pa.total_allocated_bytes()
    seen = inodes_of(table)
    return table.num_rows, seen, pa.total_allocated_bytes() - before, table.slice(1, 3)


def make(rows: int) -> Any:
    """A worker's own table, dropped here as soon as it is sent."""
    handles.install()
    return arrow.table(arrow.to_descriptor({"n": range(rows)}))


def send_and_die(pipe: Any) -> None:
    pipe.send(make(1000))
    os.kill(os.getpid(), signal.SIGKILL)


def receive_and_die(pipe: Any) -> None:
    """Map what comes, and be killed with it."""
    table = pipe.recv()
    assert inodes_of(table) != {0}
    pipe.send(md.page_size)
    signal.pause()
