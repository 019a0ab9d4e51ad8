"""Methods and their arguments: what fits is called, what does not is told by name."""

from __future__ import annotations

import dataclasses
import errno
import functools
import logging
import threading
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest

import memdesc as md
from memdesc import errors
from memdesc.services import protocol
from memdesc.services.failures import rebuilt


class Point(msgspec.Struct):
    x: float
    y: float = 0.0


@dataclasses.dataclass
class Box:
    name: str
    corners: list[Point]


class Framed(msgspec.Struct):
    title: str
    pixels: np.ndarray[Any, Any]


def refused(client: md.Connection, /, *arguments: Any, **named: Any) -> str:
    with pytest.raises(md.InvalidArgument) as caught:
        client.call(*arguments, **named)
    assert caught.value.errno == errno.EINVAL
    return str(caught.value)


def test_scalars_text_and_structures_travel_both_ways(
    service: md.Service, client: md.Connection
) -> None:
    @service.method
    def add(left: int, right: int = 1) -> int:
        return left + right

    @service.method(name="flip")
    def turn_over(box: Box, factor: float) -> dict[str, Any]:
        points = [Point(point.y * factor, point.x) for point in box.corners]
        return {"name": box.name[::-1], "corners": points}

    @service.method
    def nothing(maybe: str | None = None) -> str | None:
        return maybe

    assert (client.call("add", 2, 3), client.call("add", 2), client.call("add", left=4)) == (
        5,
        3,
        5,
    )
    assert client.call("nothing") is None
    assert client.call("nothing", "é") == "é"
    box = Box("ab", [Point(1, 2)])
    assert client.call("flip", box, 2.0) == {"name": "ba", "corners": [{"x": 4.0, "y": 1.0}]}
    made = client.call("flip", box, factor=0.5, returns=Box)
    assert made == Box("ba", [Point(1.0, 1.0)])
    with pytest.raises(md.InvalidArgument) as caught:
        client.call("flip", box, 2.0, returns=Point)
    assert caught.value.errno == errno.EINVAL


def test_what_does_not_fit_never_reaches_the_handler(
    service: md.Service, client: md.Connection
) -> None:
    reached = []

    @service.method
    def scale(values: list[float], factor: float, /, *, mode: str = "fast") -> None:
        reached.append(values)

    for arguments, named, words in [
        (("no", 1.0), {}, ["scale()", "'values'", "array", "str"]),
        (([1.0], "x"), {}, ["'factor'", "float", "str"]),
        (([1.0, None], 1.0), {}, ["'values'", "None", "$[1]"]),
        (([1.0],), {}, ["'factor'", "missing"]),
        (([1.0], 1.0, 2), {}, ["2 arguments", "3 came"]),
        (([1.0], 1.0), {"factor": 2.0}, ["'factor'", "came twice"]),
        (([1.0],), {"factor": 2.0}, ["'factor'", "not taken by that name"]),
        (([1.0], 1.0), {"speed": 2}, ["'speed'", "not taken"]),
        (([1.0], 1.0), {"mode": 2}, ["'mode'", "str", "int"]),
    ]:
        message = refused(client, "scale", *arguments, **named)
        assert all(word in message for word in words), message
    assert not reached
    client.call("scale", [1.0], 2.0, mode="slow")
    assert reached == [[1.0]]


def test_a_method_that_is_not_there_is_an_error_of_its_own(client: md.Connection) -> None:
    with pytest.raises(md.MethodNotFoundError) as caught:
        client.call("nope", 1)
    assert caught.value.errno == errno.ENOENT
    assert isinstance(caught.value, KeyError)
    for name in ("", "x" * 2000, 7):
        with pytest.raises(md.InvalidArgument):
            client.call(name)  # type: ignore[arg-type]


def test_the_caller_is_given_to_who_asks_for_it(service: md.Service, client: md.Connection) -> None:
    import os

    seen = []

    @service.method
    def whose(client: md.UserClient, word: str) -> int:
        seen.append(client)
        return client.task.pid

    assert client.call("whose", "x") == client.call("whose", word="x") == os.getpid()
    assert seen[0] is service.clients()[0]
    assert "not taken" in refused(client, "whose", "x", client=1)


def test_bound_methods_and_callables_are_methods_too(
    service: md.Service, client: md.Connection
) -> None:
    class Store:
        def get(self, key: str) -> str:
            return key * 2

        def __call__(self, key: str) -> str:
            return key * 3

    store = Store()
    service.method(store.get)
    service.method(store, name="call")
    assert (client.call("get", "a"), client.call("call", "a")) == ("aa", "aaa")
    service.method(functools.partial(store.get, "b"), name="partly")
    assert client.call("partly") == "bb"
    service.method(lambda: None, name="get")  # replaces it; a lambda of no arguments fits
    assert client.call("get") is None


def test_a_signature_that_can_not_be_checked_is_refused_at_once(service: md.Service) -> None:
    def unannotated(x):  # type: ignore[no-untyped-def]
        pass

    def several(*x: int) -> None: ...
    def named(**x: int) -> None: ...
    def lock(x: threading.Lock) -> None: ...
    def inside(x: list[dict[str, threading.Event]]) -> None: ...
    def unknown(x: Missing) -> None: ...  # type: ignore[name-defined]  # noqa: F821
    def callers(x: md.UserClient, y: md.UserClient) -> None: ...
    def mixed(x: np.ndarray[Any, Any] | int) -> None: ...

    for function in (unannotated, several, named, lock, inside, unknown, callers, mixed):
        with pytest.raises(md.InvalidArgument) as caught:
            service.method(function)
        assert function.__name__ in str(caught.value)
        assert caught.value.errno == errno.EINVAL
    with pytest.raises(md.InvalidArgument):
        service.method(7)  # type: ignore[call-overload]
    with pytest.raises(md.InvalidArgument):
        service.method(name="")(lambda: None)


