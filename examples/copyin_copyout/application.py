"""The application: a private buffer, whose address it passes to the driver. Knows no memdesc."""

import ctypes

buffer = ctypes.create_string_buffer(b"what the application wrote", 64)
print(ctypes.addressof(buffer), flush=True)
input()
print(f"application: its buffer is {buffer.value.decode()}")
