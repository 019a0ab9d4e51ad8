"""What descriptors are supposed to be, in plain Python: bytes, counts and rules, nothing shared.

`Outcome` names how a call ends: None, the name of an error class, or of a mapping reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from memdesc import Direction, page_size

Outcome = str | None


class Refused(Exception):
    """A call that must fail; the argument is its outcome."""


@dataclass(eq=False)
class Node:
    """A descriptor: a buffer of its own (`data`), a part of one other, or several others."""

    kind: str
    writable: bool
    data: bytearray = field(default_factory=bytearray)
    members: list[Node] = field(default_factory=list)
    offset: int = 0
    size: int = 0
    prepared: list[Direction] = field(default_factory=list)
    closed: bool = False

    @property
    def length(self) -> int:
        return sum(m.length for m in self.members) if self.kind == "multi" else self.size

    def parts(self, offset: int, length: int) -> Iterator[tuple[Node, int, int]]:
        """The members that a range touches, with the range in each."""
        if self.kind == "sub" and length:
            yield self.members[0], self.offset + offset, length
        start = 0
        for member in self.members if self.kind == "multi" else ():
            low, high = max(offset, start), min(offset + length, start + member.length)
            if low < high:
                yield member, low - start, high - low
            start += member.length

    def pieces(self, offset: int, length: int) -> list[tuple[Node, int, int]]:
        """The same down to the buffers; every descriptor on the way must be open."""
        self.check_open()
        if self.kind == "buffer":
            return [(self, offset, length)]
        return [piece for part in self.parts(offset, length) for piece in part[0].pieces(*part[1:])]

    def check_open(self) -> None:
        if self.closed:
            raise Refused("ClosedError")

    def check_range(self, offset: int, length: int, outcome: str = "RangeError") -> None:
        if offset < 0 or length < 0 or offset + length > self.length:
            raise Refused(outcome)

    # -- bytes -----------------------------------------------------------------------------------

    def bytes_at(self, offset: int, length: int) -> bytes:
        """What lies there, whatever is closed."""
        if self.kind == "buffer":
            return bytes(self.data[offset : offset + length])
        return b"".join(node.bytes_at(at, n) for node, at, n in self.parts(offset, length))

    def read(self, offset: int, length: int) -> bytes:
        self.check_open()
        self.check_range(offset, length)
        if self.kind == "buffer":
            return self.bytes_at(offset, length)
        if self.kind == "sub":  # also of no bytes
            return self.members[0].read(self.offset + offset, length)
        return b"".join(node.read(at, n) for node, at, n in self.parts(offset, length))

    def write(self, offset: int, data: bytes) -> None:
        self.check_open()
        self.check_range(offset, len(data))
        if data:
            self.check_store(offset, len(data))
            self.store(offset, data)

    def check_store(self, offset: int, length: int) -> None:
        self.check_open()
        if self.prepared and self.prepared[0] is Direction.OUT:
            raise Refused("WiringError")
        for node, at, nbytes in self.parts(offset, length):
            node.check_store(at, nbytes)

    def store(self, offset: int, data: bytes) -> None:
        if self.kind == "buffer":
            self.data[offset : offset + len(data)] = data
        done = 0
        for node, at, nbytes in self.parts(offset, len(data)):
            node.store(at, data[done : done + nbytes])
            done += nbytes

    # -- preparing -------------------------------------------------------------------------------

    def prepare(self, direction: Direction) -> None:
        self.check_open()
        if self.prepared:
            if direction is not Direction.OUT and self.prepared[0] is Direction.OUT:
                raise Refused("WiringError")
        else:
            done: list[Node] = []
            try:
                for member in self.members:
                    member.prepare(direction)
                    done.append(member)
            except Refused:
                for member in done:
                    member.complete()
                raise
        self.prepared.append(direction)

    def complete(self) -> None:
        if not self.prepared:
            raise Refused("NotPreparedError")
        self.prepared.pop()
        if not self.prepared:
            self.let_members_go()

    def let_members_go(self) -> None:
        for member in self.members:
            if member.prepared:
                member.complete()

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            if self.prepared:
                self.prepared.clear()
                self.let_members_go()

    # -- mapping ---------------------------------------------------------------------------------

    def most(self) -> bool:
        """Whether a mapping of it may be writable; a closed buffer can not tell."""
        if self.kind == "buffer":
            self.check_open()
            return self.writable
        return all(member.most() for member in self.members)

    def check_map(self, offset: int, length: int, writable: bool | None) -> bool:
        """Everything that is looked at before a mapping that exists could be lent."""
        self.check_open()
        self.check_range(offset, length, "OUT_OF_RANGE")
        if length == 0:
            raise Refused("ZERO_LENGTH")
        most = self.most()
        if writable and not most:
            raise Refused("ACCESS")
        return most if writable is None else writable

    def check_congruent(self, offset: int, length: int) -> tuple[int, int]:
        """(offset of the first byte in its page, bytes of whole pages), or NOT_CONGRUENT."""
        pieces = self.pieces(offset, length)
        for _, at, _ in pieces[1:]:
            if at % page_size:
                raise Refused("NOT_CONGRUENT")
        for _, at, nbytes in pieces[:-1]:
            if (at + nbytes) % page_size:
                raise Refused("NOT_CONGRUENT")
        skip = pieces[0][1] % page_size
        return skip, -(-(skip + length) // page_size) * page_size

    def check_grant(self, offset: int, length: int, writable: bool) -> None:
        """Memory that is writable for its holders is given read-only to nobody."""
        for node, _, _ in self.pieces(offset, length):
            if node.writable and not writable:
                raise Refused("NOT_ENFORCED")


@dataclass(eq=False)
class Memory:
    """Whole pages mapped, by one mapping or lent to several."""

    nbytes: int


@dataclass(eq=False)
class Mapped:
    """A mapping, here or in the client, and what the model says of it."""

    real: Any
    node: Node
    offset: int
    length: int
    writable: bool
    memory: Memory
    guards: int = 0
    number: int = -1  # in the client's list
    live: bool = True
    views: list[memoryview] = field(default_factory=list)
    viewed: bool = False  # by the client
    wires: list[tuple[Any, tuple[int, int]]] = field(default_factory=list)

    @property
    def expected(self) -> bytes:
        return self.node.bytes_at(self.offset, self.length)
