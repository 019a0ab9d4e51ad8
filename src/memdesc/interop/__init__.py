"""Our memory in what others made: one module for each. Each imports its library only when used.

* `arrays`            NumPy arrays that live in descriptors
* `arrow`             Arrow tables, read in place by any process
* `dask`              such arrays, and descriptors, between Dask workers of one host
* `multiprocessing`   such arrays as handles through Process, Queue, Pipe and Pool
* `prometheus`        metrics of services, and of what the process holds
* `shared_memory`     the interface of `multiprocessing.shared_memory`
* `torch`             tensors, and batches that workers write where a GPU reads them
"""

from __future__ import annotations

import memdesc.handover  # noqa: F401  (descriptors are arguments of multiprocessing's)

TYPE_CHECKING = False
if TYPE_CHECKING:
    import memdesc.interop.arrays as arrays
    import memdesc.interop.arrow as arrow
    import memdesc.interop.dask as dask
    import memdesc.interop.multiprocessing as multiprocessing
    import memdesc.interop.prometheus as prometheus
    import memdesc.interop.shared_memory as shared_memory
    import memdesc.interop.torch as torch

__all__ = ["arrays", "arrow", "dask", "multiprocessing", "prometheus", "shared_memory", "torch"]


def _load(name: str) -> object:
    import importlib

    if name not in __all__:
        raise AttributeError(f"module 'memdesc.interop' has no attribute {name!r}")
    return importlib.import_module(f"memdesc.interop.{name}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if not TYPE_CHECKING:
    __getattr__ = _load
