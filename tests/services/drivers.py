"""A service of this process with one client that is a puppet."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from puppets import Puppet

import memdesc as md


@contextmanager
def driver(*lines: str, **options: object) -> Iterator[tuple[md.UserClient, Puppet]]:
    """A service of this process with one client: a puppet, whose connection is `c`."""
    limit = f", limits=md.Limits(mappings={options['mappings']})" if "mappings" in options else ""
    with md.Service("camera") as service, Puppet() as one:
        one.do(f"c = md.connect('camera'{limit})")
        for line in lines:
            one.do(line)
        yield service.wait_client(20), one


def reason_of(call: Callable[[], object]) -> tuple[md.MappingReason, int | None]:
    with pytest.raises(md.MappingError) as caught:
        call()
    return caught.value.reason, caught.value.errno
