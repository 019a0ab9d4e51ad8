"""copyin and copyout through a connection, where the kernel denies the direct way.

The denial is injected into this process (EPERM from process_vm_*, as another user's task or a
container answers); the client, its memory and the connection are real.
"""

import errno
import subprocess
import sys
from contextlib import contextmanager

import pytest

import memdesc as md
from memdesc.copyio import Route, route
from memdesc.testing import failing

CLIENT = """
import sys, memdesc as md
from memdesc._core import buffer_address
text = bytearray(b"of the client" + bytes(200_000))
with md.connect(sys.argv[1], allow_copy=sys.argv[2] == "allow") as service:
    print(buffer_address(text)[0], flush=True)
    sys.stdin.readline()
    print(bytes(text[:13]), flush=True)
    sys.stdin.readline()
"""


@contextmanager
def client_of(tmp_path, word):
    with md.Service(f"{tmp_path}/copying") as service:
        child = subprocess.Popen(
            [sys.executable, "-c", CLIENT, service.path, word],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            client = service.wait_client(20)
            yield client, int(child.stdout.readline()), child
        finally:
            child.kill()
            child.communicate()


def denied():
    return failing("process_vm_readv", errno.EPERM, times=1000)


def denied_writing():
    return failing("process_vm_writev", errno.EPERM, times=1000)


@pytest.mark.slow
def test_the_client_copies_for_us_if_its_program_allows(tmp_path):
    with client_of(tmp_path, "allow") as (client, address, child), denied(), denied_writing():
        assert route(client.task) is Route.CONNECTION
        assert md.copyin(client.task, address, 13) == b"of the client"
        assert md.copyin(client.task, address, 200_013)[13:] == bytes(200_000)
        assert md.copyout(b"from the service"[:13], client.task, address) == 13
        child.stdin.write("\n")
        child.stdin.flush()
        assert child.stdout.readline().strip() == repr(b"from the service"[:13])


@pytest.mark.slow
def test_a_fault_there_is_an_error_here(tmp_path):
    with client_of(tmp_path, "allow") as (client, _, _), denied():
        with pytest.raises(md.CopyError) as caught:
            md.copyin(client.task, 4096, 10)
        assert (caught.value.errno, caught.value.completed) == (errno.EFAULT, 0)


@pytest.mark.slow
def test_nobody_copies_unless_the_program_said_so(tmp_path):
    with client_of(tmp_path, "deny") as (client, address, _), denied(), denied_writing():
        with pytest.raises(md.AccessDeniedError) as caught:
            md.copyin(client.task, address, 13)
        assert caught.value.errno == errno.EACCES
        with pytest.raises(md.AccessDeniedError):
            md.copyout(b"x", client.task, address)


@pytest.mark.slow
def test_without_a_connection_the_kernels_word_stands(tmp_path):
    with client_of(tmp_path, "allow") as (client, address, _):
        task = client.task
        client.close()
        with denied(), pytest.raises(md.NotPrivilegedError):
            md.copyin(task, address, 13)
