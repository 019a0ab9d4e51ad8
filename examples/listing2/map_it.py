"""Maps the buffer of Listing 2's program, by pid and address, and changes it there.

python map_it.py PID ADDRESS [LENGTH]
"""

import sys

import memdesc as md

task = md.Task(int(sys.argv[1]))
address = int(sys.argv[2], 16)
length = int(sys.argv[3]) if sys.argv[3:] else 54321
out_in = md.Direction.OUT_IN

theirs = md.MemoryDescriptor.with_address_range(address, length, out_in, task=task)
try:
    with theirs.map() as mapping:
        view = memoryview(mapping)
        print(f"mapped {len(view)} bytes, which say: {bytes(view[:12]).decode()}")
        view[:20] = b"changed from Python\0"
        view.release()
except md.MappingError as error:
    print(f"not mapped: {error.reason.name}")
    if error.reason is not md.MappingReason.NOT_PRIVILEGED:
        raise
    try:
        print(f"copied in: {md.copyinstr(task, address, length).decode()}")
        md.copyout(b"changed from Python\0", task, address)
    except md.NotPrivilegedError:
        print("not copied: NotPrivilegedError")
