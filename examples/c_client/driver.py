"""The driver: shares a buffer, and parts of two, with whoever connects; a C program does."""

import zlib

import numpy as np

import memdesc as md

frame = md.BufferMemoryDescriptor(100_000, name="frame")
pixels = frame.array((250, 400), "u1")
pixels[:] = np.arange(100_000).reshape(250, 400) % 251
other = md.BufferMemoryDescriptor(5000, name="other")
other.array()[:] = 7
parts = md.MultiMemoryDescriptor(
    [md.SubMemoryDescriptor(frame, 333, 4567), md.SubMemoryDescriptor(other, 1000, 2000)]
)

with md.Service("c-client") as service:
    client = service.wait_client(timeout=30)
    service.share("frame", frame, shape=pixels.shape, dtype=pixels.dtype)
    service.share("parts", parts)
    client.task.wait(timeout=30)

print(f"driver: frame has the checksum {zlib.adler32(frame):08x}")
print(f"driver: parts have the checksum {zlib.adler32(parts.read_bytes()):08x}")
