"""Where calls to CUDA are made for: one device, in this process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import final

from memdesc.dma.cuda.driver import Driver
from memdesc.errors import ClosedError
from memdesc.vm.forks import tell_child


@final
class Place:
    """A device as all that is made for it knows it: registrations, streams, events, copies.

    Attributes
    ----------
    driver : Driver
    index : int
    name : str
    inherited : bool
        Whether this is a fork child, in which nothing reaches the driver any more.
    """

    def __init__(self, driver: Driver, index: int, name: str) -> None:
        self.driver, self.index, self.name = driver, index, name
        self.inherited = False
        tell_child(self)

    def _inherit(self) -> None:
        self.inherited = True

    def check_open(self) -> None:
        """Raise `ClosedError` in a fork child."""
        if self.inherited:
            raise ClosedError(
                "CUDA does not survive a fork, and this belongs to the parent: start processes "
                "that use a GPU with spawn"
            )

    @contextmanager
    def current(self) -> Iterator[Driver]:
        """Have the device current in this thread for the length of a block."""
        self.check_open()
        driver = self.driver
        before = driver.get_device()
        if before == self.index:
            yield driver
            return
        try:
            driver.set_device(self.index)
            yield driver
        finally:
            driver.set_device(before)
