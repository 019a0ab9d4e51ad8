"""What a service has for its clients by name, and what it says of a name that it does not have."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any

from memdesc.errors import ShareNotFoundError
from memdesc.services.logs import log
from memdesc.services.protocol import ALL
from memdesc.vm.task import Task

if TYPE_CHECKING:
    from memdesc.services.accepting import Accepted, Accepting

Allow = Callable[[Task], bool]
Offers = dict[str, tuple[Mapping[str, Any], Callable[[Any], Allow | None]]]
"""By kind: what there is by name, and what tells the rule of each."""

_MOST_NAMES = 64
_LONGEST = 40  # to be compared: clients may ask again and again
_TOLD = 5


def allows(rule: Allow | None, client: Accepted, what: str) -> bool:
    """Whether a further rule, for what has that name, lets a client; one that raises does not."""
    if rule is None:
        return True
    try:
        return bool(rule(client.task))
    except BaseException:
        log.exception("service.rule_failed", extra={"share": what})
        return False


def near_names(name: str, known: Iterable[str]) -> list[str]:
    """Give the names that are nearly that one, the nearest first. Of few, short ones."""
    if len(name) > _LONGEST:
        return []
    import difflib

    return difflib.get_close_matches(
        name, [one for one in islice(known, _MOST_NAMES) if len(one) <= _LONGEST]
    )


def tell_names(name: str, known: Iterable[str]) -> str:
    """Put some of the names that there are into words, those first that are nearly that one."""
    few = list(islice(known, _MOST_NAMES))
    near = near_names(name, few)
    few = [*near, *(one for one in few if one not in near)]
    return ", ".join(repr(one[:80]) for one in few[:_TOLD]) + (", …" if len(few) > _TOLD else "")


def not_offered(
    service: Accepting, client: Accepted, kind: str, name: str, what: str
) -> ShareNotFoundError:
    """Say that a client finds nothing of a name, and what it would; nothing that a rule hides."""
    with service._lock:
        offers = service._offers()
        known, rule_of = offers[kind]
        others = [
            (method, rule(them[name]))
            for method, (them, rule) in offers.items()
            if method != kind and name in them
        ]
        # Without a rule, so none is called for what nobody asked for.
        few = [one for one in islice(known, _MOST_NAMES) if rule_of(known[one]) is None]
    one = f"arrays together (the share {ALL!r})" if name == ALL else f"{what} {name[:80]!r}"
    told = f"service {service.name!r} has no {one} for you"
    names = [one for one in few if one != ALL]
    for method, rule in others:
        if allows(rule, client, name):
            told += f": it is had by {method}({name[:80]!r})"
            break
    else:
        if names:
            told += f"; there is {tell_names(name, names)}"
        if ALL in few:
            told += f"; arrays() has {'all of them' if names else 'all there is'}"
    return ShareNotFoundError(told, errno=errno.ENOENT)
