"""What `memdesc ls` tells of handles on their way: asked of those who keep them for others."""

from __future__ import annotations

import contextlib
from contextlib import closing
from typing import Any

from memdesc.cli.words import program_of
from memdesc.handover import transit

_PATIENCE = 1.0
_LISTENING = 0x10000  # __SO_ACCEPTCON (linux/net.h), in the flags of /proc/net/unix


def gather() -> list[dict[str, Any]]:
    """Ask all holders of this user in this network namespace; who does not answer is left out."""
    found = []
    for address in _addresses():
        with contextlib.suppress(OSError), closing(transit.Link(address, _PATIENCE)) as link:
            counts = link.counts()
            found.append(
                {
                    "pid": link.pid,
                    "program": program_of(link.pid),
                    **counts._asdict(),
                    "limit": link.limit,
                }
            )
    return sorted(found, key=lambda one: int(one["pid"]))


def _addresses() -> set[bytes]:
    """The abstract names of holders that listen: the kernel shows their first byte as ``@``."""
    shown = b"@" + transit.PREFIX[1:]
    found = set()
    with open("/proc/net/unix", "rb") as table:
        for line in table:
            fields = line.split(maxsplit=7)
            if len(fields) == 8 and fields[7].startswith(shown) and int(fields[3], 16) & _LISTENING:
                found.add(b"\0" + fields[7].rstrip(b"\n")[1:])
    return found
