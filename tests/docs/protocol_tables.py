"""The tables of docs/protocol.md, made of the messages' types.

python tests/docs/protocol_tables.py        writes them into the page
"""

from __future__ import annotations

import importlib
import re
import sys
import typing
from pathlib import Path
from typing import Any

import msgspec
from msgspec import inspect

from memdesc.portable import Portable
from memdesc.services import protocol

PAGE = Path(__file__).parents[2] / "docs" / "protocol.md"
BLOCK = re.compile(r"<!-- begin (\w+) -->\n(?:.*?\n)??<!-- end -->\n", re.S)
MESSAGES = typing.get_args(protocol.Message)


def with_tables(page: str) -> str:
    """Give the page with each block as it should be."""
    return BLOCK.sub(lambda found: block(found[1]), page)


def block(capability: str) -> str:
    if capability == "memory":
        return f"<!-- begin memory -->\n\n{described(Portable)}\n<!-- end -->\n"
    text = "\n".join(described(kind) for kind in kinds_of(capability))
    if capability == "basics":
        text = greeting() + text
    return f"<!-- begin {capability} -->\n\n{text}\n<!-- end -->\n"


def kinds_of(capability: str) -> list[type[msgspec.Struct]]:
    """The messages of a capability's module, and then the records that only occur in them."""
    module = importlib.import_module(f"memdesc.services.protocol.{capability}")
    structs = [
        one
        for one in {id(one): one for one in vars(module).values()}.values()
        if isinstance(one, type)
        and issubclass(one, msgspec.Struct)
        and one.__module__ == module.__name__
    ]
    return sorted(structs, key=lambda kind: kind not in MESSAGES)


def greeting() -> str:
    """What a client sends first, as bytes."""
    data = protocol.encode(protocol.Hello(protocol.VERSION))
    return (
        f"The version is {protocol.VERSION}. The first message of every client is these "
        f"{len(data)} bytes:\n\n```text\n{data.hex(' ')}\n```\n\n"
    )


def described(kind: type[msgspec.Struct]) -> str:
    """A heading, what the type's own text says, and a row for each field."""
    info = inspect.type_info(kind)
    assert isinstance(info, inspect.StructType)
    form = ""
    if info.array_like:
        form = "An array of these, in this order:"
    elif kind not in MESSAGES:
        form = f"A record, {'without' if info.tag is None else 'with its'} `type`:"
    text = re.sub(r"\n +", "\n", (kind.__doc__ or "").strip())
    lines = [f"### {kind.__name__}", "", text, ""]
    lines += [form, ""] if form else []
    lines += ["| field | what | where absent |", "|---|---|---|"] if info.fields else ["No fields."]
    for field in info.fields:
        lines.append(f"| `{field.encode_name}` | {wire(field.type)} | {absent(field)} |")
    return "\n".join(lines) + "\n"


def absent(field: inspect.Field) -> str:
    if field.required:
        return ""
    default = field.default
    if isinstance(default, msgspec.Raw):
        default = msgspec.msgpack.decode(default)
    if isinstance(default, int) and not isinstance(default, bool):
        return str(default)  # 0 == False, which would find its word
    return {None: "nil", False: "false", True: "true", (): "empty", "": "empty"}.get(
        default, repr(default)
    )


def wire(info: Any) -> str:
    """What MessagePack carries, with its bounds."""
    simple = {
        inspect.BoolType: "bool",
        inspect.NoneType: "nil",
        inspect.RawType: "any value",
        inspect.AnyType: "any value",
        inspect.FloatType: "float",
    }
    if type(info) in simple:
        return simple[type(info)]
    if isinstance(info, inspect.IntType):
        if info.le in (None, 2**63 - 1):
            return {None: "integer", 0: "natural", 1: "natural, not 0"}[info.ge]
        return f"natural, {info.ge:,} to {info.le:,}"
    if isinstance(info, (inspect.StrType, inspect.BytesType)):
        unit = "characters" if isinstance(info, inspect.StrType) else "bytes"
        name = "text" if unit == "characters" else "bytes"
        return f"{name}, {bounds(info, unit)}".removesuffix(", ")
    if isinstance(info, inspect.StructType):
        return f"[{info.cls.__name__}](#{info.cls.__name__.lower()})"
    if isinstance(info, inspect.UnionType):
        *first, last = (wire(one) for one in info.types)
        return ", ".join(first) + f", or {last}"
    if isinstance(info, inspect.TupleType):
        return "[" + ", ".join(wire(one) for one in info.item_types) + "]"
    if isinstance(info, (inspect.VarTupleType, inspect.ListType)):
        return f"array, {bounds(info, 'items')}: {wire(info.item_type)}"
    raise TypeError(f"the page can not tell of {info}")


def bounds(info: Any, unit: str) -> str:
    low = f"at least {info.min_length:,}, " if info.min_length else ""
    return f"{low}at most {info.max_length:,} {unit}" if info.max_length is not None else ""


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text()))
    sys.exit()
