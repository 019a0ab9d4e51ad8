"""The storm of clients: SIGKILLs at random moments, under load, and what the others notice.

    client_storm.py [--kills 10000] [--victims 6] [--seed N]

A service that does all that services do: it publishes a stream, calls, queues both ways, events,
shares and mappings. A few clients that nobody kills check what they get: every slot of the stream
under the policy `block`, in order and whole; every answer. Others, forked by the score, do a bit
of everything and are killed at random moments, several of them at work at a time. Then nothing of
theirs may be left: no slot, no byte, no descriptor, no object of the service.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import os
import random
import re
import select
import shutil
import signal
import struct
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import memdesc as md
from memdesc.services import connection, service  # noqa: F401 (before any fork)

SERVICE = "storm"
SURVIVORS = 2
SLOTS = 96
SLOT = 1024
"""Numbers in a slot."""
PR_SET_PDEATHSIG = 1  # linux/prctl.h
LONGEST = 0.01
"""Seconds between two kills at most."""
EXPECTED = (md.PeerGoneError, md.ServiceNotFoundError, md.TimedOutError)


# -- the clients ---------------------------------------------------------------------------------


def check(array: Any, sequence: int) -> None:
    """A slot is full of its own number."""
    assert array[0] == array[-1] == sequence, (array[0], array[-1], sequence)
    assert (array[::97] == sequence).all()


class Victim:
    """A client that does a bit of everything until it is killed."""

    def __init__(self, rng: random.Random, client: md.Connection) -> None:
        self.rng = rng
        self.client = client
        self.video: Any = None
        self.samples: Any = None
        self.commands: Any = None
        self.ticks: Any = None
        self.held: list[Any] = []

    def live(self) -> None:
        """Never ends by itself."""
        deeds = [self.watch, self.call, self.call_large, self.leave_calls, self.map]
        deeds += [self.push, self.consume, self.produce, self.listen]
        while True:
            try:
                self.rng.choice(deeds)()
            except (md.MappingError, md.AllocationError):
                pass  # a limit, or it is too late
            del self.held[: -self.rng.randrange(1, 6)]

    def watch(self) -> None:
        if self.video is None:
            policy = self.rng.choice(["drop_oldest", "drop_newest", "block"])
            self.video = self.client.subscribe("video", policy=policy, loans=3)
        for _ in range(self.rng.randrange(8)):
            with contextlib.suppress(md.TimedOutError), self.video.take(0.01) as slot:
                check(slot.array, slot.sequence)
                if self.rng.random() < 0.2:
                    self.held.append(slot.array)

    def call(self) -> None:
        assert self.client.call("echo", 5) == 5

    def call_large(self) -> None:
        values = np.full(self.rng.choice([10, 5000, 100_000]), 2, "u4")
        assert self.client.call("total", values) == 2 * len(values)
        room = bytearray(20_000)
        self.client.call("fill", len(room), into=room)
        assert room == b"\7" * len(room)

    def leave_calls(self) -> None:
        self.held += [self.client.begin("echo", number) for number in range(3)]

    def map(self) -> None:
        mapping = self.client.map("frame", timeout=1)
        assert set(memoryview(mapping)[::501]) == {9}
        self.held.append(mapping)

    def push(self) -> None:
        own = md.BufferMemoryDescriptor(self.rng.choice([100, 300_000]), name="victim's")
        self.held.append(own.create_mapping_in_task(self.client.task, timeout=0.5))

    def consume(self) -> None:
        if self.samples is None:
            self.samples = self.client.queue("samples")
        for _ in range(20):
            self.samples.try_dequeue()

    def produce(self) -> None:
        if self.commands is None:
            self.commands = self.client.queue("commands")
        for _ in range(20):
            self.commands.try_enqueue(b"victim" * self.rng.randrange(1, 50))

    def listen(self) -> None:
        if self.ticks is None:
            self.ticks = self.client.events("tick")
        self.ticks.try_get()


def be_victim(rng: random.Random) -> None:
    """Connect again and again: now and then it is the service that says no."""
    while True:
        try:
            with md.connect(SERVICE, timeout=30) as client:
                Victim(rng, client).live()
        except md.MemdescError as error:
            assert isinstance(error, EXPECTED) or error.errno, error


def survive(_: random.Random) -> None:
    """Take every slot, send numbers, call; then tell what was seen, and end."""
    with md.connect(SERVICE, timeout=30) as client:
        commands = client.queue("commands")
        taken = calls = last = 0
        with client.subscribe("video", policy="block", depth=8, latest=False) as video:
            client.call("ready")
            for slot in video:
                assert last in (0, slot.sequence - 1), f"{last} came before {slot.sequence}"
                last = slot.sequence
                check(slot.array, last)
                taken += 1
                if taken % 16 == 0:
                    commands.enqueue(b"n" + struct.pack("<Q", taken // 16), timeout=30)
                    assert client.call("echo", taken, timeout=30) == taken
                    calls += 1
        assert client.call("report", taken, last, calls, timeout=30) is None


# -- who forks and kills -------------------------------------------------------------------------


def fork(work: Callable[[random.Random], None], seed: int) -> int:
    """Fork a process that does that work; give its pid."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # nobody outlives the storm
        work(random.Random(seed))
        status = 0
    except BaseException:  # noqa: BLE001 (the process ends here, and the storm says so)
        traceback.print_exc()
    os._exit(status)


