"""Measures what an honest client of a service feels while others attack it.

    latency.py CORPUS [--seconds 5]

A service, an honest client that asks it something again and again, and attackers that act out the
inputs of a corpus as fast as they can, each a process of its own. Who shares the processors with
an attacker waits for those too; how long is told by the same attack on another service.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
PAUSE = 0.0005
"""Seconds between two of the honest client's questions."""
FEWEST = 12
"""Questions: on a machine that is busy enough a short time has room for none."""


@dataclass(frozen=True, slots=True)
class Figures:
    """Of round trips, in microseconds."""

    count: int
    median: float
    p90: float
    p99: float

    @classmethod
    def of(cls, seconds: list[float]) -> Figures:
        hundredths = [1e6 * cut for cut in statistics.quantiles(seconds, n=100)]
        return cls(len(seconds), hundredths[49], hundredths[89], hundredths[98])

    def __str__(self) -> str:
        return f"median {self.median:6.0f} us, 90% {self.p90:6.0f} us, 99% {self.p99:6.0f} us"


def round_trips(name: str, seconds: float) -> list[float]:
    """Ask a service for its shares, again and again, so long and a few times at least; give how
    long each answer took."""
    import memdesc as md

    took = []
    with md.connect(name, timeout=30) as connection:
        connection.shares()
        end = time.perf_counter() + seconds
        while (start := time.perf_counter()) < end or len(took) < FEWEST:
            connection.shares()
            took.append(time.perf_counter() - start)
            time.sleep(PAUSE)
    return took


def attack(path: Path, corpus: Path) -> None:
    """Act out every input, over and over, until killed, or alone."""
    from clients import run

    inputs = [file.read_bytes() for file in sorted(corpus.iterdir())]
    print("ready", flush=True)
    parent = os.getppid()
    while os.getppid() == parent:
        for data in inputs:
            with contextlib.suppress(OSError):  # where the service has had enough of us
                run(path, data)


@contextlib.contextmanager
def started(*arguments: str) -> Iterator[str]:
    """Run a script of this folder; give its first line. It ends with its standard input."""
    command = [sys.executable, *arguments]
    with subprocess.Popen(
        command, cwd=HERE, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.terminate() if "--attack" in arguments else process.communicate(timeout=30)


def measure(corpus: Path, seconds: float) -> dict[str, Figures]:
    """Measure round trips in turn: with nobody beside, while another service is attacked by as
    many processes as are attackers here, and while this one is."""
    mine, other = f"mine-{os.getpid()}", f"other-{os.getpid()}"
    took: dict[str, list[float]] = {"quiet": [], "beside": [], "attacked": []}
    with started("server.py", mine) as my_path, started("server.py", other) as other_path:
        paths = {"quiet": None, "beside": other_path, "attacked": my_path}
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for situation, path in paths.items():
                with contextlib.ExitStack() as stack:
                    if path is not None:
                        attacker = started("latency.py", "--attack", path, str(corpus.resolve()))
                        if stack.enter_context(attacker) != "ready":
                            raise RuntimeError("the attacker did not start")
                    took[situation] += round_trips(mine, min(seconds, 1.0))
    return {situation: Figures.of(times) for situation, times in took.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--attack", metavar="SOCKET", type=Path)
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("corpus", type=Path)
    arguments = parser.parse_args()
    if arguments.attack:
        attack(arguments.attack, arguments.corpus)
    for situation, figures in measure(arguments.corpus, arguments.seconds).items():
        print(f"{situation:9} {figures}")


if __name__ == "__main__":
    main()
