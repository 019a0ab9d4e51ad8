"""What lies where in the memory of a queue. Native byte order; offsets in bytes.

The producer's page, then the consumer's, then the data area, to the end of the descriptor. Each
end writes the first cache line of its own page and nothing else there; only the producer writes
the data area. What an end reads it reads once, checks, and then uses the copy.

| page | offset | name     | type | written by | read by  | ordering                            |
|------|--------|----------|------|------------|----------|-------------------------------------|
| both | 0      | position | u64  | its end    | other    | release, after the data; acquire    |
| both | 8      | wanted   | u64  | its end    | other    | a full fence before the next look   |
| both | 16     | bell     | u32  | its end    | other    | sequential; futex                   |
| both | 20     | closed   | u32  | its end    | other    | sequential; acquire                 |
| 1st  | 24     | magic    | u64  | creator    | both     | before the queue is handed over     |
| both | 32     | listens  | u32  | its end    | other    | before `wanted`                     |

* `position`: bytes put in (the producer's, "tail") or taken out (the consumer's, "head") since the
  queue was made: a multiple of 8 that only grows. A byte lies at its position modulo the capacity.
  Empty: they are equal. Full: they are the capacity apart.
* `wanted`: the position of the other end whose crossing is to wake this one; 0 for none.
* `bell`: another value each time that this end wakes the other, who sleeps on it.
* `closed`: not 0 once this end is done.
* `listens`: not 0 once an event loop has waited for this end: whoever wakes it then sends a byte to
  its socket too.
* An entry: its size (u64), its bytes, and up to 7 bytes that mean nothing, so that the next one
  lies on a multiple of 8. An entry that begins near the end of the area goes on at its start: both
  ends map the area twice in a row, and see each entry in one piece.
"""

from __future__ import annotations

from memdesc.vm.pages import page_size, round_page

ENTRY_HEADER = 8
CONTROL = 2 * page_size
MAX_CAPACITY = 1 << 40


def memory_for(capacity: int) -> int:
    """Bytes of memory of a queue whose data area has at least `capacity` bytes."""
    return CONTROL + round_page(capacity)


def entry_extent(nbytes: int) -> int:
    """Bytes of the data area that an entry of so many bytes takes."""
    return ENTRY_HEADER + (nbytes + 7) // 8 * 8
