"""Batches onto the GPU: copies on a stream of their own, straight out of registered slots.

A slot may be filled again only when the copies out of it are done. PyTorch notes that for pinned
memory that it allocated itself, and for no other. So batches in registered memory never leave the
loader: it starts their copies, keeps each until the event behind its copies has come, and hands
out what is on the GPU.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, Protocol

from memdesc.interop.torch.needed import pytree, torch

if TYPE_CHECKING:
    from memdesc.dma.cuda import CudaDevice

MOST_IN_FLIGHT = 2
"""Batches whose copies may be under way: one is copied while the next one is started."""


class CopyStream(Protocol):
    """Where copies run: a GPU's stream, or what stands in for one in tests."""

    def copy(self, batch: Any) -> tuple[Any, Any]:
        """Start copying a batch: (what it becomes, the event behind the copies)."""

    def hand_over(self, moved: Any, event: Any) -> None:
        """Let the caller's stream use it from here on: it waits for the event, not the caller."""


class CudaStream:
    """A stream of a GPU, beside the one that computes."""

    def __init__(self, device: CudaDevice) -> None:
        self._device = torch.device("cuda", device.index)
        self._stream = torch.cuda.Stream(self._device)

    def copy(self, batch: Any) -> tuple[Any, Any]:
        """Start copying every tensor of a batch."""

        def moved(leaf: Any) -> Any:
            if isinstance(leaf, torch.Tensor):
                return leaf.to(self._device, non_blocking=True)
            return leaf

        with torch.cuda.stream(self._stream):
            return pytree.tree_map(moved, batch), self._stream.record_event()

    def hand_over(self, moved: Any, event: Any) -> None:
        """Have the current stream wait, and PyTorch's allocator know that it uses the memory."""
        current = torch.cuda.current_stream(self._device)
        current.wait_event(event)
        for leaf in pytree.tree_leaves(moved):
            if isinstance(leaf, torch.Tensor):
                leaf.record_stream(current)


class Moving:
    """One iteration's batches on their way to the GPU."""

    def __init__(self, stream: CopyStream) -> None:
        self._stream = stream
        self._in_flight: deque[tuple[Any, Any]] = deque()

    def start(self, batch: Any) -> tuple[Any, Any]:
        """Start copying a batch, which is kept until that is done."""
        while len(self._in_flight) >= MOST_IN_FLIGHT:
            self._wait()
        moved, event = self._stream.copy(batch)
        self._in_flight.append((event, batch))
        return moved, event

    def hand_over(self, started: tuple[Any, Any]) -> Any:
        """Give what `start` gave, for use on the caller's stream."""
        moved, event = started
        self._stream.hand_over(moved, event)
        return moved

    def let_go(self) -> None:
        """Let go of the batches that are copied; never wait."""
        while self._in_flight and self._in_flight[0][0].query():
            self._in_flight.popleft()

    def end(self) -> None:
        """Wait for all copies, and let go."""
        while self._in_flight:
            self._wait()

    def _wait(self) -> None:
        self._in_flight[0][0].synchronize()
        self._in_flight.popleft()
