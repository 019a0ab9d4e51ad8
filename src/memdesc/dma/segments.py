"""Segments for a device: physical runs cut to what it can take. Arithmetic alone.

A constraint that the memory does not meet is an error that names it. Nothing is bounced.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from memdesc.errors import InvalidArgument, SegmentError, SegmentReason
from memdesc.vm.pages import check_alignment, check_integer, check_length, page_size
from memdesc.vm.physical import PhysicalSegment


@dataclass(frozen=True, slots=True)
class DMASpecification:
    """What a device can take (I/O Kit: IODMACommand::SegmentOptions).

    Attributes
    ----------
    address_bits : int
        Of a physical address: those of a page at least, 64 at most.
    max_segment_length : int, optional
        Bytes; None: any.
    max_transfer_length : int, optional
        Bytes of one `prepare`; None: any.
    alignment : int
        Of the address of every segment, in bytes; a power of two.
    length_alignment : int
        Of the length of every segment, and of the transfer.

    Raises
    ------
    InvalidArgument
    """

    address_bits: int = 64
    max_segment_length: int | None = None
    max_transfer_length: int | None = None
    alignment: int = 1
    length_alignment: int = 1

    def __post_init__(self) -> None:
        fewest = page_size.bit_length() - 1
        if not fewest <= check_integer(self.address_bits, "address_bits") <= 64:
            raise InvalidArgument(
                f"address_bits is {self.address_bits}: give {fewest}, which reach one page, to 64",
                errno=errno.EINVAL,
            )
        check_alignment(self.alignment)
        check_alignment(self.length_alignment)
        if self.max_transfer_length is not None:
            check_length(self.max_transfer_length, "max_transfer_length")
        if self.max_segment_length is None:
            return
        if check_length(self.max_segment_length, "max_segment_length") < self.granule:
            raise InvalidArgument(
                f"max_segment_length is {self.max_segment_length:,}: a segment after which another "
                f"aligned one follows has at least {self.granule:,} bytes",
                errno=errno.EINVAL,
            )

    @property
    def granule(self) -> int:
        """What a run is cut at: both alignments hold behind it (powers of two: the larger one)."""
        return max(self.alignment, self.length_alignment)


def part_of_runs(
    runs: Iterable[PhysicalSegment], offset: int, length: int
) -> Iterator[PhysicalSegment]:
    """Give the runs of `length` bytes from `offset` on of those that runs describe."""
    start, end = 0, offset + length
    for run in runs:
        low, high = max(offset, start), min(end, start + run.length)
        if low < high:
            yield PhysicalSegment(run.address + low - start, high - low)
        start += run.length


def segments_of(
    runs: Iterable[PhysicalSegment], specification: DMASpecification, offset: int = 0
) -> Iterator[PhysicalSegment]:
    """Cut runs of physical memory into segments that a device can take.

    Parameters
    ----------
    runs : iterable of PhysicalSegment
        Merged: the next begins elsewhere.
    specification : DMASpecification
        What every segment has to meet.
    offset : int
        Of the first byte, for what an error says.

    Raises
    ------
    SegmentError
        A segment that does not meet the specification, with its `reason`.
    """
    longest = specification.max_segment_length
    for address, left in runs:
        while left:
            length = left
            if longest is not None and left > longest:
                length = longest - longest % specification.granule
            _check(PhysicalSegment(address, length), specification, offset)
            yield PhysicalSegment(address, length)
            address, left, offset = address + length, left - length, offset + length


def _check(segment: PhysicalSegment, specification: DMASpecification, offset: int) -> None:
    address, length = segment
    if (address + length - 1) >> specification.address_bits:
        reason, why = (
            SegmentReason.ADDRESS_BITS,
            f"ends above the {specification.address_bits} bits of the device's addresses",
        )
    elif address % specification.alignment:
        reason, why = (
            SegmentReason.ALIGNMENT,
            f"does not begin at a multiple of {specification.alignment:,}",
        )
    elif length % specification.length_alignment:
        reason, why = (
            SegmentReason.LENGTH_ALIGNMENT,
            f"is no multiple of {specification.length_alignment:,} bytes long",
        )
    else:
        return
    raise SegmentError(
        f"the segment of {length:,} bytes at physical address {address:#x}, byte {offset:,} of the "
        f"transfer, {why}: use memory that lies so (huge pages are contiguous), or copy it there",
        reason=reason,
        errno=errno.EMSGSIZE if reason is SegmentReason.ADDRESS_BITS else errno.EINVAL,
        offset=offset,
        address=address,
    )
