"""What all commands have in common: readers that go, errors in one line, completion."""

from __future__ import annotations

import os
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
