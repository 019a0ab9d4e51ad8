"""Arrow's files and streams (Feather, version 2): one table each, read in place by who opens it.

Its form is checked here, without PyArrow, so that a file which no reader could use is not served;
whether what is in it holds together each reader checks for itself.
"""

from __future__ import annotations

import errno

from memdesc.errors import InvalidArgument
from memdesc.files.formats import StoredArray, stored
from memdesc.files.sources import OpenFile
from memdesc.tables import ARROW
from memdesc.tables.messages import NotArrow, check_stream


def find_arrays(file: OpenFile) -> list[StoredArray]:
    """Find the table of a file: all of its bytes."""
    try:
        check_stream(file.read, file.size)
    except NotArrow as error:
        if error.errno == errno.EBADMSG:
            raise file.wrong(f"as an Arrow stream or file: {error}", error.offset) from error
        raise InvalidArgument(
            f"{file.path} ({file.size:,} bytes), offset {error.offset:,}: the table is written "
            f"{error}, so no reader could have it in place; write it anew: pyarrow.feather."
            'write_feather(table, path, compression="uncompressed")',
            errno=errno.ENOTSUP,
        ) from error
    name = file.source.name or file.path.stem
    return [stored(file, name, "u1", (file.size,), 0, content=ARROW)]
