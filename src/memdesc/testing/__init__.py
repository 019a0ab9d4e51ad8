"""What the library is tested with, shipped so that code built on it can be tested the same way.

faults        `failing`: one call of the compiled core answers an errno of your choice
leaks         `leak_guard`: what a block of code leaves behind is named, and is an error
conformance   the suite that every kind of descriptor passes (needs pytest)

The first two need nothing but the standard library. Nothing outside tests imports this room.
"""

from memdesc.testing.faults import Fault as Fault, failing as failing
from memdesc.testing.leaks import (
    Leak as Leak,
    LeakError as LeakError,
    LeakKind as LeakKind,
    Resources as Resources,
    find_leaks as find_leaks,
    leak_guard as leak_guard,
)

__all__ = [
    "Fault",
    "failing",
    "Leak",
    "LeakError",
    "LeakKind",
    "Resources",
    "find_leaks",
    "leak_guard",
]
