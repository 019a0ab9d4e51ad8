"""Descriptors from task to task, without services: over Unix sockets, and by `multiprocessing`.

* `forms`      what travels: a header and file descriptors
* `sockets`    both in one message on a Unix socket
* `reducers`   both through what carries bytes only, as `multiprocessing` does: as a handle
* `transit`    where the file descriptors of a handle are left, and taken
* `holder`     what keeps them meanwhile
* `endings`    what is done about them at the end of a process
"""

from __future__ import annotations

from memdesc.handover import reducers as reducers
from memdesc.handover.forms import (
    MAX_OBJECTS as MAX_OBJECTS,
    MAX_PIECES as MAX_PIECES,
    check_giving as check_giving,
    give as give,
    pack as pack,
    portable_type as portable_type,
    take as take,
    too_many_files as too_many_files,
    travelling as travelling,
    unpack as unpack,
)
from memdesc.handover.sockets import (
    receive_descriptor as receive_descriptor,
    receive_once as receive_once,
    receive_with_fds as receive_with_fds,
    send_descriptor as send_descriptor,
    send_with_fds as send_with_fds,
)
from memdesc.memory.closing import close_all as close_all, discard as discard
