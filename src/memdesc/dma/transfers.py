"""Transfers between files and memory: cut into requests, and put together from what came of them.

Nothing here talks to the kernel. What carries the requests, a ring or pread and pwrite, asks for
the `next` one and tells what it `completed` with, until the transfer is `finished`.

O_DIRECT wants offsets in the file, lengths and addresses to be multiples of what the file says.
What lies before the first such offset, or behind the last, is an edge: it goes through the page
cache, as a bounce. So does all of a range whose memory is aligned otherwise than its place in the
file. A write's edges follow when its direct requests are done, and share no page with them: else
the kernel could write an old page over what went past the cache.
"""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import NamedTuple

import msgspec

from memdesc.dma.files import OpenedFile
from memdesc.dma.targets import Piece, Target
from memdesc.errors import TransferError
from memdesc.vm.pages import MAX_LENGTH, page_size, round_page

Progress = Callable[[int, int], object]


class Way(Enum):
    """How bytes went between a file and memory."""

    URING_DIRECT = "io_uring, O_DIRECT"
    PREAD_DIRECT = "pread or pwrite, O_DIRECT"
    URING_BUFFERED = "io_uring, through the page cache"
    PREAD_BUFFERED = "pread or pwrite, through the page cache"


@dataclass(frozen=True, slots=True)
class Transferred:
    """What came of a transfer.

    Attributes
    ----------
    nbytes : int
        Bytes transferred. Fewer than asked for at the end of the file; nothing else is an end.
    counts : tuple of int
        The same for each part of `read_many` or `write_many`.
    bounced_bytes : int
        Of them, those that went through the page cache: edges, or all where O_DIRECT was refused.
    registered_bytes : int
        Of them, those that went by registered buffers, pinned once for all.
    requests : int
        How many requests the kernel was given.
    way : Way
        O_DIRECT if any byte went that way.
    reasons : tuple of str
        Why no better way was taken; empty for URING_DIRECT.
    """

    nbytes: int
    counts: tuple[int, ...]
    bounced_bytes: int
    registered_bytes: int
    requests: int
    way: Way
    reasons: tuple[str, ...]


class Part(msgspec.Struct, gc=False):
    """A range of memory and one of the file.

    Attributes
    ----------
    target : Target
    offset : int
        In the descriptor.
    file_offset : int
    end : int
        Of the range in the file; so far as is known, where the file ends in it.
    missing : int
        Where the first request failed, or was not made; else the end.
    """

    target: Target
    offset: int
    file_offset: int
    end: int
    missing: int


class Request(NamedTuple):
    """One request: `slot` is the registered buffer, or -1."""

    part: Part
    direct: bool
    address: int
    nbytes: int
    offset: int
    slot: int


_new_request = partial(tuple.__new__, Request)  # without a call in Python: there are so many


