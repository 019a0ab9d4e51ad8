"""SharedMemoryManager: a process that holds blocks until it is shut down."""

from __future__ import annotations

from collections.abc import Iterable
from multiprocessing import ProcessError
from multiprocessing.managers import (  # type: ignore[attr-defined]
    BaseManager,
    Server,
    State,
    dispatch,
)
from typing import Any, ClassVar

from memdesc.interop.shared_memory import block as blocks, shareable_list
from memdesc.interop.shared_memory.shareable_list import Item


class _Keeper(Server):
    """The manager's process: it attaches to each block, and so holds it."""

    public = Server.public + ["track_segment", "release_segment", "list_segments"]

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._blocks: dict[str, blocks.SharedMemory] = {}

    def track_segment(self, _: Any, name: str) -> None:
        """Hold a block."""
        self._blocks[name] = blocks.SharedMemory(name)

    def release_segment(self, _: Any, name: str) -> None:
        """Remove a block's name, and hold it no longer."""
        block = self._blocks.pop(name)
        try:
            block.unlink()
        except FileNotFoundError:
            pass  # who used it did so already
        finally:
            block.close()

    def list_segments(self, _: Any) -> list[str]:
        """Tell the names of the blocks that it holds."""
        return list(self._blocks)

    def shutdown(self, c: Any) -> None:
        """Release all, and end."""
        for name in list(self._blocks):
            self.release_segment(c, name)
        super().shutdown(c)


class SharedMemoryManager(BaseManager):
    """Makes blocks that live until it is shut down, whoever has them open and whoever ends.

    As `multiprocessing.managers.SharedMemoryManager`. Its process holds the blocks: also those
    whose maker has ended. It is the keeper for blocks that are to outlive the programs that use
    them.

    Parameters
    ----------
    address, authkey, ...
        As of `multiprocessing.managers.BaseManager`.

    Notes
    -----
    ``with`` starts it and shuts it down; so do `start` and `shutdown`. `connect` reaches one that
    runs. A manager that was killed holds nothing; those who have blocks open keep them.

    Examples
    --------
    >>> from memdesc.interop.shared_memory import SharedMemoryManager
    >>> with SharedMemoryManager() as manager:
    ...     block = manager.SharedMemory(size=128)
    ...     numbers = manager.ShareableList(range(3))
    ...     block.size, list(numbers)
    (128, [0, 1, 2])
    """

    _Server: ClassVar[Any] = _Keeper

    def get_server(self) -> Any:
        """Give the server to be run in this process, of a manager that was not started.

        Raises
        ------
        ProcessError
            It was started, or shut down.
        """
        state = self._state.value  # type: ignore[attr-defined]
        if state != State.INITIAL:
            raise ProcessError(
                "the manager was started already: get_server() is for one that runs here"
                if state == State.STARTED
                else "the manager was shut down: make a new one"
            )
        return _Keeper(self._registry, self._address, self._authkey, self._serializer)  # type: ignore[attr-defined]

    def SharedMemory(self, size: int) -> blocks.SharedMemory:
        """Make a block of that many bytes, which this manager holds."""
        block = blocks.SharedMemory(create=True, size=size)
        self._hold(block)
        return block

    def ShareableList(self, sequence: Iterable[Item]) -> shareable_list.ShareableList:
        """Make a list of these items, which this manager holds."""
        made = shareable_list.ShareableList(sequence)
        self._hold(made.shm)
        return made

    def _hold(self, block: blocks.SharedMemory) -> None:
        """Have the manager's process hold a block; without it there is none."""
        try:
            with self._Client(self._address, authkey=self._authkey) as connection:  # type: ignore[attr-defined]
                dispatch(connection, None, "track_segment", (block.name,))
        except BaseException:
            block.unlink()
            block.close()
            raise
