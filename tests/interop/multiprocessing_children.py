"""What processes of `multiprocessing` do with the arrays that they are given, and give."""

from __future__ import annotations

import os
import resource
import signal
from typing import Any

import numpy as np

import memdesc as md
from memdesc.interop import multiprocessing as handles


def inode_at(array: Any) -> int:
    """The inode of what lies at an array's first byte; 0: private memory."""
    address = array.__array_interface__["data"][0]
    with open("/proc/self/maps") as maps:
        for line in maps:
            span, _rights, _offset, _device, inode = line.split()[:5]
            start, end = (int(part, 16) for part in span.split("-"))
            if start <= address < end:
                return int(inode)
    raise AssertionError("it lies nowhere")


def look(array: Any) -> dict[str, Any]:
    """What a receiver sees, and may do."""
    seen = {
        "pid": os.getpid(),
        "inode": inode_at(array),
        "shape": array.shape,
        "strides": array.strides,
        "dtype": array.dtype,
        "values": array.tolist(),
        "found": md.descriptor_of(array) is not None,
    }
    try:
        array[...] = array + 1
        seen["wrote"] = True
    except ValueError:
        seen["wrote"] = False
    return seen


def serve(argument: Any, pipe: Any, queue: Any, simple: Any, answers: Any) -> None:
    """Take one array each way, and tell of each."""
    answers.put(("Process", look(argument)))
    answers.put(("Pipe", look(pipe.recv())))
    answers.put(("Queue", look(queue.get(timeout=60))))
    answers.put(("SimpleQueue", look(simple.get())))
    pair = pipe.recv()
    answers.put(("inside others", [look(pair["a"][0]), look(pair["b"])]))


def make(count: int) -> Any:
    """A worker's own array, dropped here as soon as it is sent."""
    return md.asarray(np.arange(count))


def make_late(count: int) -> Any:
    """As `make`, of a worker that installs by itself."""
    handles.install()
    return make(count)


def give_back(array: Any) -> Any:
    return array


def anonymous_memory(array: Any) -> tuple[int, int, int]:
    """(sum, bytes of private memory, bytes of shared memory that this process has mapped)."""
    total = int(array.sum())
    with open("/proc/self/status") as status:
        sizes = {line.split(":")[0]: line.split()[1] for line in status if line.startswith("Rss")}
    return total, int(sizes["RssAnon"]) << 10, int(sizes["RssShmem"]) << 10


def send_and_die(pipe: Any) -> None:
    """Send an array of one's own, and be killed before anybody receives it."""
    pipe.send(make(1000))
    os.kill(os.getpid(), signal.SIGKILL)


def install_send_and_die(pipe: Any) -> None:
    handles.install()
    send_and_die(pipe)


def install_and_send(pipe: Any) -> None:
    """Send an array that this process keeps itself, until it was received."""
    handles.install()
    pipe.send(make(10))
    pipe.recv()


def few_descriptors(count: int) -> None:
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))


def send_on_and_die(pipe: Any, queue: Any) -> None:
    """Send a descriptor that came, and one of one's own; be killed before anybody receives them."""
    came = pipe.recv()
    own = md.BufferMemoryDescriptor(md.page_size)
    own.write_bytes(0, b"of his")
    pipe.send(came)
    queue.put([came, own])
    os.kill(os.getpid(), signal.SIGKILL)


def put_own(way: Any) -> None:
    """Send a descriptor of one's own, and be done."""
    own = md.BufferMemoryDescriptor(md.page_size)
    own.write_bytes(0, b"of his")
    (way.put if hasattr(way, "put") else way.send)(own)


def turned_over(descriptor: md.MemoryDescriptor) -> tuple[md.MemoryDescriptor, md.MemoryDescriptor]:
    """What came, and one of one's own with all bits the other way."""
    own = md.BufferMemoryDescriptor(descriptor.length)
    own.array()[:] = ~descriptor.array()
    return descriptor, own
