"""Drivers and clients, killed with SIGKILL at random moments: a program of its own.

`python weather.py KILLS SEED` forks them from one process that has the library imported and has
used none of it, kills one after the other and forks a new one in its place. It prints a JSON
object: how many were killed in which role, and what they had managed to do before.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import signal
import sys
import time

import memdesc as md
import memdesc.services.connection
import memdesc.services.service  # so that no child imports anything

NAMES = ("north", "south")
DRIVERS, CLIENTS = 2, 3
DEEDS = ("shared", "pushed", "wired", "connected", "mapped", "given")


class Deeds:
    """Counts in shared memory, so that they outlive who did them."""

    def __init__(self) -> None:
        self._cells = memoryview(mmap.mmap(-1, 8 * len(DEEDS))).cast("Q")

    def count(self, deed: str) -> None:
        self._cells[DEEDS.index(deed)] += 1  # two at once may count as one: it is no proof

    def told(self) -> dict[str, int]:
        return dict(zip(DEEDS, self._cells, strict=True))


def drive(chance: random.Random, deeds: Deeds) -> None:
    """Serve one of the names; make, wire, share, push and drop buffers."""
    while True:
        try:
            with md.Service(chance.choice(NAMES)) as service:
                for _ in range(20):
                    buffer = md.BufferMemoryDescriptor(
                        chance.randrange(1, 1 << 21),
                        max_access=chance.choice(list(md.Access)),
                        lazy=chance.random() < 0.2,
                    )
                    buffer.write_bytes(0, b"s")
                    service.share("it", buffer)
                    deeds.count("shared")
                    if chance.random() < 0.3:
                        buffer.prepare()
                        deeds.count("wired")
                    for client in service.clients():
                        buffer.create_mapping_in_task(client.task, unique=True, timeout=0.2)
                        deeds.count("pushed")
                    time.sleep(chance.random() * 0.01)
        except md.MemdescError:
            time.sleep(0.002)  # the name is taken, a client has gone, the lock limit is reached


def use(chance: random.Random, deeds: Deeds) -> None:
    """Connect; map, read, wire and hold what is shared; give something back."""
    while True:
        held: list[object] = []
        try:
            with md.connect(chance.choice(NAMES), timeout=0.3) as connection:
                deeds.count("connected")
                for _ in range(20):
                    mapping = connection.map("it", timeout=0.3)
                    deeds.count("mapped")
                    held.append(memoryview(mapping)[:1])
                    if chance.random() < 0.3:
                        held.append(mapping.wire(0, min(4096, mapping.length)))
                    own = md.BufferMemoryDescriptor(chance.randrange(1, 1 << 18))
                    held.append(own.create_mapping_in_task(connection.task, timeout=0.2))
                    deeds.count("given")
                    time.sleep(chance.random() * 0.01)
        except md.MemdescError:
            time.sleep(0.002)


def begin(role: str, seed: int, deeds: Deeds) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        chance = random.Random(seed)
        (drive if role == "driver" else use)(chance, deeds)
    finally:
        os._exit(1)


def main(kills: int, seed: int) -> None:
    chance = random.Random(seed)
    deeds = Deeds()
    roles = ["driver"] * DRIVERS + ["client"] * CLIENTS
    alive = {begin(role, chance.randrange(1 << 30), deeds): role for role in roles}
    killed = {"driver": 0, "client": 0}
    early = 0
    for number in range(kills):
        time.sleep(chance.random() * 0.04)
        pid = chance.choice(list(alive))
        role = alive.pop(pid)
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        early += not (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL)
        killed[role] += 1
        alive[begin(role, chance.randrange(1 << 30), deeds)] = role
        if number % 50 == 49:
            print(f"{number + 1} of {kills} killed", file=sys.stderr, flush=True)
    for pid in alive:
        os.kill(pid, signal.SIGKILL)
    for pid in alive:
        os.waitpid(pid, 0)
    print(json.dumps({"killed": killed, "ended_by_themselves": early, "deeds": deeds.told()}))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
