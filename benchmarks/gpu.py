"""How fast do bytes go between a GPU and a descriptor that two processes share?

Of 1 MiB to 1 GiB, to the device and back, several copies under way at a time, by one stream:

* memdesc: a descriptor that another process fills, and compares afterwards; registered in this
  one, and copied by `PinnedMemory`;
* pinned: torch's own pinned memory, or that of cudaHostAlloc where torch is not installed;
* pageable: NumPy's, as it is without registering. That one, and pinned, are copied by bare calls.

Rounds of all of them alternate. What holds: at least 0.98 of pinned memory's bytes a second, at
least 2.5 times pageable memory's; and the bytes that came back are those that the other process
wrote. Without a GPU nothing is measured, which it says. Where there is no memory for the largest
size it is left out, which it says too.
"""

from __future__ import annotations

import argparse
import errno
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
from common import finish, gpu_facts, summary

import memdesc as md
from memdesc.dma.cuda import Attribute, CudaDevice
from memdesc.dma.cuda.driver import Kind

MIB = 1 << 20
SIZES = [MIB, 4 * MIB, 16 * MIB, 64 * MIB, 256 * MIB, 1024 * MIB]

DEPTH = 16
"""Copies that the program has under way at a time."""

LEAST_ROUNDS = 3
"""Of each size, however long they take."""

Handles = tuple[int, int]
"""A stream and an event, for bare calls."""

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
        parts = [slice(at, min(at + (64 << 20), nbytes)) for at in range(0, nbytes, 64 << 20)]
        print(all(np.array_equal(there[part], back[part]) for part in parts), flush=True)
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


@contextmanager
def device_memory(device: CudaDevice, nbytes: int) -> Iterator[tuple[int, Handles]]:
    """Memory of the device, and for bare calls a stream and an event."""
    with device.current() as driver:
        pointer, stream = driver.allocate(nbytes), driver.create_stream()
        event = driver.create_event()
    try:
        yield pointer, (stream, event)
    finally:
        with device.current() as driver:
            driver.destroy_event(event)
            driver.destroy_stream(stream)
            driver.free(pointer)


Way = Callable[[Kind, int, int], object]
"""Copies (which way, bytes, how often), and waits."""


