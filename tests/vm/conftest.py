"""Other processes for the tests of tasks: real ones, ended by pid."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest
from programs import Start, start_program


@pytest.fixture
def start() -> Iterator[Start]:
    """Start programs as `start_program` does, and end them with the test."""
    started: list[subprocess.Popen[str]] = []

    def start_one(code: str = "", *arguments: str) -> subprocess.Popen[str]:
        started.append(start_program(code, *arguments))
        return started[-1]

    yield start_one
    for child in started:
        child.kill()
        child.communicate()
