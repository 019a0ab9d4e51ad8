"""What is no descriptor is refused in words, wherever one is wanted."""

import socket

import numpy as np
import pytest

import memdesc as md


def not_descriptors():
    return [np.zeros(3), b"bytes", None, 7]


@pytest.mark.parametrize("wrong", not_descriptors(), ids=lambda wrong: type(wrong).__name__)
def test_what_is_no_descriptor(wrong):
    near, far = socket.socketpair()
    with near, far, md.Service("types") as service:
        for use in (
            lambda: service.share("it", wrong),
            lambda: md.send_descriptor(near, wrong),
            lambda: md.SubMemoryDescriptor(wrong, 0, 1),
            lambda: md.MultiMemoryDescriptor([wrong]),
            lambda: md.MultiMemoryDescriptor(wrong),
        ):
            with pytest.raises(md.InvalidArgument, match="MemoryDescriptor"):
                use()


def test_a_descriptor_alone_is_no_sequence_of_members():
    with md.BufferMemoryDescriptor(1) as buffer, pytest.raises(md.InvalidArgument):
        md.MultiMemoryDescriptor(buffer)


@pytest.mark.parametrize("name", [None, 7, b"bytes"])
def test_a_name_is_text(name):
    with pytest.raises(md.InvalidArgument, match="give a str"):
        md.BufferMemoryDescriptor(1, name=name)


@pytest.mark.parametrize("dtype", ["(((", "no such", object, 7.5, "V0"])
def test_what_is_no_dtype(dtype):
    with md.BufferMemoryDescriptor(8) as buffer, pytest.raises(md.InvalidArgument):
        buffer.array(1, dtype)
