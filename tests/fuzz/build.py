"""Compiles the fuzzers of what lies in shared memory: with gcc, against libFuzzer.

libFuzzer comes with Atheris, as a static library: so neither clang nor anything but gcc is
needed. gcc has no counters of libFuzzer's own kind; it calls a function at each branch instead,
and `hostile.h` counts there.
"""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
from pathlib import Path

HERE = Path(__file__).parent
CORE = HERE.parent.parent / "src" / "memdesc" / "_core"
FLAGS = [
    *("-std=gnu11", "-O1", "-g", "-Wall", "-Wextra"),
    *("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    "-fsanitize-coverage=trace-pc,trace-cmp",
    "-Wl,--wrap=__sanitizer_cov_trace_pc",
]


class CanNotBuild(Exception):
    """What is missing here, in words."""


def libfuzzer() -> Path:
    """Find libFuzzer without a main function, in Atheris's distribution."""
    try:
        files = importlib.metadata.files("atheris") or []
    except importlib.metadata.PackageNotFoundError:
        raise CanNotBuild("Atheris is not installed") from None
    for file in files:
        if file.name == "libclang_rt.fuzzer_no_main.a":
            return Path(str(file.locate()))
    raise CanNotBuild("this Atheris brings no libFuzzer")


def build(name: str, folder: Path, core: Path = CORE) -> Path:
    """Compile the fuzzer `name` into a folder; the header that it tests lies in `core`."""
    compiler = shutil.which("gcc")
    if compiler is None:
        raise CanNotBuild("gcc is not installed")
    if not core.is_dir():
        raise CanNotBuild("no sources of the core here")
    folder.mkdir(parents=True, exist_ok=True)
    made = folder / name
    command = [
        *(compiler, *FLAGS, f"-I{core}", HERE / f"{name}.c", libfuzzer(), "-o", made),
        *("-l:libstdc++.so.6", "-lm", "-pthread"),
    ]
    run = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    if run.returncode:
        raise CanNotBuild(run.stderr)
    return made