def test_arrays_are_checked_for_their_element_type(
    service: md.Service, client: md.Connection
) -> None:
    @service.method
    def total(values: npt.NDArray[np.float64]) -> float:
        return float(values.sum())

    @service.method
    def describe(framed: Framed, extra: np.ndarray[Any, Any] | None = None) -> list[Any]:
        return [framed.title, framed.pixels.shape, extra is None, framed.pixels.flags.writeable]

    assert client.call("total", np.ones((3, 4))) == 12
    message = refused(client, "total", np.ones(3, "f4"))
    assert "float64" in message
    assert "float32" in message
    assert "list" in refused(client, "total", [1.0])
    for pixels in (np.zeros((2, 3), "u1"), np.zeros((200, 300), "u1")):
        assert client.call("describe", Framed("t", pixels)) == [
            "t",
            list(pixels.shape),
            True,
            False,
        ]
        assert client.call("describe", Framed("t", pixels), pixels)[2] is False


def test_what_can_not_travel_is_refused_before_anything_is_sent(
    service: md.Service, client: md.Connection
) -> None:
    @service.method
    def take(x: object) -> object:
        return x

    recursive: list[Any] = []
    recursive.append(recursive)
    for value in (
        object(),
        1 << 70,
        np.array([object()]),
        np.zeros(3, [("a", "i4")]),
        recursive,
        memoryview(bytes(10000))[::2],
        {object(): 1},
    ):
        with pytest.raises(md.InvalidArgument):
            client.call("take", value)
    with pytest.raises(md.InvalidArgument) as caught:
        client.call("take", 1, into=b"read-only")
    assert caught.value.errno == errno.EINVAL
    with pytest.raises(md.InvalidArgument) as caught:
        client.call("take", 1, into=bytearray())
    assert caught.value.errno == errno.EINVAL
    with pytest.raises(md.InvalidArgument):
        client.call("take", 1, returns=threading.Lock)
    assert client.call("take", np.float32(1.5)) == 1.5


def test_errors_travel_as_what_they_are(
    service: md.Service, client: md.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    class NoSuchFrame(md.RangeError):
        """A program's own, of the family."""

    raised: list[BaseException] = [
        md.AllocationError("no room", errno=errno.ENOMEM),
        md.MappingError("private", reason=md.MappingReason.PRIVATE_MEMORY, errno=errno.EACCES),
        md.WiringError("limit", reason=md.WiringReason.LIMIT, errno=errno.ENOMEM),
        md.ShareNotFoundError("x", errno=errno.ENOENT),
        BufferError("views"),
        NoSuchFrame("frame 7", errno=errno.EINVAL),
    ]

    @service.method
    def fail(which: int) -> None:
        raise raised[which]

    for which, error in enumerate(raised):
        with pytest.raises(type(error) if which < 5 else md.RangeError) as caught:
            client.call("fail", which)
        assert str(caught.value) == str(error)
        for field in ("errno", "reason"):
            assert getattr(caught.value, field, None) == getattr(error, field, None)

    with caplog.at_level(logging.ERROR, "memdesc.services"):
        with pytest.raises(md.RemoteError) as remote:
            client.call("fail", 99)
    bug = remote.value
    assert len(bug.reference) == 8
    assert "IndexError" not in str(bug)
    assert bug.__cause__ is None
    (record,) = [one for one in caplog.records if bug.reference in one.getMessage()]
    assert record.exc_info is not None
    assert record.exc_info[0] is IndexError
    del record
    caplog.clear()  # its frames hold the client


def test_every_error_of_the_family_arrives(service: md.Service, client: md.Connection) -> None:
    """Whatever a stranger says of its fields; and with names of files that are no text."""
    for name in errors.__all__:
        for reason in (None, "", "X"):
            built = rebuilt(protocol.Failed(1, name, "text", None, reason))
            assert isinstance(built, (md.MemdescError, BufferError)), name

    @service.method
    def sync() -> None:
        raise md.InvalidArgument("no file \udcff")

    @service.method(name="async")
    async def later() -> None:
        raise md.InvalidArgument("no file \udcff")

    for method in ("sync", "async"):
        with pytest.raises(md.InvalidArgument, match="udcff"):
            client.call(method, timeout=30)
    with pytest.raises(md.InvalidArgument):
        client.call("sync", "\udcff")


def test_a_call_in_the_middle_of_reading_another(
    service: md.Service, client: md.Connection
) -> None:
    class Asks(msgspec.Struct):
        n: int

        def __post_init__(self) -> None:
            assert client.call("echo", self.n, timeout=30) == self.n

    @service.method
    def echo(x: int) -> int:
        return x

    @service.method
    def both() -> list[Any]:
        return [{"n": 5}, np.zeros(3)]

    one, array = client.call("both", returns=tuple[Asks, np.ndarray])
    assert one.n == 5
    assert array.shape == (3,)


def test_a_result_that_can_not_travel_is_the_methods_failure(
    service: md.Service, client: md.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    service.method(lambda: object(), name="odd")
    with pytest.raises(md.InvalidArgument):
        client.call("odd")
    service.method(lambda: exit(3), name="quits")  # a handler ends no thread
    for _ in range(9):
        with pytest.raises(md.RemoteError):
            client.call("quits")
    caplog.clear()
