"""The driver: makes the buffer of Listing 1, shares it, and maps it into the client."""

import numpy as np

import memdesc as md

alloc_bytes = 54321
buffer = md.BufferMemoryDescriptor(alloc_bytes, direction=md.Direction.OUT_IN, name="listing-1")
pixels = buffer.array((alloc_bytes,), "u1")
pixels[:] = np.arange(alloc_bytes) % 251

with md.Service("listing1") as service:
    service.share("frame", buffer, shape=pixels.shape, dtype=pixels.dtype)
    client = service.wait_client(timeout=30)
    mapping = buffer.create_mapping_in_task(client.task)
    pixels[0] = 99  # after the mapping was made: the client sees it, for it is the same memory
    client.task.wait(timeout=30)
print(f"driver: the first byte is {pixels[0]}")
print(f"driver: mapped {mapping.length} bytes into the client")
