"""Which pages of a private mapping of a file this task has changed: they are its own by now.

A page of the file shows as the file's; one that was stored to is a private copy. The kernel tells
so in the page table: PAGEMAP_SCAN (Linux 6.7) lists the changed runs and skips what was never
touched, the pagemap file has one entry a page. Neither needs a privilege for the own task.
"""

from __future__ import annotations

import array
import errno
import fcntl
import os
import struct

from memdesc.vm.pages import add_run, page_size
from memdesc.vm.physical import is_file_or_shared, is_present, is_swapped, pagemap
from memdesc.vm.task import Task

_SCAN = 0xC0606610  # _IOWR('f', 16, struct pm_scan_arg), linux/fs.h
_FILE, _PRESENT, _SWAPPED = 1 << 2, 1 << 3, 1 << 4
_ARGUMENT = struct.Struct("<12Q")
_REGION_WORDS = 3  # start, end, categories
_AT_ONCE = 512

Run = tuple[int, int]
"""Offset from the beginning of the range, and length: bytes."""


def changed_runs(address: int, length: int, most: int) -> list[Run] | None:
    """List the changed runs of whole pages in a range; None where there are more than `most`.

    Parameters
    ----------
    address, length : int
        Whole pages of one private mapping of a file, in this task.
    most : int
        Runs, 1 or more.

    Notes
    -----
    A page that another thread changes meanwhile may be in the list or not.
    """
    try:
        return _scan(address, length, most)
    except OSError as error:
        if error.errno not in (errno.ENOTTY, errno.EINVAL, errno.EPERM):
            raise
        return _read(address, length, most)


def _scan(address: int, length: int, most: int) -> list[Run] | None:
    """By PAGEMAP_SCAN; ENOTTY where the kernel has none."""
    regions = array.array("Q", bytes(8 * _REGION_WORDS * _AT_ONCE))
    vector = regions.buffer_info()[0]
    runs: list[Run] = []
    fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        at, end = address, address + length
        while at < end:
            flags = (_FILE, _FILE, _PRESENT | _SWAPPED, _FILE)  # inverted, all of, any of, told
            asked = (_ARGUMENT.size, 0, at, end, 0, vector, _AT_ONCE, 0, *flags)
            argument = bytearray(_ARGUMENT.pack(*asked))
            found = fcntl.ioctl(fd, _SCAN, argument)
            at = _ARGUMENT.unpack(argument)[4]
            for index in range(0, found * _REGION_WORDS, _REGION_WORDS):
                add_run(runs, regions[index] - address, regions[index + 1] - regions[index])
            if len(runs) > most:
                return None
    finally:
        os.close(fd)
    return runs


def _read(address: int, length: int, most: int) -> list[Run] | None:
    """By the pagemap file."""
    runs: list[Run] = []
    with Task.current() as task:
        for index, entry in enumerate(pagemap(task, address, length)):
            if (is_present(entry) or is_swapped(entry)) and not is_file_or_shared(entry):
                add_run(runs, index * page_size, page_size)
                if len(runs) > most:
                    return None
    return runs
