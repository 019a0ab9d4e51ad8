"""`memdesc demo`, run as its users run it: as a program, on small files."""

from __future__ import annotations

import json
import mmap
import os
import pty
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from children import in_child
from runs import CONTAINER, why_not

import memdesc as md
from memdesc import _core
from memdesc.cli import demo, demo_client, demo_compare, demo_files, demo_kernel
from memdesc.cli.demo_processes import ProgramFailed, Programs
from memdesc.cli.demo_screen import Screen
from memdesc.vm.regions import parse_smaps

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

MEMDESC = [sys.executable, "-c", "from memdesc.cli import main; main()"]
WAYS = {"memdesc", "pipe", "shared_memory"}


def run_demo(
    *arguments: str | Path, prefix: tuple[str, ...] | list[str] = (), **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*prefix, *MEMDESC, "demo", *map(str, arguments)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture(scope="module")
def files() -> Iterator[list[Path]]:
    """Two files: one of several steps and an odd length, one smaller than a page."""
    with tempfile.TemporaryDirectory(prefix="md-") as folder:
        large, small = Path(folder, "large file"), Path(folder, "small")
        large.write_bytes(os.urandom(9_000_001))
        small.write_bytes(b"\0small")
        yield [large, small]


@pytest.fixture(scope="module")
def told(files: list[Path]) -> Iterator[subprocess.CompletedProcess[str]]:
    with tempfile.TemporaryDirectory(prefix="md-") as folder:
        yield run_demo("--json", "--clients", "3", *files, MEMDESC_RUNTIME_DIR=folder)


@pytest.fixture
def report(told: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert told.returncode == 0, told.stderr
    found: dict[str, Any] = json.loads(told.stdout)  # nothing else is on stdout
    return found


def test_all_claims_hold(report: dict[str, Any]) -> None:
    assert report["failed"] == []
    assert report["left"] == []
    assert [act["failed"] for act in report["acts"]] == [[]] * 5
    assert set(report["ways"]) == WAYS


def test_hashes_equal_sha256sum(report: dict[str, Any], files: list[Path]) -> None:
    summed = subprocess.run(
        ["sha256sum", *files], capture_output=True, text=True, check=True, timeout=30
    ).stdout
    expected = {line[66:]: line[:64] for line in summed.splitlines()}
    assert {one["path"]: one["sha256"] for one in report["files"]} == expected
    assert not any(one["chosen"] for one in report["files"])
    for way in report["ways"].values():
        assert all(measured["wrong"] == [] for measured in way["rounds"])


def test_each_write_is_refused_with_an_errno(report: dict[str, Any]) -> None:
    attempts = report["acts"][1]["attempts"]
    assert len(attempts) >= 5
    assert set(attempts.values()) <= {"EACCES", "EPERM", "EBADF", "EIO"}
    assert attempts["mprotect"] == "EACCES"
    assert report["acts"][1]["unchanged"] is True


def test_stranger_memory(report: dict[str, Any]) -> None:
    act = report["acts"][2]
    assert act["malloc"] == "PRIVATE_MEMORY"
    assert act["shared"] in ("mapped", "NOT_PRIVILEGED")
    assert (act["seen_here"], act["seen_there"]) == ("stored by the stranger", "stored by memdesc")
    assert act["shared"] == "mapped" or act["denied"]


def test_wiring_leaves_nothing(report: dict[str, Any]) -> None:
    act = report["acts"][3]
    assert (act["reason"], act["errno"]) == ("LIMIT", "ENOMEM")
    assert act["locked_before"] == act["locked_after"] < act["locked_alone"]


def test_nothing_is_left_of_the_killed(report: dict[str, Any]) -> None:
    act = report["acts"][4]
    assert (act["holders"], act["names"], act["socket_swept"]) == (0, [], True)


def test_only_ours_copies_nothing(report: dict[str, Any], files: list[Path]) -> None:
    total = sum(path.stat().st_size for path in files)
    copied = {name: way["median"]["bytes_copied"] for name, way in report["ways"].items()}
    assert copied == {"memdesc": 0, "pipe": 2 * 3 * total, "shared_memory": total}
    through = {name: way["median"]["bytes_through_kernel"] for name, way in report["ways"].items()}
    assert through["pipe"] == 0 or through["pipe"] >= 2 * 3 * total  # 0: not counted here
    assert through["memdesc"] < total


def test_pages_are_the_same_where_memory_is_shared(report: dict[str, Any]) -> None:
    same = {name: way["pages"]["same"] for name, way in report["ways"].items()}
    assert same == {"memdesc": True, "pipe": False, "shared_memory": True}


def test_after_a_kill_the_others_finish(report: dict[str, Any]) -> None:
    for way in report["ways"].values():
        assert way["killed"]["others"] == 2
        assert way["killed"]["others_wrong"] == []
    ours = report["ways"]["memdesc"]["killed"]
    assert (ours["left"], ours["driver_met"], ours["destroyed"]) == ([], [], [])


def test_told_in_plain_lines_where_piped(told: subprocess.CompletedProcess[str]) -> None:
    lines = told.stderr.splitlines()  # the same telling: stdout has the JSON
    assert sum(line.startswith("Act ") for line in lines) == 5
    assert any("round 1: memdesc" in line for line in lines)
    assert "\x1b" not in told.stderr
    assert told.stderr.isascii()
    assert [line for line in lines if len(line) > 80 and "md-" not in line] == []


def test_a_way_that_can_not_run_is_named(
    report: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    why = demo._unavailable(demo_kernel.shm_free() + 1)["shared_memory"]
    assert "/dev/shm" in why
    assert demo._unavailable(0) == {} or demo_kernel.shm_free() < 1 << 20
    report["ways"]["shared_memory"] = {"title": "segments", "unavailable": why}
    Screen(to_stderr=False).tell_comparison(report)
    shown = capsys.readouterr().out
    assert "not here" in shown
    assert "segments could not run here" in shown


def test_a_terminal_shows_progress_and_respects_no_color(files: list[Path]) -> None:
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "80", "NO_COLOR": "1"}
    command = [*MEMDESC, "demo", "--clients", "1", str(files[1])]
    with subprocess.Popen(command, env=environment, stdout=theirs, stdin=theirs) as process:
        os.close(theirs)
        shown = read_all(ours)
    assert process.returncode == 0, shown
    assert "\x1b[" in shown  # the bars move
    assert not re.search(r"\x1b\[[\d;]*[34]\d[;m]", shown)  # and have no colour
    assert "multiprocessing Pipe" in shown


def read_all(fd: int) -> str:
    shown = bytearray()
    while select.select([fd], [], [], 60)[0]:
        try:
            shown += os.read(fd, 1 << 16)
        except OSError:  # EIO: the last holder of the other end has ended
            break
    os.close(fd)
    return shown.decode()


def test_without_a_compiler_a_python_program_stands_in(files: list[Path], tmp_path: Path) -> None:
    done = run_demo("--json", "--clients", "1", files[1], PATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    act = json.loads(done.stdout)["acts"][2]
    assert act["program"] == "Python program"
    assert any("neither gcc nor cc" in one for one in act["denied"])
    assert act["seen_there"] == "stored by memdesc"


def test_in_a_container_what_stood_in_is_named(files: list[Path]) -> None:
    if denied := why_not(CONTAINER):
        pytest.skip(f"can not be root in a container: {denied}")
    done = run_demo("--json", "--clients", "1", files[1], prefix=CONTAINER)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["acts"][0]["proof"] == "object"
    assert found["acts"][0]["denied"]
    assert found["acts"][2]["shared"] == "NOT_PRIVILEGED"
    assert found["ways"]["memdesc"]["pages"]["proof"] == "object"


# -- what can not be used --------------------------------------------------------------------------


def refused(*paths: Path) -> str:
    done = run_demo(*paths)
    assert (done.returncode, done.stdout) == (2, ""), done
    assert str(paths[-1]) in done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def test_a_missing_file(files: list[Path], tmp_path: Path) -> None:
    assert "No such file" in refused(files[1], tmp_path / "missing")


def test_a_name_that_moves_the_cursor_is_made_harmless(tmp_path: Path) -> None:
    done = run_demo(tmp_path / "mis\x1b[2Jsing")
    assert (done.returncode, done.stdout) == (2, "")
    assert "mis\\x1b[2Jsing" in done.stderr
    assert done.stderr.rstrip("\n").isprintable()


def test_a_directory(tmp_path: Path) -> None:
    assert "directory" in refused(tmp_path)


def test_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert "empty" in refused(tmp_path / "empty")


def test_a_fifo_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    assert "regular" in refused(tmp_path / "fifo")


def test_an_unreadable_file(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_bytes(b"secret")
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read every file (CAP_DAC_OVERRIDE)")
    assert "Permission denied" in refused(path)


def test_more_than_memory_holds() -> None:
    with pytest.raises(demo_files.UnusableFile, match="smaller files"):
        demo._check_memory([1 << 50], 4)


def test_without_click_the_remedy_is_named() -> None:
    code = "import sys; sys.modules['click'] = None; from memdesc.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=30
    )
    assert done.returncode == 2
    assert "pip install 'memdesc[cli]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_folder_for_services_that_is_not_ours(files: list[Path], tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    done = run_demo("--json", files[1], MEMDESC_RUNTIME_DIR=str(tmp_path))
    assert done.returncode == 1
    found = json.loads(done.stdout)
    assert any("AccessDeniedError" in claim for claim in found["failed"])
    assert found["left"] == []


# -- what is noticed -------------------------------------------------------------------------------


class Quiet:
    def advance(self, way: str, nbytes: int) -> None:
        pass

    def finish_round(self, way: str, number: int, rate: float) -> None:
        pass


@pytest.mark.parametrize("way", sorted(WAYS))
def test_a_wrong_result_is_noticed(files: list[Path], way: str) -> None:
    right = demo_files.examine(files[1])
    source = demo_files.Source(right.path, right.nbytes, "0" * 64, right.histogram)
    with Programs() as programs:
        groups = demo_compare.start(programs, [way], 2)
        found = demo_compare.compare(groups, [source], Quiet(), until=0)
    failed = demo_compare.failures(way, found[way])
    assert len(found[way]["rounds"]) == 1
    assert [one for one in failed if "sha256" in one]
    assert not [one for one in failed if "histogram" in one]


def test_a_write_that_goes_through_is_noticed() -> None:
    """The same attempts, on memory that nothing seals."""

    def attempts() -> dict[str, str]:
        fd = os.memfd_create("open")
        os.ftruncate(fd, md.page_size)
        mapping = mmap.mmap(fd, md.page_size)
        address = _core.buffer_address(mapping)[0]
        return dict(demo_client._attempts(fd, address))

    found = in_child(attempts)
    assert found["mmap writable"] == ""
    assert found["pwrite"] == ""
    assert found["truncate"] == ""


def test_a_program_that_fails_is_named_with_what_it_said() -> None:
    command = [sys.executable, "-c", "raise SystemExit('out of luck')"]
    with Programs() as programs, pytest.raises(ProgramFailed, match=r"unlucky .*out of luck"):
        programs.start("unlucky", command).read_line()


def test_a_program_that_does_not_answer_is_named_and_ended() -> None:
    command = [sys.executable, "-c", "import signal; signal.pause()"]
    with pytest.raises(ProgramFailed, match="did not answer"), Programs() as programs:
        program = programs.start("silent", command)
        program.read_line(timeout=0.1)
    assert program.ended


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_stopped_in_the_middle_nothing_is_left(
    files: list[Path], runtime_dir: Path, number: signal.Signals
) -> None:
    names = demo_kernel.shm_names()
    command = [*MEMDESC, "demo", str(files[0])]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, stdout=pipe, stderr=pipe, text=True, preexec_fn=heed_interrupts
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "round 1: memdesc" in line:  # another way is at work now
                break
        started = demo_kernel.with_descendants([process.pid])
        assert len(started) > 10
        process.send_signal(number)
        process.communicate(timeout=30)
    expected = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}
    assert process.returncode == expected[number]
    until = time.monotonic() + 20
    while living := [pid for pid in started if is_alive(pid)]:
        assert time.monotonic() < until, living
        time.sleep(0.02)
    assert demo_kernel.abandoned_names(names, settle=20) == []
    if number == signal.SIGKILL:  # its driver's socket is swept by the next to look
        with pytest.raises(md.ServiceNotFoundError):
            md.connect("nobody", timeout=0)
    assert list(runtime_dir.iterdir()) == []


def heed_interrupts() -> None:
    """In the child: a shell's background job starts with SIGINT ignored, and hands that on."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def is_alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


# -- what is read of the kernel --------------------------------------------------------------------


def test_shared_pages_count_once() -> None:
    size = 32 << 20
    before = demo_kernel.memory_of([os.getpid()])
    with mmap.mmap(-1, size) as memory:
        memory[:] = bytes(size)
        pid = os.fork()
        if pid == 0:
            memory[:: md.page_size]
            signal.pause()
            os._exit(0)
        try:
            until = time.monotonic() + 10
            while demo_kernel.memory_of([pid]).shared < size // 2:  # it has touched them all
                assert time.monotonic() < until
                time.sleep(0.01)
            both = demo_kernel.memory_of([os.getpid(), pid])
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    assert size <= both.shared - before.shared < size + (1 << 20)
    assert both.total == both.private + both.shared + both.file + both.huge + both.swapped


HUGE = """\
7f0000000000-7f0000400000 rw-s 00000000 00:10 77 /memfd:huge (deleted)
Size:               4096 kB
KernelPageSize:     2048 kB
Shared_Hugetlb:     {shared} kB
Private_Hugetlb:    {private} kB
VmFlags: rd wr sh ht
"""


def test_huge_pages_count_once() -> None:
    driver = parse_smaps(HUGE.format(shared=4096, private=0))
    client = parse_smaps(HUGE.format(shared=2048, private=0))
    other = parse_smaps(HUGE.format(shared=0, private=2048).replace(" 77 ", " 78 "))
    assert demo_kernel.sum_huge([driver, client]) == 4096 << 10
    assert demo_kernel.sum_huge([driver, client, other]) == 6144 << 10


def test_holders_are_found_by_mapping_and_by_descriptor() -> None:
    fd = os.memfd_create("held")
    status = os.fstat(fd)
    identity = (os.major(status.st_dev), os.minor(status.st_dev), status.st_ino)
    os.ftruncate(fd, md.page_size)
    assert demo_kernel.holders(identity) == [os.getpid()]
    with mmap.mmap(fd, md.page_size, prot=mmap.PROT_READ):
        os.close(fd)
        held = demo_kernel.holders(identity)
    assert held == [os.getpid()]
    assert demo_kernel.holders(identity) == []


def test_large_files_are_found_within_the_limit() -> None:
    most = 64 << 20
    found = demo_files.find_files(most)
    assert found
    assert sum(path.stat().st_size for path in found) <= most or len(found) == 1
    assert demo_files.check_files(found) == found


def test_an_abandoned_name_is_found() -> None:
    if not os.access(demo_kernel.SHM, os.W_OK):
        pytest.skip("there is no /dev/shm to write to")
    before = demo_kernel.shm_names()
    path = demo_kernel.SHM / f"md-test-{os.getpid()}"
    path.touch()
    try:
        assert path.name in demo_kernel.abandoned_names(before, settle=0)
    finally:
        path.unlink()
