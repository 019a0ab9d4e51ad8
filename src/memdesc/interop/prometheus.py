"""What this process shares and holds, as metrics that Prometheus scrapes.

Nothing is counted for this: a scrape asks every object for its `statistics()`, which waits for
nobody. The library, prometheus-client, is in `memdesc[metrics]`.
"""

from __future__ import annotations

import contextlib
import errno
import weakref
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Protocol

from memdesc.vm.telling import needed

with needed("memdesc.interop.prometheus", "prometheus-client", "metrics"):
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from memdesc import wiring
from memdesc.alloc import zprint
from memdesc.errors import ClosedError, InvalidArgument
from memdesc.interop.multiprocessing import in_transit
from memdesc.memory import recycler
from memdesc.services.service import Service

__all__ = ["Collector"]

# What ends in _total only rises, and begins anew with what it counts; the rest is as it is now.
_OF_SERVICE = {
    "memdesc_service_clients": "Clients that are connected",
    "memdesc_service_shares": "Descriptors that are shared",
    "memdesc_service_opens_total": "Times that clients opened what is shared",
    "memdesc_service_opened_bytes_total": "Bytes of what they opened, of which none was copied",
    "memdesc_service_calls_total": "Calls of its methods",
    "memdesc_service_calls_in_flight": "Calls that are not answered yet",
    "memdesc_service_remote_mappings": "Mappings that it has made in its clients",
}
_OF_QUEUE = {
    "memdesc_queue_clients": "Clients that have it open",
    "memdesc_queue_entries_total": "Entries that went through it",
    "memdesc_queue_entry_bytes_total": "Bytes of them",
    "memdesc_queue_dropped_entries_total": "Entries for which a client had no room",
}
_OF_STREAM = {
    "memdesc_stream_subscribers": "Subscribers",
    "memdesc_stream_published_slots_total": "Slots published",
    "memdesc_stream_published_bytes_total": "Bytes published",
    "memdesc_stream_discarded_slots_total": "Slots loaned and not published",
    "memdesc_stream_dropped_slots_total": "Slots that subscribers missed, being too slow",
    "memdesc_stream_free_slots": "Slots that nobody has",
    "memdesc_stream_held_slots": "Slots that subscribers have taken and not given back",
    "memdesc_stream_waits_total": "Loans that had to wait for a subscriber",
}
_OF_FILES = {
    "memdesc_files_version": "Version of the files that is served",
    "memdesc_files_arrays": "Arrays that are served",
    "memdesc_files_bytes": "Bytes that are served",
}
_OF_ZONE = {
    "memdesc_zone_elements": "Elements in use",
    "memdesc_zone_most_elements": "Elements that it can have",
    "memdesc_zone_failures_total": "Allocations for which it had no element",
}
_OF_PROCESS = {
    "memdesc_wired_bytes": "Bytes that are wired",
    "memdesc_wiring_failures_total": "Wirings that the kernel refused",
    "memdesc_recycler_kept_bytes": "Bytes of freed buffers that are kept for new ones",
    "memdesc_recycler_hits_total": "Buffers that took the memory of a freed one",
    "memdesc_recycler_misses_total": "Buffers that found none",
    "memdesc_in_transit_handles": "Arrays and descriptors sent by multiprocessing, not received",
    "memdesc_in_transit_bytes": "Bytes of them",
}
_LABELS: list[tuple[tuple[str, ...], dict[str, str]]] = [
    (("service",), _OF_SERVICE),
    (("service", "queue"), _OF_QUEUE),
    (("service", "stream"), _OF_STREAM),
    (("service",), _OF_FILES),
    (("zone",), _OF_ZONE),
    ((), _OF_PROCESS),
]


class _Served(Protocol):
    """What `memdesc.files.FileServer` tells; that room stands beside this one."""

    version: int
    arrays: int
    nbytes: int


