"""The exceptions: builtins that callers catch, with fields that survive every journey."""

import builtins
import copy
import errno
import inspect
import pickle
from enum import Enum

import pytest

import memdesc
from memdesc import errors
from memdesc.errors import MappingReason, MemdescError, SegmentReason, WiringReason

CLASSES = [
    item
    for name in errors.__all__
    if isinstance(item := getattr(errors, name), type) and issubclass(item, MemdescError)
]
REASONS = [MappingReason, WiringReason, SegmentReason]
MESSAGE = "cannot wire 1,048,576 bytes: RLIMIT_MEMLOCK is 65,536 (mlock: ENOMEM); raise it"

# One value for each field that any class has beside its message and errno.
FIELDS = {
    "requested": 1 << 40,
    "available": 4096,
    "expected": 100,
    "completed": 40,
    "file_offset": 8192,
    "pid": 4242,
    "data": b"not yet ended",
    "zone": "headers",
    "holders": (errors.Holding("program.py:7 in read", 3, 768, 1, 9),),
    "address": 0x7F00_0000_1000,
    "offset": 17,
    "value": 255,
    "reference": "5f1d03aa",
    "code": 712,
    "name": "cudaErrorHostMemoryAlreadyRegistered",
}


def fields_of(kind: type[MemdescError]) -> dict[str, object]:
    names = set(inspect.signature(kind).parameters) - {"message", "errno"}
    reasons = {"MappingError": MappingReason.ZONE_MEMORY, "WiringError": WiringReason.LIMIT}
    reasons["SegmentError"] = SegmentReason.MOVED
    return {name: FIELDS[name] if name in FIELDS else reasons[kind.__name__] for name in names}


def make(kind: type[MemdescError], number: int | None) -> MemdescError:
    return kind(MESSAGE, errno=number, **fields_of(kind))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("number", [errno.ENOMEM, errno.EPERM, None])
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickling_keeps_every_field(
    kind: type[MemdescError], number: int | None, protocol: int
) -> None:
    error = make(kind, number)
    again = pickle.loads(pickle.dumps(error, protocol))
    assert type(again) is kind
    assert (again.errno, again.message, str(again)) == (number, MESSAGE, MESSAGE)
    assert {name: getattr(again, name) for name in fields_of(kind)} == fields_of(kind)
    assert again.args == error.args


@pytest.mark.parametrize("kind", CLASSES)
def test_copies_keep_every_field(kind: type[MemdescError]) -> None:
    error = make(kind, errno.EACCES)
    for again in (copy.copy(error), copy.deepcopy(error)):
        assert type(again) is kind
        assert vars(again) == vars(error)
        assert (again.errno, str(again)) == (errno.EACCES, MESSAGE)


@pytest.mark.parametrize("kind", CLASSES)
def test_each_field_is_declared_and_is_what_was_given(kind: type[MemdescError]) -> None:
    assert set(kind._FIELDS) == set(fields_of(kind))
    error = make(kind, errno.EIO)
    for name, value in fields_of(kind).items():
        assert getattr(error, name) == value


@pytest.mark.parametrize("kind", CLASSES)
def test_each_is_of_the_family_and_a_builtin(kind: type[MemdescError]) -> None:
    assert issubclass(kind, MemdescError)
    if kind is MemdescError:
        return
    builtin = [
        base
        for base in kind.__mro__
        if getattr(builtins, base.__name__, None) is base
        and issubclass(base, Exception)
        and base is not Exception
    ]
    assert builtin, f"{kind.__name__} is no builtin that a caller would already catch"
    error = make(kind, errno.EBUSY)
    with pytest.raises(builtin[0]) as caught:
        raise error
    assert caught.value is error
    assert error.errno == errno.EBUSY
    if isinstance(error, OSError):
        assert error.strerror == MESSAGE
        assert error.args == (errno.EBUSY, MESSAGE)


@pytest.mark.parametrize("kind", CLASSES)
def test_each_is_documented_and_exported(kind: type[MemdescError]) -> None:
    assert kind.__doc__
    assert kind.__doc__ != (kind.__mro__[1].__doc__)
    assert getattr(memdesc, kind.__name__) is kind


def test_none_is_forgotten() -> None:
    defined = {
        name
        for name, item in vars(errors).items()
        if isinstance(item, type)
        and item.__module__ == errors.__name__
        and issubclass(item, MemdescError | Enum)
    }
    assert defined == set(errors.__all__)
    assert set(errors.__all__) <= set(dir(memdesc))


@pytest.mark.parametrize("reasons", REASONS)
def test_each_reason_is_told_apart_in_words(reasons: type[Enum]) -> None:
    words = [reason.value for reason in reasons]
    assert all(isinstance(text, str) and len(text.split()) > 3 for text in words)
    assert len(words) == len(set(words)) == len(reasons.__members__)


@pytest.mark.parametrize("reasons", REASONS)
def test_each_reason_survives_pickling(reasons: type[Enum]) -> None:
    kind = errors.MappingError if reasons is MappingReason else errors.WiringError
    for reason in reasons:
        error = kind(MESSAGE, reason=reason, errno=errno.EINVAL)  # type: ignore[arg-type]
        assert pickle.loads(pickle.dumps(error)).reason is reason


def test_a_reason_can_not_be_left_out() -> None:
    for kind in (errors.MappingError, errors.WiringError):
        with pytest.raises(TypeError):
            kind(MESSAGE)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOMEM, "mlock: Cannot allocate memory"), "mlock answered ENOMEM"),
        (OSError(errno.EPERM, "Operation not permitted"), "the kernel answered EPERM"),
        (OSError(9999, "mlock: what"), "mlock answered 9999"),
    ],
)
def test_describe_errno_names_the_call_and_the_number(error: OSError, expected: str) -> None:
    assert errors.describe_errno(error) == expected
