"""Dask: workers of one host hand over memory as handles, those of different hosts as bytes.

* `Plugin`       register it with a client: ``client.register_plugin(Plugin())``
* `attach`       have the client, too, receive handles; `detach` ends it
* `statistics`   what a process has sent and received: `Transfers`

Dask's distributed is imported when one of them is first asked for; without it that is a
`ModuleNotFoundError` which says what to install.
"""

from __future__ import annotations

from memdesc.vm.later import later

TYPE_CHECKING = False
if TYPE_CHECKING:
    from memdesc.interop.dask.handles import Transfers as Transfers, statistics as statistics
    from memdesc.interop.dask.plugin import Plugin as Plugin, attach as attach, detach as detach

__all__ = ["Plugin", "attach", "detach", "statistics", "Transfers"]

_LATER = {
    "Plugin": "memdesc.interop.dask.plugin",
    "attach": "memdesc.interop.dask.plugin",
    "detach": "memdesc.interop.dask.plugin",
    "statistics": "memdesc.interop.dask.handles",
    "Transfers": "memdesc.interop.dask.handles",
}

if not TYPE_CHECKING:
    __getattr__, __dir__ = later(__name__, _LATER)
