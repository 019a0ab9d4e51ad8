"""The driver: a page that both sides write. It counts even numbers, the client odd ones."""

import memdesc as md

page = md.BufferMemoryDescriptor(md.page_size, max_access=md.Access.READ_WRITE, name="counter")
counter = memoryview(page).cast("Q")

with md.Service("both-write") as service:
    service.share("counter", page)
    client = service.wait_client(timeout=30)
    for turn in range(0, 10, 2):
        while counter[0] != turn:
            if client.task.wait(0.001):
                raise SystemExit("the client has gone")
        counter[0] = turn + 1
    client.task.wait(timeout=30)
print(f"driver: the counter is at {counter[0]}, last written by the client")