def end(pid: int) -> None:
    """Kill a process of ours; it must not have ended before."""
    os.kill(pid, signal.SIGKILL)
    ended = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if ended != -signal.SIGKILL:
        raise SystemExit(f"client {pid} ended by itself: {ended}")


def kill_many(kills: int, victims: int, seed: int, go: int, told: int) -> None:
    """Start when told; tell of each hundred kills. One thread, so that it may fork for ever."""
    os.read(go, 1)
    rng = random.Random(seed)
    alive = [fork(be_victim, rng.getrandbits(32)) for _ in range(victims)]
    try:
        for count in range(1, kills + 1):
            time.sleep(rng.uniform(0, LONGEST))
            end(alive.pop(rng.randrange(victims)))
            alive.append(fork(be_victim, rng.getrandbits(32)))
            if count % 100 == 0:
                os.write(told, b".")
    finally:
        for pid in alive:
            end(pid)


# -- the service ---------------------------------------------------------------------------------


class Driver:
    """The service under load; what its threads find wrong is in `failures`."""

    def __init__(self) -> None:
        self.service = md.Service(SERVICE)
        self.stop = threading.Event()
        self.failures: list[str] = []
        self.ready = threading.Semaphore(0)
        self.reports: list[tuple[int, int, int]] = []
        self.numbers: dict[md.Task, int] = {}
        self.done: Counter[str] = Counter()
        self.frame = md.BufferMemoryDescriptor(100_000, name="frame")
        self.frame.array()[:] = 9
        self.service.share("frame", self.frame)
        self.stream = self.service.stream(
            "video",
            shape=(SLOT,),
            dtype="u8",
            slots=SLOTS,
            policies=["drop_oldest", "drop_newest", "block"],
        )
        self.samples = self.service.queue("samples", capacity=1 << 16)
        self.commands = self.service.queue("commands", capacity=1 << 16, direction=md.Direction.IN)
        self._make_methods()

    def _make_methods(self) -> None:
        @self.service.method
        def echo(value: int) -> int:
            self.done["calls"] += 1
            return value

        @self.service.method
        def total(values: np.ndarray) -> int:
            return int(values.sum())

        @self.service.method
        def fill(nbytes: int) -> bytes:
            return b"\7" * nbytes

        @self.service.method
        def ready() -> None:
            self.ready.release()

        @self.service.method
        def report(taken: int, last: int, calls: int) -> None:
            self.reports.append((taken, last, calls))

    def start(self) -> list[threading.Thread]:
        threads = [
            threading.Thread(target=self._work, args=(work,))
            for work in (self._publish, self._feed, self._drain, self._push)
        ]
        for thread in threads:
            thread.start()
        return threads

    def _work(self, work: Callable[[], None]) -> None:
        try:
            while not self.stop.is_set():
                work()
        except BaseException:  # noqa: BLE001 (the storm tells of it)
            self.failures.append(traceback.format_exc())
            self.stop.set()

    def _publish(self) -> None:
        with contextlib.suppress(md.TimedOutError), self.stream.loan(timeout=0.2) as slot:
            slot.array[:] = self.stream.statistics().published + 1
        time.sleep(0.0005)

    def _feed(self) -> None:
        self.samples.put(b"sample" * 20)
        self.done["events"] += self.service.notify("tick", self.done["events"])
        time.sleep(0.001)

    def _drain(self) -> None:
        with contextlib.suppress(md.TimedOutError):
            client, data = self.commands.get(timeout=0.1)
            self.done["commands"] += 1
            if data[:1] == b"n":
                (number,) = struct.unpack("<Q", data[1:])
                assert number == self.numbers.get(client.task, 0) + 1, "an entry was lost"
                self.numbers[client.task] = number

    def _push(self) -> None:
        for client in self.service.clients():
            with contextlib.suppress(md.MappingError):
                there = self.frame.create_mapping_in_task(client.task, timeout=0.1)
                self.done["pushes"] += 1
                there._let_go()
        time.sleep(0.005)

    def held(self) -> dict[str, int]:
        """What clients could leave behind in this process."""
        gc.collect()
        with open("/proc/self/maps") as maps:
            memfds = [line.split() for line in maps if "/memfd:" in line]
        bounds = [re.split("-", line[0]) for line in memfds]
        return {
            "descriptors": len(os.listdir("/proc/self/fd")),
            "regions of memfds": len(memfds),
            "bytes of memfds": sum(int(high, 16) - int(low, 16) for low, high in bounds),
            "clients": len(self.service.clients()),
            "strangers": len(self.service._strangers),
            "objects": sum(isinstance(one, md.UserClient) for one in gc.get_objects()),
            "queues": len(self.samples.clients()) + len(self.commands.clients()),
            "subscribers": len(self.stream.statistics().subscribers),
            "threads": threading.active_count(),
        }


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> bool:
    """Wait for what is about to happen; whether it did."""
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True


