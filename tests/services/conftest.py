"""Puppets for the tests of services: started as needed, ended with the test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from puppets import Puppet

from memdesc.services import logs

Start = Callable[..., Puppet]


@pytest.fixture
def puppet() -> Iterator[Start]:
    """Start puppets; each may be told its first lines."""
    with ExitStack() as stack:

        def start(*lines: str) -> Puppet:
            one = stack.enter_context(Puppet())
            for line in lines:
                one.do(line)
            return one

        yield start


@pytest.fixture(autouse=True)
def every_test_has_its_log() -> None:
    """What other tests made a service log leaves no line of this one's out."""
    logs.sparing.forget()
