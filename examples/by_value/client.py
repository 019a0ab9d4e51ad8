"""The client: sees the state twice, as it was each time."""

import memdesc as md

with md.connect("by-value", timeout=30) as driver:
    first = driver.map("first").array(dtype="u4")
    second = driver.map("second", timeout=30).array(dtype="u4")  # waits until it is shared
    print(f"client: first {first[0]} ... {first[-1]}, second {second[0]} ... {second[-1]}")
    print(f"client: writable: {first.flags.writeable}")
