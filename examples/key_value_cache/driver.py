"""The driver: keeps arrays under keys. What it gives out are the pages that it keeps."""

import threading

import numpy as np

import memdesc as md


class Cache:
    """Arrays by key, each in a buffer of its own; the oldest go where there are too many bytes."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._entries: dict[str, np.ndarray] = {}
        self._lock = threading.Lock()  # clients' calls run in several threads
        self.hits = self.misses = 0

    def put(self, key: str, values: np.ndarray) -> None:
        if values.nbytes > self._most:
            raise md.RangeError(f"{key!r} has {values.nbytes:,} bytes of {self._most:,} in all")
        buffer = md.BufferMemoryDescriptor(values.nbytes, name="cache")
        kept = buffer.array(values.shape, values.dtype)
        kept[...] = values  # the one copy: from the caller's memory into ours
        with self._lock:
            self._entries.pop(key, None)
            self._entries[key] = kept
            while sum(each.nbytes for each in self._entries.values()) > self._most:
                self._entries.pop(next(iter(self._entries)))  # who has it mapped keeps it

    def get(self, key: str) -> np.ndarray | None:
        with self._lock:
            found = self._entries.get(key)
            self.hits += found is not None
            self.misses += found is None
        return found

    def keys(self) -> list[str]:
        with self._lock:
            return list(self._entries)


cache = Cache(most=64 << 20)
with md.Service("cache") as service:
    for method in (cache.put, cache.get, cache.keys):
        service.method(method)
    client = service.wait_client(timeout=30)
    client.task.wait(timeout=30)
print(f"driver: {cache.hits} hits, {cache.misses} misses")
