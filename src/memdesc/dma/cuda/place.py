"""Where calls to CUDA are made for: one device, in this process."""

from __future__ import annotations

import os
from typing import final

from memdesc.dma.cuda.driver import Driver
from memdesc.errors import ClosedError


@final
class Place:
    """A device as all that is made for it knows it: registrations, streams, events, copies.

    Attributes
    ----------
    driver : Driver
    index : int
    name : str
    """

    def __init__(self, driver: Driver, index: int, name: str) -> None:
        self.driver, self.index, self.name = driver, index, name
        self._pid = os.getpid()

    @property
    def inherited(self) -> bool:
        """Whether this is a fork child, in which nothing reaches the driver any more.

        By the pid: hooks run in any order, and none where a library forks by itself.
        """
        return os.getpid() != self._pid

    def check_open(self) -> None:
        """Raise `ClosedError` in a fork child."""
        if self.inherited:
            raise ClosedError(
                "CUDA does not survive a fork, and this belongs to the parent: start processes "
                "that use a GPU with spawn"
            )

    def current(self) -> Current:
        """Have the device current in this thread for the length of a block."""
        return Current(self)


@final
class Current:
    """A block in which a device is current; gives its driver."""

    __slots__ = ("_before", "_place")

    def __init__(self, place: Place) -> None:
        place.check_open()
        self._place = place
        self._before = place.index

    def __enter__(self) -> Driver:
        place = self._place
        before = place.driver.get_device()
        if before != place.index:
            self._before = before
            try:
                place.driver.set_device(place.index)
            except BaseException:
                place.driver.set_device(before)  # an interrupt may have come after it was done
                raise
        return place.driver

    def __exit__(self, *exc: object) -> None:
        if self._before != self._place.index:
            self._place.driver.set_device(self._before)
