"""The hook of `memdesc.debug`: who makes something that lasts notes it here, while one looks.

Off, as nearly always, `books` is None, and each such place costs that one look.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, Protocol, TypeVar

_E = TypeVar("_E", bound=BaseException)

Told = tuple[str, int] | None
"""What a thing says of itself: its name and its bytes; None once it has ended."""


class Books(Protocol):
    """What `memdesc.debug` keeps while it is on."""

    def note(self, thing: Any, told: Callable[[Any], Told]) -> None:
        """Note where a thing is made, as long as it lives. It must be weakly referable."""

    def blame(
        self, error: BaseException, *, views_of: object = None, of: Collection[str] = ()
    ) -> None:
        """Add to an error who holds the views of something, or where those of a class were made."""


books: Books | None = None


def blamed(error: _E, *, views_of: object = None, of: Collection[str] = ()) -> _E:
    """Give an error, with what `Books.blame` adds to it where one looks.

    To be raised as it comes: a variable of the function that raises it would hold the error, which
    holds that function's variables and its callers', until the collector runs.
    """
    if books is not None:
        books.blame(error, views_of=views_of, of=of)
    return error
