"""Every example runs, and prints what its folder says."""

from __future__ import annotations

import fcntl
import os
import socket
import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest
from listing2_program import Program, compiled, compiler, running

from memdesc import _core, page_size
from memdesc.portable import Portable
from memdesc.services import protocol

EXAMPLES = Path(__file__).parent.parent / "examples"


def expected(example: str, variant: str = "") -> str:
    return (EXAMPLES / example / f"expected{variant}.txt").read_text()


def start(example: str, script: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, script, *arguments],
        cwd=EXAMPLES / example,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    """Its output; fails if it failed, or after a minute."""
    try:
        output, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, errors
    return output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("example", "driver"),
    [
        ("listing1", "driver.py"),
        ("listing1", "driver_iokit.py"),
        ("both_write", "driver.py"),
        ("by_value", "driver.py"),
        ("key_value_cache", "driver.py"),
        ("asyncio_service", "driver.py"),
    ],
)
def test_driver_and_client(example: str, driver: str) -> None:
    with start(example, driver) as one, start(example, "client.py") as other:
        client = finish(other)
        assert client + finish(one) == expected(example, driver[len("driver") : -len(".py")])


@pytest.mark.slow
def test_frames_through_multiprocessing() -> None:
    with start("multiprocessing_args", "frames.py") as process:
        assert finish(process) == expected("multiprocessing_args")


@pytest.mark.slow
def test_copyin_and_copyout() -> None:
    with start("copyin_copyout", "driver.py") as process:
        output, errors = process.communicate(timeout=60)
    if "NotPrivilegedError" in errors or "this kernel lets no one" in errors:
        pytest.skip(errors.strip())
    assert (process.returncode, output) == (0, expected("copyin_copyout")), errors


@pytest.mark.slow
def test_listing_2() -> None:
    with compiled() as file, running(file) as program:
        address = hex(program.buffer)
        with start("listing2", "map_it.py", str(program.process.pid), address) as process:
            lines = finish(process).splitlines()
        if may_open_objects_of(program):
            assert lines == ["mapped 54321 bytes, which say: written by C"]
        else:
            assert lines[0] == "not mapped: NOT_PRIVILEGED"
            if lines[1:] == ["not copied: NotPrivilegedError"]:
                pytest.skip("this kernel lets no task copy from its sibling")
            assert lines[1:] == ["copied in: written by C"]
        assert program.says() == "changed from Python"


@pytest.mark.slow
def test_a_camera_and_three_viewers(tmp_path: Path) -> None:
    strip = tmp_path / "strip.png"
    viewers = [["track"], ["record", str(strip)], ["glance"]]
    with start("camera", "camera.py") as camera, ExitStack() as stack:
        looking = [
            stack.enter_context(start("camera", "viewer.py", *arguments)) for arguments in viewers
        ]
        said = "".join(finish(one) for one in looking)
        assert said + finish(camera) == expected("camera")
    assert strip.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_client_in_c(tmp_path: Path) -> None:
    client = compiled_client(tmp_path)
    with start("c_client", "driver.py") as driver:
        said = run_client(client, "c-client", "frame", "parts")
        assert said + finish(driver) == expected("c_client")


def compiled_client(folder: Path) -> Path:
    source = EXAMPLES / "c_client" / "c_client.c"
    options = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([compiler(), *options, "-o", folder / "c_client", source], check=True)
    return folder / "c_client"


