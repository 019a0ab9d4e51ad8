"""Entries of any size from one task to another, through memory that both have mapped.

* `layout`: what lies where in that memory
* `waiting`: what both ends have: opening, waiting, closing
* `data_queue`: `create_data_queue`, `Producer`, `Consumer`
* `notify`: sockets by which an event loop hears that a queue is no longer empty
"""

import memdesc.handover  # noqa: F401  (descriptors are arguments of multiprocessing's)
from memdesc.queues.data_queue import Consumer, Producer, create_data_queue
from memdesc.queues.notify import notification_pair
from memdesc.queues.waiting import QueueStatistics

__all__ = [
    "Consumer",
    "Producer",
    "QueueStatistics",
    "create_data_queue",
    "notification_pair",
]
