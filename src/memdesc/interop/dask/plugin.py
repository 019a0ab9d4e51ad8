"""What a user registers: the plugin for workers, and the same for a client."""

from __future__ import annotations

import errno
import weakref
from typing import Any, final

from memdesc.errors import InvalidArgument
from memdesc.interop.dask import handles
from memdesc.interop.dask.ends import ends
from memdesc.interop.dask.needed import Client, WorkerPlugin

_attached: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
"""By worker or client: what ends its receiving, once."""


def _advertise(node: Any, advert: dict[str, Any] | None) -> None:
    """Have a worker's or client's new connections say, in the handshake, where handles can go."""
    for arguments in (node.connection_args, node.rpc.connection_args):
        overrides = dict(arguments.get("handshake_overrides") or {})
        overrides.pop(handles.KEY, None)
        if advert is not None:
            overrides[handles.KEY] = advert
        arguments["handshake_overrides"] = overrides


def _receive(node: Any) -> None:
    if node in _attached:
        return
    handles.register()
    inbox = ends.open()
    _attached[node] = weakref.finalize(node, ends.close)
    _attached[node].atexit = False
    _advertise(node, {"version": 1, "host": ends.host, "inbox": inbox})


def _end_receiving(node: Any) -> None:
    if (end := _attached.pop(node, None)) is not None:
        _advertise(node, None)
        end()


@final
class Plugin(WorkerPlugin):  # type: ignore[misc]
    """Has Dask's workers of one host hand over memory as handles.

    Register it with a client: all workers have it then, also those that come later. A worker that
    asks another one for arrays that live in descriptors (`memdesc.empty`), or for descriptors,
    gets the very same pages, read-only, held by the kernel; from a worker of another host, bytes.

    Parameters
    ----------
    copy : bool
        Also copy arrays of private memory into a descriptor when they are first sent to a
        process of this host, and send that, to all who ask. The copy lives as long as the array.

    Notes
    -----
    Replaces one that was registered before; ``client.unregister_worker_plugin("memdesc")`` takes it
    away, and what comes from then on is bytes. Threads: safe. Fork: the child receives nothing.

    Linux: an abstract Unix socket and SCM_RIGHTS; no privilege. Workers need one user, one network
    namespace and one user namespace.

    Examples
    --------
    >>> from distributed import Client  # doctest: +SKIP
    >>> client = Client("tcp://scheduler:8786")  # doctest: +SKIP
    >>> client.register_plugin(Plugin())  # doctest: +SKIP
    """

    name = "memdesc"

    def __init__(self, *, copy: bool = False) -> None:
        self.copy = copy
        handles.register()  # the client, too, may be sent a descriptor

    def setup(self, worker: Any) -> None:
        """Begin, in a worker; Dask calls it."""
        handles.copies = handles.Copies() if self.copy else None
        _receive(worker)
        worker.rpc.collect()  # idle connections, whose handshake said nothing

    def teardown(self, worker: Any) -> None:
        """End, in a worker; Dask calls it."""
        handles.copies = None
        _end_receiving(worker)
        worker.rpc.collect()


def attach(client: Any) -> None:
    """Have a client, too, receive handles: of what it gathers with ``direct=True``.

    What it gathers by way of the scheduler, which is asked then, and what it scatters are bytes.

    Parameters
    ----------
    client : distributed.Client
        Of this process.

    Raises
    ------
    InvalidArgument
        It is no client (EINVAL): workers have the `Plugin`.

    Notes
    -----
    Again is a no-op. It ends with `detach`, and with the client.
    """
    if not isinstance(client, Client):
        raise InvalidArgument(
            f"{type(client).__name__} is no distributed.Client: attach the client itself; workers "
            "receive handles by client.register_plugin(Plugin())",
            errno=errno.EINVAL,
        )
    _receive(client)
    client.loop.add_callback(client.rpc.collect)


def detach(client: Any) -> None:
    """Have a client receive bytes again. Without `attach` before it is a no-op."""
    _end_receiving(client)
    client.loop.add_callback(client.rpc.collect)
