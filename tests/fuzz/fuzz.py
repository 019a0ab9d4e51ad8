"""Fuzzes what strangers can reach, guided by coverage, and says what others felt meanwhile.

    fuzz.py [--seconds 60] [--python PYTHON]

The fuzzers share the time: those of memory that a hostile peer writes (`fuzz_*.c`, with the
address sanitizer), and that of a service's socket (`fuzz_service.py`; with the address sanitizer
where the given interpreter's core was compiled for it, see tests/runs.py). Then a service is
attacked with what they found, while an honest client measures its round trips. Each starts from
`corpus/NAME`; what it finds is kept under build/fuzz. Fails where a fuzzer did, or, from ten
minutes on, where the honest client's median round trip more than doubled.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from latency import Figures, measure
from messages import seeds

from build import build

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
WORK = ROOT / "build" / "fuzz"
MEMORY = sorted(path.stem for path in HERE.glob("fuzz_*.c"))
"""The fuzzers of memory."""
PATIENCE = 30
"""Seconds that one input may take at most: else it hangs."""
TOO_SLOW = 2.0
LONG = 600


def options(seconds: float, artifacts: Path) -> list[str]:
    """Give libFuzzer's options."""
    return [
        f"-max_total_time={max(int(seconds), 1)}",
        f"-timeout={PATIENCE}",
        "-rss_limit_mb=4096",
        "-max_len=512",
        f"-artifact_prefix={artifacts}/",
        "-print_final_stats=1",
    ]


def corpora(name: str, work: Path) -> list[str]:
    """Where a fuzzer writes what it finds, and what it starts from."""
    folders = [work / name, HERE / "corpus" / name, work / f"{name}_seeds"]
    for folder in (folders[0], folders[2]):
        folder.mkdir(parents=True, exist_ok=True)
    if name == "fuzz_service":  # of each message that the protocol has by now
        for number, seed in enumerate(seeds()):
            (folders[2] / str(number)).write_bytes(seed)
    return [str(folder) for folder in folders if folder.is_dir()]


def fuzz(command: list[str], name: str, seconds: float, work: Path, env: dict[str, str]) -> str:
    """Run one fuzzer; give what it did in a line. A failure of it is CalledProcessError."""
    command = [*command, *corpora(name, work), *options(seconds, work)]
    run = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=seconds + 120,
        check=False,
        env=env,
    )
    if run.returncode:
        print(run.stdout[-6000:])
    run.check_returncode()
    return summary(name, run.stdout)


def summary(name: str, output: str) -> str:
    """Tell of inputs and features, as libFuzzer counts them."""
    runs = re.search(r"^Done (\d+) runs in (\d+) second", output, re.M)
    features = re.findall(r"\bft: (\d+) corp: (\d+)/", output)
    if runs is None or not features:
        raise AssertionError(f"{name} did not fuzz:\n{output[-3000:]}")
    first, last = features[0], features[-1]
    return (
        f"{name}: {int(runs[1]):,} inputs in {runs[2]} s, features {first[0]} -> {last[0]}, "
        f"{last[1]} inputs kept"
    )


def fuzz_memory(name: str, seconds: float, work: Path) -> str:
    """Fuzz one structure in shared memory."""
    return fuzz([str(build(name, work / "bin"))], name, seconds, work, dict(os.environ))


def fuzz_service(seconds: float, work: Path, python: str, env: dict[str, str]) -> str:
    """Fuzz a live service."""
    with tempfile.TemporaryDirectory(prefix="md-") as folder:
        env = {**env, "MEMDESC_RUNTIME_DIR": folder}
        return fuzz([python, str(HERE / "fuzz_service.py")], "fuzz_service", seconds, work, env)


def latency(seconds: float, work: Path) -> dict[str, Figures]:
    """Attack a service with what the fuzzer of services found."""
    with tempfile.TemporaryDirectory(prefix="md-") as folder:
        os.environ["MEMDESC_RUNTIME_DIR"] = folder
        return measure(work / "fuzz_service", seconds)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--python", default=sys.executable, help="with the sanitized core")
    arguments = parser.parse_args()
    share = arguments.seconds * 0.9 / (len(MEMORY) + 1)
    for name in MEMORY:
        print(fuzz_memory(name, share, WORK), flush=True)
    print(fuzz_service(share, WORK, arguments.python, dict(os.environ)), flush=True)
    felt = latency(max(arguments.seconds * 0.1, 6.0), WORK)
    for situation, figures in felt.items():
        print(f"round trips of others, {situation:9} {figures}")
    ratio = felt["attacked"].median / felt["beside"].median
    print(f"median under attack: {ratio:.2f} of that beside an attack on another service")
    return 1 if arguments.seconds >= LONG and ratio > TOO_SLOW else 0


if __name__ == "__main__":
    sys.exit(main())
