"""How fast do bytes go between a GPU and a descriptor that two processes share?

Of 1 MiB to 1 GiB, to the device and back, several copies under way at a time, by one stream:

* memdesc: a descriptor that another process fills, and compares afterwards; registered in this
  one, and copied by `PinnedMemory`;
* pinned: torch's own pinned memory, or that of cudaHostAlloc where torch is not installed;
* pageable: NumPy's, as it is without registering. That one, and pinned, are copied by bare calls.

Rounds of all of them alternate. What holds: at least 0.98 of pinned memory's bytes a second, at
least 2.5 times pageable memory's; and the bytes that came back are those that the other process
wrote. Without a GPU nothing is measured, which it says.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from common import finish, summary

import memdesc as md
from memdesc.dma.cuda import CudaDevice
from memdesc.dma.cuda.driver import Kind

MIB = 1 << 20

OTHER = """
import sys, numpy as np, memdesc as md
with md.connect(sys.argv[1]) as service:
    there, back = service.map("there").array(), service.map("back").array()
    block = np.random.default_rng().integers(0, 256, 1 << 20, "u1")
    for at in range(0, there.size, block.size):
        block[:8] = np.array([at], "u8").view("u1")
        there[at : at + block.size] = block[: there.size - at]
    print("filled", flush=True)
    for line in sys.stdin:
        nbytes = int(line)
        print(bool(np.array_equal(there[:nbytes], back[:nbytes])), flush=True)
        back[:nbytes] = 0
"""


class Shared:
    """Two descriptors, and the process that fills one and compares the other with it."""

    def __init__(self, nbytes: int, path: str) -> None:
        options: dict[str, Any] = {"max_access": md.Access.READ_WRITE, "recycle": False}
        self.there = md.BufferMemoryDescriptor(nbytes, name="there", **options)
        self.back = md.BufferMemoryDescriptor(nbytes, name="back", **options)
        self._service = md.Service(path)
        self._service.share("there", self.there)
        self._service.share("back", self.back)
        self._other = subprocess.Popen(
            [sys.executable, "-c", OTHER, self._service.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._ask() == "filled"

    def _ask(self) -> str:
        assert self._other.stdout is not None
        return self._other.stdout.readline().strip()

    def equal(self, nbytes: int) -> bool:
        """Whether the other process finds in `back` what it wrote; cleared after that."""
        assert self._other.stdin is not None
        self._other.stdin.write(f"{nbytes}\n")
        self._other.stdin.flush()
        return self._ask() == "True"

    def close(self) -> None:
        self._other.communicate(timeout=60)
        self._service.close()
        self.there.close()
        self.back.close()


@contextmanager
def shared(nbytes: int) -> Iterator[Shared]:
    with tempfile.TemporaryDirectory() as folder:
        made = Shared(nbytes, folder + "/gpu")
        try:
            yield made
        finally:
            made.close()


@contextmanager
def pinned_memory(device: CudaDevice, nbytes: int) -> Iterator[tuple[int, str]]:
    """Pinned memory that is not ours: (address, whose)."""
    try:
        import torch
    except ImportError:
        torch = None
    if torch is not None and torch.cuda.is_available():
        tensor = torch.zeros(nbytes, dtype=torch.uint8, pin_memory=True)
        yield tensor.data_ptr(), f"torch {torch.__version__}"
        return
    with device.current() as driver:
        address = driver.allocate_host(nbytes)
    try:
        yield address, "cudaHostAlloc"
    finally:
        with device.current() as driver:
            driver.free_host(address)


Way = Callable[[Kind, int, int], object]
"""Copies (which way, bytes, how often), and waits."""


def bare(device: CudaDevice, pointer: int, address: int, stream: int, event: int) -> Way:
    """By the driver's calls alone."""

    def run(kind: Kind, nbytes: int, count: int) -> None:
        to, source = (pointer, address) if kind is Kind.TO_DEVICE else (address, pointer)
        with device.current() as driver:
            for _ in range(count):
                driver.copy(to, source, nbytes, kind, stream)
            driver.record_event(event, stream)
            while not driver.event_done(event):
                pass

    return run


