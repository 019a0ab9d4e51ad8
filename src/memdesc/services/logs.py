"""The log of services, connections and streams, which no stranger can fill.

An event's name is the first word of its message, and stays; `docs/finding-leaks.md` lists them.

Whoever makes a service log a line can do it ten thousand times. Of one event (the message; what
belongs to it is in the record's fields) a few lines are written at once, and then one now and
then, with the number of those left out in its field `left_out`. Lines below WARNING all are.
"""

from __future__ import annotations

import logging

from memdesc.services.rate import Bucket

BURST = 10
PER_SECOND = 0.1
_MOST_EVENTS = 256


class Sparing(logging.Filter):
    """Lets through what its event's rate allows."""

    def __init__(self) -> None:
        super().__init__()
        self._buckets: dict[str, Bucket] = {}
        self._left_out: dict[str, int] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether this line is written."""
        if record.levelno < logging.WARNING:
            return True
        event = str(record.msg)
        if len(self._buckets) > _MOST_EVENTS:
            self.forget()
        if not self._buckets.setdefault(event, Bucket(PER_SECOND, BURST)).take():
            self._left_out[event] = self._left_out.get(event, 0) + 1
            return False
        record.left_out = self._left_out.pop(event, 0)
        return True

    def forget(self) -> None:
        """Begin anew."""
        self._buckets.clear()
        self._left_out.clear()


log = logging.getLogger("memdesc.services")
sparing = Sparing()
for _name in ("memdesc.services", "memdesc.streams"):
    logging.getLogger(_name).addFilter(sparing)
