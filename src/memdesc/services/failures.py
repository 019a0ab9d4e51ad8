"""How failures travel between tasks, and those that services and connections have in common."""

from __future__ import annotations

from memdesc import errors
from memdesc.errors import (
    AllocationError,
    MappingError,
    MappingReason,
    MemdescError,
    ProtocolError,
    RemoteError,
    WiringError,
    WiringReason,
    describe_errno,
)
from memdesc.services import protocol


def failed(number: int, error: BaseException) -> protocol.Failed:
    """Make the form in which an error travels."""
    if not isinstance(error, MemdescError):
        return protocol.Failed(number, "BufferError", str(error)[:4096])
    reason = getattr(error, "reason", None)
    told = error.reference if isinstance(error, RemoteError) else getattr(reason, "name", None)
    return protocol.Failed(number, _family_name(error), error.message[:4096], error.errno, told)


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
    if issubclass(kind, MappingError):
        known = answer.reason in MappingReason.__members__
        reason = MappingReason[answer.reason] if known else MappingReason.REFUSED  # type: ignore[misc]
        return kind(answer.message, reason=reason, errno=answer.errno)
    if issubclass(kind, WiringError):
        if answer.reason not in WiringReason.__members__:
            return ProtocolError(f"the peer answered {answer.error}: {answer.message}")
        return kind(answer.message, reason=WiringReason[answer.reason], errno=answer.errno)  # type: ignore[misc]
    if issubclass(kind, RemoteError):
        return kind(answer.message, errno=answer.errno, reference=answer.reason or "")
    return kind(answer.message, errno=answer.errno)


def no_descriptor(doing: str, error: OSError) -> AllocationError:
    """Say in the family's terms that a descriptor could not be had (EMFILE, ENFILE, ENOMEM)."""
    return AllocationError(
        f"cannot {doing}: {describe_errno(error)}; close descriptors, or raise `ulimit -n`",
        errno=error.errno,
    )
