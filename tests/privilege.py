"""Runs Python under each class of privilege that docs/privileges.md tells of.

Started as root, a test can become each of them; otherwise only the class it was started in.
"""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path

import msgspec
import pytest
from runs import CONTAINER, MEMLOCK, USER, interpreters, version_of, why_not

import memdesc
from memdesc._core import _native

# linux/capability.h: CAP_IPC_LOCK, CAP_SYS_PTRACE, CAP_SYS_ADMIN, CAP_CHECKPOINT_RESTORE.
_FOUR = sum(1 << bit for bit in (14, 19, 21, 40))
_DAC_OVERRIDE = 1 << 1


class Privilege(Enum):
    """A class of privilege; the value is its column in the table."""

    ROOT = "root"
    USER = "ordinary user"
    CONTAINER = "root in a container"


def own_privilege() -> Privilege | None:
    """Tell the class of this process by its capabilities; None where it is none of the three."""
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("CapEff:"))
    held = int(line.split()[1], 16)
    if held & _FOUR == _FOUR:
        return Privilege.ROOT
    if held & _FOUR:
        return None
    return Privilege.CONTAINER if held & _DAC_OVERRIDE else Privilege.USER


def run_as(
    privilege: Privilege, code: str, *arguments: str, timeout: float = 60
) -> subprocess.CompletedProcess[str]:
    """Run Python code that may import memdesc and msgspec (not NumPy) under a class, or skip.

    The two lesser classes have at most 8 MiB of RLIMIT_MEMLOCK when started from root.
    """
    own = own_privilege()
    if own is privilege:
        return _run([sys.executable], code, arguments, dict(os.environ), timeout)
    if own is not Privilege.ROOT:
        pytest.skip(f"started as {own.value if own else 'a mixture'}: can not be {privilege.value}")
    prefix = USER if privilege is Privilege.USER else CONTAINER
    if denied := why_not(prefix):
        pytest.skip(f"can not be {privilege.value}: {denied}")
    _, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    limit = MEMLOCK if hard == resource.RLIM_INFINITY else min(MEMLOCK, hard)
    limited = ["prlimit", f"--memlock={limit}:{limit}", *prefix]
    with _readable_package() as folder:
        environment = {"PATH": os.defpath, "PYTHONPATH": str(folder)}
        return _run([*limited, _python_for(prefix)], code, arguments, environment, timeout)


def _run(
    command: list[str],
    code: str,
    arguments: tuple[str, ...],
    environment: dict[str, str],
    timeout: float,
) -> subprocess.CompletedProcess[str]:
    whole = [*command, "-B", "-c", code, *arguments]
    return subprocess.run(
        whole,
        env=environment,
        cwd="/",
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def _python_for(prefix: list[str]) -> str:
    """Give an interpreter that may be run that way: a virtual environment may lie in a home.

    One of this version, as msgspec's compiled part goes with no other.
    """
    own = "{}.{}".format(*sys.version_info)
    for path in [Path(sys.executable), *interpreters()]:
        if version_of(path, prefix) == own:
            return str(path)
    pytest.skip(f"no CPython {own} here that another user may run")


@contextmanager
def _readable_package() -> Iterator[Path]:
    """Give a folder that everyone may read, with copies of the package and of msgspec."""
    with tempfile.TemporaryDirectory(prefix="memdesc-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        source = Path(memdesc.__file__).parent
        ignored = shutil.ignore_patterns("__pycache__", "*.pyx", "*.h")
        shutil.copytree(source, folder / "memdesc", ignore=ignored)
        shutil.copytree(Path(msgspec.__file__).parent, folder / "msgspec", ignore=ignored)
        core = Path(_native.__file__)
        shutil.copy(core, folder / "memdesc" / "_core" / core.name)
        for path in folder.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)
        yield folder
