"""The client: takes the mapping that the driver makes in it, and maps the share by name too."""

import memdesc as md

with md.connect("listing1", timeout=30) as driver:
    pushed = driver.wait_mapping(30)
    pixels = driver.map("frame").array()
    while pixels[0] != 99:  # the driver's next store comes through by itself
        driver.task.wait(0.001)
    print(f"client: {pixels.size} bytes, sum {int(pixels.sum())}, first {pixels[0]}")
    print(f"client: the mapping pushed by the driver begins with {memoryview(pushed)[0]}")
    try:
        pixels[0] = 5
        print(f"client: {pushed.access.value}: stored {pixels[0]}")
    except ValueError as error:
        print(f"client: {pushed.access.value}: {error}")
