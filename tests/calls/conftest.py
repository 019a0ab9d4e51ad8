"""A service and a connection to it: in one process, or with the service in a puppet."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from puppets import Puppet

import memdesc as md


@pytest.fixture
def service() -> Iterator[md.Service]:
    """A service of this process, without methods yet."""
    with md.Service("calls") as one:
        yield one


@pytest.fixture
def client(service: md.Service) -> Iterator[md.Connection]:
    """A connection to it."""
    with md.connect("calls") as one:
        yield one
    one.task.close()  # pytest holds on to the connection


class Remote:
    """A service in a process of its own: a puppet whose service is `s`, and a connection to it."""

    def __init__(self, stack: ExitStack, *lines: str) -> None:
        self.puppet = stack.enter_context(Puppet())
        self.puppet.do("s = md.Service('remote')")
        for line in lines:
            self.puppet.do(line)
        self.connection = stack.enter_context(md.connect("remote"))


@pytest.fixture
def remote() -> Iterator[Callable[..., Remote]]:
    """Start a service in a puppet, which may be told its first lines."""
    made = []
    with ExitStack() as stack:

        def start(*lines: str) -> Remote:
            made.append(Remote(stack, *lines))
            return made[-1]

        yield start
    for one in made:
        one.connection.task.close()
    md.Service("last").close()  # sweeps what killed services left
