"""A file that bears the name of shared anonymous memory is not taken for it."""

import subprocess
import sys

import pytest

import memdesc as md
from memdesc.vm.regions import ObjectKind, region_at

# In a mount namespace of its own the task makes a file /dev/zero and deletes it; its maps then say
# "/dev/zero (deleted)" of memory that it can truncate.
PROGRAM = """
import mmap, os, sys
from memdesc._core import buffer_address
with open("/dev/zero", "wb") as file:
    file.write(bytes(8192))
fd = os.open("/dev/zero", os.O_RDWR)
memory = mmap.mmap(fd, 8192)
os.unlink("/dev/zero")
print(buffer_address(memory)[0], flush=True)
sys.stdin.readline()
"""
IN_A_NAMESPACE = 'mount -t tmpfs none /dev && exec "$0" -c "$1"'


def test_a_file_named_dev_zero_can_shrink():
    child = subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", IN_A_NAMESPACE, sys.executable, PROGRAM],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        line = child.stdout.readline()
        if not line:
            pytest.skip(f"no mount namespace of its own: {child.stderr.read().splitlines()[-1]}")
        with md.Task(child.pid) as task:
            assert region_at(task, int(line)).object.kind is ObjectKind.SHARED_ANONYMOUS
            theirs = md.MemoryDescriptor.with_address_range(
                int(line), 8192, md.Direction.OUT_IN, task=task
            )
            with pytest.raises(md.MappingError) as caught:
                theirs.map()
            assert caught.value.reason is md.MappingReason.CAN_SHRINK
    finally:
        child.kill()
        child.communicate()
