"""The lock-free algorithms of the core: in every interleaving, and under the thread sanitizer.

The headers themselves, compiled as C: `explore_*.c` runs short programs in every order (and needs
no luck), `threads_*.c` runs long ones on real threads. With MEMDESC_LOCKFREE=long (`make
interleave`, `make sanitize`) the programs are longer.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CORE = HERE.parent.parent / "src" / "memdesc" / "_core"
LONG = os.environ.get("MEMDESC_LOCKFREE") == "long"
THREADS = "-fsanitize=thread"
NAMES = ["ring", "offers"]
RACE = 66
"""What the thread sanitizer exits with."""

pytestmark = pytest.mark.slow


def compiled(folder: Path, source: str, *options: str) -> Path:
    """Compile a program of this folder; a sanitizer that the compiler lacks is a skip."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    if not CORE.is_dir():
        pytest.skip("no sources of the core here")
    made = folder / "-".join([source, *options]).replace("=", "-")
    flags = ["-std=gnu11", "-O2", "-g", "-Wall", "-Wextra", "-Werror", f"-I{CORE}"]
    command = [compiler, *flags, *options, HERE / f"{source}.c", "-o", made, "-pthread"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    if run.returncode and any("sanitize" in option for option in options):
        tiny = subprocess.run(
            [compiler, *options, "-xc", "-", "-o", os.devnull],
            input="int main(void) { return 0; }",
            text=True,
            capture_output=True,
            check=False,
        )
        if tiny.returncode:
            pytest.skip(f"the compiler has no such sanitizer: {tiny.stderr.strip()[:200]}")
    assert run.returncode == 0, run.stderr
    return made


def ran(command: list[str | Path], limit: float) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=limit,
        check=False,
    )


# -- every interleaving ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def explorers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("explore")
    # No symbol is looked up on the small stacks of the programs.
    return {name: compiled(folder, f"explore_{name}", "-Wl,-z,now") for name in NAMES}


@pytest.mark.timeout(3600 if LONG else 120)
@pytest.mark.parametrize("name", NAMES)
def test_every_interleaving(
    explorers: dict[str, Path], name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    run = ran([explorers[name], *(["--long"] if LONG else [])], 3500 if LONG else 110)
    if LONG:
        with capfd.disabled():
            print(f"\n{run.stdout}", end="")
    assert run.returncode == 0, run.stdout
    lines = run.stdout.splitlines()
    assert len(lines) >= 4
    for line in lines:
        states = int(line.rpartition(": ")[2].split()[0])
        assert states > 1000, line


SLEEPS = "a lost waking: somebody sleeps for ever"


@pytest.mark.parametrize(
    ("name", "mutation", "outcome"),
    [
        ("ring", "md_ring_publish:fence", SLEEPS),
        ("ring", "md_want:fence", SLEEPS),
        ("ring", "md_wake:add", SLEEPS),
        ("ring", "md_wake:send", SLEEPS),
        ("ring", "md_futex:wake", SLEEPS),
        ("ring", "md_futex:wait", SLEEPS),
        ("ring", "md_ring_publish:release", "entry"),
        ("offers", "md_pool_publish:fence", SLEEPS),
        ("offers", "md_want:fence", SLEEPS),
        ("offers", "md_wake:add", SLEEPS),
        ("offers", "md_wake:send", SLEEPS),
        ("offers", "md_futex:wake", SLEEPS),
        ("offers", "md_futex:wait", SLEEPS),
        ("offers", "sleep_for:once", SLEEPS),  # waits for one after those that it has not counted
        ("offers", "md_line_put:release", "md_taker_take gave"),
        ("offers", "md_line_revoke:exchange", "the end does not add up"),
        ("offers", "md_taker_take:exchange", "the end does not add up"),
    ],
)
def test_what_they_can_not_do_without(
    explorers: dict[str, Path], name: str, mutation: str, outcome: str
) -> None:
    """Each fence and step that is left out is found: the exploration can fail."""
    run = ran([explorers[name], "--mutate", mutation], 110)
    assert run.returncode == 1, run.stdout
    assert outcome in run.stdout
    assert run.stdout.rstrip().endswith("FAILED")


# -- the thread sanitizer ----------------------------------------------------------------------


def sanitized(program: Path, seconds: float, seed: int) -> subprocess.CompletedProcess[str]:
    # Older sanitizers know fewer of the places where memory may lie at random.
    setarch = shutil.which("setarch")
    fixed = [setarch, "-R"] if setarch and not ran([setarch, "-R", "true"], 20).returncode else []
    run = ran([*fixed, program, str(seconds), str(seed)], seconds + 100)
    if "unexpected memory mapping" in run.stdout:
        pytest.skip("the thread sanitizer does not know this layout of the address space")
    return run


@pytest.mark.timeout(1000)
@pytest.mark.parametrize("name", NAMES)
def test_under_the_thread_sanitizer(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    program = compiled(tmp_path, f"threads_{name}", THREADS)
    seed = time.time_ns() if LONG else 1
    run = sanitized(program, 300 if LONG else 1, seed)
    if LONG:
        with capfd.disabled():
            print(f"\n{name}, seed {seed}: {run.stdout}", end="")
    assert run.returncode == 0, f"seed {seed}\n{run.stdout}"


@pytest.mark.parametrize("name", NAMES)
def test_the_thread_sanitizer_sees_what_is_not_released(name: str, tmp_path: Path) -> None:
    program = compiled(tmp_path, f"threads_{name}", THREADS, "-DWEAK")
    run = sanitized(program, 0.1, 1)
    assert run.returncode == RACE, run.stdout
    assert "data race" in run.stdout
