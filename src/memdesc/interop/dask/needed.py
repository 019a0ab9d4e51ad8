"""Dask's distributed itself, or an error that says how to have it."""

from __future__ import annotations

from memdesc.vm.telling import needed

with needed("memdesc.interop.dask", "Dask's distributed", "dask"):
    from dask.sizeof import sizeof
    from distributed import Client
    from distributed.diagnostics.plugin import WorkerPlugin
    from distributed.protocol import dask_deserialize, dask_serialize, numpy as plain

__all__ = ["Client", "WorkerPlugin", "dask_deserialize", "dask_serialize", "plain", "sizeof"]
