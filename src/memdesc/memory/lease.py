"""Whether anyone else still has a file: the kernel tells by a write lease.

Linux: fcntl(F_SETLEASE), on a file of this user or with CAP_LEASE.
"""

from __future__ import annotations

import contextlib
import fcntl
import signal


def held_by_others(fd: int) -> bool:
    """Ask whether any other open file description of a memfd exists: mappings keep theirs.

    The lease is taken and given back at once. Whoever opens the file meanwhile waits that long,
    and the signal that tells of him is one that is ignored, not SIGIO, which kills. Not seen: who
    shares this very description (a duplicate, a fork child), and who holds an O_PATH handle.

    Raises
    ------
    OSError
        There is no telling: no leases on this system, or none for this user.
    """
    fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        return fcntl.fcntl(fd, fcntl.F_GETLEASE) != fcntl.F_WRLCK
    except BlockingIOError:
        return True
    finally:
        # An interrupt may strike at any call: nobody could open the memory until the lease ends.
        with contextlib.suppress(BlockingIOError):  # EAGAIN: there is none
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
