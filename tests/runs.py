"""Runs the test suite elsewhere: as other users, and on other interpreters.

    runs.py user       as an ordinary user (uid 65534, 8 MiB of RLIMIT_MEMLOCK), on the wheel
    runs.py container  as root without SYS_ADMIN, SYS_PTRACE, IPC_LOCK and CHECKPOINT_RESTORE
    runs.py wheel      the wheel, on every CPython >= 3.11 that is found (--short: oldest, newest)
    runs.py sanitized  what writes memory in the core, compiled with the address sanitizer
    runs.py fuzz       tests/fuzz/fuzz.py, on such a core (--seconds: how long)
    runs.py gpu        what needs a GPU: its tests, and its benchmarks, whose results are kept

`--short` leaves out what is slow. What this machine does not allow is said, and is no failure; but
without a GPU `gpu` fails.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOBODY = 65534
MEMLOCK = 8 << 20

# `env` starts the program once the capabilities are gone: setpriv itself still has them, and
# could start an interpreter that the user can not read.
USER = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "env"]
CONTAINER = [
    "setpriv",
    "--bounding-set=-sys_admin,-sys_ptrace,-ipc_lock,-checkpoint_restore",
    "--inh-caps=-all",
]
SUITABLE = """
import platform, sys, sysconfig
print("{}.{}".format(*sys.version_info)) if (
    sys.version_info >= (3, 11)
    and platform.python_implementation() == "CPython"
    and not sysconfig.get_config_var("Py_GIL_DISABLED")
) else sys.exit(1)
"""
GPU = """
import importlib.metadata, platform, shutil, subprocess, sys
def said(*words): print("  ", *words, flush=True)
said("Python", platform.python_version(), "on Linux", platform.release())
if shutil.which("nvidia-smi"):
    subprocess.run(["nvidia-smi", "--query-gpu=name,driver_version,memory.total,"
        "pcie.link.gen.max,pcie.link.width.max", "--format=csv,noheader"], timeout=60)
else:
    said("nvidia-smi is not there")
for name in ("numpy", "cuda-bindings", "torch"):
    try:
        said(name, importlib.metadata.version(name))
    except ImportError:
        said(name, "is not installed")
try:
    import torch
    said("torch is built for CUDA", torch.version.cuda, "and finds", torch.cuda.device_count(),
        "GPUs")
except ImportError as error:
    said("torch can not be imported:", error, "(what needs it is left out)")
import memdesc
from memdesc.dma.cuda import Attribute, CudaDevice
try:
    device = CudaDevice(0)
except memdesc.MemdescError as error:
    sys.exit(f"no GPU: {error}")
from cuda.bindings import runtime
said("the driver is of CUDA", runtime.cudaDriverGetVersion()[1], "the runtime",
    runtime.cudaRuntimeGetVersion()[1])
