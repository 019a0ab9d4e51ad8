"""Batches on their way: put into a slot by a worker, made tensors again in the training process.

A worker sends what its collate function gave, with a `Place` instead of each tensor that lies in
the slot. Tensors that do not fit, and what is no plain tensor of the CPU, go PyTorch's own way.
"""

from __future__ import annotations

import socket as sockets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from memdesc.errors import TimedOutError
from memdesc.handover import receive_descriptor
from memdesc.interop.torch.needed import collate, default_collate_fn_map, pytree, torch
from memdesc.interop.torch.slots import Flow, flows

ALIGNMENT = 256
"""Of each tensor in a slot: what CUDA gives its own allocations."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor lies in a slot: bytes; the strides are elements."""

    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    def tensor(self, view: memoryview) -> torch.Tensor:
        """Give the tensor over a slot's bytes; PyTorch checks that it lies inside."""
        count = 1
        for extent in self.shape:
            count *= extent
        flat = torch.frombuffer(view, dtype=self.dtype, count=count, offset=self.offset)
        return flat.as_strided(self.shape, self.strides)


class FilledBatch:
    """A batch as it travels.

    Attributes
    ----------
    slot : str or None
        The name of the slot that its places lie in, if there are any; it goes back with them.
    needed : int
        Bytes of a slot that would have taken all of its tensors.
    left_out : int
        How many of these did not get into the slot.
    copied : int
        Bytes that the worker copied into the slot.
    """

    def __init__(self, key: int, slot: str | None, structure: Any, fill: Fill) -> None:
        self.slot = slot
        self.needed, self.left_out, self.copied = fill.needed, fill.left_out, fill.copied
        self._key = key
        self._structure = structure
        self._view: memoryview | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_view": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        # At once: PyTorch drops what arrives from an epoch that was left, and never opens it.
        flow = flows.get(self._key)
        if flow is not None:
            self._claim(flow)

    def _claim(self, flow: Flow) -> None:
        if self.slot is not None and self._view is None:
            self._view = flow.claim(self.slot)

    def open(self, flow: Flow) -> Any:
        """Give the batch, with tensors over the slot."""
        self._claim(flow)  # with no workers it did not travel
        view, self._view = self._view, None
        if view is None:
            return self._structure
        return pytree.tree_map(
            lambda leaf: leaf.tensor(view) if isinstance(leaf, Place) else leaf, self._structure
        )


class Taken(NamedTuple):
    """A slot as a worker has it mapped."""

    name: str
    view: memoryview


class Fill:
    """Puts the tensors of one batch into a slot, one behind the other."""

    def __init__(self, taken: Taken | None) -> None:
        self.needed = self.left_out = self.copied = self._end = 0
        self._view = taken.view if taken else memoryview(b"")
        # Of none that PyTorch could have: then no tensor is found to lie inside.
        self._address = torch.frombuffer(self._view, dtype=torch.uint8).data_ptr() if taken else 0

    def _reserve(self, tensor: torch.Tensor, count: int = 1) -> int | None:
        """Keep room for so many tensors of that kind, if there is: the offset."""
        nbytes = tensor.numel() * tensor.element_size() * count
        start = self._end
        if not nbytes or start + nbytes > self._view.nbytes:
            return None
        self._end += -(-nbytes // ALIGNMENT) * ALIGNMENT
        self.needed += self._end - start
        return start

    def stack(
        self, samples: list[torch.Tensor], *, collate_fn_map: dict[Any, Callable[..., Any]]
    ) -> torch.Tensor:
        """As the default collate function stacks tensors, but in the slot."""
        first = samples[0]
        alike = all(is_plain(one) and one.dtype is first.dtype for one in samples)
        start = self._reserve(first, len(samples)) if alike else None
        if start is None:
            fallback = default_collate_fn_map[torch.Tensor]
            return fallback(samples, collate_fn_map=collate_fn_map)
        shape = (len(samples), *first.shape)
        strides = torch.empty(shape, device="meta").stride()
        out = Place(start, shape, strides, first.dtype).tensor(self._view)
        return torch.stack(samples, 0, out=out)

    def place(self, leaf: Any) -> Any:
        """Say where a tensor lies, copying it into the slot if it lies elsewhere."""
        if not is_plain(leaf) or not leaf.numel():
            return leaf
        offset = leaf.data_ptr() - self._address
        if 0 <= offset < self._end:
            return Place(offset, tuple(leaf.shape), leaf.stride(), leaf.dtype)
        start = self._reserve(leaf)
        nbytes = leaf.numel() * leaf.element_size()
        if start is None:
            self.needed += -(-nbytes // ALIGNMENT) * ALIGNMENT
            self.left_out += 1
            return leaf
        # Dense, and in the same order: what is channels-last stays so.
        strides = torch.empty_like(leaf, device="meta").stride()
        place = Place(start, tuple(leaf.shape), strides, leaf.dtype)
        place.tensor(self._view).copy_(leaf)
        self.copied += nbytes
        return place


def is_plain(value: Any) -> bool:
    """Whether the bytes of a tensor, its shape and dtype are all there is to it."""
    return (
        type(value) is torch.Tensor
        and value.device.type == "cpu"
        and value.layout is torch.strided
        and not (
            value.requires_grad
            or value.is_quantized
            or value.is_nested
            or value.is_conj()
            or value.is_neg()
        )
    )


class SlotCollate:
    """The collate function of the workers: that of the loader, into slots.

    Parameters
    ----------
    collate_fn : callable
        The loader's.
    stacks : bool
        Whether it is the default one, whose tensors can be stacked in the slot.
    """

    def __init__(
        self, collate_fn: Callable[[Any], Any], stacks: bool, key: int, granted: sockets.socket
    ) -> None:
        self._collate = collate_fn
        self._stacks = stacks
        self._key = key
        self._granted = granted
        self._mapped: dict[str, Taken] = {}
        self._taken: Taken | None = None

    def __call__(self, samples: Any) -> FilledBatch:
        """Collate samples."""
        if self._taken is None:
            self._taken = self._take()
        fill = Fill(self._taken)
        if self._stacks:
            rules = {**default_collate_fn_map, torch.Tensor: fill.stack}
            batch = collate(samples, collate_fn_map=rules)
        else:
            batch = self._collate(samples)
        batch = pytree.tree_map(fill.place, batch)
        name = None
        if self._taken is not None and fill.needed:  # also if it is too small: then it goes back
            name, self._taken = self._taken.name, None
        return FilledBatch(self._key, name, batch, fill)

    def _take(self) -> Taken | None:
        """Take the next slot that was granted, if there is one; never wait."""
        try:
            received = receive_descriptor(self._granted)
        except TimedOutError:
            return None
        with received:
            place = received.name.partition(".")[0]
            known = self._mapped.get(place)
            if known is None or known.name != received.name:
                mapping = received.map(prefault=True)
                known = self._mapped[place] = Taken(received.name, memoryview(mapping))
        return known
