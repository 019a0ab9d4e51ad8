"""Who holds the views: told in words, whatever holds them, and nothing is kept alive by asking."""

import errno
import functools
import gc
import threading
import weakref
from collections import deque
from collections.abc import Iterator
from typing import Any

import pytest

import memdesc as md
from memdesc import debug

kept: Any = None


class Camera:
    image: Any = None


class Slotted:
    __slots__ = ("image",)


@pytest.fixture
def frames() -> Iterator[md.BufferMemoryDescriptor]:
    with md.BufferMemoryDescriptor(4096, name="frames") as frames:
        yield frames


def told(thing: Any) -> list[str]:
    return sorted(holder.holder for holder in debug.holders(thing))


def test_nobody_holds_what_nobody_looks_at(frames: md.BufferMemoryDescriptor) -> None:
    assert debug.holders(frames) == []


def test_a_local_variable_is_told_with_its_function_line_and_thread(
    frames: md.BufferMemoryDescriptor,
) -> None:
    image = frames.array((8, 8), "u1")
    (holder,) = debug.holders(frames)
    assert holder.view == "array of shape (8, 8) and dtype uint8"
    name = "test_a_local_variable_is_told_with_its_function_line_and_thread"
    assert holder.holder.startswith(f"local variable `image` of {name}() at {__file__}:")
    assert holder.holder.endswith("(MainThread)")
    del image
    assert debug.holders(frames) == []


def attribute(view: Any) -> Any:
    camera = Camera()
    camera.image = view
    return [camera]


def slot(view: Any) -> Any:
    slotted = Slotted()
    slotted.image = view
    return [slotted]


def closure(view: Any) -> Any:
    return [lambda: view]


def waiting(view: Any) -> Any:
    def generate(image: Any) -> Iterator[None]:
        yield
        del image

    generator = generate(view)
    next(generator)
    return [generator]


CASES = {
    "attribute": (attribute, f"attribute `image` of a {__name__}.Camera"),
    "slot": (slot, f"attribute `image` of a {__name__}.Slotted"),
    "list": (lambda view: [view], "element 0 of a list"),
    "deque": (lambda view: deque([None, view]), "element 1 of a collections.deque"),
    "tuple": (lambda view: [(1, view)], "element 1 of a tuple, which is element 0 of a list"),
    "dict": (lambda view: {"left": view}, "value of 'left' in a dict"),
    "nested": (lambda view: {"a": {"b": view}}, "value of 'b' in a dict, which is value of 'a'"),
    "closure": (closure, "variable of a closure"),
    "partial": (lambda view: functools.partial(print, view), "attribute `args` of a functools.par"),
    "generator": (waiting, "local variable `image` of waiting.<locals>.generate()"),
}


@pytest.mark.parametrize("case", CASES)
def test_whatever_holds_a_view_is_told(case: str, frames: md.BufferMemoryDescriptor) -> None:
    make, words = CASES[case]
    held = make(frames.array())
    assert [one for one in told(frames) if words in one], told(frames)
    del held
    gc.collect()
    assert debug.holders(frames) == []


def test_a_global_variable_is_told_with_its_module(frames: md.BufferMemoryDescriptor) -> None:
    global kept
    kept = memoryview(frames)[1:]
    (holder,) = debug.holders(frames)
    assert holder.view == "memoryview of 4,095 bytes"
    assert holder.holder == f"global variable `kept` of {__name__}"
    kept = None


def test_what_a_traceback_keeps_is_told(frames: md.BufferMemoryDescriptor) -> None:
    def fail() -> None:
        leaked = frames.array()
        raise ValueError(leaked[0])

    error: BaseException | None = None
    try:
        fail()
    except ValueError as raised:
        error = raised
    assert [one for one in told(frames) if "`leaked` of" in one and "traceback" in one]
    del error
    gc.collect()
    assert debug.holders(frames) == []


def test_another_thread_is_told_by_its_name(frames: md.BufferMemoryDescriptor) -> None:
    has, may_go = threading.Event(), threading.Event()

    def show() -> None:
        image = frames.array()
        has.set()
        may_go.wait(30)
        del image

    thread = threading.Thread(target=show, name="shows")
    thread.start()
    assert has.wait(30)
    assert [one for one in told(frames) if "`image` of" in one and one.endswith("(shows)")]
    may_go.set()
    thread.join(30)
    assert debug.holders(frames) == []


def test_a_mapping_is_told_beside_the_views_of_it(frames: md.BufferMemoryDescriptor) -> None:
    mapping = frames.map()
    view = mapping.array()
    assert {holder.view.split()[0] for holder in debug.holders(frames)} == {
        "<LocalMemoryMap",
        "array",
    }
    assert [holder.view for holder in debug.holders(mapping)] == [
        "array of shape (4096,) and dtype uint8"
    ]
    del view


def test_asking_keeps_nothing_alive(frames: md.BufferMemoryDescriptor) -> None:
    """Up to Python 3.12 a frame that was asked for its variables keeps them till it ends."""
    mapping = frames.map()
    image = mapping.array()
    watched = weakref.ref(image)
    assert debug.holders(mapping)
    del image
    assert watched() is None
    mapping.unmap()
    assert not mapping.is_mapped


def test_what_locals_gave_stays_the_programs_own(frames: md.BufferMemoryDescriptor) -> None:
    image = frames.array()
    mine = locals()
    assert debug.holders(frames)
    assert mine["image"] is image


def test_what_stands_for_something_else_is_not_woken(frames: md.BufferMemoryDescriptor) -> None:
    class Lazy:
        @property
        def __class__(self) -> Any:
            raise AssertionError("it was asked what it is")

    lazy = [Lazy(), frames.array()]
    assert [one for one in told(frames) if one.startswith("element 1 of a list")]
    del lazy


def test_slots_are_told_and_those_given_back_are_not() -> None:
    with md.Stream(shape=(4,), dtype="u1") as stream:
        seat = stream.admit(loans=1)
        with md.Subscription(stream.memory, seat.memory, stream.form, seat.depth, 1) as video:
            stream.publish([1, 2, 3, 4])
            slot = video.take()
            image = slot.array
            assert len(debug.holders(video)) == 2
            del image
            (holder,) = debug.holders(video)
            assert "local variable `slot`" in holder.holder
            slot.release()
            assert debug.holders(video) == []


def test_what_has_no_memory_of_its_own_is_refused(frames: md.BufferMemoryDescriptor) -> None:
    for thing in ("frames", frames.array(), memoryview(frames), md.Task.current()):
        with pytest.raises(md.InvalidArgument) as caught:
            debug.holders(thing)
        assert caught.value.errno == errno.EINVAL
    with frames.map() as mapping:
        assert debug.holders(mapping) == []