class Transfer:
    """One transfer under way.

    Parameters
    ----------
    file : OpenedFile
    parts : sequence of Part
    writing : bool
        The file is written; else the memory.
    block_size : int
        Bytes of a request at most; a multiple of the page size.
    progress : callable, optional
        Called with (bytes done, bytes in all) by who carries the requests.
    """

    def __init__(
        self,
        file: OpenedFile,
        parts: Sequence[Part],
        *,
        writing: bool,
        block_size: int,
        progress: Progress | None,
    ) -> None:
        self.file = file
        self.parts = parts
        self.targets = list({id(part.target): part.target for part in parts}.values())
        self.writing = writing
        self.block_size = block_size
        self.failure: BaseException | None = None
        self.in_flight = 0
        self.done = 0
        self._bounced = self._registered = self._requests = self._direct = 0
        self._progress, self._told = progress, 0
        self._released = False
        self._reasons: list[str] = []
        self._again: deque[Request] = deque()
        file.use()
        self._size = file.size()
        self.total = self._total()
        self._alignment = file.offset_alignment
        if writing:
            self._alignment = max(self._alignment, page_size)
        if file.direct < 0:
            self._reasons.append(f"no O_DIRECT on {file.path!r}: {file.why_buffered}")
            stages: list[bool | None] = [None]
        else:
            stages = [True, False] if writing else [None]
        self._stages = deque(stages)
        self._requests_left: Iterator[Request] | None = None  # of the first stage, once begun

    def _total(self) -> int:
        """Count what is to be done. No block is read behind the end of the file.

        A file of 0 bytes may be one that the kernel makes up, and have some all the same.
        """
        size = MAX_LENGTH if self.writing or not self._size else self._size
        last = size if size == MAX_LENGTH else round_page(size, self.file.offset_alignment)
        total = 0
        for part in self.parts:
            start, end = part.file_offset, part.end
            if end > size:
                part.end = part.missing = max(min(end, last), start)
                end = max(min(end, size), start)
            total += end - start
        return total

    # -- cutting ---------------------------------------------------------------------------------

    def _cut_all(self, stage: bool | None) -> Iterator[Request]:
        """Give the requests, in order; of those to be direct or not only one kind, if told so."""
        for part in self.parts:
            whole = self._whole(part)
            if whole is not None:
                if stage is not False:
                    yield whole
                continue
            at = part.file_offset
            for piece, address, nbytes in part.target.spans(part.offset, part.end - at):
                for direct, start, length in self._cut(address, nbytes, at):
                    if stage is None or direct is stage:
                        yield from self._blocks(
                            part, piece, direct, address + start, length, at + start
                        )
                at += nbytes

    def _whole(self, part: Part) -> Request | None:
        """Give the one request that a small aligned part is: many such are asked for at once."""
        pieces, at = part.target.pieces, part.file_offset
        nbytes = part.end - at
        if len(pieces) != 1 or not 0 < nbytes <= self.block_size or self.file.direct < 0:
            return None
        piece = pieces[0]
        address = piece.address + part.offset - piece.start
        if (at | nbytes) % self._alignment or address % self.file.memory_alignment:
            return None
        slot = piece.slot(address, nbytes) if piece.slots else -1
        return _new_request((part, True, address, nbytes, at, slot))

    def _cut(self, address: int, nbytes: int, at: int) -> Iterator[tuple[bool, int, int]]:
        """Cut a range into head, middle and tail: (direct, start, bytes)."""
        head = -at % self._alignment
        middle = (nbytes - head) // self._alignment * self._alignment
        if self.file.direct < 0 or middle <= 0 or (address + head) % self.file.memory_alignment:
            yield False, 0, nbytes
            return
        if head:
            yield False, 0, head
        yield True, head, middle
        if head + middle < nbytes:
            yield False, head + middle, nbytes - head - middle

    def _blocks(
        self, part: Part, piece: Piece, direct: bool, address: int, nbytes: int, at: int
    ) -> Iterator[Request]:
        for start in range(0, nbytes, self.block_size):
            size = min(self.block_size, nbytes - start)
            slot = piece.slot(address + start, size) if piece.slots else -1
            yield _new_request((part, direct, address + start, size, at + start, slot))

    # -- carrying --------------------------------------------------------------------------------

    def next(self) -> Request | None:
        """Give the next request to carry out; None if there is none now."""
        if self._again and self.failure is None:
            request: Request | None = self._again.popleft()
        else:
            request = self._next_of_stage()
        if request is not None:
            self.in_flight += 1
            self._requests += 1
        return request

    def _next_of_stage(self) -> Request | None:
        while self._stages and self.failure is None:
            if self._requests_left is None:
                self._requests_left = self._cut_all(self._stages[0])
            request = next(self._requests_left, None)
            if request is not None:
                return request
            if self.in_flight and len(self._stages) > 1:
                return None  # a write's edges wait for what is direct
            self._stages.popleft()
            self._requests_left = None
        return None

    def put_back(self, request: Request) -> None:
        """Take a request back that could not be carried out yet."""
        self.in_flight -= 1
        self._requests -= 1
        self._again.appendleft(request)

    def completed(self, request: Request, result: int) -> None:
        """Note what became of a request: bytes, or -errno."""
        self.in_flight -= 1
        _, direct, _, nbytes, _, slot = request
        if result > 0:
            self.done += result
            if direct:
                self._direct += result
            else:
                self._bounced += result
            if slot >= 0:
                self._registered += result
            if result == nbytes:
                return
        if result in (-errno.EAGAIN, -errno.EINTR):
            self._retry(request)
        elif result == -errno.EINVAL and request.direct:
            self._reasons.append(f"O_DIRECT at offset {request.offset:,}: the kernel said EINVAL")
            self._retry(request._replace(direct=False))
        elif result < 0:
            self._failed(request, -result)
        else:
            self._short(request, result)

    def _retry(self, request: Request) -> None:
        if self.failure is None:
            self._again.append(request)
        else:
            self._missed(request)

    def _short(self, request: Request, nbytes: int) -> None:
        """Go on where a request stopped; a read that gives nothing there is at the end."""
        stopped = request.offset + nbytes
        if self.writing and not nbytes:
            self._failed(request, errno.EIO)  # no file answers so
        elif not self.writing and (not nbytes or stopped >= self._size > 0):
            request.part.end = min(request.part.end, stopped)
        else:
            aligned = not (stopped % self._alignment or nbytes % self.file.memory_alignment)
            self._retry(
                request._replace(
                    direct=request.direct and aligned,
                    address=request.address + nbytes,
                    nbytes=request.nbytes - nbytes,
                    offset=stopped,
                )
            )

    def _missed(self, request: Request) -> None:
        request.part.missing = min(request.part.missing, request.offset)

    def _failed(self, request: Request, number: int) -> None:
        self._missed(request)
        if self.failure is not None:
            return
        verb = "writing" if self.writing else "reading"
        name = errno.errorcode.get(number, str(number))
        self.failure = TransferError(
            f"{verb} {request.nbytes:,} bytes at offset {request.offset:,} of "
            f"{self.file.path!r}: {name} ({os.strerror(number)}){_remedy(number)}",
            errno=number,
            expected=self.total,
            file_offset=request.offset,
        )

    def stop(self, why: BaseException) -> None:
        """Give out no further request; the outcome is `why`, unless it failed before."""
        if self.failure is None:
            self.failure = why

    @property
    def finished(self) -> bool:
        """Whether nothing is to be carried out any more, nor under way."""
        if self.in_flight:
            return False
        return self.failure is not None or not (self._again or self._stages)

    def tell(self) -> None:
        """Call `progress`, if more was done since."""
        if self._progress is not None and self.done != self._told:
            self._told = self.done
            self._progress(self.done, self.total)

    # -- the outcome -----------------------------------------------------------------------------

    def outcome(self, *, by_ring: bool, why_no_ring: str = "") -> Transferred:
        """Tell what came of it, or raise why it failed."""
        if self.failure is not None:
            failure = self.failure
            if isinstance(failure, TransferError):
                failure.completed = self._completed()
            try:
                raise failure
            finally:
                del failure  # else it would hold itself, by this frame
        counts = tuple(max(part.end - part.file_offset, 0) for part in self.parts)
        direct = self.file.direct >= 0 and (self._direct > 0 or not self._bounced)
        reasons = [why_no_ring] if why_no_ring else []
        if not direct and self.file.direct >= 0:
            reasons.append(
                "memory and file are not aligned alike: O_DIRECT asks for addresses that are "
                f"multiples of {self.file.memory_alignment:,} where offsets are of "
                f"{self._alignment:,}"
            )
        ways = (
            (Way.PREAD_BUFFERED, Way.PREAD_DIRECT),
            (Way.URING_BUFFERED, Way.URING_DIRECT),
        )
        return Transferred(
            sum(counts),
            counts,
            self._bounced,
            self._registered,
            self._requests,
            ways[by_ring][direct],
            tuple(reasons + self._reasons),
        )

    def _completed(self) -> int:
        """Bytes before the first that was not transferred, of each part."""
        for request in self._again:
            self._missed(request)
        for request in self._requests_left or ():
            self._missed(request)
        for stage in list(self._stages)[self._requests_left is not None :]:
            for request in self._cut_all(stage):
                self._missed(request)
        ends = [min(part.end, part.missing) - part.file_offset for part in self.parts]
        return sum(max(end, 0) for end in ends)

    def release(self) -> None:
        """Let go of the memory and of the file, once."""
        self.failure = self._requests_left = None  # which hold this transfer
        if self._released:
            return
        self._released = True
        for target in self.targets:
            target.release()
        self.file.done()


def _remedy(number: int) -> str:
    remedies = {
        errno.ENOSPC: "; free space on that file system",
        errno.EDQUOT: "; free space within your quota",
        errno.EFBIG: "; files can not be that large here, or `ulimit -f` forbids it",
        errno.EIO: "; the device failed: look at the kernel's log",
        errno.EFAULT: "; the memory was taken away by who gave it",
    }
    return remedies.get(number, "")
