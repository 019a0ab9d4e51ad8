"""Every block of Python on a page runs: as a doctest, as a program that the page tells, or here."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_page_examples import EXAMPLES
from test_page_programs import STARTED

DOCS = Path(__file__).resolve().parents[2] / "docs"

# What the blocks of a page need around them. BLOCK n is replaced by the n-th block, indented as it
# is; a page without an entry is run block after block.
AROUND = {
    "arrow": """
import memdesc
from memdesc.interop import arrow
with memdesc.Service("trades") as service:
    service.share("trades", arrow.to_descriptor({"price": [1, 2]}), content="arrow")
    BLOCK 0
assert trades.num_rows == 2
BLOCK 1
""",
    "asyncio": """
import asyncio
from types import SimpleNamespace
import memdesc as md
from memdesc.queues import notification_pair
from memdesc.vm.awaiting import readable
# Trio is not among what the tests need: asyncio waits for the number in its place.
trio = SimpleNamespace(lowlevel=SimpleNamespace(wait_readable=lambda fd: readable(lambda: fd)))
BLOCK 0
async def main():
    notify, listen = notification_pair()
    memory = md.create_data_queue(4096)
    producer = md.Producer(memory, notify=notify)
    asyncio.get_running_loop().call_later(0.01, producer.enqueue, b"late")
    async for entry in entries(md.Consumer(memory, listen=listen)):
        return entry
assert asyncio.run(main()) == b"late"
""",
    "dma": """
import sys
from memdesc import SegmentError, SegmentReason, errors
try:
    BLOCK 0
    try:
        BLOCK 1
    except SegmentError as error:
        assert error.reason is SegmentReason.ADDRESS_BITS, error     # the memory lies too high
except errors.NotPrivilegedError as error:
    sys.exit(f"not allowed: {error}")
except errors.WiringError as error:
    if error.reason not in (errors.WiringReason.NOT_PRIVILEGED, errors.WiringReason.LIMIT):
        raise
    sys.exit(f"not allowed: {error}")
""",
    "dask": """
BLOCK 0
from types import SimpleNamespace
client = SimpleNamespace(register_plugin=lambda plugin: None)
BLOCK 1
""",
    "iokit": """
from types import SimpleNamespace
import memdesc
alloc_bytes, client = 54321, SimpleNamespace(task=memdesc.Task.current())
BLOCK 0
assert map is not None and map.getLength() == alloc_bytes
""",
    "multiprocessing": """
BLOCK 0
from multiprocessing import get_context
def make_array(number):
    return md.zeros(number + 1)
if __name__ == "__main__":
    BLOCK 1
    md.interop.multiprocessing.uninstall()
""",
    "serving-files": """
import memdesc
import numpy
with memdesc.Service("model") as service:
    service.share("layer.0.weight", memdesc.BufferMemoryDescriptor(800), shape=(100,), dtype="f8")
    BLOCK 0
assert weights.shape == (100,) and not weights.flags.writeable
""",
    "services": """
import os
from types import SimpleNamespace
import memdesc as md
pid = os.fork()                           # each side has its part, and none of the other one
if pid:
    service, frames = md.Service("camera"), md.BufferMemoryDescriptor(4096)
    service.wait_client(timeout=30)
    client = SimpleNamespace(wait_mapping=lambda timeout: None)
else:
    service, frames = SimpleNamespace(clients=list), None
    client = md.connect("camera", timeout=30)
BLOCK 0
if pid:
    assert there.address > 0
    assert os.waitpid(pid, 0)[1] == 0
    service.close()
else:
    assert len(mapping) == 4096
    os._exit(0)
""",
    "streams": """
import asyncio
import memdesc as md
shown = []
def interesting(slot):
    return slot.sequence == 2
def show(array):
    shown.append(int(array[0]))
async def page():
    with md.Service("camera") as camera, md.connect("camera") as connection:
        stream = camera.stream("video", shape=(4,), dtype="u1", slots=8)
        video = connection.subscribe("video")
        for value in range(3):
            stream.publish([value] * 4)
        stream.close()
        BLOCK 0
asyncio.run(page())
assert shown == [0, 1, 2]
""",
    "web-workers": """
from types import SimpleNamespace
import memdesc
with memdesc.Service("model") as service, memdesc.BufferMemoryDescriptor(100) as memory:
    service.share("weights", memory)
    BLOCK 0
    worker = SimpleNamespace(app=SimpleNamespace())
    post_fork(None, worker)
    assert worker.app.weights.nbytes == 100
""",
}

NOT_RUN = {
    "gpu": "needs a GPU: tests/cuda shows what the page tells",
    "torch": "the last block needs a GPU; the others are doctests",
}
SESSIONS = {"command-line": "tests/docs/test_command_line_page.py"}
DOCTESTS = {*EXAMPLES, "arrow", "services", "torch"}
BLOCK = re.compile(r"^```(?:python|pycon)\n(.*?)^```", re.S | re.M)
PAGES = {page.stem: BLOCK.findall(page.read_text()) for page in sorted(DOCS.glob("*.md"))}


def is_program(block: str) -> bool:
    return re.match(r"# \w+\.py\n", block) is not None


def plain(page: str) -> list[str]:
    """The blocks of a page that are neither doctests nor programs."""
    return [one for one in PAGES[page] if ">>>" not in one and not is_program(one)]


TO_RUN = [page for page in PAGES if plain(page) and page not in NOT_RUN]


def test_doctests_and_programs_run_elsewhere() -> None:
    started = {*STARTED, *SESSIONS}
    for page, blocks in PAGES.items():
        assert page in DOCTESTS or not any(">>>" in block for block in blocks), page
        assert page in started or not any(is_program(block) for block in blocks), page
    assert all(plain(page) for page in NOT_RUN)


@pytest.mark.slow
@pytest.mark.parametrize("page", TO_RUN)
def test_the_other_blocks_run(page: str, tmp_path: Path) -> None:
    blocks = plain(page)
    (tmp_path / "page.py").write_text(program(AROUND.get(page), blocks))
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(one for one in sys.path if one))
    done = subprocess.run(
        [sys.executable, "page.py"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    if done.stderr.startswith("not allowed: "):
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr


def program(around: str | None, blocks: list[str]) -> str:
    """Put a page's blocks together, each of them once."""
    if around is None:
        return "\n".join(blocks)
    lines = []
    for line in around.splitlines():
        found = re.fullmatch(r"( *)BLOCK (\d+)", line)
        if found is None:
            lines.append(line)
        else:
            lines += [found[1] + one for one in blocks[int(found[2])].splitlines()]
    assert around.count("BLOCK ") == len(blocks)
    return "\n".join(lines) + "\n"