def places(nbytes: int, count: int, largest: int) -> Iterator[int]:
    """Where in the memory to copy: further each time, as frames come, so that no cache helps."""
    for number in range(count):
        yield number % (largest // nbytes) * nbytes


def bare(device: CudaDevice, pointer: int, address: int, handles: Handles, largest: int) -> Way:
    """By the driver's calls alone."""
    stream, event = handles

    def run(kind: Kind, nbytes: int, count: int) -> None:
        to, source = (pointer, address) if kind is Kind.TO_DEVICE else (address, pointer)
        with device.current() as driver:
            for at in places(nbytes, count, largest):
                driver.copy(to + at, source + at, nbytes, kind, stream)
            driver.record_event(event, stream)
            while not driver.event_done(event):
                pass

    return run


def ours(there: md.dma.PinnedMemory, back: md.dma.PinnedMemory, pointer: int) -> Way:
    """As a program does it: some copies under way, and the oldest is waited for."""

    def run(kind: Kind, nbytes: int, count: int) -> None:
        copy = there.copy_to_device if kind is Kind.TO_DEVICE else back.copy_from_device
        under_way: deque[md.dma.Copy] = deque()
        for at in places(nbytes, count, there.nbytes):
            if len(under_way) == DEPTH:
                under_way.popleft().wait()
            under_way.append(copy(pointer + at, at, nbytes))
        while under_way:
            under_way.popleft().wait()

    return run


class Bench:
    """All that is measured with, of one largest size.

    Attributes
    ----------
    whose : str
        Whose pinned memory it is measured against.
    registering : dict of str to float
        Seconds that pinning took, once.
    """

    def __init__(self, device: CudaDevice, largest: int, stack: ExitStack) -> None:
        pointer, handles = stack.enter_context(device_memory(device, largest))
        self.two = stack.enter_context(shared(largest))
        pageable = np.full(largest, 1, "u1")  # else all of it would be one page of zeros
        start = time.perf_counter()
        address, self.whose = stack.enter_context(pinned_memory(device, largest))
        allocated = time.perf_counter()
        there = stack.enter_context(device.registered(self.two.there))
        registered = time.perf_counter()
        back = stack.enter_context(device.registered(self.two.back))
        self.registering = {
            "bytes": largest,
            "seconds to register": registered - allocated,
            "seconds to allocate pinned memory": allocated - start,
        }
        self.ways = {
            "memdesc": ours(there, back, pointer),
            "pinned": bare(device, pointer, address, handles, largest),
            "pageable": bare(device, pointer, pageable.ctypes.data, handles, largest),
        }
        self._held = pageable

    def equal(self, nbytes: int) -> bool:
        """Whether the bytes of the other process come back to it."""
        for kind in (Kind.TO_DEVICE, Kind.FROM_DEVICE):
            self.ways["memdesc"](kind, nbytes, 1)
        return self.two.equal(nbytes)

    def measure(
        self, nbytes: int, rounds: int, at_least: int, seconds: float
    ) -> dict[str, dict[str, list[float]]]:
        """GB/s of each way and round, by case; rounds end when the time is over."""
        deadline = time.perf_counter() + seconds
        self.round(nbytes, 0, at_least)  # warms up
        samples: dict[str, dict[str, list[float]]] = {}
        for turn in range(rounds):
            if turn >= LEAST_ROUNDS and time.perf_counter() > deadline:
                break
            for case, speeds in self.round(nbytes, turn, at_least).items():
                for way, speed in speeds.items():
                    samples.setdefault(case, {}).setdefault(way, []).append(speed)
        return samples

    def round(self, nbytes: int, turn: int, at_least: int) -> dict[str, dict[str, float]]:
        """One after the other, each time another one first."""
        found: dict[str, dict[str, float]] = {}
        names = list(self.ways)
        first = turn % len(names)
        for kind, word in ((Kind.TO_DEVICE, "to"), (Kind.FROM_DEVICE, "from")):
            speeds = found[f"{nbytes / MIB:g} MiB {word} the device"] = {}
            for name in names[first:] + names[:first]:
                # Pageable memory is slow: a quarter of the bytes takes as long.
                count = max(at_least // (4 if name == "pageable" else 1) // nbytes, 1)
                start = time.perf_counter()
                self.ways[name](kind, nbytes, count)
                speeds[name] = count * nbytes / (time.perf_counter() - start) / 1e9
        return found


@contextmanager
def bench(device: CudaDevice, sizes: list[int]) -> Iterator[tuple[Bench, list[int]]]:
    """What there is memory for: (what to measure with, the sizes)."""
    while True:
        with ExitStack() as stack:
            try:
                made = Bench(device, max(sizes), stack)
            except (OSError, MemoryError, RuntimeError) as error:  # torch's is a RuntimeError
                none = getattr(error, "errno", errno.ENOMEM) in (errno.ENOMEM, errno.ENOSPC)
                if len(sizes) == 1 or not none:
                    raise
                print(f"{max(sizes) / MIB:g} MiB is left out: {error}")
            else:
                yield made, sizes
                return
        sizes = sorted(sizes)[:-1]


def summed(ways: dict[str, list[float]]) -> dict[str, Any]:
    rows: dict[str, Any] = {
        way: summary(speeds) | {"samples": speeds} for way, speeds in ways.items()
    }
    for other in ("pinned", "pageable"):
        # Round by round: what one round meets, the other meets too.
        pairs = zip(ways["memdesc"], ways[other], strict=True)
        rows[f"of {other}"] = summary([mine / theirs for mine, theirs in pairs])["median"]
    return rows


def facts(device: CudaDevice) -> dict[str, Any]:
    """What the device is, as far as the figures depend on it."""
    return {"name": device.name, "driver": gpu_facts()} | {
        attribute.value: device.attribute(attribute) for attribute in Attribute
    }


def show(case: str, rows: dict[str, Any]) -> None:
    """Print a line as soon as it is known."""
    speeds = "   ".join(
        f"{way} {rows[way]['median']:6.1f} GB/s" for way in ("memdesc", "pinned", "pageable")
    )
    print(f"{case:28} {speeds}   {rows['of pinned']:.3f} of pinned", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=120, help="no further rounds after that")
    parser.add_argument("--short", action="store_true", help="few bytes, to see that it runs")
    arguments, _ = parser.parse_known_args()
    try:
        device = CudaDevice()
    except md.UnsupportedError as error:
        print(f"nothing was measured: {error}")
        return
    sizes, rounds, at_least = SIZES, arguments.rounds, 4096 * MIB
    if arguments.short:
        sizes, rounds, at_least = SIZES[:2], 1, 8 * MIB
    results: dict[str, Any] = {}
    equal = True
    with bench(device, sizes) as (made, possible):
        for nbytes in possible:
            share = arguments.seconds / len(possible)
            for case, speeds in made.measure(nbytes, rounds, at_least, share).items():
                results[case] = summed(speeds)
                show(case, results[case])
            equal &= made.equal(nbytes)
    checks = {"the bytes are those that the other process wrote": equal}
    if not arguments.short:
        checks["all sizes were measured"] = possible == SIZES
    for case, rows in results.items():
        checks[f"{case}: at least 0.98 of pinned"] = rows["of pinned"] >= 0.98
        checks[f"{case}: at least 2.5 of pageable"] = rows["of pageable"] >= 2.5
    results |= {"gpu": facts(device), "pinned memory": made.whose, "registering": made.registering}
    finish("gpu", __doc__ or "", results, checks)


if __name__ == "__main__":
    main()
