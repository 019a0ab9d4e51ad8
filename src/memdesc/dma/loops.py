"""Engines driven by an event loop: an eventfd tells the loop that requests have completed."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from memdesc import _core
from memdesc.dma.rings import Engine, run_without_ring
from memdesc.dma.transfers import Transfer

if TYPE_CHECKING:
    import asyncio


class LoopEngine:
    """An engine for the transfers of one event loop, several at a time.

    The loop knows of it only while a transfer is under way.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._closing = False
        self._waiters: dict[Transfer, asyncio.Future[None]] = {}
        self._eventfd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            _core.uring_register_eventfd(engine.uring, self._eventfd)
        except BaseException:
            os.close(self._eventfd)
            self._eventfd = -1
            raise

    async def carry(self, transfer: Transfer) -> None:
        """Carry a transfer to its end. Cancelled, it gives up when the kernel did.

        Cancelled once more it does not wait: what the kernel has it then keeps.
        """
        import asyncio

        loop = asyncio.get_running_loop()
        if not self._waiters:
            loop.add_reader(self._eventfd, self._readable)
        self._waiters[transfer] = waiter = loop.create_future()
        try:
            self.engine.start(transfer)
            self._pump()
            await waiter
        except GeneratorExit as error:  # the loop ended in the middle: nobody will call us
            transfer.stop(error)
            self.engine.drain(transfer)
            raise
        except BaseException as error:
            transfer.stop(error)
            if transfer.in_flight:
                self._waiters[transfer] = waiter = loop.create_future()
                try:
                    self.engine.cancel(transfer)
                    await waiter
                except BaseException:
                    self.engine.keep(transfer)
                    raise
            raise
        finally:
            self._waiters.pop(transfer, None)
            with contextlib.suppress(ValueError):
                self.engine.active.remove(transfer)
            if not self._waiters:
                if not loop.is_closed():
                    loop.remove_reader(self._eventfd)
                if self._closing:
                    self._let_go()

    def _readable(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._eventfd)
        self._pump()

    def _pump(self) -> None:
        """Take what has completed and submit what comes next; waits for nothing."""
        try:
            self.engine.reap()
            self.engine.fill()
            self.engine.enter(0)
        except OSError as error:  # the kernel takes no more of anybody's
            for transfer in self._waiters:
                transfer.stop(error)
        for transfer, waiter in list(self._waiters.items()):
            self._tell(transfer)
            if transfer.finished and not waiter.done():
                waiter.set_result(None)

    def _tell(self, transfer: Transfer) -> None:
        try:
            transfer.tell()
        except BaseException as error:  # noqa: BLE001 raised where it is awaited
            transfer.stop(error)
            self.engine.cancel(transfer)

    def close(self) -> None:
        """Let go of the engine when the last transfer has ended."""
        self._closing = True
        if not self._waiters:
            self._let_go()

    def _let_go(self) -> None:
        fd, self._eventfd = self._eventfd, -1
        if fd >= 0:
            os.close(fd)
            self.engine.close()

    def __del__(self) -> None:
        if hasattr(self, "_eventfd"):
            self._let_go()

    def forked(self) -> None:
        """In a fork child: the engine is the parent's, the loop most likely too."""
        fd, self._eventfd = self._eventfd, -1
        if fd >= 0:
            os.close(fd)


async def carry_without_ring(transfer: Transfer) -> None:
    """Carry a transfer in a thread; cancelled, it gives up after the request under way."""
    import asyncio

    running = asyncio.get_running_loop().run_in_executor(None, run_without_ring, transfer)
    try:
        await asyncio.shield(running)
    except asyncio.CancelledError as error:
        transfer.stop(error)
        await asyncio.wait([running])
        raise
