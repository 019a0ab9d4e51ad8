"""How failures travel between tasks, and those that services and connections have in common."""

from __future__ import annotations

from memdesc import errors
from memdesc.errors import (
    AllocationError,
    MappingError,
    MappingReason,
    MemdescError,
    ProtocolError,
    WiringError,
    describe_errno,
)
from memdesc.services import protocol


def failed(number: int, error: BaseException) -> protocol.Failed:
    """Make the form in which an error travels."""
    if not isinstance(error, MemdescError):
        return protocol.Failed(number, "BufferError", str(error)[:4096])
    reason = getattr(error, "reason", None)
    name = None if reason is None else reason.name
    return protocol.Failed(number, type(error).__name__, error.message[:4096], error.errno, name)


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
        return ProtocolError(f"the peer answered {answer.error}: {answer.message}")
    return kind(answer.message, errno=answer.errno)


def no_descriptor(doing: str, error: OSError) -> AllocationError:
    """Say in the family's terms that a descriptor could not be had (EMFILE, ENFILE, ENOMEM)."""
    return AllocationError(
        f"cannot {doing}: {describe_errno(error)}; close descriptors, or raise `ulimit -n`",
        errno=error.errno,
    )
