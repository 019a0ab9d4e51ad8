"""Waiting in an asyncio event loop, and iterating with ``for`` and ``async for``."""

from __future__ import annotations

import os
from abc import abstractmethod
from typing import TYPE_CHECKING, Generic, Self, TypeVar

from memdesc.errors import ClosedError
from memdesc.memory.closing import no_descriptor

if TYPE_CHECKING:
    import asyncio

_T = TypeVar("_T")


async def readable(fd: int) -> None:
    """Wait in the running event loop until a descriptor is readable.

    By a duplicate of it: so several tasks may wait for one, and its owner may close it meanwhile.

    Raises
    ------
    AllocationError
        This process has no descriptor left (EMFILE).
    """
    import asyncio

    loop = asyncio.get_running_loop()
    try:
        own = os.dup(fd)
    except OSError as error:
        raise no_descriptor("wait in an event loop", error) from error
    try:
        ready = loop.create_future()
        loop.add_reader(own, _set, ready)
        try:
            await ready
        finally:
            loop.remove_reader(own)
    finally:
        os.close(own)


def _set(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)


class Arrivals(Generic[_T]):
    """Base of what one can wait for: gives iteration, which ends quietly when it is closed here."""

    _closed: bool
    _inherited: bool

    @abstractmethod
    def get(self, timeout: float | None = None) -> _T:
        """Give the next one, waiting for it."""

    @abstractmethod
    def try_get(self) -> _T | None:
        """Give the next one, or None where none waits."""

    @abstractmethod
    def fileno(self) -> int:
        """Give what is readable while one waits, and after the end."""

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> _T:
        try:
            return self.get()
        except ClosedError:
            if self._closed and not self._inherited:
                raise StopIteration from None
            raise

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> _T:
        try:
            while (found := self.try_get()) is None:
                await readable(self.fileno())
        except ClosedError:
            if self._closed and not self._inherited:
                raise StopAsyncIteration from None
            raise
        return found
