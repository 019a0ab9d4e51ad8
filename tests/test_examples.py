"""Every example runs, and prints what its folder says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from listing2_program import Program, compiled, running

from memdesc import page_size

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
