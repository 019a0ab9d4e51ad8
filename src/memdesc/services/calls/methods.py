"""A method of a service: a function, and its signature as what arguments are checked against."""

from __future__ import annotations

import errno
import functools
import sys
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from memdesc.errors import InvalidArgument
from memdesc.portable import UNREADABLE
from memdesc.services.calls.incoming import Form
from memdesc.services.protocol import check_name

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop

    from memdesc.services.accepting import Accepted

Handler = Callable[..., Any]
_Arguments = tuple[list[msgspec.Raw], dict[str, msgspec.Raw]]
_read = msgspec.msgpack.Decoder(_Arguments).decode


@dataclass(frozen=True, slots=True)
class _Parameter:
    """One argument that callers give: its name, its type, and how it may be given."""

    name: str
    form: Form
    required: bool
    by_name: bool


class Method:
    """A function that clients may call.

    Attributes
    ----------
    name : str
    function : callable
    is_async : bool
    loop : asyncio.AbstractEventLoop or None
        Of an async function: the loop that ran where it was made a method.

    Raises
    ------
    InvalidArgument
        A parameter has no annotation, or one of a type that does not travel.
    """

    def __init__(self, function: Handler, name: str | None) -> None:
        if not callable(function):
            raise InvalidArgument(f"a method is a function, not {function!r}", errno=errno.EINVAL)
        self.name = check_name(
            getattr(function, "__name__", "") if name is None else name, "a method"
        )
        self.function = function
        called = _what_runs(function)
        import inspect  # here and below, as few services have methods

        self.is_async = inspect.iscoroutinefunction(called)
        if self.is_async:
            import asyncio  # noqa: F401 (not later, on the I/O thread, which others wait for)
        self.loop = running_loop() if self.is_async else None
        self._caller: str | None = None
        self._positional: list[_Parameter] = []
        self._named: dict[str, _Parameter] = {}
        self._read_signature(called)

    def _read_signature(self, called: Any) -> None:
        import inspect

        try:
            hints = typing.get_type_hints(called, include_extras=True)
        except Exception as error:
            raise InvalidArgument(
                f"the annotations of method {self.name!r} can not be read: {error}",
                errno=errno.EINVAL,
            ) from error
        for one in inspect.signature(self.function).parameters.values():
            if one.kind in (one.VAR_POSITIONAL, one.VAR_KEYWORD):
                raise self._unfit(one.name, "stands for any number: name each, or take a list")
            if one.name not in hints:
                raise self._unfit(one.name, "has no annotation: its type is what is checked")
            if _is_caller(hints[one.name]):
                if self._caller is not None:
                    raise self._unfit(one.name, "is a second UserClient: there is one caller")
                self._caller = one.name
                continue
            try:
                form = Form(hints[one.name])
            except InvalidArgument as error:
                raise self._unfit(one.name, f"is annotated so that none fits: {error}") from error
            by_name = one.kind is not one.POSITIONAL_ONLY
            known = _Parameter(one.name, form, one.default is one.empty, by_name)
            self._named[one.name] = known
            if one.kind is not one.KEYWORD_ONLY:
                self._positional.append(known)
        if self._caller is not None and self._named:
            kinds = inspect.signature(self.function).parameters[self._caller]
            if kinds.kind is kinds.POSITIONAL_ONLY:
                raise self._unfit(self._caller, "is given by name: do not make it positional only")

    def _unfit(self, parameter: str, why: str) -> InvalidArgument:
        return InvalidArgument(
            f"parameter {parameter!r} of method {self.name!r} {why}", errno=errno.EINVAL
        )

    def bind(
        self, record: bytes | msgspec.Raw, client: Accepted
    ) -> tuple[list[Any], dict[str, Any]]:
        """Check the arguments of a record, inside `decoding`; give them as the function takes them.

        Raises
        ------
        InvalidArgument
            They do not fit; the message names the method, the argument and what came.
        """
        try:
            positional, named = _read(record)
        except UNREADABLE as error:
            raise InvalidArgument(
                f"the arguments of {self.name}() can not be read: {error}", errno=errno.EINVAL
            ) from error
        if len(positional) > len(self._positional):
            raise InvalidArgument(
                f"{self.name}() takes {len(self._positional)} arguments by position, "
                f"{len(positional)} came",
                errno=errno.EINVAL,
            )
        found = dict(zip((one.name for one in self._positional), positional, strict=False))
        for name, raw in named.items():
            known = self._named.get(name)
            if known is None or not known.by_name or name in found:
                what = "came twice" if name in found else "is not taken by that name"
                raise InvalidArgument(
                    f"{self.name}() argument {name[:80]!r} {what}", errno=errno.EINVAL
                )
            found[name] = raw
        values = {name: self._value(self._named[name], raw) for name, raw in found.items()}
        return self._called_with(values, client)

    def _value(self, parameter: _Parameter, raw: msgspec.Raw) -> Any:
        try:
            return parameter.form.read(raw)
        except InvalidArgument as error:
            raise InvalidArgument(
                f"{self.name}() argument {parameter.name!r}: {error}", errno=errno.EINVAL
            ) from error

    def _called_with(
        self, values: dict[str, Any], client: Accepted
    ) -> tuple[list[Any], dict[str, Any]]:
        for one in self._named.values():
            if one.required and one.name not in values:
                raise InvalidArgument(
                    f"{self.name}() argument {one.name!r} is missing", errno=errno.EINVAL
                )
        first: list[Any] = []
        for one in self._positional:
            if one.by_name or one.name not in values:
                break
            first.append(values.pop(one.name))
        if self._caller is not None:
            values[self._caller] = client
        return first, values


def _what_runs(function: Handler) -> Any:
    """Give the function behind a callable: it has the annotations."""
    if isinstance(function, functools.partial):
        return _what_runs(function.func)
    import inspect

    return function if inspect.isroutine(function) else type(function).__call__


def running_loop() -> AbstractEventLoop | None:
    """Give the event loop that runs in this thread, if any does. Does not import asyncio."""
    asyncio = sys.modules.get("asyncio")
    if asyncio is None:
        return None
    try:
        found: AbstractEventLoop = asyncio.get_running_loop()
    except RuntimeError:
        return None
    return found


def _is_caller(annotation: Any) -> bool:
    from memdesc.services.accepting import Accepted

    return isinstance(annotation, type) and issubclass(annotation, Accepted)
