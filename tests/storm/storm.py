"""The storm: SIGKILLs at random moments of drivers and clients, and what is left afterwards.

    storm.py [--kills 1000] [--seed N]

A driver makes buffers (some wired), fills each with one value, shares them and maps them into its
clients; clients connect, map, wire, hold, check the values and map their own memory into the
driver. All are forked here, killed here by pid, and replaced. Nobody may end in another way.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import memdesc as md
from memdesc.memory.page_kinds import meminfo
from memdesc.services import connection, folder, service  # noqa: F401 (before any fork)

SERVICE = "storm"
NAME = f"storm-{os.getpid()}"
"""Of all its memory, in every process: each is forked from this one."""
CLIENTS = 5
LONGEST_LIFE = 0.08
"""Seconds between two kills at most."""
SLACK = 1 << 20
"""Bytes that the counters of the whole machine may be off: they are kept per processor."""


# -- what the processes do ---------------------------------------------------------------------


def make_buffer(rng: random.Random) -> md.BufferMemoryDescriptor:
    """Make a buffer full of one value that is not 0, now and then wired or writable."""
    nbytes = rng.choice([100, 5000, 300_000, 2_000_000])
    access = rng.choice(list(md.Access))
    wired = nbytes <= 300_000 and rng.random() < 0.5
    options = {"name": NAME, "max_access": access}
    try:
        made = md.BufferMemoryDescriptor(nbytes, wired=wired, **options)
    except md.WiringError:  # the limit on locked memory
        made = md.BufferMemoryDescriptor(nbytes, **options)
    value = rng.randrange(1, 256)
    memoryview(made)[:] = bytes([value]) * nbytes
    return made


def check(mapping: md.MemoryMap) -> None:
    """All of its bytes are the one value that its maker filled it with."""
    view = memoryview(mapping)[::251]
    assert view[0] != 0
    assert view.tobytes() == bytes([view[0]]) * len(view)


def drive(rng: random.Random) -> None:
    """Be the driver, until killed."""
    while True:
        with contextlib.suppress(md.NameInUseError), md.Service(SERVICE) as served:
            buffers: list[md.BufferMemoryDescriptor] = []
            pushed: list[md.MemoryMap] = []
            while True:
                buffers.append(make_buffer(rng))
                served.share(f"share{rng.randrange(8)}", buffers[-1])
                for client in served.clients():
                    with contextlib.suppress(md.MappingError):
                        there = rng.choice(buffers).create_mapping_in_task(client.task, timeout=0.2)
                        pushed.append(there)
                    for mapping in client.mappings():
                        check(mapping)
                del buffers[:-8]
                while len(pushed) > 20:
                    there = pushed.pop(0)
                    with contextlib.suppress(BufferError, md.MappingError):
                        rng.choice([there.unmap, there._let_go])()
                with contextlib.suppress(md.TimedOutError):
                    served.wait_client(0.01)


def be_client(rng: random.Random) -> None:
    """Be a client, until killed; hold what was mapped also when the driver has gone."""
    held: list[md.MemoryMap] = []
    while True:
        try:
            with md.connect(SERVICE, timeout=5) as connected:
                while True:
                    use(connected, held, rng)
                    for mapping in held:
                        check(mapping)
                    del held[: -rng.randrange(1, 12)]
        except md.MemdescError as error:
            assert isinstance(error, EXPECTED) or error.errno, error


EXPECTED = (md.PeerGoneError, md.ServiceNotFoundError, md.TimedOutError)


def use(connected: md.Connection, held: list[md.MemoryMap], rng: random.Random) -> None:
    """Map something shared, wire it, take what was pushed, push something."""
    shares = connected.shares()
    if shares:
        with contextlib.suppress(md.ShareNotFoundError):
            held.append(connected.map(rng.choice(shares).name, timeout=1))
        with contextlib.suppress(md.WiringError):
            if rng.random() < 0.5 and held[-1].length <= 300_000:
                held[-1].wire()
    with contextlib.suppress(md.TimedOutError):
        mapping = connected.wait_mapping(0.01)
        if mapping.is_mapped:
            with contextlib.suppress(md.ClosedError):  # released in between
                check(mapping)
    if rng.random() < 0.3:
        with contextlib.suppress(md.MappingError), make_buffer(rng) as own:
            own.create_mapping_in_task(connected.task, timeout=0.2)


# -- the storm ---------------------------------------------------------------------------------


def start(work: Callable[[random.Random], None], seed: int) -> int:
    """Fork a process that does that work; give its pid."""
    pid = os.fork()
    if pid:
        return pid
    try:
        work(random.Random(seed))
    except BaseException:  # noqa: BLE001 (the process ends here, and the storm says so)
        traceback.print_exc()
    finally:
        os._exit(1)


def kill(pid: int) -> None:
    """Kill a process of ours; it must not have ended before."""
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    ended = os.waitstatus_to_exitcode(status)
    if ended != -signal.SIGKILL:
        raise SystemExit(f"process {pid} ended by itself: {ended}")


def state() -> dict[str, int]:
    """What could be left behind: bytes of the whole machine, descriptors of this process."""
    found = meminfo()
    return {
        "Shmem": found["Shmem"],
        "Mlocked": found["Mlocked"],
        "fds": len(os.listdir("/proc/self/fd")),
    }


def holders() -> int:
    """How many processes that we may look at hold memory of the storm."""
    found = 0
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            found += f"/memfd:{NAME} " in maps.read_text()
    return found


def wait_for_calm(before: dict[str, int], seconds: float = 60) -> dict[str, int]:
    """Give the counters when they are back, or as they are when the time is over."""
    end = time.monotonic() + seconds
    while True:
        after = state()
        calm = after["fds"] <= before["fds"] and all(
            after[name] <= before[name] + SLACK for name in ("Shmem", "Mlocked")
        )
        if calm or time.monotonic() > end:
            return after
        time.sleep(0.1)


def storm(kills: int, seed: int) -> None:
    """Kill; then see to it that nothing is left."""
    rng = random.Random(seed)
    before = state()
    jobs = [drive] + [be_client] * CLIENTS
    alive = {start(job, rng.getrandbits(32)): job for job in jobs}
    highest = dict(before)
    try:
        for count in range(1, kills + 1):
            time.sleep(rng.uniform(0, LONGEST_LIFE))
            now = state()
            highest = {name: max(highest[name], now[name]) for name in now}
            # The driver as often as all clients together.
            driver = next(pid for pid, job in alive.items() if job is drive)
            clients = [pid for pid, job in alive.items() if job is be_client]
            victim = driver if rng.random() < 0.5 else rng.choice(clients)
            job = alive.pop(victim)
            kill(victim)
            alive[start(job, rng.getrandbits(32))] = job
            if count % 20 == 0 or count == kills:
                tell(f"{count:,} of {kills:,} killed", end=count == kills)
    finally:
        for pid in alive:
            kill(pid)
    after = wait_for_calm(before)
    for name in ("Shmem", "Mlocked"):
        print(
            f"{name}: {before[name]:,} bytes before, {highest[name]:,} at most, "
            f"{after[name]:,} after"
        )
        assert after[name] <= before[name] + SLACK, f"{name} is not back"
    assert highest["Shmem"] > before["Shmem"] + SLACK, "the storm made no memory"
    assert after["fds"] <= before["fds"], "descriptors are left"
    assert holders() == 0, "somebody holds the storm's memory"
    left = os.listdir(folder.runtime_folder())
    folder.open_folder("another")
    assert os.listdir(folder.runtime_folder()) == [], "a dead socket was not swept"
    print(f"sockets of the dead: {len(left)}, swept at the next opening")


def tell(text: str, end: bool) -> None:
    """A progress line, on one line where there is a terminal."""
    if sys.stdout.isatty():
        print(f"\r{text}", end="\n" if end else "", flush=True)
    else:
        print(text, flush=True)


def main() -> int:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=None)
    arguments = parser.parse_args()
    seed = random.SystemRandom().getrandbits(32) if arguments.seed is None else arguments.seed
    print(f"the storm: {arguments.kills:,} kills, --seed {seed}", flush=True)
    runtime = tempfile.mkdtemp(prefix="md-storm-")
    os.environ["MEMDESC_RUNTIME_DIR"] = runtime
    try:
        storm(arguments.kills, seed)
    finally:
        shutil.rmtree(runtime)
    return 0


if __name__ == "__main__":
    sys.exit(main())
