"""What surrounds every test: a folder of its own for services, and the leak guard.

At the end of a run: the tests that were skipped, grouped by the reason.
"""

from __future__ import annotations

import gc
import os
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from huge_pool import pool_as_it_is

from memdesc.testing import LeakKind, leak_guard

# The suite that ships tells as much about a failed assert as a test module does.
pytest.register_assert_rewrite(
    "memdesc.testing.conformance", "memdesc.testing._kind", "memdesc.testing._mapping"
)

_failed = pytest.StashKey[bool]()
_any_phase_failed = pytest.StashKey[bool]()


def pytest_configure(config: pytest.Config) -> None:
    # What a shell starts in the background has it ignored; tests interrupt themselves with it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    config.addinivalue_line(
        "markers",
        "leaves(*kinds, reason): this test leaves these kinds of things behind on purpose "
        f"({', '.join(kind.value for kind in LeakKind)})",
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    if report.when == "call":
        item.stash[_failed] = report.failed
    if report.failed:
        item.stash[_any_phase_failed] = True
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[object]:
    """Have one failure be one: what a traceback holds goes before the next test, not in its midst.

    Else descriptors, mappings and threads that the next one counts would end while it does.
    """
    result = yield
    if item.stash.get(_any_phase_failed, False):
        for name in ("last_exc", "last_type", "last_value", "last_traceback"):  # pytest's
            vars(sys).pop(name, None)
        gc.collect()
    return result


@pytest.fixture(autouse=True, scope="module")
def what_is_there_stays() -> None:
    """Have the collector, which the leak guard runs, look at what the tests make alone."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def huge_page_pool() -> Iterator[None]:
    """The pool of huge pages, which `pages=AUTO` takes of, is filled by no other test meanwhile."""
    with pool_as_it_is():
        yield


@pytest.fixture(autouse=True)
def runtime_dir() -> Iterator[Path]:
    """Services of a test live in a folder of its own (short: a socket's path has 107 bytes)."""
    folder = tempfile.mkdtemp(prefix="md-")
    before = os.environ.get("MEMDESC_RUNTIME_DIR")
    os.environ["MEMDESC_RUNTIME_DIR"] = folder
    yield Path(folder)
    if before is None:
        del os.environ["MEMDESC_RUNTIME_DIR"]
    else:
        os.environ["MEMDESC_RUNTIME_DIR"] = before
    shutil.rmtree(folder)
    # A fork server has the environment of the test that it was started in, and so the folder.
    started = sys.modules.get("multiprocessing.forkserver")
    if started is not None:
        started._forkserver._stop()


@pytest.fixture(autouse=True)
def nothing_left_behind(
    request: pytest.FixtureRequest, runtime_dir: Path, huge_page_pool: None
) -> Iterator[None]:
    """Fail a test that leaves something behind. Not one that failed: its frames hold on."""
    allow: set[LeakKind] = set()
    for mark in request.node.iter_markers("leaves"):
        if not mark.kwargs.get("reason"):
            raise pytest.UsageError("the marker `leaves` needs a reason")
        allow.update(LeakKind(kind) for kind in mark.args)
    # Others leave names in /dev/shm for a while, and where all is busy threads end late.
    guard = leak_guard(allow=allow, settle=20)
    guard.__enter__()
    yield
    if request.node.stash.get(_failed, False):
        return
    os.environ["MEMDESC_RUNTIME_DIR"] = str(runtime_dir)  # a test may have set another one
    guard.__exit__(None, None, None)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = Counter(_reason(report) for report in skipped)
    if reasons:
        terminalreporter.section("skipped, by reason")
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"{count:5}  {reason}")
        for nodeid in sorted({_short(r.nodeid) for r in skipped if _reason(r) == reason}):
            terminalreporter.write_line(f"         {nodeid}")


def _reason(report: pytest.TestReport) -> str:
    where = report.longrepr
    text = where[2] if isinstance(where, tuple) else str(where)
    return text.removeprefix("Skipped: ")


def _short(nodeid: str) -> str:
    """The test without its parameters: a grid that is skipped is one line."""
    return nodeid.partition("[")[0]