def run_client(client: Path, *arguments: str, status: int = 0) -> str:
    run = subprocess.run(
        [client, *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    assert run.returncode == status, run.stderr
    return run.stdout if status == 0 else run.stderr


@pytest.mark.slow
def test_a_client_in_c_is_wary_of_its_service(tmp_path: Path, runtime_dir: Path) -> None:
    """Of what it must not map, and of answers that make no sense."""
    client = compiled_client(tmp_path)
    answers = {
        "no seals": "could be truncated",
        "not enforced": "can be written by others",
        "too short": "not within what came",
        "no such object": "not within what came",
        "another length": "makes no sense",
        "deep": "makes no sense",
        "cut off": "not within what came",
        "refused": "no such thing",
        "nothing": "ended the connection",
        "not admitted": "not admitted: go away",
    }
    for what, says in answers.items():
        thread = threading.Thread(target=answer_badly, args=(runtime_dir / "bad", what))
        thread.start()
        assert says in run_client(client, "bad", "it", status=1), what
        thread.join(30)
        assert not thread.is_alive()


def answer_badly(path: Path, what: str) -> None:
    """Be a service for one client, that asks for a share."""
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening:
        listening.bind(str(path))
        listening.listen()
        listening.settimeout(30)
        sock = listening.accept()[0]
    path.unlink()
    with sock:
        sock.settimeout(30)
        assert protocol.read(sock.recv(4096)) == protocol.Hello(protocol.VERSION)
        if what == "not admitted":
            sock.send(protocol.encode(protocol.Failed(0, "AccessDeniedError", "go away")))
            return
        sock.send(protocol.encode(protocol.Welcome(protocol.VERSION, "bad")))
        sock.send(protocol.encode(protocol.PullMapping(77, 5)))  # what it must refuse
        asked = protocol.read(sock.recv(4096))
        if what != "nothing":
            data, fds = bad_answer(what, asked.id)
            socket.send_fds(sock, [data], fds)
            for fd in fds:
                os.close(fd)
        refused = sock.recv(4096)
        assert not refused or protocol.read(refused).id == 77


def bad_answer(what: str, number: int) -> tuple[bytes, list[int]]:
    if what == "refused":
        return protocol.encode(protocol.Failed(number, "MemdescError", "no such thing")), []
    fd = os.memfd_create("bad", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, page_size)
    seals = 0 if what == "no seals" else fcntl.F_SEAL_SHRINK
    if what != "not enforced":
        seals |= _core.F_SEAL_FUTURE_WRITE if seals else 0
    if seals:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    length = page_size + 1 if what == "too short" else page_size
    piece = (1 if what == "no such object" else 0, 0, length)
    nbytes = 5 if what == "another length" else length
    answer = protocol.Opened(
        number, protocol.Share("it", nbytes, False), Portable(1, "it", 3, False, (piece,))
    )
    data = protocol.encode(answer)
    if what == "cut off":
        data = data[:-5]
    elif what == "deep":
        before, key, share = data.partition(b"\xa5share")
        assert key
        data = before + b"\xa5shar_" + b"\x91" * 60_000 + share
    return data, [fd]


def test_the_client_in_c_speaks_the_version_that_the_page_tells() -> None:
    source = (EXAMPLES / "c_client" / "c_client.c").read_text()
    assert f"#define VERSION {protocol.VERSION}\n" in source
    assert f"#define MAX_MESSAGE {protocol.MAX_MESSAGE}\n" in source


def may_open_objects_of(program: Program) -> bool:
    """Whether this process may, found by trying."""
    maps = Path(f"/proc/{program.process.pid}/maps").read_text().splitlines()
    (bounds,) = [
        line.split()[0] for line in maps if int(line.partition("-")[0], 16) == program.buffer
    ]
    try:
        os.close(os.open(f"/proc/{program.process.pid}/map_files/{bounds}", os.O_RDWR))
    except PermissionError:
        return False
    return True


def test_listing_2_refuses_what_is_no_single_object() -> None:
    with compiled() as file, running(file) as program:
        for address, length, reason in [
            (program.malloced, 54321, "PRIVATE_MEMORY"),
            (program.two_objects, 2 * page_size, "SEVERAL_OBJECTS"),
        ]:
            arguments = [str(program.process.pid), hex(address), str(length)]
            with start("listing2", "map_it.py", *arguments) as process:
                output, errors = process.communicate(timeout=60)
            assert process.returncode == 1
            assert output == f"not mapped: {reason}\n", errors


def test_each_example_tells_what_it_is() -> None:
    folders = [path for path in EXAMPLES.iterdir() if path.is_dir()]
    assert len(folders) >= 5
    for folder in folders:
        text = (folder / "README.md").read_text()
        assert text.startswith("# ")
        assert "privilege" in text or "takes the right" in text
        assert (folder / "expected.txt").exists() or folder.name == "listing2"
