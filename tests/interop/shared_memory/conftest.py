"""The two modules side by side: what both promise is tested of both."""

import contextlib
import gc
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from shm_both import OURS, THEIRS, Kind


@pytest.fixture(params=[OURS, THEIRS], ids=["ours", "theirs"])
def kind(request: pytest.FixtureRequest) -> Kind:
    found: Kind = request.param
    if not found.ours and not os.access("/dev/shm", os.W_OK):
        pytest.skip("there is no /dev/shm here that this user can write, which the original needs")
    return found


@pytest.fixture
def closing() -> Iterator[Callable[[Any], Any]]:
    """Close and unlink what a test passes through it, whatever became of it."""
    passed: list[Any] = []

    def note(made: Any) -> Any:
        passed.append(getattr(made, "shm", made))
        return made

    yield note
    while passed:
        block = passed.pop()
        block.close()
        with contextlib.suppress(FileNotFoundError):
            block.unlink()
    gc.collect()