class Collector:
    """Gives the metrics of services, and of the memory of this process, to a registry.

    Parameters
    ----------
    *services : Service or FileServer
        More can be added, with `add`. Those that were closed are left out from then on.

    Raises
    ------
    InvalidArgument
        Something else was given (EINVAL).

    Notes
    -----
    One for each registry: two have the same metrics, which a registry refuses. Prometheus's own
    multiprocess mode takes no collectors: let the process be scraped that has the services.

    Threads: safe; it is read in the thread of who scrapes, and waits for nobody. Fork: in a child
    the services are closed, and so left out. I/O Kit: none.

    Examples
    --------
    >>> import memdesc as md
    >>> from prometheus_client import CollectorRegistry, generate_latest
    >>> registry = CollectorRegistry()
    >>> with md.Service("camera") as camera:
    ...     registry.register(Collector(camera))
    ...     text = generate_latest(registry).decode()
    >>> [line for line in text.splitlines() if line.startswith("memdesc_service_clients")]
    ['memdesc_service_clients{service="camera"} 0.0']
    """

    def __init__(self, *services: object) -> None:
        # Weak: a service that its program dropped ends, and is not kept for being counted.
        self._services: list[weakref.ref[object]] = []
        for service in services:
            self.add(service)

    def add(self, service: object) -> None:
        """Tell of one more `Service` or `FileServer` from now on.

        Of a `FileServer` that takes the place of its `service`, which would be counted twice.
        """
        if not isinstance(_service_of(service), Service):
            raise InvalidArgument(
                f"can not tell of {type(service).__name__}: give a Service or a FileServer",
                errno=errno.EINVAL,
            )
        self._services = [
            ref for ref in self._services if _service_of(ref()) not in (None, _service_of(service))
        ]
        self._services.append(weakref.ref(service))

    def describe(self) -> Iterator[Metric]:
        """Give the metrics without values: a registry asks whether they are anybody else's."""
        yield from _families({})

    def collect(self) -> Iterator[Metric]:
        """Give the metrics as they are now."""
        found: _Found = defaultdict(Counter)
        for ref in self._services:
            with contextlib.suppress(ClosedError):  # closed meanwhile
                _tell(found, ref())
        for zone in zprint().zones:
            _put(found, _OF_ZONE, (zone.name,), zone.in_use, zone.max_elements, zone.failures)
        wired, kept, sent = wiring.statistics(), recycler.statistics(), in_transit()
        _put(
            found,
            _OF_PROCESS,
            (),
            wired.wired_bytes,
            wired.failures,
            kept.kept_bytes,
            kept.hits,
            kept.misses,
            sent.handles,
            sent.nbytes,
        )
        yield from _families(found)


_Found = dict[str, Counter[tuple[str, ...]]]
"""Values by metric and labels. Of what has one name (zones may) the sum: a label is told once."""


def _service_of(one: object) -> object:
    return getattr(one, "service", one)


def _put(found: _Found, names: dict[str, str], labels: tuple[str, ...], *values: int) -> None:
    # A path need not be UTF-8; one label that is not would keep all others from the scraper.
    written = tuple(label.encode(errors="backslashreplace").decode() for label in labels)
    for name, value in zip(names, values, strict=True):
        found[name][written] += value


def _tell(found: _Found, one: object) -> None:
    service = _service_of(one)
    if not isinstance(service, Service) or service.closed:
        return
    told = service.statistics()
    _put(
        found,
        _OF_SERVICE,
        (service.name,),
        told.clients,
        told.shares,
        told.opens,
        told.opened_bytes,
        told.calls,
        told.calls_in_flight,
        told.mappings,
    )
    for name, queue in service.queues().items():
        total = queue.total()
        clients = len(queue.clients())
        labels = service.name, name
        _put(found, _OF_QUEUE, labels, clients, total.entries, total.nbytes, total.dropped)
    for name, stream in service.streams().items():
        done = stream.statistics()
        _put(
            found,
            _OF_STREAM,
            (service.name, name),
            len(done.subscribers),
            done.published,
            done.nbytes,
            done.discarded,
            done.dropped,
            done.free,
            sum(subscriber.held for subscriber in done.subscribers),
            done.waits,
        )
    if one is not service:
        files: _Served = one.statistics()  # type: ignore[attr-defined]
        _put(found, _OF_FILES, (service.name,), files.version, files.arrays, files.nbytes)


def _families(found: _Found) -> Iterator[Metric]:
    for labels, names in _LABELS:
        for name, about in names.items():
            kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            family = kind(name, about, labels=labels)
            for values, value in found.get(name, {}).items():
                family.add_metric(values, value)
            yield family
