"""The camera: publishes pictures of a ball that flies through a room. Nothing is copied."""

import time

import numpy as np

import memdesc as md

HEIGHT, WIDTH, FRAMES, VIEWERS = 480, 640, 60, 3
rows, columns = np.mgrid[:HEIGHT, :WIDTH].astype("f4")
noise = np.random.default_rng(7).integers(0, 12, (HEIGHT, WIDTH, 3), "u1")
room = np.stack([rows / 6, columns / 8, 120 - rows / 8], axis=-1).astype("u1")


def take_picture(number, pixels):
    """Fill a slot in place, as a grabber would: what the viewers see are these very pages."""
    across = number / (FRAMES - 1)
    center = 60 + 520 * across, 400 - 1300 * across * (1 - across)
    near = (columns - center[0]) ** 2 + (rows - center[1]) ** 2 < 30**2
    np.add(room, np.roll(noise, number, axis=1), out=pixels)  # a sensor is never quiet
    pixels[near] = 250, 240, 90


with md.Service("camera") as service:
    video = service.stream(
        "video", shape=(HEIGHT, WIDTH, 3), dtype="u1", slots=24, policies=["drop_oldest", "block"]
    )
    while len(video.subscribers()) < VIEWERS:
        time.sleep(0.01)
    for number in range(FRAMES):
        with video.loan(timeout=30) as slot:
            take_picture(number, slot.array)
            slot.metadata = {"exposure_us": 800 + number}
    told = video.statistics()
    video.close()
    while service.clients():
        time.sleep(0.01)

print(f"camera: {told.published} pictures, {told.nbytes} bytes")