def ours(pinned: md.dma.PinnedMemory, back: md.dma.PinnedMemory, pointer: int) -> Way:
    def run(kind: Kind, nbytes: int, count: int) -> None:
        copy = pinned.copy_to_device if kind is Kind.TO_DEVICE else back.copy_from_device
        for _ in range(count - 1):
            copy(pointer, 0, nbytes)
        copy(pointer, 0, nbytes).wait()

    return run


def measure(
    device: CudaDevice, sizes: list[int], rounds: int, at_least: int
) -> tuple[dict[str, Any], bool, str]:
    """Every size both ways: (results by case, whether the bytes are equal, whose pinned memory)."""
    largest, equal = max(sizes), True
    samples: dict[str, dict[str, list[float]]] = {}
    pageable = np.zeros(largest, "u1")
    with device.current() as driver:
        pointer, stream = driver.allocate(largest), driver.create_stream()
        event = driver.create_event()
    try:
        with shared(largest) as two, pinned_memory(device, largest) as (address, whose):
            with device.registered(two.there) as there, device.registered(two.back) as back:
                ways = {
                    "memdesc": ours(there, back, pointer),
                    "pinned": bare(device, pointer, address, stream, event),
                    "pageable": bare(device, pointer, pageable.ctypes.data, stream, event),
                }
                for nbytes in sizes:
                    for turn in range(rounds + 1):  # the first one warms up
                        once(ways, nbytes, max(at_least // nbytes, 1), samples, turn > 0)
                    ways["memdesc"](Kind.TO_DEVICE, nbytes, 1)
                    ways["memdesc"](Kind.FROM_DEVICE, nbytes, 1)
                    equal &= two.equal(nbytes)
    finally:
        with device.current() as driver:
            driver.destroy_event(event)
            driver.destroy_stream(stream)
            driver.free(pointer)
    return {case: summed(ways) for case, ways in samples.items()}, equal, whose


def once(
    ways: dict[str, Way],
    nbytes: int,
    count: int,
    samples: dict[str, dict[str, list[float]]],
    counts: bool,
) -> None:
    for kind, word in ((Kind.TO_DEVICE, "to the device"), (Kind.FROM_DEVICE, "from the device")):
        rows = samples.setdefault(f"{nbytes // MIB or 1} MiB {word}", {})
        for name, way in ways.items():
            start = time.perf_counter()
            way(kind, nbytes, count)
            took = time.perf_counter() - start
            if counts:
                rows.setdefault(name, []).append(count * nbytes / took / 1e9)


def summed(ways: dict[str, list[float]]) -> dict[str, Any]:
    rows: dict[str, Any] = {
        way: summary(speeds) | {"samples": speeds} for way, speeds in ways.items()
    }
    for other in ("pinned", "pageable"):
        # Round by round: what one round meets, the other meets too.
        pairs = zip(ways["memdesc"], ways[other], strict=True)
        rows[f"of {other}"] = summary([mine / theirs for mine, theirs in pairs])["median"]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--short", action="store_true", help="few bytes, to see that it runs")
    arguments, _ = parser.parse_known_args()
    short = arguments.short
    try:
        device = CudaDevice()
    except md.UnsupportedError as error:
        print(f"nothing was measured: {error}")
        return
    sizes = [MIB, 4 * MIB] if short else [MIB, 4 * MIB, 16 * MIB, 64 * MIB, 256 * MIB, 1024 * MIB]
    rounds, at_least = (1, 8 * MIB) if short else (arguments.rounds, 1024 * MIB)
    results, equal, whose = measure(device, sizes, rounds, at_least)
    checks = {"the bytes are those that the other process wrote": equal}
    for case, rows in results.items():
        speeds = "   ".join(
            f"{way} {rows[way]['median']:6.1f} GB/s" for way in ("memdesc", "pinned", "pageable")
        )
        print(f"{case:28} {speeds}   {rows['of pinned']:.3f} of pinned")
        checks[f"{case}: at least 0.98 of pinned"] = rows["of pinned"] >= 0.98
        checks[f"{case}: at least 2.5 of pageable"] = rows["of pageable"] >= 2.5
    results["gpu"], results["pinned memory"] = device.name, whose
    finish("gpu", __doc__ or "", results, checks)


if __name__ == "__main__":
    main()
