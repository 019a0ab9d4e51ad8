"""Paging for real: what is not wired leaves memory under pressure, and what is prepared stays.

A swap device is made of compressed memory (zram), a program is put into a memory cgroup, and the
cgroup's limit is lowered below what the program has. Where its pages are then is the kernel's word:
mincore, and `Swap` in smaps.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from memory_cgroup import ENTER, Cgroup, memory_cgroup

MIB = 1 << 20
SIZE = 32 * MIB
WIRED = 4 * MIB
LIMIT = 256 * MIB

PROGRAM = (
    "import sys\n"
    + ENTER
    + """
import json, os
import memdesc as md

def where(buffer):
    '''Bytes resident and bytes in swap, both of the kernel's telling.'''
    swapped, inside = 0, False
    for line in open("/proc/self/smaps"):
        first = line.split()[0]
        if "-" in first:
            inside = int(first.split("-")[0], 16) == buffer.address
        elif inside and first == "Swap:":
            swapped = int(line.split()[1]) * 1024
    return buffer.page_counts().resident * md.page_size, swapped

loose = md.BufferMemoryDescriptor(int(sys.argv[2]), name="loose")
wired = md.BufferMemoryDescriptor(int(sys.argv[3]), name="wired")
content = os.urandom(4096)
for buffer in loose, wired:
    for offset in range(0, buffer.length, 4096):
        buffer.write_bytes(offset, content)
wired.prepare()
before = where(loose), where(wired)
print("ready", flush=True)
sys.stdin.readline()
under = where(loose), where(wired)
print("looked", flush=True)
sys.stdin.readline()
intact = all(
    buffer.read_bytes(offset, 4096) == content
    for buffer in (loose, wired) for offset in range(0, buffer.length, 4096))
wired.complete()
print(json.dumps([before, under, where(loose), intact]), flush=True)
"""
)


def swap_areas() -> list[str]:
    return Path("/proc/swaps").read_text().splitlines()[1:]


@pytest.fixture
def zram_swap() -> Iterator[None]:
    """A swap device of compressed memory, the only one; undone afterwards."""
    if swap_areas():
        pytest.skip("swap is on already: the test would page to a disk of this machine")
    device = next(
        (
            folder
            for folder in sorted(Path("/sys/block").glob("zram*"))
            if (folder / "disksize").read_text().strip() == "0"
        ),
        None,
    )
    if device is None:
        pytest.skip("no unused zram device (modprobe zram makes one)")
    try:
        (device / "disksize").write_text(str(256 * MIB))
    except OSError as error:
        pytest.skip(f"{device}/disksize: {error.strerror}")
    node = f"/dev/{device.name}"
    try:
        for command in (["mkswap", node], ["swapon", node]):
            try:
                done = subprocess.run(command, capture_output=True, text=True, check=False)
            except FileNotFoundError:
                pytest.skip(f"{command[0]} is not installed")
            if done.returncode:
                pytest.skip(f"{command[0]}: {done.stderr.strip()}")
        try:
            yield
        finally:
            subprocess.run(["swapoff", node], check=True)
    finally:
        (device / "reset").write_text("1")
    assert swap_areas() == []


def run_under_pressure(group: Cgroup) -> list[object]:
    command = [sys.executable, "-c", PROGRAM, str(group.folder), str(SIZE), str(WIRED)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as program:
        assert program.stdin and program.stdout
        try:
            assert program.stdout.readline() == "ready\n"
            group.squeeze(SIZE * 3 // 4)
            group.limit(LIMIT)  # what is in swap stays there until it is touched
            program.stdin.write("\n")
            program.stdin.flush()
            assert program.stdout.readline() == "looked\n"
            answer, _ = program.communicate("\n", timeout=60)
        finally:
            program.kill()
    result: list[object] = json.loads(answer)
    return result


@pytest.mark.alone
@pytest.mark.slow
def test_unwired_memory_leaves_under_pressure_and_prepared_memory_stays(zram_swap: None) -> None:
    with memory_cgroup(LIMIT, swap=True) as group:
        before, under, after, intact = run_under_pressure(group)
    assert before == [[SIZE, 0], [WIRED, 0]]
    (loose_resident, loose_swapped), (wired_resident, wired_swapped) = under  # type: ignore[misc]
    assert loose_swapped >= SIZE // 4  # most of it, and not by a few pages only
    assert loose_resident <= SIZE - loose_swapped
    assert (wired_resident, wired_swapped) == (WIRED, 0)
    assert after == [SIZE, 0]  # read back, and all there
    assert intact
