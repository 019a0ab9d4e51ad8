"""An interrupt anywhere in a transfer leaves nothing held, registered or in flight."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from disk_tools import KIB, a_file, known
from interrupts import interrupted

from memdesc import BufferMemoryDescriptor
from memdesc.dma import DirectFile, rings


@pytest.mark.slow
@pytest.mark.parametrize("register", [False, True])
def test_a_transfer_struck_anywhere(tmp_path: Path, register: bool) -> None:
    path = a_file(tmp_path, 16 * KIB)
    with BufferMemoryDescriptor(16 * KIB, recycle=False) as buffer:
        life = buffer.memory.lifecycle
        disk: list[DirectFile] = []

        def prepare() -> Callable[[], object]:
            disk[:] = [DirectFile(path, queue_depth=2, block_size=4 * KIB, register=register)]
            return lambda: disk[0].read_into(buffer)

        for number in interrupted(prepare):
            disk.pop().close()
            assert rings._parked == [], number
            assert life.registrations == 0, number
        with DirectFile(path) as last:
            last.read_into(buffer)
        assert buffer.read_bytes() == known(16 * KIB)
