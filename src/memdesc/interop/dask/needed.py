"""Dask's distributed itself, or an error that says how to have it."""

from __future__ import annotations

try:
    from dask.sizeof import sizeof
    from distributed import Client
    from distributed.diagnostics.plugin import WorkerPlugin
    from distributed.protocol import dask_deserialize, dask_serialize, numpy as plain
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"memdesc.interop.dask needs Dask's distributed ({error}): pip install 'memdesc[dask]'",
        name=error.name,
    ) from error

__all__ = ["Client", "WorkerPlugin", "dask_deserialize", "dask_serialize", "plain", "sizeof"]
