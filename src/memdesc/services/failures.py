"""How failures travel between tasks, and those that services and connections have in common."""

from __future__ import annotations

from enum import Enum

from memdesc import errors
from memdesc.errors import (
    MappingError,
    MappingReason,
    MemdescError,
    ProtocolError,
    RemoteError,
    SegmentError,
    SegmentReason,
    WiringError,
    WiringReason,
)
from memdesc.services import protocol

_REASONS: dict[type[MemdescError], type[Enum]] = {
    MappingError: MappingReason,
    WiringError: WiringReason,
    SegmentError: SegmentReason,
}
_UNKNOWN: dict[type[MemdescError], Enum] = {MappingError: MappingReason.REFUSED}


def failed(number: int, error: BaseException) -> protocol.Failed:
    """Make the form in which an error travels."""
    if not isinstance(error, MemdescError):
        return protocol.Failed(number, "BufferError", _told(str(error)))
    reason = getattr(error, "reason", None)
    told = error.reference if isinstance(error, RemoteError) else getattr(reason, "name", None)
    return protocol.Failed(number, _family_name(error), _told(error.message), error.errno, told)


def _told(text: str) -> str:
    """Give a text as it can travel: the name of a file need not be one."""
    return text[:4096].encode(errors="backslashreplace").decode()[:4096]


def _family_name(error: MemdescError) -> str:
    """Name the class of the family that an error is of: a program may have made its own."""
    names = (kind.__name__ for kind in type(error).__mro__ if kind.__module__ == errors.__name__)
    return next(name for name in names if name in errors.__all__)


def rebuilt(answer: protocol.Failed) -> BaseException:
    """Make an exception of what a peer says failed; only classes of the family come through."""
    if answer.error == "BufferError":
        return BufferError(answer.message)
    kind = getattr(errors, answer.error, None) if answer.error in errors.__all__ else None
    if not (isinstance(kind, type) and issubclass(kind, MemdescError)):
        return ProtocolError(f"the peer answered {answer.error}: {answer.message}")
    for family, reasons in _REASONS.items():
        if issubclass(kind, family):
            reason = reasons.__members__.get(answer.reason or "", _UNKNOWN.get(family))
            if reason is None:
                return ProtocolError(f"the peer answered {answer.error}: {answer.message}")
            return kind(answer.message, errno=answer.errno, reason=reason)  # type: ignore[call-arg]
    if issubclass(kind, RemoteError):
        return kind(answer.message, errno=answer.errno, reference=answer.reason or "")
    return kind(answer.message, errno=answer.errno)
