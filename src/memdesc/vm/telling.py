"""Errors told in other words, and errors kept: neither holds more than it says.

A traceback holds the frames that an error came through. Each of these holds its variables and, when
its function has returned, the frame of who called it. An error that is found from there keeps
itself alive, and with it the memory and the descriptors of all these functions, until the collector
runs. So what is raised must be in no variable of a function that it leaves, and what is kept goes
without its traceback.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

_P = ParamSpec("_P")
_E = TypeVar("_E", bound=BaseException)


class _Block:
    """No generator of `contextlib`: from CPython 3.12 on its frame leads to `__exit__`'s, which has
    the error that was replaced.
    """

    __slots__ = ("_tell",)

    def __init__(self, tell: Callable[[Exception], None]) -> None:
        self._tell = tell

    def __enter__(self) -> None:
        """Tell what goes wrong from here on."""

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if isinstance(error, Exception):
            self._tell(error)


def explains(tell: Callable[Concatenate[Exception, _P], None]) -> Callable[_P, _Block]:
    """Make a ``with`` block of a function that raises an error in other words.

    It is called with what leaves the block, and the arguments of the block; where it returns, the
    error goes on as it is.
    """

    def block(*arguments: _P.args, **named: _P.kwargs) -> _Block:
        return _Block(lambda error: tell(error, *arguments, **named))

    return block


@explains
def needed(error: Exception, what: str, library: str, extra: str) -> None:
    """Say how to have a library that is imported in the block, where it is not installed."""
    if isinstance(error, ModuleNotFoundError):
        raise ModuleNotFoundError(
            f"{what} needs {library} ({error}): pip install 'memdesc[{extra}]'", name=error.name
        ) from error


def bare(error: _E) -> _E:
    """Take the traceback off an error that is kept or given, and off all that led to it."""
    left: list[BaseException | None] = [error]
    seen = set()
    while left:
        one = left.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            one.__traceback__ = None
            left += one.__cause__, one.__context__
    return error
