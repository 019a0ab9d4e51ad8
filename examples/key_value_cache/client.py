"""The client: puts arrays, gets them back, and computes on the cache's own pages."""

import numpy as np

import memdesc as md

with md.connect("cache", timeout=30) as cache:
    cache.call("put", "squares", np.arange(1_000_000, dtype="u8") ** 2)
    cache.call("put", "half", np.full((512, 512), 0.5))

    squares = cache.call("get", "squares")
    print(f"client: squares {squares.shape} {squares.dtype}, the last {squares[-1]}")
    half = cache.call("get", "half")
    print(f"client: writable: {squares.flags.writeable}, the mean of half {half.mean()}")

    room = np.empty((512, 512))  # or into a buffer of our own, in place
    print(f"client: {cache.call('get', 'half', into=room)} bytes in place, sum {room.sum()}")

    for number in range(8):
        cache.call("put", f"frame {number}", np.full(8 << 20, number, "u1"))
    print(f"client: kept are {', '.join(cache.call('keys'))}")
    gone = cache.call("get", "squares") is None
    print(f"client: squares is gone there: {gone}, and still here: {squares[3]}")

    try:
        cache.call("put", "everything", np.zeros(65 << 20, "u1"))
    except md.RangeError as error:
        print(f"client: {error}")
    try:
        cache.call("put", "text", "no array")
    except md.InvalidArgument as error:
        print(f"client: {error}")
