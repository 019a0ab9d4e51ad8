"""Validating: that a table of a stranger holds together, in time that its size bounds.

PyArrow reads a dictionary again with each piece of a column that has it, and a text with each view
of it; so a few megabytes could keep it busy for days, and no signal would end that.
"""

from __future__ import annotations

import errno
from typing import Any

from memdesc.errors import InvalidArgument

_MOST_REPEATED = 16 << 30
"""Bytes that may be read more than once: some seconds."""


def validate(pa: Any, table: Any, nbytes: int) -> None:
    """Validate a table that lies in so many bytes; `InvalidArgument` (ENOTSUP): too much to do."""
    table.validate()
    seen: set[object] = set()
    left = max(_MOST_REPEATED, 4 * nbytes)
    for column in table.columns:
        if not _repeats(pa, column.type):
            column.validate(full=True)
            continue
        for chunk in column.chunks:
            left -= _validate(pa, chunk, seen, left)


def _validate(pa: Any, chunk: Any, seen: set[object], most: int) -> int:
    """Validate a piece; a dictionary only once, if it has one itself."""
    if not pa.types.is_dictionary(chunk.type):
        repeated = _check_repeated(pa, chunk, most)
        chunk.validate(full=True)
        return repeated
    words, repeated = chunk.dictionary, 0
    places = tuple(buffer and (buffer.address, buffer.size) for buffer in words.buffers())
    known = (words.type, words.offset, len(words), places)
    if known not in seen:
        repeated = _check_repeated(pa, words, most)
        words.validate(full=True)
        seen.add(known)
    # The indices, of as many words that take no bytes.
    bare = pa.DictionaryArray.from_arrays(chunk.indices, pa.nulls(len(words)), safe=False)
    bare.validate(full=True)
    return repeated


def _check_repeated(pa: Any, array: Any, most: int) -> int:
    repeated = _repeated(pa, array)
    if repeated > most:
        raise InvalidArgument(
            f"validating the table takes reading {repeated:,} bytes of shared dictionaries and "
            f"texts, and {most:,} are left to be read: have it written without views, in fewer "
            "pieces (combine_chunks), or say trusted=True if whoever wrote it is trusted",
            errno=errno.ENOTSUP,
        )
    return repeated


def _repeats(pa: Any, kind: Any) -> bool:
    """Whether validating an array of that type may read bytes more than once."""
    if isinstance(kind, pa.BaseExtensionType):
        return _repeats(pa, kind.storage_type)
    if pa.types.is_dictionary(kind) or pa.types.is_string_view(kind):
        return True
    if pa.types.is_run_end_encoded(kind):
        return _repeats(pa, kind.value_type)
    return any(_repeats(pa, kind.field(number).type) for number in range(kind.num_fields))


def _repeated(pa: Any, array: Any) -> int:
    """How many bytes of dictionaries, and of texts by views, validating an array reads."""
    types, kind = pa.types, array.type
    if isinstance(kind, pa.BaseExtensionType):
        return _repeated(pa, array.storage)
    if types.is_string_view(kind):
        return _length_of_views(array)
    if types.is_dictionary(kind):
        words = array.dictionary
        return int(words.get_total_buffer_size()) + _repeated(pa, words)
    if not kind.num_fields or not _repeats(pa, kind):
        return 0
    if types.is_struct(kind) or types.is_union(kind):
        return sum(_repeated(pa, array.field(number)) for number in range(kind.num_fields))
    return _repeated(pa, array.values)  # lists, maps, runs


def _length_of_views(array: Any) -> int:
    import numpy as np

    views = array.buffers()[1]  # of 16 bytes each, first a length
    if views is None:
        return 0
    lengths = np.frombuffer(views, "<i4", views.size // 16 * 4)[::4]
    return int(lengths[array.offset :][: len(array)].clip(0).sum(dtype=np.int64))
