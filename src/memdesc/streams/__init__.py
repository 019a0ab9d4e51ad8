"""Slots of shared memory, filled in place by one publisher, seen in place by any number.

* `layout`: what lies where in that memory; `StreamForm`, what a subscriber has to know of it
* `ends`: what both ends have: names for what goes wrong, waiting, fork
* `subscriber`: `Subscriber`, one subscriber as the publisher sees it, and its policies
* `publisher`: `Stream`
* `subscription`: `Subscription`, a stream as a subscriber sees it
"""

import memdesc.handover  # noqa: F401  (descriptors are arguments of multiprocessing's)
from memdesc._core import LoanedSlot, TakenSlot
from memdesc.streams.layout import METADATA_LIMIT, StreamForm
from memdesc.streams.publisher import Stream
from memdesc.streams.subscriber import (
    Backpressure,
    StreamStatistics,
    Subscriber,
    SubscriberStatistics,
)
from memdesc.streams.subscription import Subscription, SubscriptionStatistics

__all__ = [
    "METADATA_LIMIT",
    "Backpressure",
    "LoanedSlot",
    "Stream",
    "StreamForm",
    "StreamStatistics",
    "Subscriber",
    "SubscriberStatistics",
    "Subscription",
    "SubscriptionStatistics",
    "TakenSlot",
]
