"""A viewer of the camera.

viewer.py track          finds the ball in every picture; rather than miss one, the camera waits
viewer.py record FILE    keeps three pictures while others come, and writes them as a PNG file
viewer.py glance         looks at the newest picture only, now and then
"""

import struct
import sys
import time
import zlib

import memdesc as md


def track(video):
    """Where the ball is: the middle of all that is as bright as it."""
    path = []
    for picture in video:
        bright = picture.array[..., 0] > 200
        path.append((int(bright.any(axis=0).argmax()), int(bright.any(axis=1).argmax())))
        last = picture.sequence, picture.metadata["exposure_us"]
    top = min(path, key=lambda place: place[1])
    print(f"track: {len(path)} pictures, {video.missed} missed, the last is {last}")
    print(f"track: the ball went from {path[0]} over {top} to {path[-1]}")


def record(video):
    """Three at once, held while the camera goes on."""
    kept = []
    for picture in video:
        if picture.sequence % 20 == 1:
            picture.keep()
            kept.append(picture)
    with open(sys.argv[2], "wb") as file:
        write_png(file, [picture.array for picture in kept])
    numbers = [picture.sequence for picture in kept]
    print(f"record: pictures {numbers} held to the end, {video.missed} missed")


def glance(video):
    """What is newest when it has time to look; a slow viewer slows nobody."""
    seen = []
    for picture in video:
        seen.append(picture.sequence)
        time.sleep(0.05)
    print(f"glance: saw some of them in order: {seen == sorted(set(seen))}, the last is {seen[-1]}")


def write_png(file, pictures):
    """Side by side, and as plain as PNG can be."""
    height, width = pictures[0].shape[:2]

    def chunk(kind, data):
        file.write(struct.pack(">I", len(data)) + kind + data)
        file.write(struct.pack(">I", zlib.crc32(kind + data)))

    lines = [
        b"\0" + b"".join(picture[row].tobytes() for picture in pictures) for row in range(height)
    ]
    file.write(b"\x89PNG\r\n\x1a\n")
    chunk(b"IHDR", struct.pack(">2I5B", width * len(pictures), height, 8, 2, 0, 0, 0))
    chunk(b"IDAT", zlib.compress(b"".join(lines), 1))
    chunk(b"IEND", b"")


VIEWERS = {
    "track": (track, {"policy": "block", "latest": False}),
    "record": (record, {"policy": "block", "latest": False, "loans": 4}),
    "glance": (glance, {"depth": 1}),
}
view, options = VIEWERS[sys.argv[1]]
with md.connect("camera") as camera, camera.subscribe("video", **options) as video:
    view(video)
