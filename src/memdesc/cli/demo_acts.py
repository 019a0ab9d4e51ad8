"""The five acts: what the documents of the model tell, on live processes.

What an act says is read of the kernel (page frames, maps, errno, VmLck, Shmem), from outside the
programs that play it wherever the kernel lets this process look. Where it does not, the act names
what was denied and what stood in.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import memdesc as md
from memdesc.cli import demo_kernel as kernel
from memdesc.cli.demo_processes import Program, Programs
from memdesc.errors import MappingReason
from memdesc.vm.physical import Proof, same_pages
from memdesc.vm.regions import region_at, task_status

CLIENTS = 3
_WIRE_LIMIT = 1 << 20
_STRANGER_LENGTH = 54321
_HELLO = b"stored by memdesc"

# What the C program does, for machines without a compiler. It knows as little of us.
_STAND_IN = f"""
import ctypes, mmap, sys
length = {_STRANGER_LENGTH}
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
big = mmap.mmap(-1, length)
small = libc.malloc(ctypes.c_size_t(length))
big[:23] = b"stored by the stranger" + bytes(1)
ctypes.memmove(small, b"private to the stranger", 24)
print(hex(ctypes.addressof(ctypes.c_char.from_buffer(big))), hex(small), flush=True)
for _ in sys.stdin:
    print(big[:60].partition(bytes(1))[0].decode(), flush=True)
