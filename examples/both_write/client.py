"""The client: maps the driver's page for writing, and counts with it."""

import memdesc as md

with md.connect("both-write", timeout=30) as driver:
    mapping = driver.map("counter")
    counter = memoryview(mapping).cast("Q")
    for turn in range(1, 10, 2):
        while counter[0] != turn:
            if driver.task.wait(0.001):
                raise SystemExit("the driver has gone")
        counter[0] = turn + 1
    print(f"client: {mapping.access.value}, counted to {counter[0]}")
