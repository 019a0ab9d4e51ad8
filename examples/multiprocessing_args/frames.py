"""A descriptor as an argument of a process, and through a queue: what travels is a handle."""

import multiprocessing

import memdesc as md

SHAPE = (1080, 1920, 3)


def look(frame, queue):
    """In the worker: the same pages, read-only."""
    pixels = frame.array(SHAPE, "u1")
    print(f"worker: got {frame.length} bytes, row 7 is {pixels[7, 0, 0]}", flush=True)
    other = queue.get(timeout=30)
    pixels = other.array(SHAPE, "u1")
    print(f"worker: through the queue, row 9 is {pixels[9, 0, 0]}", flush=True)
    print(f"worker: may it write? {pixels.flags.writeable}", flush=True)


def main():
    """In the driver."""
    first = md.BufferMemoryDescriptor(1080 * 1920 * 3, name="first")
    second = md.BufferMemoryDescriptor(1080 * 1920 * 3, name="second")
    first.array(SHAPE, "u1")[7] = 70
    second.array(SHAPE, "u1")[9] = 90
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    worker = context.Process(target=look, args=(first, queue))
    worker.start()
    queue.put(second)
    worker.join(30)
    print(f"driver: the worker ended with {worker.exitcode}")


if __name__ == "__main__":
    main()
