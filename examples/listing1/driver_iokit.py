"""The same driver in I/O Kit's own spelling: Listing 1 nearly to the letter."""

import numpy as np

import memdesc as md
from memdesc.iokit import (
    IOBufferMemoryDescriptor,
    kIODirectionOutIn,
    kIOMapAnywhere,
    kIOMemoryKernelUserShared,
    page_size,
)

alloc_bytes = 54321

memDesc = IOBufferMemoryDescriptor.withOptions(
              kIODirectionOutIn | kIOMemoryKernelUserShared,
              alloc_bytes, page_size )  # fmt: skip

pixels = np.frombuffer(memDesc.getBytesNoCopy(), "u1")
pixels[:] = np.arange(alloc_bytes) % 251

with md.Service("listing1") as service:
    service.share("frame", memDesc.descriptor, shape=pixels.shape, dtype=pixels.dtype)
    client = service.wait_client(timeout=30)
    why = []
    mapping = memDesc.createMappingInTask(client.task, 0, kIOMapAnywhere, why=why)
    if mapping is None:
        raise SystemExit(f"createMappingInTask gave NULL: {why[0]}")
    pixels[0] = 99
    client.task.wait(timeout=30)
print(f"driver: the first byte is {pixels[0]}")
print(f"driver: mapped {mapping.getLength()} bytes into the client")
