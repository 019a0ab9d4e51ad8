"""The driver: hands its state out by value, and goes on writing it. The state is not copied."""

import memdesc as md

state = md.BufferMemoryDescriptor(64 << 20, name="state")
cells = state.array(dtype="u4")

with md.Service("by-value") as service:
    cells[:] = 1
    first = state.snapshot()  # fill privately, share the snapshot
    service.share("first", first)
    client = service.wait_client(timeout=30)
    cells[: 1 << 16] = 2  # a two hundred and fifty-sixth of it
    second = state.snapshot()
    service.share("second", second)
    client.task.wait(timeout=30)

print(f"driver: copied {first.copied_bytes} bytes for the first snapshot,", end=" ")
print(f"for the second less than a tenth: {second.copied_bytes < state.length // 10}")
