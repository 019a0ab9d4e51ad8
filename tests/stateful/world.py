"""The processes of the state machine, and what the kernel says of them."""

from __future__ import annotations

import os
import re
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from puppets import Puppet, wait_until

from memdesc import Service

NAME = "machine"
"""Of all buffers of the machine, by which the maps files show them."""


class World:
    """A service of this process and its one client; they outlive the single histories."""

    def __init__(self) -> None:
        self.service = Service("machine")
        self.start_client()
        # Every history begins and ends with these; the I/O thread lets some go a little later.
        self.fds = settled(kinds_of_fds)

    def start_client(self) -> None:
        self.puppet = Puppet()
        self.puppet.do("maps, views = [], {}")
        self.puppet.do("c = md.connect('machine')")
        self.client = self.service.wait_client(30)
        self.client_fds = settled(lambda: kinds_of_fds(self.puppet.pid))

    def replace_client(self) -> None:
        self.puppet.kill()
        wait_until(lambda: not self.service.clients())
        self.puppet.close()
        del self.client
        self.start_client()

    def close(self) -> None:
        self.puppet.close()
        self.service.close()


def settled(look: Callable[[], Any]) -> Any:
    """Give what is seen once it has stayed the same for a while."""
    seen = [look()]
    while len(seen) < 5 or any(one != seen[-1] for one in seen[-5:]):
        time.sleep(0.005)
        seen.append(look())
    return seen[-1]


def becomes(look: Callable[[], Any], expected: Any) -> None:
    """See what is expected, if not at once then soon: I/O threads let go a little later."""
    end = time.monotonic() + 5
    while (seen := look()) != expected and time.monotonic() < end:
        time.sleep(0.005)
    assert seen == expected


def kinds_of_fds(pid: int | str = "self") -> Counter[str]:
    """How many descriptors of each kind a process has."""
    found: Counter[str] = Counter()
    for number in os.listdir(f"/proc/{pid}/fd"):
        with suppress(FileNotFoundError):  # the listing's own, closed since
            found[re.sub(r"\d+", "", os.readlink(f"/proc/{pid}/fd/{number}"))] += 1
    return found


def mapped_bytes(pid: int | str) -> int:
    """Bytes of our buffers that a process has mapped, by the kernel's list."""
    with open(f"/proc/{pid}/maps") as maps:
        found = re.findall(rf"^(\w+)-(\w+) .*/memfd:{NAME} ", maps.read(), re.M)
    return sum(int(end, 16) - int(start, 16) for start, end in found)


def locked_bytes() -> int:
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("VmLck:"))
    return int(line.split()[1]) * 1024
