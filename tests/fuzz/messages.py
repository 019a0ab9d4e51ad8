"""Messages of every type that the protocol has, made of a fuzzer's bytes.

What the types are is asked of the protocol itself (`typing.get_args(protocol.Message)`), so a new
one is fuzzed without a word here. Values are near the bounds that the types state, on both sides.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
from msgspec import inspect

from memdesc.services import protocol

NAMES = ["it", "writable", "several", "given", "nothing", "", "ä\0", "x" * 1024, "x" * 1025]
"""Of shares and the like: those of the service that is fuzzed, and others."""
TYPES = typing.get_args(protocol.Message)

_INTEGERS = [0, 1, 2, 3, 4095, 4096, 65536, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1, -1]
_KINDS = {info.cls: info for info in inspect.multi_type_info(TYPES)}  # type: ignore[union-attr]


class Bytes:
    """A fuzzer's bytes, one after the other; zeros when they are used up."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def __bool__(self) -> bool:
        return self._at < len(self._data)

    def number(self, below: int = 256) -> int:
        byte = self._data[self._at] if self else 0
        self._at += 1
        return byte % below

    def some(self, count: int) -> bytes:
        piece = self._data[self._at : self._at + count]
        self._at += count
        return piece

    def pick(self, choices: typing.Sequence[Any]) -> Any:
        return choices[self.number(len(choices))]


def message(data: Bytes) -> bytes:
    """Make one message, well formed as a rule, and encode it."""
    kind = _KINDS[data.pick(TYPES)]
    made = bytearray(msgspec.msgpack.encode(_value(kind, data)))
    if data.number() >= 240:  # a byte of it is something else
        at = data.number() + 256 * data.number(2)
        made[at % len(made)] = data.number()
    return bytes(made)


def _value(kind: inspect.Type, data: Bytes, depth: int = 0) -> Any:
    make = _MAKERS.get(type(kind), _anything)
    return make(kind, data, depth)


def _anything(kind: Any, data: Bytes, depth: int) -> Any:
    choices: list[Callable[[], Any]] = [
        lambda: None,
        lambda: data.number() - 128,
        lambda: data.some(data.number(16)),
        lambda: data.some(data.number(16)).hex(),
        lambda: data.number() / 3,
        lambda: bool(data.number(2)),
        lambda: msgspec.msgpack.Ext(data.number(128), data.some(4)),
        lambda: _extension(kind, data, depth),
        lambda: [_anything(kind, data, depth + 1) for _ in range(data.number(4))],
        lambda: {str(n): _anything(kind, data, depth + 1) for n in range(data.number(4))},
    ]
    return data.pick(choices[: 7 if depth > 3 else 10])()


def _extension(kind: Any, data: Bytes, depth: int) -> msgspec.msgpack.Ext:
    """Memory that travels beside a call, by its place; or whatever."""
    place = _integer(kind, data, depth) if data.number(4) else _anything(kind, data, depth + 1)
    form = [data.pick(["<f8", "u1", "|O8", "V0", ""]), [data.number(), data.number(4)], place]
    return msgspec.msgpack.Ext(1 + data.number(5), msgspec.msgpack.encode(data.pick([place, form])))


def _record(kind: Any, data: Bytes, depth: int) -> Any:
    """The arguments of a call, or one value."""
    if data.number() > 160:
        return _anything(kind, data, depth)
    positional = [_anything(kind, data, depth + 1) for _ in range(data.number(4))]
    names = ["first", "second", "data", "view", "array", "client", "memory"]
    named = [data.pick(names) for _ in range(data.number(3))]
    return [positional, {name: _anything(kind, data, depth + 1) for name in named}]


def _integer(kind: Any, data: Bytes, depth: int) -> int:
    which = data.number(8)
    if which < 4:
        return data.number()
    if which == 4:
        return int.from_bytes(data.some(2), "big")
    limits = getattr(kind, "ge", 0), getattr(kind, "le", None)
    bounds = [limit + off for limit in limits if limit is not None for off in (0, 1)]
    if which == 5 and bounds:
        return min(data.pick(bounds), 2**64 - 1)
    return int(data.pick(_INTEGERS))


def _text(kind: Any, data: Bytes, depth: int) -> str:
    if data.number(4):
        return str(data.pick(NAMES))
    return "x" * ((kind.max_length or 16) + data.number(3) - 1)


def _bytes(kind: Any, data: Bytes, depth: int) -> bytes:
    if data.number() < 240:
        return data.some(data.number(64))
    return bytes((kind.max_length or 16) + data.number(3) - 1)


def _several(kind: Any, data: Bytes, depth: int) -> list[Any]:
    count = data.number(4) if data.number() < 248 else min(kind.max_length or 9, 500) + 1
    return [_value(kind.item_type, data, depth + 1) for _ in range(count)]


def _tuple(kind: Any, data: Bytes, depth: int) -> list[Any]:
    return [_value(item, data, depth + 1) for item in kind.item_types]


def _dict(kind: Any, data: Bytes, depth: int) -> dict[Any, Any]:
    pairs = range(data.number(4))
    return {
        _value(kind.key_type, data, depth + 1): _value(kind.value_type, data, depth + 1)
        for _ in pairs
    }


def _struct(kind: Any, data: Bytes, depth: int) -> Any:
    fields = {}
    for field in kind.fields:
        if not field.required and data.number(2):
            continue
        fields[field.encode_name] = _value(field.type, data, depth + 1)
    if kind.array_like:
        return [*([kind.tag] if kind.tag is not None else []), *fields.values()]
    return {**({kind.tag_field: kind.tag} if kind.tag is not None else {}), **fields}


_MAKERS: dict[type, Callable[[Any, Bytes, int], Any]] = {
    inspect.NoneType: lambda kind, data, depth: None,
    inspect.BoolType: lambda kind, data, depth: bool(data.number(2)),
    inspect.IntType: _integer,
    inspect.FloatType: lambda kind, data, depth: data.pick([0.0, 1e308, float("nan"), -1.5]),
    inspect.StrType: _text,
    inspect.BytesType: _bytes,
    inspect.ListType: _several,
    inspect.VarTupleType: _several,
    inspect.TupleType: _tuple,
    inspect.DictType: _dict,
    inspect.StructType: _struct,
    inspect.LiteralType: lambda kind, data, depth: data.pick(kind.values),
    inspect.UnionType: lambda kind, data, depth: _value(data.pick(kind.types), data, depth),
    inspect.RawType: _record,
    inspect.AnyType: _anything,
}


def seeds() -> Iterator[bytes]:
    """For each type, inputs of which `fuzz_service` makes a message of that type."""
    for index in range(len(TYPES)):
        for filling in (b"\0", b"\1", b"\5\1\3\2"):
            yield bytes([1, 0, index]) + filling * (40 // len(filling))


def _check() -> None:
    for number in range(len(TYPES)):
        message(Bytes(bytes([number]) + bytes(range(200))))


if __name__ == "__main__":
    _check()
    print(len(TYPES), "types,", len(list(seeds())), "seeds")
