"""`memdesc doctor`, run as its users run it: as a program."""

from __future__ import annotations

import errno
import json
import os
import pty
import re
import resource
import select
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from children import in_child, limit_locking
from runs import CONTAINER, why_not

from memdesc.cli import doctor
from memdesc.testing import failing
from memdesc.vm.probe import FEATURES

pytestmark = pytest.mark.slow

MEMDESC = [sys.executable, "-c", "from memdesc.cli import main; main()"]
# Not the pool of huge pages: tests that run beside this one raise it.
SETTINGS = [
    Path("/proc/sys/vm/max_map_count"),
    Path("/sys/kernel/mm/transparent_hugepage/enabled"),
    Path("/proc/sys/vm/overcommit_memory"),
]
# Runs the command in a process where one call of the core always fails.
WITHOUT = (
    "import errno, sys; from memdesc.testing import failing\n"
    "with failing({name!r}, {number}, times=None):\n"
    "    from memdesc.cli import main; main()"
)


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "MEMDESC_CALIBRATION"}
    return kept | {"XDG_CACHE_HOME": str(tmp_path), "COLUMNS": "80", "TERM": "xterm"}


def run(
    environment: dict[str, str],
    *arguments: str,
    command: list[str] | None = None,
    prefix: list[str] | None = None,
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*(prefix or []), *(command or MEMDESC), "doctor", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def expect_status(report: dict[str, Any]) -> int:
    """What this machine's own state says that the status must be."""
    denied = [one for one in report["features"] if one["matters"] and not one["available"]]
    assert report["failed"][: len(denied)] == [one["name"] for one in denied]
    return 1 if report["failed"] else 0


def test_told_in_80_columns_where_piped(environment: dict[str, str]) -> None:
    before = [path.read_text() for path in SETTINGS if path.exists()]
    done = run(environment)
    assert done.returncode in (0, 1), done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert done.stdout.isascii()
    assert "\x1b" not in done.stdout
    assert done.stderr == ""
    for word in (*FEATURES, "RLIMIT_MEMLOCK", "RLIMIT_NOFILE", "vm.max_map_count", "shmem"):
        assert word in done.stdout
    assert "4,096 bytes" in done.stdout
    assert "--calibrate" in done.stdout  # nothing was measured, and it says how to
    assert before == [path.read_text() for path in SETTINGS if path.exists()]


def test_json_is_all_that_is_on_stdout(environment: dict[str, str]) -> None:
    done = run(environment, "--json")
    report = json.loads(done.stdout)
    assert done.returncode == expect_status(report)
    assert done.stderr  # told there
    assert [one["name"] for one in report["features"]] == list(FEATURES)
    for one in report["features"]:
        assert one.keys() == {"name", "available", "why", "needs", "remedy", "limit", "matters"}
        assert one["why"]
        assert one["remedy"]
    assert {one["name"] for one in report["features"]} >= doctor.MATTERS
    limits = {one["name"]: one for one in report["limits"]}
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert limits["RLIMIT_NOFILE"]["value"] == soft
    assert 0 < limits["RLIMIT_NOFILE"]["in_use"] < soft
    assert limits["vm.max_map_count"]["value"] == int(SETTINGS[0].read_text())
    assert limits["MemAvailable"]["value"] > 0
    assert report["thresholds"]["origin"] == "default"
    assert report["thresholds"]["values"]["inline"] == 4096
    assert report["calibration_failure"] == ""


def test_calibrating_is_kept_and_told(environment: dict[str, str], tmp_path: Path) -> None:
    done = run(environment, "--calibrate", "--json")
    report = json.loads(done.stdout)
    assert done.returncode == expect_status(report)
    assert report["thresholds"]["origin"] == "measured"
    assert report["thresholds"]["figures"]["INLINE"]["1024"] > 0
    again = json.loads(run(environment, "--json").stdout)["thresholds"]
    assert again["where"] == str(tmp_path / "memdesc" / "calibration.json")
    assert again["values"] == report["thresholds"]["values"]
    assert again["measured"] == report["thresholds"]["measured"]
    assert again["measured"] in run(environment).stdout


def test_a_calibration_that_can_not_be_kept(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "memdesc").touch()
    done = run(environment, "--calibrate", "--json")
    report = json.loads(done.stdout)
    assert done.returncode == 1
    assert report["failed"][-1] == "calibration"
    assert "MEMDESC_CALIBRATION" in report["calibration_failure"]
    assert report["thresholds"]["origin"] == "measured"  # it holds here all the same


def test_thresholds_by_hand_are_told_as_such(environment: dict[str, str]) -> None:
    told = run(environment | {"MEMDESC_CALIBRATION": "inline=12345,mapping=never"}).stdout
    assert "12,345 bytes" in told
    assert "$MEMDESC_CALIBRATION" in told


def test_what_matters_and_is_denied_is_named_with_its_remedy(environment: dict[str, str]) -> None:
    code = WITHOUT.format(name="process_vm_readv", number=errno.ENOSYS)
    done = run(environment, command=[sys.executable, "-c", code])
    assert done.returncode == 1
    assert "DENIED  copy_other_task" in done.stdout
    end = done.stdout[done.stdout.index("NOT USABLE HERE") :]
    assert "copy_other_task: copyin and copyout through a connection" in end
    report = json.loads(run(environment, "--json", command=[sys.executable, "-c", code]).stdout)
    assert "copy_other_task" in report["failed"]


@pytest.mark.parametrize(
    ("call", "feature"),
    [
        ("buffer_address", "page_frames"),
        ("pidfd_getfd", "pidfd_getfd"),  # as the filters of containers have it
        ("open_uring", "io_uring"),
    ],
)
def test_what_does_not_matter_is_no_failure(call: str, feature: str) -> None:
    with failing(call, errno.EPERM, times=None):
        report = doctor.examine()
    states = {one["name"]: one["available"] for one in report["features"]}
    assert not states[feature]
    assert feature not in report["failed"]


def test_no_locking_at_all() -> None:
    def limited() -> list[str]:
        limit_locking(0)
        failed: list[str] = doctor.examine()["failed"]
        return failed

    assert "lock_memory" in in_child(limited)


def test_in_a_container_what_is_lost_is_told(environment: dict[str, str]) -> None:
    if denied := why_not(CONTAINER):
        pytest.skip(f"capabilities can not be dropped here: {denied}")
    done = run(environment, "--json", prefix=CONTAINER)
    report = json.loads(done.stdout)
    states = {one["name"]: one["available"] for one in report["features"]}
    assert not states["copy_any_task"]
    assert "copy_any_task" not in report["failed"]
    assert done.returncode == expect_status(report)


@pytest.mark.parametrize("colour", [True, False])
def test_a_terminal_shows_progress_and_respects_no_color(
    environment: dict[str, str], colour: bool
) -> None:
    ours, theirs = pty.openpty()
    if not colour:
        environment["NO_COLOR"] = "1"
    else:
        environment.pop("NO_COLOR", None)
    command = [*MEMDESC, "doctor", "--calibrate"]
    with subprocess.Popen(command, env=environment, stdout=theirs, stdin=theirs) as process:
        os.close(theirs)
        shown = read_all(ours)
    assert process.returncode in (0, 1), shown
    assert "calibrating" in shown
    assert bool(re.search(r"\x1b\[[\d;]*3\d[;m]", shown)) is colour


def read_all(fd: int) -> str:
    shown = bytearray()
    while select.select([fd], [], [], 60)[0]:
        try:
            shown += os.read(fd, 1 << 16)
        except OSError:  # EIO: the last holder of the other end has ended
            break
    os.close(fd)
    return shown.decode()
