"""The driver: copies from and to an application's private buffer, at an address it was told."""

import subprocess
import sys
from pathlib import Path

import memdesc as md

application = subprocess.Popen(
    [sys.executable, Path(__file__).with_name("application.py")],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
)
with application, md.Task(application.pid) as task:
    address = int(application.stdout.readline())
    try:
        print(f"copyinstr: {md.copyinstr(task, address, 64).decode()}")
        print(f"copyin:    {md.copyin(task, address, 4).decode()}")
        filled = md.copyout(b"filled by the driver\0", task, address)
        print(f"copyout:   {filled} bytes")
    except md.NotPrivilegedError as error:
        sys.exit(f"this kernel lets no one copy from his own child: {error}")
    try:
        md.copyin(task, 0, 8)
    except md.CopyError as error:
        print(f"at 0:      {error.completed} of {error.expected} bytes, errno {error.errno}")
    answer, _ = application.communicate("go on\n")
    print(answer, end="")
