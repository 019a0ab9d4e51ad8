"""Fuzzing in short: what the long form found stays found, and a planted flaw is.

`make fuzz` is the long form.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.append(str(HERE))

from fuzz import MEMORY, fuzz, fuzz_memory, fuzz_service  # noqa: E402
from latency import FEWEST, measure  # noqa: E402
from messages import TYPES, Bytes, message, seeds  # noqa: E402

from build import CORE, CanNotBuild, build, libfuzzer  # noqa: E402
from memdesc.services import protocol  # noqa: E402

pytestmark = pytest.mark.slow

FLAWS = {
    "fuzz_ring": (
        "ring.h",
        [
            ("size > there - MD_RING_HEADER", "0"),
            (
                "ring->entry = size;",
                "ring->entry = atomic_load_explicit((_Atomic uint64_t *)at, memory_order_relaxed);",
            ),
        ],
    ),
    "fuzz_offers": (
        "offers.h",
        [
            ("return -EPROTO; /* it holds more than was agreed */", ";"),
            ("taken->nbytes > taker->slot_size || ", ""),
        ],
    ),
}
"""Per fuzzer: its header, and checks whose lack it has to find (one: a value is read twice)."""


@pytest.fixture(autouse=True)
def possible() -> None:
    try:
        libfuzzer()
    except CanNotBuild as why:
        pytest.skip(str(why))


@pytest.mark.parametrize("name", MEMORY)
def test_memory_that_a_hostile_peer_writes(name: str, tmp_path: Path) -> None:
    try:
        done = fuzz_memory(name, 2, tmp_path)
    except CanNotBuild as why:
        pytest.skip(str(why))
    assert int(re.sub(r"\D", "", done.partition(" inputs")[0].rpartition(": ")[2])) > 1000, done


@pytest.mark.parametrize(
    ("name", "header", "line", "instead"),
    [(name, header, *flaw) for name, (header, flaws) in FLAWS.items() for flaw in flaws],
)
def test_a_flaw_in_memory_is_found(
    name: str, header: str, line: str, instead: str, tmp_path: Path
) -> None:
    core = tmp_path / "core"
    shutil.copytree(CORE, core, ignore=shutil.ignore_patterns("*.py*", "__pycache__"))
    text = (core / header).read_text()
    assert text.count(line) == 1
    (core / header).write_text(text.replace(line, instead))
    try:
        made = build(name, tmp_path / "bin", core)
    except CanNotBuild as why:
        pytest.skip(str(why))
    with pytest.raises(subprocess.CalledProcessError):
        fuzz([str(made)], name, 60, tmp_path, dict(os.environ))


def test_a_service(tmp_path: Path) -> None:
    done = fuzz_service(3, tmp_path, sys.executable, dict(os.environ))
    assert done.startswith("fuzz_service: ")
    first, last = re.findall(r"features (\d+) -> (\d+)", done)[0]
    assert int(last) >= int(first) > 100


FLAWED = """
import runpy, sys
from memdesc.services import protocol
whole = protocol.decode
def flawed(data):
    message = whole(data)
    if isinstance(message, protocol.PullMapping) and message.token == 1:
        raise RuntimeError("planted")
    return message
protocol.decode = flawed
sys.path.insert(0, sys.argv[1])
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_flaw_in_a_service_is_found(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], runtime_dir: Path
) -> None:
    command = [sys.executable, "-c", FLAWED, str(HERE), str(HERE / "fuzz_service.py")]
    with pytest.raises(subprocess.CalledProcessError) as caught:
        fuzz(command, "fuzz_service", 60, tmp_path, dict(os.environ))
    assert "RuntimeError: planted" in caught.value.stdout
    for left in runtime_dir.iterdir():  # it was not closed
        left.unlink()


def test_every_message_of_the_protocol_is_made() -> None:
    made = set()
    for seed in seeds():
        data = Bytes(seed[2:])
        try:
            made.add(type(protocol.decode(message(data))))
        except ValueError:  # msgspec's: beyond a bound, on purpose
            continue
    assert made == set(TYPES)


def test_what_others_feel(tmp_path: Path) -> None:
    for number, seed in enumerate(seeds()):
        (tmp_path / str(number)).write_bytes(seed)
    felt = measure(tmp_path, 0.1)
    assert set(felt) == {"quiet", "beside", "attacked"}
    for figures in felt.values():
        assert figures.count >= FEWEST
        assert 0 < figures.median <= figures.p99