def storm(kills: int, victims: int, seed: int) -> None:
    """Kill; then see to it that nothing is left, and that nobody noticed."""
    go, told = os.pipe(), os.pipe()
    killer = fork(lambda _: kill_many(kills, victims, seed, go[0], told[1]), seed)
    os.close(told[1])
    survivors = [fork(survive, seed) for _ in range(SURVIVORS)]
    driver = Driver()
    for _ in survivors:
        assert driver.ready.acquire(timeout=60), "a client did not come up"
    driver.service.wait_client(1)
    before = driver.held()
    threads = driver.start()
    begun = time.monotonic()
    os.write(go[1], b"g")
    count = 0
    while driver.failures == [] and select.select([told[0]], [], [], 120)[0]:
        dots = os.read(told[0], 100)
        if not dots:
            break
        count += 100 * len(dots)
        tell(f"{count:,} of {kills:,} killed, {count / (time.monotonic() - begun):.0f} a second")
    seconds = time.monotonic() - begun
    if driver.failures:
        os.kill(killer, signal.SIGTERM)
    ended = os.waitstatus_to_exitcode(os.waitpid(killer, 0)[1])
    driver.stop.set()
    for thread in threads:
        thread.join(60)
    assert driver.failures == [], driver.failures[0]
    assert ended == 0, "a client ended by itself"
    print(f"{kills:,} kills in {seconds:.1f} s")
    look_after(driver, before)
    say_goodbye(driver, survivors)
    for fd in (*go, told[0]):
        os.close(fd)


def look_after(driver: Driver, before: dict[str, int]) -> None:
    """Nothing of the killed is left, while the others are still connected."""
    # Workers of calls come with the first of them, and stay.
    same = [name for name in before if name != "threads"]
    wait_for(lambda: all(driver.held()[name] <= before[name] for name in same))
    after = driver.held()
    assert all(after[name] == before[name] for name in same), (before, after)
    # All slots are free but the latest, which late joiners would get.
    assert wait_for(lambda: driver.stream.statistics().free == SLOTS - 1), "slots are lost"
    told = driver.stream.statistics()
    assert told.loaned == 0
    print(f"before: {before}\nafter:  {after}")
    print(f"{told.published:,} slots published, {dict(driver.done)}")


def say_goodbye(driver: Driver, survivors: list[int]) -> None:
    """The others have had all, in order."""
    published = driver.stream.statistics().published
    driver.stream.close()
    for pid in survivors:
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, "a client was disturbed"
    assert [(taken, last) for taken, last, _ in driver.reports] == [
        (published, published)
    ] * SURVIVORS, driver.reports
    assert wait_for(lambda: driver.service.clients() == [])
    driver.service.close()
    print(f"each of {SURVIVORS} subscribers had all {published:,} slots")


def tell(text: str) -> None:
    """A progress line, on one line where there is a terminal."""
    if sys.stdout.isatty():
        print(f"\r{text}", end="", flush=True)
    else:
        print(text, flush=True)


def main() -> int:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=10_000)
    parser.add_argument("--victims", type=int, default=6)
    parser.add_argument("--seed", type=int, default=None)
    arguments = parser.parse_args()
    seed = random.SystemRandom().getrandbits(32) if arguments.seed is None else arguments.seed
    print(f"the storm of clients: {arguments.kills:,} kills, --seed {seed}", flush=True)
    runtime = tempfile.mkdtemp(prefix="md-storm-")
    os.environ["MEMDESC_RUNTIME_DIR"] = runtime
    try:
        storm(arguments.kills, arguments.victims, seed)
        assert list(Path(runtime).iterdir()) == [], "a socket is left"
    finally:
        shutil.rmtree(runtime)
    return 0


if __name__ == "__main__":
    sys.exit(main())
