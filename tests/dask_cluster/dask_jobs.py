"""A cluster of Dask, and what its workers do: runs in a puppet, and is imported by the workers."""

from __future__ import annotations

import hashlib
import mmap
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import dask
import numpy as np
from distributed import Client, LocalCluster, wait

import memdesc as md
from memdesc.interop.dask import Plugin, attach, detach, ends, handles, statistics

LENGTH = 1 << 20  # of arrays of f4: 4 MiB
cluster: LocalCluster
client: Client
one: str
two: str


def start(folder: str, **options: Any) -> None:
    """Two workers of one thread, with the plugin."""
    global cluster, client
    # It drops copies of what two workers have, now and then.
    dask.config.set({"distributed.scheduler.active-memory-manager.start": False})
    cluster = LocalCluster(
        n_workers=2,
        threads_per_worker=1,
        processes=True,
        dashboard_address=":0",
        host="127.0.0.1",
        local_directory=folder,
        memory_limit=0,
    )
    client = Client(cluster, timeout=60)
    client.register_plugin(Plugin(**options))
    name_workers()


def name_workers() -> None:
    global one, two
    one, two = sorted(client.scheduler_info(n_workers=-1)["workers"])


def stop() -> None:
    client.close()
    cluster.close()


def on_one(function: Callable[..., Any], *arguments: Any) -> Any:
    """A future of a call on the first worker, done."""
    future = client.submit(function, *arguments, workers=[one], pure=False)
    wait(future, timeout=60)
    return future