"""


@dataclass(slots=True)
class Act:
    """One act, as it went.

    Attributes
    ----------
    title : str
    happened : list of str
        What happened, a sentence each.
    denied : list of str
        What the kernel denied this process, and what stood in.
    failed : list of str
        What did not hold; empty if all did.
    facts : dict
        The readings, for `--json`.
    """

    title: str
    happened: list[str] = field(default_factory=list)
    denied: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def check(self, held: object, claim: str) -> None:
        """Note a claim that did not hold."""
        if not held:
            self.failed.append(claim)

    def as_json(self) -> dict[str, Any]:
        """Give the act as it stands in the JSON object."""
        return {
            "title": self.title,
            "happened": self.happened,
            "denied": self.denied,
            "failed": self.failed,
            **self.facts,
        }


@dataclass(slots=True)
class Stage:
    """What the first, second and fifth act share: a driver, its clients and one buffer."""

    name: str
    driver: Program
    clients: list[Program]
    address: int
    length: int
    socket: Path
    shmem_before: int
    shm_names: set[str]


def mb(nbytes: int) -> str:
    """Give bytes in millions."""
    return f"{nbytes / 1e6:,.1f} MB"


def _enumerate(names: Sequence[object]) -> str:
    return ", ".join(str(name) for name in names)


def act_1(programs: Programs) -> tuple[Act, Stage]:
    """Listing 1: one buffer in several tasks."""
    act = Act("Listing 1: a driver's buffer, mapped by its clients")
    name = f"demo-{os.getpid()}"
    before, names = kernel.shmem(), kernel.shm_names()
    driver = programs.module("driver", "demo_client", "driver", name)
    made = driver.read_json()
    stage = Stage(
        name, driver, [], made["address"], made["length"], Path(made["socket"]), before, names
    )
    stage.clients += [
        programs.module(f"client {n + 1}", "demo_client", "client", name) for n in range(CLIENTS)
    ]
    mapped = [client.read_json() for client in stage.clients]
    proofs = _prove(act, stage, [there["address"] for there in mapped])
    driver.ask("store", offset=stage.length - 1, value=77)
    seen = [client.ask("load", offset=stage.length - 1)["value"] for client in stage.clients]
    act.check(seen == [77] * CLIENTS, "a store of the driver is seen by every client")
    pages = md.round_page(stage.length) // md.page_size
    act.happened.append(
        f"{mb(stage.length)} in driver {driver.pid} and clients "
        f"{_enumerate([client.pid for client in stage.clients])}: {proofs}; a store of the driver "
        f"is seen by {seen.count(77)} of {CLIENTS}."
    )
    act.facts |= {"pages": pages, "length": stage.length, "stores_seen": seen.count(77)}
    return act, stage


def _prove(act: Act, stage: Stage, addresses: list[int]) -> str:
    """Show that driver and clients have the same memory; give the words for it."""
    pages = md.round_page(stage.length) // md.page_size
    try:
        proofs = [
            same_pages(stage.driver.task, stage.address, client.task, address, stage.length)
            for client, address in zip(stage.clients, addresses, strict=True)
        ]
    except md.NotPrivilegedError as error:
        act.denied.append(f"{error}. The store seen on the other side stands in.")
        act.facts["proof"] = "store"
        return "no map may be read"
    act.check(all(proofs), f"the same memory in all tasks ({_enumerate([p.why for p in proofs])})")
    act.facts["proof"] = _weakest(proofs).proof
    act.facts["same_pages"] = all(proofs)
    if act.facts["proof"] == "frames":
        return f"{pages:,} pages, the same page frames in all {len(proofs) + 1} (pagemap)"
    act.denied.append(
        f"Page frames: {shorten(_weakest(proofs).denied)}. The same object and offset (maps), and "
        "a store seen on the other side, stand in."
    )
    return f"{pages:,} pages, the same offsets of the same object in all {len(proofs) + 1} (maps)"


def _weakest(proofs: Sequence[Proof]) -> Proof:
    """Give the proof that says least."""
    return min(proofs, key=lambda one: one.proof == "frames")


def shorten(denied: str) -> str:
    """Give the cause alone of a message: what was tried + numbers: cause; what to do."""
    return denied.partition(": ")[2].partition(";")[0] or denied


def act_2(stage: Stage) -> Act:
    """A client tries to write to what it was given."""
    act = Act("A client tries to write to it")
    before = stage.driver.ask("digest")["sha256"]
    attempts = stage.clients[0].ask("attack")["attempts"]
    after = stage.driver.ask("digest")["sha256"]
    for what, answer in attempts:
        act.check(answer, f"{what} is refused")
    act.check(before == after, "the driver's bytes are as they were")
    who = "root" if os.geteuid() == 0 else f"user {os.geteuid()}"
    told = _enumerate([f"{what} {answer or 'WENT THROUGH'}" for what, answer in attempts])
    refused = sum(bool(answer) for _, answer in attempts)
    unchanged = "unchanged" if before == after else "CHANGED"
    act.happened.append(
        f"As {who}, refused by the kernel {refused} of {len(attempts)} times: {told}. The "
        f"driver's bytes are {unchanged}."
    )
    act.facts |= {"attempts": dict(attempts), "unchanged": before == after}
    return act


def act_3(programs: Programs) -> Act:
    """Listing 2: memory of a program that knows nothing of us."""
    act = Act("Listing 2: a program that has never heard of us")
    stranger, kind = _start_stranger(programs, act)
    shared, private = (int(word, 16) for word in stranger.read_line().split())
    act.facts |= {"program": kind, "length": _STRANGER_LENGTH}
    _refuse_private(act, stranger, private, kind)
    theirs = md.MemoryDescriptor.with_address_range(
        shared, _STRANGER_LENGTH, md.Direction.OUT_IN, task=stranger.task
    )
    try:
        mapping = theirs.map()
    except md.MappingError as error:
        _copy_instead(act, stranger, theirs, error)
    else:
        _use_mapping(act, stranger, mapping, shared)
    stranger.kill()
    return act


def _start_stranger(programs: Programs, act: Act) -> tuple[Program, str]:
    """Compile and start the C program; or the stand-in, and say why."""
    with tempfile.TemporaryDirectory(prefix="memdesc-demo-") as folder:
        program = Path(folder) / "stranger"
        try:
            _compile(program)
            return programs.start("the stranger", [str(program)]), "C program"
        except (OSError, subprocess.SubprocessError) as error:
            why = getattr(error, "stderr", "") or str(error)
    act.denied.append(f"A C program: {why.strip()}. A Python program that does the same stands in.")
    command = [sys.executable, "-I", "-S", "-c", _STAND_IN]
    return programs.start("the stranger", command), "Python program"


def _compile(program: Path) -> None:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        raise FileNotFoundError("there is neither gcc nor cc here")
    source = resources.files("memdesc.cli").joinpath("stranger.c").read_bytes()
    command = [compiler, "-x", "c", "-", "-o", str(program)]
    subprocess.run(command, input=source, capture_output=True, check=True, timeout=20)


def _refuse_private(act: Act, stranger: Program, address: int, kind: str) -> None:
    """Its malloc buffer is private memory: no one else can map it."""
    small = md.MemoryDescriptor.with_address_range(
        address, _STRANGER_LENGTH, md.Direction.OUT_IN, task=stranger.task
    )
    reason = "mapped"
    try:
        small.map()
    except md.MappingError as error:
        reason = error.reason.name
    if reason == MappingReason.NOT_PRIVILEGED.name:
        act.denied.append("The stranger's maps may not be read, so its memory is refused unseen.")
    else:
        act.check(reason == MappingReason.PRIVATE_MEMORY.name, "malloc memory: PRIVATE_MEMORY")
    act.facts["malloc"] = reason
    act.happened.append(f"{kind} {stranger.pid}: its malloc buffer is refused, {reason}.")


def _use_mapping(act: Act, stranger: Program, mapping: md.MemoryMap, there: int) -> None:
    """Look at its stores through our mapping, and let it look at ours."""
    with memoryview(mapping) as view:  # type: ignore[arg-type]
        theirs = bytes(view[:22])
        sum(view[:: md.page_size])
        try:
            proof = same_pages(
                md.Task.current(), mapping.address, stranger.task, there, md.page_size
            )
        except md.NotPrivilegedError as error:
            act.denied.append(f"{error}. The stores seen stand in.")
            act.facts["proof"] = "store"
        else:
            act.check(proof, f"the stranger's page is mapped here ({proof.why})")
            act.facts["proof"] = proof.proof
        view[: len(_HELLO) + 1] = _HELLO + b"\0"
    stranger.write(b"\n")
    ours = stranger.read_line()
    act.check(theirs == b"stored by the stranger", "the stranger's store is seen here")
    act.check(ours == _HELLO, "our store is seen by the stranger")
    seen = {"frames": "the same page frame (pagemap)", "object": "the same object (maps)"}
    how = seen.get(act.facts["proof"], "by the stores alone")
    act.happened.append(
        f"Its anonymous shared mmap of {_STRANGER_LENGTH:,} bytes is mapped without a copy, {how}: "
        f'we read "{theirs.decode()}", it reads "{ours.decode()}".'
    )
    act.facts |= {"shared": "mapped", "seen_here": theirs.decode(), "seen_there": ours.decode()}


def _copy_instead(
    act: Act, stranger: Program, theirs: md.MemoryDescriptor, error: md.MappingError
) -> None:
    """Without the privilege to map it, copyin and copyout reach it."""
    act.check(
        error.reason is MappingReason.NOT_PRIVILEGED, f"its shared mmap can be mapped: {error}"
    )
    act.denied.append(
        "Mapping a stranger's object takes CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE. copyin and "
        "copyout stand in."
    )
    act.facts["shared"] = error.reason.name
    told = f"Its anonymous shared mmap is refused, {error.reason.name}"
    try:
        read = theirs.read_bytes(0, 22)
        theirs.write_bytes(0, _HELLO + b"\0")
    except (md.NotPrivilegedError, md.CopyError) as why:
        act.denied.append(f"copyin and copyout too: {why}")
        act.happened.append(f"{told}, and so are copies of it.")
        return
    stranger.write(b"\n")
    ours = stranger.read_line()
    act.check(read == b"stored by the stranger", "copyin reads the stranger's store")
    act.check(ours == _HELLO, "the stranger sees what copyout stored")
    act.happened.append(
        f'{told}; copyin reads "{read.decode()}", after copyout it reads "{ours.decode()}".'
    )
    act.facts |= {"seen_here": read.decode(), "seen_there": ours.decode()}


def act_4(programs: Programs) -> Act:
    """Wiring more than the limit allows."""
    act = Act("Wiring past the limit")
    wirer = programs.module("the wiring program", "demo_client", "wirer", str(_WIRE_LIMIT))
    found = wirer.read_json()
    found["locked_after"] = task_status(wirer.task).locked
    wirer.end()
    before, after = found["locked_before"], found["locked_after"]
    reason = found.get("reason", "WIRED")
    act.check(reason == "LIMIT", f"refused with the reason LIMIT (it was {reason})")
    act.check(before == after, "nothing stays wired")
    fits = _WIRE_LIMIT // 4
    act.check(found["locked_alone"] == before + fits, "what fits under the limit can be wired")
    act.happened.append(
        f"{fits:,} bytes wired: VmLck {found['locked_alone']:,}. With {found['asked'] - fits:,} "
        f"more, under RLIMIT_MEMLOCK {_WIRE_LIMIT:,}: refused, {reason} "
        f"({found.get('errno', 'no error')}); VmLck {before:,} before, {after:,} after."
    )
    act.facts |= found
    return act


def act_5(stage: Stage) -> Act:
    """SIGKILL: first the driver, then its clients."""
    act = Act("kill -9 of the driver, then of its clients")
    region = region_at(stage.driver.task, stage.address)
    identity = region.object.identity if region else None
    alive = kernel.shmem()
    stage.driver.kill()
    still = [client.ask("load", offset=stage.length - 1)["value"] for client in stage.clients]
    act.check(still == [77] * CLIENTS, "clients of a killed driver still read their pages")
    for client in stage.clients:
        client.kill()
    after = kernel.shmem()
    held = kernel.holders(identity) if identity else []
    act.check(identity and not held, f"no process holds the memory (held by {_enumerate(held)})")
    names = kernel.abandoned_names(stage.shm_names)
    act.check(not names, f"nothing is left in /dev/shm ({_enumerate(names)})")
    gone = _no_service(stage)
    act.check(gone and not stage.socket.exists(), "the dead driver's socket is swept")
    act.happened.append(
        f"Its clients still read their pages ({still.count(77)} of {CLIENTS}). Then: held by "
        f"{len(held)} processes; Shmem (meminfo) {mb(stage.shmem_before)} before, {mb(alive)} with "
        f"the buffer, {mb(after)} now; {len(names)} names in /dev/shm; the socket is "
        f"{'STILL THERE' if stage.socket.exists() else 'swept'}."
    )
    act.facts |= {
        "shmem_before": stage.shmem_before,
        "shmem_alive": alive,
        "shmem_after": after,
        "holders": len(held),
        "names": names,
        "socket_swept": gone and not stage.socket.exists(),
    }
    return act


def _no_service(stage: Stage) -> bool:
    """Whether no one answers under the name; looking sweeps the sockets of the dead."""
    try:
        md.connect(stage.name, timeout=0).close()
    except md.ServiceNotFoundError:
        return True
    return False
