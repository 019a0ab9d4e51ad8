"""What docs/containers.md says of engines, on namespaces and a filter like theirs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_page_programs import programs

OWN = ["unshare", "--mount", "--ipc", "--uts", "--net"]
OWN_PIDS = ["--pid", "--fork", "--kill-child", "--mount-proc"]
SMALL_SHM = ["sh", "-c", 'mount -t tmpfs -o size=64k tmpfs /dev/shm && exec "$@"', "sh"]

# Denies what the default filters deny and memdesc uses, by EPERM, as they do; then tries.
FILTERED = """
import ctypes, json, mmap, struct, subprocess, sys, tempfile
import memdesc as md

DENIED = [425, 426, 427, 438]                # io_uring_setup, _enter, _register; pidfd_getfd
code = struct.pack("HBBI", 0x20, 0, 0, 0)    # load the number of the call
for number in DENIED:
    code += struct.pack("HBBI", 0x15, 0, 1, number) + struct.pack("HBBI", 6, 0, 0, 0x50001)
code += struct.pack("HBBI", 6, 0, 0, 0x7FFF0000)

class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_char_p)]

prctl = ctypes.CDLL(None, use_errno=True).prctl
if prctl(38, 1, 0, 0, 0) or prctl(22, 2, ctypes.byref(Program(len(code) // 8, code)), 0, 0):
    sys.exit(f"not allowed: no filter, errno {ctypes.get_errno()}")

told = {}
buffer = md.BufferMemoryDescriptor(1 << 20)
with tempfile.NamedTemporaryFile() as file:
    file.write(bytes(1 << 20))
    file.flush()
    with md.dma.DirectFile(file.name) as disk:
        transferred = disk.read_into(buffer, file_offset=0)
        told["way"] = transferred.way.name
        told["why"] = any("io_uring_setup answered EPERM" in one for one in transferred.reasons)
try:
    with md.dma.DMACommand(buffer):
        told["pinned"] = "yes"
except md.MemdescError as error:
    told["pinned"] = type(error).__name__
stranger = subprocess.Popen(
    [sys.executable, "stranger.py"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
)
address, pid = int(stranger.stdout.readline()), stranger.pid
theirs = md.MemoryDescriptor.with_address_range(address, 5, md.Direction.OUT, task=md.Task(pid))
try:
    told["mapped"] = bytes(theirs.map()).decode()
except md.MappingError as error:
    told["mapped"] = error.reason.name
told["copied"] = md.copyin(md.Task(pid), address, 5).decode()
stranger.communicate("")
print(json.dumps(told))
"""


def environment(runtime: Path) -> dict[str, str]:
    path = os.pathsep.join(one for one in sys.path if one)
    return dict(os.environ, PYTHONPATH=path, MEMDESC_RUNTIME_DIR=str(runtime))


def skip_unless_allowed(command: list[str]) -> None:
    tried = subprocess.run([*command, "true"], capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"no namespaces of its own: {tried.stderr.strip()}")


def together(first: list[str], second: list[str], folder: Path) -> list[tuple[int, str, str]]:
    """Run the page's two programs at once: the exit status and output of each."""
    names = ("serving.py", "reading.py")
    for name in names:
        (folder / name).write_text(programs("containers")[name])
    started = [
        subprocess.Popen(
            [*prefix, sys.executable, name],
            cwd=folder,
            env=environment(folder / "memdesc"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for prefix, name in zip((first, second), names, strict=True)
    ]
    try:
        outputs = [started[1].communicate(timeout=60)]
        if started[1].returncode:
            started[0].kill()  # nobody else will come
        outputs.insert(0, started[0].communicate(timeout=60))
    finally:
        for one in started:
            one.kill()
            one.wait()
    return [(one.returncode, *output) for one, output in zip(started, outputs, strict=True)]


@pytest.mark.slow
def test_a_folder_and_pids_in_common_are_enough(tmp_path: Path) -> None:
    apart = [*OWN, *SMALL_SHM]
    skip_unless_allowed(apart)
    (_, _, errors), answer = together(apart, apart, tmp_path)
    assert (errors, answer) == ("", (0, "3145728\n", ""))


@pytest.mark.slow
@pytest.mark.leaves("socket", reason="the service is killed")
def test_without_pids_in_common_it_says_so(tmp_path: Path) -> None:
    apart = [*OWN, *OWN_PIDS, *SMALL_SHM]
    skip_unless_allowed(apart)
    _, (status, _, errors) = together(apart, apart, tmp_path)
    assert status == 1
    assert "NotPrivilegedError" in errors
    assert "pid namespace" in errors


def test_the_root_of_a_volume_is_refused(runtime_dir: Path) -> None:
    volume = runtime_dir / "volume"  # short: a socket's path has 107 bytes
    volume.mkdir(mode=0o755)
    code = """
import memdesc as md
try:
    md.Service("table").close()
except md.AccessDeniedError as error:
    print(error.errno)
"""
    for folder, said in [(volume, "13\n"), (volume / "memdesc", "")]:
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=environment(folder),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, said, "")
    shutil.rmtree(volume)


@pytest.mark.slow
def test_what_a_default_filter_denies(tmp_path: Path) -> None:
    (tmp_path / "stranger.py").write_text(programs("unprivileged")["stranger.py"])
    done = subprocess.run(
        [sys.executable, "-c", FILTERED],
        cwd=tmp_path,
        env=dict(environment(tmp_path / "memdesc"), TMPDIR=str(tmp_path)),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if done.stderr.startswith("not allowed: "):
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["way"] in ("PREAD_DIRECT", "PREAD_BUFFERED")  # a tmpfs may know no O_DIRECT
    assert told["why"]
    assert told["pinned"] in ("WiringError", "NotPrivilegedError")
    assert told["mapped"] in ("NOT_PRIVILEGED", "hello")  # that takes map_files
    assert told["copied"] == "hello"
