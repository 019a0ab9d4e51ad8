"""What `memdesc ls` tells, as one record: services, their buffers, and who has these."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from memdesc.cli import in_transit
from memdesc.cli.looking import GONE, Seen, Watch, others, sockets
from memdesc.cli.words import program_of
from memdesc.services import protocol
from memdesc.vm.holders import HeldObject, Holding, Identity, Survey, survey
from memdesc.vm.pages import Access, page_size

_FIGURES = (
    "clients",
    "shares",
    "queues",
    "streams",
    "methods",
    "calls",
    "entries",
    "entry_bytes",
    "slots",
    "slot_bytes",
)


def gather(name: str | None = None) -> dict[str, Any]:
    """Ask all services, or that one; look who has their memory, and what is nobody's."""
    with Watch() as watch:
        found = watch.look(sockets(name), items=True)
    told = [_service(seen) for seen in found]
    claimed = {
        (one["device"], one["inode"])
        for service in told
        for buffer in service["buffers"]
        for one in buffer["objects"]
    }
    seen = survey(None if name is None else claimed)
    programs: dict[int, str] = {}
    for service in told:
        for buffer in service["buffers"]:
            buffer["objects"] = [
                _object(one["device"], one["inode"], seen, programs) for one in buffer["objects"]
            ]
    return {
        "services": told,
        "others": [] if name is None or told[0]["state"] not in GONE else others(name),
        "buffers": _of_no_service(seen, claimed, programs) if name is None else [],
        "in_transit": in_transit.gather() if name is None else [],
        "hidden_tasks": seen.hidden,
        "hidden_pids": seen.hidden_pids,
        "held_up_pids": seen.held_up_pids,
    }


def _service(seen: Seen) -> dict[str, Any]:
    told = seen.told
    return {
        **seen.described(),
        "superseded": told.superseded if told else None,
        **{name: getattr(told, name) if told else None for name in _FIGURES},
        "buffers": [one for item in seen.items if (one := _buffer(item)) is not None],
        "connected": [
            {
                "pid": item.pid,
                "user": item.uid,
                "program": program_of(item.pid),
                "calls": item.calls,
                "mappings": item.mappings,
            }
            for item in seen.items
            if isinstance(item, protocol.ClientItem)
        ],
    }


def _buffer(item: object) -> dict[str, Any] | None:
    """Tell what of a service is memory; None for what is none."""
    if isinstance(item, protocol.ShareItem):
        extra = {"enforced": item.enforced, "ruled": item.ruled} | _form(item)
        extra["content"] = item.content or None
        return _described("share", item.name, item.nbytes, item.writable, item.objects, extra)
    if isinstance(item, protocol.StreamItem):
        extra = {"slots": item.slots, "published": item.published} | _form(item)
        nbytes = item.slots * item.nbytes
        return _described("stream", item.name, nbytes, False, item.objects, extra)
    if isinstance(item, protocol.SubscriberItem):
        extra = {
            "client": item.pid,
            "policy": item.policy,
            "offered": item.offered,
            "dropped": item.dropped,
            "held": item.held,
        }
        return _described("subscriber", item.stream, None, True, item.objects, extra)
    if isinstance(item, protocol.QueueItem):
        extra = {"direction": "out" if item.produces else "in", "wired": item.wired}
        return _described("queue", item.name, item.nbytes, True, (), extra)
    if isinstance(item, protocol.QueueEndItem):
        extra = {"client": item.pid, "entries": item.entries, "dropped": item.dropped}
        return _described("queue end", item.queue, None, True, item.objects, extra)
    return None


def _form(item: protocol.ShareItem | protocol.StreamItem) -> dict[str, Any]:
    return {"shape": item.shape and list(item.shape), "dtype": item.dtype}


def _described(
    kind: str,
    name: str,
    nbytes: int | None,
    writable: bool,
    objects: Sequence[Identity],
    extra: dict[str, Any],
) -> dict[str, Any]:
    access = Access.READ_WRITE if writable else Access.READ_ONLY
    return {
        "kind": kind,
        "name": name,
        "nbytes": nbytes,
        "access": access.value,
        **extra,
        "objects": [{"device": device, "inode": inode} for device, inode in objects],
    }


def _object(device: int, inode: int, seen: Survey, programs: dict[int, str]) -> dict[str, Any]:
    """Tell what the kernel shows of an object, and of who has it."""
    known = seen.objects.get((device, inode)) or HeldObject((device, inode), "")
    holders = sorted(known.holders.values(), key=lambda one: one.pid)
    return {
        "device": device,
        "inode": inode,
        "nbytes": known.nbytes,
        "allocated": known.allocated,
        "pages": pages_of(known),
        "page_size": known.page_size,
        "huge": max((one.huge for one in holders), default=0),
        "wired": max((one.wired for one in holders), default=0),
        "holders": [holder_record(one, programs) for one in holders],
    }


def pages_of(known: HeldObject) -> str | None:
    """Say what pages an object is mapped by; None where nobody has it."""
    if not known.holders:
        return None
    if known.page_size > page_size:
        return "huge"
    mostly = any(one.huge * 2 > one.resident for one in known.holders.values())
    return "transparent huge" if mostly else "base"


def holder_record(one: Holding, programs: dict[int, str]) -> dict[str, Any]:
    """Tell what a task has of an object; `programs` keeps what was read of it."""
    if one.pid not in programs:
        programs[one.pid] = program_of(one.pid)
    return {
        "pid": one.pid,
        "user": one.uid,
        "program": programs[one.pid],
        "access": access_of(one),
        "mapped": one.mapped,
        "resident": one.resident,
        "wired": one.wired,
        "descriptors": one.descriptors,
    }


def access_of(one: Holding) -> str | None:
    """Say what a task may do with an object; None where it has not mapped it."""
    if one.access is not None:
        return one.access.value
    if one.copies:
        return "copy-on-write"
    return "none" if one.mapped else None


def _may_be_ours(one: HeldObject) -> bool:
    """Whether memdesc may have made it: where its mode is not seen, it is mapped shared."""
    if one.ours is None:
        return any(holding.access is not None for holding in one.holders.values())
    return one.ours


def _of_no_service(
    seen: Survey, claimed: Iterable[Identity], programs: dict[int, str]
) -> list[dict[str, Any]]:
    """Tell the memfds that no service names, and that are, or may be, made by memdesc."""
    known = set(claimed)
    found = []
    for identity, one in sorted(seen.objects.items()):
        if identity in known or not _may_be_ours(one):
            continue
        nbytes = one.nbytes
        if nbytes is None:
            nbytes = max((holding.mapped for holding in one.holders.values()), default=None)
        described = _described("memfd", one.name, nbytes, False, (), {"ours": one.ours})
        del described["access"]  # what its owner allows only its seals say
        described["objects"] = [_object(*identity, seen, programs)]
        found.append(described)
    return found
