"""Who has which memory: as the kernel shows it, of tasks that come and go."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from puppets import Puppet

import memdesc as md
from memdesc.vm.holders import all_pids, survey

SETUP = """
import mmap
fd = os.memfd_create({name!r}); os.ftruncate(fd, 4 * 4096); os.fchmod(fd, 0o600)
def view(prot=mmap.PROT_READ, flags=mmap.MAP_SHARED, length=4 * 4096):
    return mmap.mmap(fd, length, flags=flags, prot=prot)
"""


@pytest.fixture(scope="module")
def other():
    with Puppet() as one:
        one.do(SETUP.format(name="held"))
        yield one


@pytest.mark.parametrize(
    ("views", "access", "copies", "mapped"),
    [
        ("", None, False, 0),
        ("view()", md.Access.READ_ONLY, False, 4),
        ("view(), view(prot=3, length=4096)", md.Access.READ_WRITE, False, 5),
        ("view(prot=3, length=4096), view()", md.Access.READ_WRITE, False, 5),
        ("view(flags=mmap.MAP_PRIVATE)", None, True, 4),
        ("view(flags=mmap.MAP_PRIVATE, prot=3), view()", md.Access.READ_ONLY, True, 8),
        ("view(prot=0)", None, False, 4),
    ],
    ids=["open", "read", "both", "both, turned round", "private", "private and read", "none"],
)
def test_how_a_task_has_it(other, views, access, copies, mapped):
    other.do(f"v = [{views}]")
    identity = tuple(other.do("[os.fstat(fd).st_dev, os.fstat(fd).st_ino]"))
    for found in (survey(), survey([identity]), survey(pids=[other.pid])):
        object_ = found.objects[identity]
        assert (object_.name, object_.nbytes, object_.mode, object_.ours) == (
            "held", 4 * 4096, 0o600, True,
        )  # fmt: skip
        (holding,) = object_.holders.values()
        assert (holding.pid, holding.uid) == (other.pid, os.geteuid())
        assert (holding.access, holding.copies) == (access, copies)
        assert holding.descriptors == 1 + views.count("view(")  # each view has a duplicate
        assert holding.mapped == mapped * 4096
    other.do("v.clear()")


def test_what_is_resident_and_wired(other):
    identity = tuple(other.do("[os.fstat(fd).st_dev, os.fstat(fd).st_ino]"))
    other.do("v = [view(prot=3)]; v[0][:4096] = bytes(4096)")
    (holding,) = survey([identity]).objects[identity].holders.values()
    assert (holding.resident, holding.wired) == (4096, 0)
    other.do("import ctypes; c = ctypes.CDLL(None)")
    address = other.do("ctypes.addressof(ctypes.c_char.from_buffer(v[0]))")
    if other.do(f"c.mlock(ctypes.c_void_p({address}), ctypes.c_size_t(4096))"):
        pytest.skip("not a page can be locked here")
    (holding,) = survey([identity]).objects[identity].holders.values()
    assert holding.wired == 4096  # all of it, though another task may map it too


def test_another_programs_is_not_ours(other):
    other.do("os.fchmod(fd, 0o777)")
    identity = tuple(other.do("[os.fstat(fd).st_dev, os.fstat(fd).st_ino]"))
    assert survey([identity]).objects[identity].ours is False
    other.do("os.fchmod(fd, 0o600)")


def test_one_whose_file_is_open_nowhere(other):
    other.do("import ctypes; c = ctypes.CDLL(None); c.mmap.restype = ctypes.c_void_p")
    other.do("x = os.memfd_create('closed'); os.ftruncate(x, 4096); s = os.fstat(x)")
    other.do("p = c.mmap(None, ctypes.c_size_t(4096), 1, 1, x, ctypes.c_long(0)); os.close(x)")
    identity = tuple(other.do("[s.st_dev, s.st_ino]"))
    found = survey([identity]).objects[identity]
    assert (found.name, found.ours, found.nbytes) == ("closed", None, None)
    (holding,) = found.holders.values()
    assert (holding.pid, holding.access, holding.descriptors) == (
        other.pid, md.Access.READ_ONLY, 0,
    )  # fmt: skip


def test_nothing_is_wanted():
    assert survey([]).objects == {}


def test_tasks_that_are_none_any_more():
    with Puppet() as one:
        ended = one.pid
    found = survey(pids=[ended, 2, 2**31 - 1])  # 2: a thread of the kernel, or not there at all
    assert found.objects == {}
    code = "import os, time; [os.fork() or os._exit(0) for _ in range(300)]"
    with subprocess.Popen([sys.executable, "-c", code]) as process:
        while process.poll() is None:
            survey()
    assert os.getpid() in all_pids()
