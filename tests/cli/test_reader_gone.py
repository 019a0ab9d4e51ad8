"""What all commands have in common: readers that go, errors in one line, completion."""

from __future__ import annotations

import errno
import os
import shlex
import signal
import subprocess

import pytest
from cli_runs import MEMDESC, environment, memdesc

import memdesc as md

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "words",
    [
        "doctor",
        "ls --json",
        "top --once --interval 0.1",
        "map PID --all",
        "--help",
        "--version",
        "ls -h",
    ],
)
def test_a_reader_that_goes_is_no_noise(words: str) -> None:
    with md.Service("camera"):
        command = [*MEMDESC, *words.replace("PID", str(os.getpid())).split()]
        reader, writer = os.pipe()
        with subprocess.Popen(
            command, env=environment(), stdout=writer, stderr=subprocess.PIPE
        ) as process:
            os.close(writer)
            os.close(reader)
            _, told = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGPIPE
    assert b"Traceback" not in told
    assert b"BrokenPipe" not in told
    assert b"Exception ignored" not in told


def test_a_reader_of_mistakes_that_goes_is_no_noise() -> None:
    for words in ("nothing", "ls --nothing", "map", "ls nowhere"):
        reader, writer = os.pipe()
        os.close(reader)
        done = subprocess.run(
            [*MEMDESC, *words.split()],
            env=environment(),
            stdout=writer,
            stderr=writer,
            timeout=60,
            check=False,
        )
        os.close(writer)
        assert done.returncode == 128 + signal.SIGPIPE, words


def test_what_can_not_be_written_is_told_in_a_line() -> None:
    for words in ("ls --json", "--version"):
        with open("/dev/full", "w") as full:
            done = subprocess.run(
                [*MEMDESC, *words.split()],
                env=environment(),
                stdout=full,
                stderr=subprocess.PIPE,
                text=True,
                timeout=60,
                check=False,
            )
        assert done.returncode == 1
        assert done.stderr == f"memdesc: standard output: {os.strerror(errno.ENOSPC)}\n"


def test_streams_that_are_closed_are_no_error() -> None:
    command = f"{shlex.join([*MEMDESC, 'ls'])} <&- >&- 2>&-"
    assert subprocess.run(["sh", "-c", command], env=environment(), timeout=60).returncode == 0


def complete(words: str, number: int) -> list[str]:
    """What bash is given for the last word."""
    done = memdesc(
        _MEMDESC_COMPLETE="bash_complete", COMP_WORDS=f"memdesc {words}", COMP_CWORD=str(number)
    )
    assert (done.returncode, done.stderr) == (0, "")
    return [line.removeprefix("plain,") for line in done.stdout.split()]


def test_completion() -> None:
    with md.Service("camera"), md.Service("cam\x1b[2Jera"), md.Service("other"):
        assert complete("ls ca", 2) == ["camera"]
        assert complete("ls ", 2) == ["camera", "other"]
        assert complete("ma", 1) == ["map"]
        assert str(os.getpid()) in complete(f"map {str(os.getpid())[0]}", 2)
        assert complete("map x", 2) == []
        assert "--interval" in complete("top --", 2)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_for_each_shell(shell: str) -> None:
    done = memdesc(_MEMDESC_COMPLETE=f"{shell}_source")
    assert done.returncode == 0
    assert "_MEMDESC_COMPLETE" in done.stdout