def on_two(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a call on the second worker gives: of futures it asks the first worker for the data."""
    return client.submit(function, *arguments, workers=[two], pure=False).result(60)


def counts(worker: str, *names: str) -> Any:
    told = client.run(statistics, workers=[worker])[worker]
    return [getattr(told, name) for name in names]


def moved(before: Any, *names: str) -> Any:
    return [now - was for now, was in zip(counts(two, *names), before, strict=True)]


def digest(array: Any) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def ramp(**options: Any) -> Any:
    array = md.empty(LENGTH, "f4", **options)
    array[:] = np.arange(LENGTH)
    return array


def private() -> Any:
    return np.arange(LENGTH, dtype="f4")


def object_of(array: Any) -> Any:
    descriptor = md.descriptor_of(array)
    assert descriptor is not None
    (extent,) = descriptor._extents(0, descriptor.length, md.Access.READ_ONLY)
    return extent.object


def inode(array: Any) -> Any:
    return object_of(array).identity


# -- what tests ask --------------------------------------------------------------------------------


def looks(array: Any) -> Any:
    """What the second worker finds of an array, and whether it can write it by any means."""
    denied = {}
    fd = object_of(array).open(md.Access.READ_ONLY)
    for what, attempt in {
        "array": lambda: array.__setitem__(0, 1),
        "mapping": lambda: mmap.mmap(fd, 4096, prot=mmap.PROT_WRITE),
        "pwrite": lambda: os.pwrite(fd, b"x", 0),
        "reopened": lambda: write_anew(fd),
    }.items():
        try:
            attempt()
        except (OSError, ValueError) as error:
            denied[what] = type(error).__name__
    os.close(fd)
    return {
        "inode": inode(array),
        "digest": digest(array),
        "denied": denied,
        "enforced": md.descriptor_of(array).enforced,
    }


def write_anew(fd: int) -> None:
    with open(f"/proc/self/fd/{fd}", "r+b", buffering=0) as file:
        file.write(b"x")


def same_pages() -> Any:
    future = on_one(ramp)
    seen = on_two(looks, future)
    owner = client.submit(lambda array: (inode(array), digest(array)), future, workers=[one])
    stored = on_two(lambda array: float(array[7]), future)
    client.submit(lambda array: array.__setitem__(7, -1), future, workers=[one]).result(60)
    return {"seen": seen, "owner": owner.result(60), "stored": [stored, on_two_kept(future)]}


def on_two_kept(future: Any) -> float:
    """What the second worker, which has the array already, sees in it now."""
    return float(on_two(lambda array: float(array[7]), future))


FORMS: dict[str, Callable[[], Any]] = {
    "fortran": lambda: _filled(md.empty((512, 2048), "f4", order="F")),
    "reversed": lambda: _filled(md.empty(LENGTH, "f4"))[::-1],
    "steps": lambda: _filled(md.empty((1024, 1024), "f4"))[:, ::2],
    "half": lambda: _filled(md.empty(LENGTH, "f4"))[LENGTH // 2 :],
    "times": lambda: _filled(md.empty(LENGTH, "i8")).view("M8[ns]"),
    "big endian": lambda: _filled(md.empty(LENGTH, "i4")).view(">i4"),
    "transposed": lambda: _filled(md.empty((64, 128, 128), "i4")).transpose(2, 0, 1),
    "broadcast": lambda: np.broadcast_to(_filled(md.empty(LENGTH, "f4")), (3, LENGTH)),
}
BYTES: dict[str, Callable[[], Any]] = {
    "small": lambda: md.zeros(1000, "f4"),
    "part": lambda: _filled(md.empty(LENGTH, "f4"))[: LENGTH // 8],
    "fields": lambda: md.zeros(LENGTH, [("a", "i4"), ("b", "f8")]),
    "writable by others": lambda: ramp(max_access=md.Access.READ_WRITE),
    "private": private,
    "objects": lambda: np.array([{"a": 1}] * 100_000),
    "subclass": lambda: _filled(md.empty((1024, 1024), "f4")).view(np.matrix),
    "masked": lambda: np.ma.masked_less(_filled(md.empty(LENGTH, "f4")), 100),
}


def _filled(array: Any) -> Any:
    array[...] = np.arange(array.size).reshape(array.shape) % 100_003
    return array


def sent(form: str) -> Any:
    """Send an array of that form; tell whether it is equal, and how many handles came."""
    make = {**FORMS, **BYTES}[form]
    before = counts(two, "received", "nbytes_received")
    future = on_one(make)
    equal, writable = on_two(_compare, make, future)
    handles_, nbytes = moved(before, "received", "nbytes_received")
    return {"equal": equal, "writable": writable, "handles": handles_, "nbytes": nbytes}


def _compare(make: Callable[[], Any], array: Any) -> Any:
    like = make()
    equal = array.dtype == like.dtype and array.shape == like.shape and bool((array == like).all())
    return equal, array.flags.writeable


def nested() -> Any:
    before = counts(two, "received")
    future = on_one(lambda: {"a": [ramp(), ramp()], "b": (ramp(), 3)})
    total = on_two(lambda tree: float(sum(x[5] for x in [*tree["a"], tree["b"][0]])), future)
    return total, moved(before, "received")


def replicated() -> Any:
    future = on_one(ramp)
    before = counts(two, "received")
    client.replicate(future, workers=[one, two])
    return on_two(lambda array: float(array[9]), future), moved(before, "received")


def passed_on() -> Any:
    """The first worker's array, received by the second, is sent by that to the client."""
    future = on_one(ramp)
    again = client.submit(lambda array: array[10:], future, workers=[two], pure=False)
    wait(again, timeout=60)
    identity = on_two(inode, again)
    del future  # the first worker lets go of it
    attach(client)
    try:
        before = statistics()
        array = client.gather(again, direct=True)
        came = statistics().received - before.received
        result = inode(array) == tuple(identity), float(array[0]), array.flags.writeable, came
        del array
    finally:
        detach(client)
    after = client.gather(again, direct=True)
    return *result, float(after[0]), statistics().received - before.received


def by_scheduler() -> Any:
    attach(client)
    try:
        before = statistics().received
        array = client.gather(on_one(ramp), direct=False)
        return float(array[9]), array.flags.writeable, statistics().received - before
    finally:
        detach(client)


def literal() -> Any:
    before = counts(two, "received")
    return on_two(lambda array: float(array[9]), ramp()), moved(before, "received")


def scattered() -> Any:
    before = counts(two, "received")
    future = client.scatter(ramp(), workers=[two], direct=True)
    value = on_two(lambda array: (float(array[9]), array.flags.writeable), future)
    return value, moved(before, "received")


def _descriptor(kind: str) -> Any:
    buffer = md.BufferMemoryDescriptor(1 << 20, name="frames", direction=md.Direction.IN)
    buffer.write_bytes(4096, b"memory")
    if kind == "sub":
        return md.SubMemoryDescriptor(buffer, 4096, 8192)
    if kind == "multi":
        return md.MultiMemoryDescriptor([md.SubMemoryDescriptor(buffer, 4096, 100), buffer])
    return buffer.snapshot() if kind == "snapshot" else buffer


def descriptor(kind: str) -> Any:
    before = counts(two, "received")
    pulled = on_two(_described, on_one(_descriptor, kind))
    handles_ = moved(before, "received")
    pushed = on_two(_described, client.scatter(_descriptor(kind), workers=[two], direct=True))
    return {"pulled": pulled, "pushed": pushed, "handles": handles_}


def closed() -> Any:
    def use(memory: Any) -> str:
        try:
            return repr(memory.read_bytes())
        except md.ClosedError as error:
            return str(error)

    return on_two(use, on_one(_closed))


def _closed() -> Any:
    memory = _descriptor("buffer")
    memory.close()
    return memory


def _described(memory: Any) -> Any:
    start = memory.read_bytes(0, 6)
    data = start if start == b"memory" else memory.read_bytes(4096, 6)
    return [
        type(memory).__name__,
        memory.length,
        memory.direction.name,
        memory.max_access.name,
        memory.enforced,
        data.decode(),
    ]


def _lose_one() -> None:
    """The next handle that comes to this worker can not be had."""
    take = ends.ends.take

    def lose(token: bytes) -> Any:
        ends.ends.take = take  # type: ignore[method-assign]
        for fd in take(token):
            os.close(fd)
        return take(token)

    ends.ends.take = lose  # type: ignore[method-assign]


def lost() -> Any:
    """A handle can not be opened: Dask asks again, and gets bytes; after a rest, handles again."""
    before = counts(two, "received", "lost")
    client.run(_lose_one, workers=[two])
    value = on_two(lambda array: (float(array[9]), array.flags.writeable), on_one(ramp))
    told = moved(before, "received", "lost")
    client.run(_rested, workers=[two])
    client.run(_rested, workers=[one])
    again = on_two(lambda array: array.flags.writeable, on_one(ramp))
    return {"value": value, "told": told, "again": again}


def _rested() -> None:
    """As if the time had passed."""
    ends.ends._avoided.clear()
    inbox = ends.ends._inbox
    assert inbox is not None
    inbox._rests_until = 0.0


def sender_killed() -> Any:
    """Its worker is killed when a handle has come, and before it is opened."""
    future = client.submit(ramp, workers=[one], allow_other_workers=True, pure=False)
    wait(future, timeout=60)
    victim = client.run(os.getpid, workers=[one])[one]
    client.run(_kill_first, victim, workers=[two])
    second = client.submit(lambda array: float(array[9]), future, workers=[two], pure=False)
    first = second.result(60)
    client.cancel([future, second])
    gone = one
    until = time.monotonic() + 60
    while True:  # the nanny starts another one, which is given the plugin
        known = list(client.scheduler_info(n_workers=-1)["workers"])
        if gone not in known and len(known) == 2:
            break
        assert time.monotonic() < until, known
        time.sleep(0.05)
    name_workers()
    before = counts(two, "received")
    value = on_two(lambda array: array.flags.writeable, on_one(ramp))
    return {"first": first, "again": value, "handles": moved(before, "received")}


def _kill_first(pid: int) -> None:
    take = ends.ends.take

    def kill(token: bytes) -> Any:
        ends.ends.take = take  # type: ignore[method-assign]
        os.kill(pid, signal.SIGKILL)
        return take(token)

    ends.ends.take = kill  # type: ignore[method-assign]


def copied() -> Any:
    """With copy=True, private memory goes as handles, copied once for all who ask."""
    client.register_plugin(Plugin(copy=True))
    attach(client)
    try:
        future = on_one(private)
        before = totals()
        values = on_two(lambda array: (float(array[9]), array.flags.writeable), future)
        mine = client.gather(future, direct=True)
        result = [now - was for now, was in zip(totals(), before, strict=True)]
        same = inode(mine) == tuple(on_two(inode, future))
        kept = client.run(_copies, workers=[one])[one]
        del mine, future
        until = time.monotonic() + 30
        while left := client.run(_copies, workers=[one])[one]:
            assert time.monotonic() < until, left
        return {"values": values, "counts": result, "same": same, "kept": kept}
    finally:
        detach(client)
        client.register_plugin(Plugin())


def totals() -> Any:
    """Copies and handles of both workers: the client asks either one that has the array."""
    return [
        sum(pair) for pair in zip(*(counts(w, "copied", "sent") for w in (one, two)), strict=True)
    ]


def _copies() -> int:
    import gc

    gc.collect()
    return 0 if handles.copies is None else len(handles.copies._copies)


def held() -> Any:
    """What the workers hold: descriptors, regions of memfds, and what waits in inboxes."""
    return sorted(client.run(_held).values())


def _held() -> Any:
    import gc

    gc.collect()
    md.recycler.trim()
    with open("/proc/self/maps") as maps:
        regions = sum("/memfd:array" in line for line in maps)
    memfds = sum("/memfd:array" in name for name in map(_link_of, os.listdir("/proc/self/fd")))
    return [regions, memfds, statistics().waiting]


def _link_of(number: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{number}")
    except OSError:
        return ""


def accounted() -> Any:
    """What the second worker counts of an array and of a descriptor that it received."""
    array, memory = on_one(ramp), on_one(_descriptor, "buffer")
    together = client.submit(lambda *_: None, array, memory, workers=[two], pure=False)
    wait(together, timeout=60)
    keys = array.key, memory.key
    told = client.run(
        lambda dask_worker: [dask_worker.state.tasks[key].nbytes for key in keys],
        workers=[two],
    )
    return told[two]


def workers() -> Any:
    """The workers' pids, and what their inboxes are called in /proc/net/unix."""
    return list(client.run(_pid_and_inbox).values())


def _pid_and_inbox() -> Any:
    inbox = ends.ends._inbox
    assert inbox is not None
    return os.getpid(), "@" + inbox.address[1:].decode()