said(device.name, {item.name: device.attribute(item) for item in Attribute})
"""
NOT_COPIED = shutil.ignore_patterns(
    ".git", ".venv*", "build", "dist", "_build", "__pycache__", ".*_cache", ".hypothesis"
)


def main() -> int:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("where", choices=["user", "container", "wheel", "sanitized", "fuzz", "gpu"])
    parser.add_argument("--short", action="store_true", help="without what is slow")
    parser.add_argument("--seconds", type=float, default=60.0, help="of fuzzing")
    arguments = parser.parse_args()
    if arguments.where == "fuzz":
        return run_fuzz(arguments.seconds)
    if arguments.where == "gpu":
        return run_gpu(arguments.short)
    run = {
        "user": run_as_user,
        "container": run_as_container,
        "wheel": run_wheel,
        "sanitized": run_sanitized,
    }
    return run[arguments.where](arguments.short)


def run_as_user(short: bool) -> int:
    """Run as an ordinary user, from a copy that he may read, with an interpreter that he may."""
    print("== tests as an ordinary user", flush=True)
    if denied := why_not(USER):
        return skip(denied)
    with tempfile.TemporaryDirectory(prefix="memdesc-") as folder:
        work = Path(folder)
        found = [path for path in interpreters() if version_of(path, USER)]
        if not found:
            return skip("no CPython >= 3.11 here that another user may run")
        python = install_wheel(found[0], work / "venv")
        checkout = work / "checkout"
        shutil.copytree(ROOT, checkout, ignore=NOT_COPIED, symlinks=True)
        for path in [checkout, *checkout.rglob("*")]:
            os.chown(path, NOBODY, NOBODY, follow_symlinks=False)
        print(f"   on {found[0]}", flush=True)
        return run_suite(USER, python, checkout, own_home(work, NOBODY), short)


def run_as_container(short: bool) -> int:
    """Run as root with the capabilities that a container leaves, in this checkout."""
    print("== tests as a container's root", flush=True)
    if os.geteuid() != 0:
        return skip("not started as root")
    if denied := why_not(CONTAINER):
        return skip(denied)
    with tempfile.TemporaryDirectory(prefix="memdesc-") as folder:
        home = own_home(Path(folder), 0)
        return run_suite(CONTAINER, Path(sys.executable), ROOT, home, short)


def run_wheel(short: bool) -> int:
    """Run the installed wheel on one interpreter of each version found; the short way, on two."""
    found = one_of_each_version()
    ends = {found[0], found[-1]} if short and found else set(found)
    for version, path in found:
        if (version, path) not in ends:
            print(f"== tests of the wheel on CPython {version}: left out, as between others")
            continue
        print(f"== tests of the wheel on CPython {version}", flush=True)
        python = install_wheel(path, ROOT / "build" / f"wheel-{version}")
        status = run_suite([], python, ROOT, dict(os.environ), short)
        if status:
            return status
    return 0


def run_sanitized(short: bool) -> int:
    """Run the tests of queues, streams and hostile peers on a core with the address sanitizer."""
    print("== tests with the address sanitizer", flush=True)
    python = sanitized_python()
    if python is None:
        return skip("Atheris, which brings the address sanitizer, is not to be had here")
    environment = {**os.environ, "MEMDESC_SCRIBBLE": "5" if short else "30"}
    tests = ["tests/queues", "tests/services", "tests/security/test_hostile_messages.py"]
    command = [python, "-P", "-m", "pytest", "--quiet", "-m", "not alone", *tests]
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


def run_fuzz(seconds: float) -> int:
    """Fuzz, on a core with the address sanitizer where that is to be had."""
    print("== fuzzing", flush=True)
    python = sanitized_python() or Path(sys.executable)
    command = [sys.executable, "tests/fuzz/fuzz.py", f"--seconds={seconds}", "--python", python]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


def run_gpu(short: bool) -> int:
    """Run what needs a GPU with this interpreter, within ten minutes; each part whatever others do.

    Needs the package, pytest, pytest-timeout and hypothesis in it, for all of it torch; no network.
    """
    print("== the GPU", flush=True)
    if subprocess.run([sys.executable, "-P", "-c", GPU], cwd=ROOT, check=False).returncode:
        return 1
    pytest = ["-P", "-m", "pytest", "--quiet", "--timeout=60", "tests/cuda", "tests/pytorch"]
    keep = ["--short"] if short else ["--save"]
    parts = {
        "tests/cuda and tests/pytorch": (pytest, 220),
        "benchmarks/gpu.py": (["benchmarks/gpu.py", *keep], 160),
        "benchmarks/dataloader.py": (["benchmarks/dataloader.py", *keep], 150),
    }
    ended: dict[str, str] = {}
    for name, (arguments, seconds) in parts.items():
        print(f"== {name}", flush=True)
        try:
            command = [sys.executable, *arguments]
            status = subprocess.run(command, cwd=ROOT, timeout=seconds, check=False).returncode
        except subprocess.TimeoutExpired:
            ended[name] = f"was stopped after {seconds} s"
        else:
            ended[name] = "passed" if status == 0 else f"failed ({status})"
    print("== on the GPU", flush=True)
    for name, how in ended.items():
        print(f"   {name}: {how}", flush=True)
    return 0 if set(ended.values()) == {"passed"} else 1


def sanitized_python() -> Path | None:
    """Make an interpreter whose memdesc has a core that tells of every access outside.

    None where Atheris is not to be had: its sanitizer comes with libFuzzer, and needs to be one.
    """
    folder = ROOT / "build" / "sanitized"
    shutil.rmtree(folder / "dist", ignore_errors=True)
    defines = {
        "CMAKE_C_FLAGS": "-fsanitize=address -g",
        "CMAKE_MODULE_LINKER_FLAGS": "-fno-sanitize=address",  # not the compiler's own
    }
    options = [f"--config-settings=cmake.define.{name}={value}" for name, value in defines.items()]
    options.append(f"--config-settings=build-dir={folder / 'build'}")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "-qq"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(
        [*pip, "--no-deps", "--no-build-isolation", *options, "-w", folder / "dist", ROOT],
        env={**os.environ, "PATH": path},
        check=True,
    )
    real = install_wheel(Path(sys.executable), folder / "venv", folder / "dist", "[cli,test,fuzz]")
    libraries = list((folder / "venv").glob("lib/python*/site-packages/asan_with_fuzzer.so"))
    if not libraries:
        return None
    # The interpreter is not compiled so: the library has to come first. CPython leaks by design.
    settings = f"LD_PRELOAD={libraries[0]} ASAN_OPTIONS=detect_leaks=0 PYTHONMALLOC=malloc"
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nexec env {settings} "{real}" "$@"\n')
    python.chmod(0o755)
    return python


def one_of_each_version() -> list[tuple[str, Path]]:
    """List (version, interpreter), the oldest version first."""
    found: dict[str, Path] = {}
    for path in interpreters():
        if version := version_of(path):
            found.setdefault(version, path)
    return sorted(found.items(), key=lambda item: tuple(map(int, item[0].split("."))))


def run_suite(
    prefix: list[str], python: Path, checkout: Path, environment: dict[str, str], short: bool
) -> int:
    """Run pytest, what must be alone after the rest; give the first status that is not 0."""
    if prefix:
        _, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        limit = MEMLOCK if hard == resource.RLIM_INFINITY else min(MEMLOCK, hard)
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (limit, limit))
    selections = [["-n", "2", "-m", "not alone"], ["-m", "alone"]]
    if short:
        selections = [["-n", "2", "-m", "not slow and not alone"]]
    for selection in selections:
        command = [*prefix, str(python), "-P", "-m", "pytest", "--quiet", *selection]
        status = subprocess.run(command, cwd=checkout, env=environment, check=False).returncode
        if status:
            return status
    return 0


def why_not(prefix: list[str]) -> str:
    """Say why a command can not be run that way, or nothing where it can."""
    try:
        tried = subprocess.run([*prefix, "true"], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return f"{prefix[0]} is not installed"
    return tried.stderr.strip() if tried.returncode else ""


def skip(reason: str) -> int:
    """Say that this machine does not allow it."""
    print(f"   skipped: {reason}", flush=True)
    return 0


def interpreters() -> list[Path]:
    """List the places where interpreters are found: this one's, on PATH, and pyenv's."""
    names = ["python3", *(f"python3.{minor}" for minor in range(11, 30))]
    folders = [*os.get_exec_path(), "/usr/local/bin", "/usr/bin"]
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    found = [
        Path(getattr(sys, "_base_executable", sys.executable)),
        *(Path(folder) / name for folder in folders for name in names),
        *sorted(pyenv.glob("versions/*/bin/python3")),
    ]
    # Not those of virtual environments and pyenv's shims, which speak for another one.
    return [
        path.resolve()
        for path in dict.fromkeys(found)
        if path.exists() and "shims" not in path.parts and not _in_venv(path)
    ]


def _in_venv(path: Path) -> bool:
    return (path.parent.parent / "pyvenv.cfg").exists()


def version_of(python: Path, prefix: list[str] | None = None) -> str:
    """Give "3.12" where the interpreter suits us and can be run that way, else nothing."""
    command = [*(prefix or []), str(python), "-c", SUITABLE]
    tried = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/")
    return tried.stdout.strip() if tried.returncode == 0 else ""


def install_wheel(
    python: Path, folder: Path, dist: Path = ROOT / "dist", extras: str = "[cli,test]"
) -> Path:
    """Make a virtual environment with the wheel and what its tests need; give its python."""
    (wheel,) = dist.glob("memdesc-*.whl")
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([python, "-m", "venv", "--without-pip", folder], check=True)
    pip = [sys.executable, "-m", "pip", "--python", folder, "--disable-pip-version-check"]
    options = ["-qq", "--constraint", ROOT / "constraints.txt"]
    subprocess.run([*pip, "install", *options, f"{wheel}{extras}"], check=True)
    return folder / "bin" / "python"


def own_home(folder: Path, owner: int) -> dict[str, str]:
    """Make a home of his own; give the environment that says so."""
    environment = dict(os.environ)
    # Tests have children of other users, who must reach what lies in TMPDIR, as in /tmp itself.
    folder.chmod(0o755)
    for variable, name, mode in [
        ("HOME", "home", 0o700),
        ("XDG_RUNTIME_DIR", "run", 0o700),
        ("TMPDIR", "tmp", 0o1777),
    ]:
        path = folder / name
        path.mkdir()
        path.chmod(mode)
        os.chown(path, owner, owner)
        environment[variable] = str(path)
    environment["MEMDESC_RUNTIME_DIR"] = environment["XDG_RUNTIME_DIR"]
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    return environment


if __name__ == "__main__":
    sys.exit(main())
