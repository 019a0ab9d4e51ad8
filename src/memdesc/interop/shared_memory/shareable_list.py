"""ShareableList: a list of fixed length in a block of shared memory.

The layout of `multiprocessing.shared_memory.ShareableList`, of native byte order:

    what                     bytes       written
    N, the number of items   8           once
    N + 1 offsets            8 each      once; of each item's room, from the start of the data
    data                     the last    the items; each room is whole multiples of 8 bytes
    N formats                8 each      with the item, after it; of the `struct` module
    N codes                  1 each      with the item, last

The codes are those of there (0 a number, 1 str, 2 bytes, 3 None), and for texts that end with
zeros, which there are lost, two more: plus 4, a byte 1 stands after the text and before what fills
its room; plus 8, it fills its room whole.

All of it is memory that any holder may write: the header is read and checked once, formats and
codes at each access. Items are written without a lock, as there: who reads an item while another
writes it may see parts of both.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterable
from functools import partial
from types import GenericAlias
from typing import Any, ClassVar, Final

from memdesc.errors import InvalidArgument, ProtocolError
from memdesc.interop.shared_memory.block import SharedMemory

Item = int | float | bool | str | bytes | None

_WORD = 8
_NUMBERS: Final = {int: "q", float: "d", bool: "xxxxxxx?", type(None): "xxxxxx?x"}
_PLAIN, _TEXT, _BYTES, _NONE = range(4)
_MARKED, _FULL = 4, 8
_TEXTS: Final = {kind + how for kind in (_TEXT, _BYTES) for how in (0, _MARKED, _FULL)}

_MOST_BYTES = 9_999_999
"""Of a text: its format has to fit into 8 characters."""


class ShareableList:
    r"""A list that every process sees, of `int`, `float`, `bool`, `str`, `bytes` and None.

    As `multiprocessing.shared_memory.ShareableList`. Its length is for ever; each item can be
    replaced by any other that has room: numbers always, texts of as many bytes as the first one
    there had, rounded up past the next multiple of 8.

    Parameters
    ----------
    sequence : iterable, optional
        The items of a new list; None attaches to one that exists, by its name.
    name : str, optional

    Attributes
    ----------
    shm : SharedMemory
        Where it lies.

    Raises
    ------
    InvalidArgument
        An item that can not be stored (also a ValueError); nothing was made.
    BlockExistsError, BlockNotFoundError, AllocationError
        As `SharedMemory`.
    ProtocolError
        The block of that name holds no such list (EPROTO).

    Examples
    --------
    >>> from memdesc.interop.shared_memory import ShareableList
    >>> ours = ShareableList(["howdy", 3.5, None, b"ends in\0"])
    >>> theirs = ShareableList(name=ours.shm.name)
    >>> theirs[2] = 42
    >>> list(ours)
    ['howdy', 3.5, 42, b'ends in\x00']
    >>> theirs.shm.close()
    >>> ours.shm.close()
    >>> ours.shm.unlink()
    """

    shm: SharedMemory
    _memory: ClassVar[type[SharedMemory]] = SharedMemory

    def __init__(self, sequence: Iterable[Item] | None = None, *, name: str | None = None) -> None:
        if name is None or sequence is not None:
            self._make([] if sequence is None else list(sequence), name)
        else:
            self.shm = self._memory(name)
            try:
                self._read_header()
            except BaseException:
                self.shm.close()
                raise

    def _make(self, items: list[Item], name: str | None) -> None:
        self._offsets = [0]
        for item in items:
            self._offsets.append(self._offsets[-1] + _room_for(item))
        self._length = len(items)
        packed = [_pack(item, self._room(place)) for place, item in enumerate(items)]
        self.shm = self._memory(name, create=True, size=self._nbytes)
        struct.pack_into(f"{self._length + 2}q", self.shm.buf, 0, self._length, *self._offsets)
        for place, (form, code, data) in enumerate(packed):
            self._put(place, form, code, data)

    def _read_header(self) -> None:
        """Read the header once, and believe what fits the block."""
        buf = self.shm.buf
        most = (buf.nbytes - 2 * _WORD) // (2 * _WORD + 1)
        length = struct.unpack_from("q", buf, 0)[0] if buf.nbytes >= 2 * _WORD else -1
        if not 0 <= length <= most:
            raise self._no_list(f"{length:,} items in {buf.nbytes:,} bytes")
        self._length = length
        self._offsets = list(struct.unpack_from(f"{length + 1}q", buf, _WORD))
        steps = zip(self._offsets, self._offsets[1:], strict=False)
        if self._offsets[0] != 0 or any(after - before < _WORD for before, after in steps):
            raise self._no_list("the rooms of its items do not follow each other")
        if self._nbytes > buf.nbytes:
            raise self._no_list(f"items of {self._nbytes:,} bytes in {buf.nbytes:,}")

    def _no_list(self, what: str) -> ProtocolError:
        return ProtocolError(
            f"the block {self.shm.name!r} holds no ShareableList: {what}", errno=errno.EPROTO
        )

    # -- where things lie, in bytes from the start of the block ------------------------------------

    @property
    def _data(self) -> int:
        return (self._length + 2) * _WORD

    @property
    def _formats(self) -> int:
        return self._data + self._offsets[-1]

    @property
    def _codes(self) -> int:
        return self._formats + self._length * _WORD

    @property
    def _nbytes(self) -> int:
        return self._codes + self._length

    def _room(self, place: int) -> int:
        return self._offsets[place + 1] - self._offsets[place]

    def _place(self, position: int, doing: str) -> int:
        place = position + self._length if position < 0 else position
        if not 0 <= place < self._length:
            raise IndexError(f"{doing} out of range: {position} of a list of {self._length}")
        return place

    # -- items -------------------------------------------------------------------------------------

    def _put(self, place: int, form: str, code: int, data: bytes) -> None:
        buf, start = self.shm.buf, self._data + self._offsets[place]
        room = self._room(place)
        buf[start : start + room] = data.ljust(room, b"\0")
        struct.pack_into("8s", buf, self._formats + place * _WORD, form.encode())
        buf[self._codes + place] = code

    def _form(self, place: int) -> str:
        """The format of an item, as far as it is one that can be there."""
        (raw,) = struct.unpack_from("8s", self.shm.buf, self._formats + place * _WORD)
        form: str = raw.rstrip(b"\0").decode("latin-1")
        if form not in _NUMBERS.values() and form != f"{self._room(place)}s":
            raise self._no_list(f"item {place} has the format {form!r}")
        return form

    def __getitem__(self, position: int) -> Item:
        place = self._place(position, "index")
        form, code = self._form(place), self.shm.buf[self._codes + place]
        (value,) = struct.unpack_from(form, self.shm.buf, self._data + self._offsets[place])
        if code == _NONE:
            return None
        if code == _PLAIN and not form.endswith("s"):
            return value  # type: ignore[no-any-return]
        if code not in _TEXTS or not form.endswith("s"):
            raise self._no_list(f"item {place} has the code {code} and the format {form!r}")
        data: bytes = value
        if not code & _FULL:
            data = data.rstrip(b"\0")
        if code & _MARKED:
            data = data[:-1]
        if code & ~(_MARKED | _FULL) == _BYTES:
            return data
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise self._no_list(f"item {place} is no text: {error}") from error

    def __setitem__(self, position: int, value: Item) -> None:
        place = self._place(position, "assignment index")
        self._put(place, *_pack(value, self._room(place)))

    def __len__(self) -> int:
        return self._length

    def __repr__(self) -> str:
        return f"{type(self).__name__}({list(self)}, name={self.shm.name!r})"

    def __reduce__(self) -> Any:
        return partial(type(self), name=self.shm.name), ()

    @property
    def format(self) -> str:
        """The formats of all items, in the notation of the `struct` module."""
        return "".join(self._form(place) for place in range(self._length))

    def count(self, value: object) -> int:
        """Tell how often a value occurs."""
        return sum(value == item for item in self)

    def index(self, value: object) -> int:
        """Tell where a value occurs first.

        Raises
        ------
        ValueError
            Nowhere.
        """
        for place, item in enumerate(self):
            if value == item:
                return place
        raise ValueError(f"{value!r} is not in this list")

    def __iter__(self) -> Any:
        return (self[place] for place in range(self._length))

    __class_getitem__: Any = classmethod(GenericAlias)


def _encoded(item: str | bytes) -> bytes:
    return item.encode() if isinstance(item, str) else bytes(item)


def _room_for(item: Item) -> int:
    """How many bytes an item gets in a new list.

    A text as many as there: whole words for its letters, and a bit to spare. And at least what it
    needs, which with letters of several bytes may be more.
    """
    if not isinstance(item, (str, bytes)):
        return _WORD
    nbytes = len(_encoded(item))
    room = max(_WORD * (len(item) // _WORD + 1), nbytes + -nbytes % _WORD)
    if room > _MOST_BYTES:
        raise InvalidArgument(
            f"an item of {nbytes:,} bytes: one has less than 10,000,000; put it into a block of "
            "its own",
            errno=errno.EINVAL,
        )
    return room


def _pack(item: Item, room: int) -> tuple[str, int, bytes]:
    """Give an item's format, code and bytes."""
    if isinstance(item, (str, bytes)):
        return _pack_text(item, room)
    form = _NUMBERS.get(type(item))
    if form is None:
        raise InvalidArgument(
            f"an item of type {type(item).__name__}: a ShareableList stores int, float, bool, "
            "str, bytes and None",
            errno=errno.EINVAL,
        )
    try:
        data = struct.pack(form, item is True if form.startswith("x") else item)
    except struct.error as error:
        raise InvalidArgument(
            f"{item} does not fit: an int has 64 bits here", errno=errno.EINVAL
        ) from error
    return form, _NONE if item is None else _PLAIN, data


def _pack_text(item: str | bytes, room: int) -> tuple[str, int, bytes]:
    data = _encoded(item)
    if len(data) > room:
        raise InvalidArgument(
            f"the item of {len(data):,} bytes exceeds available storage: {room:,} bytes are there",
            errno=errno.EINVAL,
        )
    code = _TEXT if isinstance(item, str) else _BYTES
    if data.endswith(b"\0"):
        code += _FULL if len(data) == room else _MARKED
        data = (data + b"\1")[:room]
    return f"{room}s", code, data
