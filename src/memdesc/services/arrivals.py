"""What comes one after the other: iterating with ``for`` and ``async for``."""

from __future__ import annotations

from abc import abstractmethod
from typing import Generic, Self, TypeVar

from memdesc.errors import ClosedError, TimedOutError
from memdesc.vm.awaiting import readable, until

_T = TypeVar("_T")


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

    @abstractmethod
    def _nothing(self, timeout: float | None) -> TimedOutError:
        """Give what `get` raises when the time has run out."""

    async def get_async(self, timeout: float | None = None) -> _T:
        """As `get`, for asyncio; cancelling it loses nothing."""
        return await until(
            self.try_get, lambda: readable(self.fileno), timeout, lambda: self._nothing(timeout)
        )

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
            return await self.get_async()
        except ClosedError:
            if self._closed and not self._inherited:
                raise StopAsyncIteration from None
            raise
