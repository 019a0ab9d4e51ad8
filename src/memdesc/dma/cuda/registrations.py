"""The books of what this process has registered with CUDA.

CUDA registers no page twice, and pins for all devices at once. So pages are registered by
whoever asks first, shared with all who ask later, and unregistered when nobody claims them any
more. Until then they can not be unmapped: a registration keeps the view that it was made of.

Claims are held weakly: one that an interrupt, an exception or the collector took away counts no
more, without any undoing.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from memdesc import _core
from memdesc.dma.cuda.driver import MAPPED, NOT_REGISTERED, PORTABLE, UNLOADING
from memdesc.dma.cuda.place import Place
from memdesc.dma.targets import Target
from memdesc.errors import DeviceError
from memdesc.vm.forks import lock_for, tell_child
from memdesc.vm.pages import page_span
from memdesc.vm.telling import bare

if TYPE_CHECKING:
    from memdesc.dma.cuda.device import CudaDevice

log = logging.getLogger("memdesc.dma.cuda")


class Claim:
    """Keeps pages registered as long as it lives, unless it is `ended` before."""

    __slots__ = ("__weakref__", "ended")

    def __init__(self) -> None:
        self.ended = False


@dataclass(eq=False, slots=True)
class Registration:
    """Pages that one call registered.

    Attributes
    ----------
    place : Place
        Of the device that registered them.
    address, nbytes : int
        Whole pages of this process.
    flags : int
    target : Target
        Holds the views, so nobody unmaps them, and the marks, so nobody replaces them.
    certain : bool
        Whether CUDA said that it has them; an interrupt may have come before it did.
    stuck : bool
        CUDA did not let go of them. They stay mapped.
    """

    place: Place
    address: int
    nbytes: int
    flags: int
    target: Target
    claims: list[weakref.ref[Claim]] = field(default_factory=list)
    certain: bool = False
    stuck: bool = False

    @property
    def end(self) -> int:
        """Of the pages."""
        return self.address + self.nbytes

    @property
    def loose(self) -> bool:
        """Whether nobody claims them."""
        claims = [reference() for reference in self.claims]
        return all(claim is None or claim.ended for claim in claims)

    def keep(self, claim: Claim) -> None:
        """Have one claim more."""
        alive = [known for known in self.claims if known() is not None]
        self.claims = [*alive, weakref.ref(claim, _loosened)]
        self.stuck = False


class Registrations:
    """All registrations of this process."""

    def __init__(self) -> None:
        self._all: list[Registration] = []
        self._pid = os.getpid()
        self._lock = lock_for(self)
        tell_child(self)

    def __len__(self) -> int:
        return len(self._all)

    def take(self, device: CudaDevice, target: Target, claim: Claim) -> list[Registration]:
        """Have all pages of a target registered, and give what has them, by address.

        Raises
        ------
        DeviceError
            What was registered on the way is given back with the claim: `end` it.
        """
        found: list[Registration] = []
        with self._lock:
            self._sweep()
            for piece in target.pieces:
                flags = PORTABLE | MAPPED | device._flags_for(piece)
                start, nbytes = page_span(piece.address, piece.nbytes)
                for at, size in list(self._missing(start, start + nbytes)):
                    new = Registration(device.place, at, size, flags, target)
                    new.keep(claim)
                    self._all.append(new)  # known before it is done: an interrupt comes anywhere
                    self._register(new)
                for known in self._overlapping(start, start + nbytes):
                    if known not in found:
                        known.keep(claim)
                        found.append(known)
        self.settle()  # the collector may have come meanwhile
        return sorted(found, key=lambda known: known.address)

    def _register(self, new: Registration) -> None:
        try:
            with new.place.current() as driver:
                driver.register(new.address, new.nbytes, new.flags)
        except DeviceError:
            self._forget(new)
            raise
        new.certain = True

    def _overlapping(self, start: int, end: int) -> list[Registration]:
        return [known for known in self._all if known.address < end and start < known.end]

    def _missing(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Give the ranges of pages that nothing has registered: (address, bytes)."""
        at = start
        for known in sorted(self._overlapping(start, end), key=lambda known: known.address):
            if at < known.address:
                yield at, known.address - at
            at = max(at, known.end)
        if at < end:
            yield at, end - at

    def end(self, claim: Claim, target: Target) -> None:
        """End a claim, unregister what nobody else has, and let go of the target.

        Raises
        ------
        DeviceError
            CUDA did not let go of some pages, which stay mapped; the others are unregistered.
        """
        claim.ended = True
        with self._lock:
            failure = self._sweep()
            if not any(known.target is target for known in self._all):
                target.release()
        self.settle()
        if failure is not None:
            try:
                raise failure
            finally:
                del failure  # else it would hold itself, and the pages, by this frame

    def settle(self) -> None:
        """Unregister what nobody has any more, unless somebody is at it, who does it then.

        Waits for no lock: the collector calls it, in the midst of anything.
        """
        if os.getpid() != self._pid:
            return  # a fork child, which is about to be told
        while any(known.loose and not known.stuck for known in list(self._all)):
            if self._lock._is_owned():
                return
            with _core.Attempt(self._lock) as mine:
                if not mine:
                    return
                self._sweep()

    def _sweep(self) -> DeviceError | None:
        """Unregister what nobody has; gives why, where CUDA did not let go of something."""
        failure: DeviceError | None = None
        for known in [known for known in self._all if known.loose and not known.stuck]:
            certain, known.certain = known.certain, False
            try:
                with known.place.current() as driver:
                    driver.unregister(known.address)
            except DeviceError as error:
                gone = error.code in (NOT_REGISTERED, UNLOADING)
                if not gone or (certain and error.code == NOT_REGISTERED):
                    failure = bare(error)
                    log.warning(
                        "cuda.unregister_failed",
                        extra={
                            "address": known.address,
                            "nbytes": known.nbytes,
                            "error": error.name,
                        },
                    )
                if not gone:
                    known.stuck = True
                    continue
            self._forget(known)
        return failure

    def _forget(self, known: Registration) -> None:
        with contextlib.suppress(ValueError):  # a signal handler was here meanwhile
            self._all.remove(known)

    def _inherit(self) -> None:
        """In a fork child: they are the parent's, and nothing is unregistered."""
        self._all.clear()
        self._pid = os.getpid()


books = Registrations()


def _loosened(reference: weakref.ref[Claim]) -> None:
    if not sys.is_finalizing():  # the process ends, and all of it with it
        books.settle()
