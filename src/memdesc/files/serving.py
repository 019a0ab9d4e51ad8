"""Serving: the arrays of files, read-only, for any number of processes; swapped while they read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self, final

from memdesc.descriptors.sub import SubMemoryDescriptor
from memdesc.errors import ClosedError
from memdesc.files.loading import Loaded, Progress, changed, load
from memdesc.files.sources import Files, FileSource, as_sources
from memdesc.memory.page_kinds import PageKind
from memdesc.services.arrays import ALL
from memdesc.services.limits import Limits
from memdesc.services.offers import Allow
from memdesc.services.service import Service
from memdesc.vm.forks import lock_for

NEW_VERSION = "version"
"""The event that tells of a new version; its value is the version's number."""


@dataclass(frozen=True, slots=True)
class FileServerStatistics:
    """What a file server serves now, and what it gave.

    Attributes
    ----------
    version : int
    arrays, nbytes : int
        Of that version; bytes with what lies between arrays.
    clients : int
        That are connected.
    opens, opened_bytes : int
        As of `ServiceStatistics`: bytes that clients were let see. None of them was copied.
    """

    version: int
    arrays: int
    nbytes: int
    clients: int
    opens: int
    opened_bytes: int


@final
class FileServer:
    """Serves the arrays of files, loaded once, read-only to any number of processes.

    A client has one array by ``md.connect(name)["array"]``, and all of one version by
    ``connection.arrays()``: in place, without copying. `reload` brings a new version; who has an
    older one keeps that, whole, and its memory goes with the last reader.

    Parameters
    ----------
    name : str
        Of the service.
    files : path-like, FileSource, or several
        As of `load`.
    pages, wired, progress
        As of `load`.
    allow, limits
        As of `Service`.

    Attributes
    ----------
    service : Service
        What clients connect to. It may share more, call methods, and so on.
    loaded : Loaded
        The version that is served.

    Raises
    ------
    NameInUseError, AccessDeniedError
        As of `Service`.
    OSError, InvalidArgument, TransferError, AllocationError, PageKindError, WiringError
        As of `load`; nothing is served then.

    Notes
    -----
    Whoever connects while the first version is being loaded waits for it. Clients that listen to
    the event ``"version"`` are told of each new one.

    Threads: safe; one reloads at a time. Fork: the service stays the parent's. I/O Kit: none.

    Examples
    --------
    >>> import tempfile
    >>> import numpy as np
    >>> import memdesc as md
    >>> folder = tempfile.TemporaryDirectory()
    >>> np.save(folder.name + "/weights.npy", np.arange(6.0))
    >>> with md.files.FileServer("model", folder.name + "/weights.npy"):
    ...     md.connect("model")["weights"]
    array([0., 1., 2., 3., 4., 5.])
    >>> folder.cleanup()
    """

    def __init__(
        self,
        name: str,
        files: Files,
        *,
        pages: PageKind = PageKind.AUTO,
        wired: bool = False,
        allow: Allow | None = None,
        limits: Limits | None = None,
        progress: Progress | None = None,
    ) -> None:
        self._lock = lock_for(self)
        self._pages, self._wired = pages, wired
        self._loaded: Loaded | None = None
        sources = as_sources(files)
        self.service = Service(name, allow=allow, limits=limits)  # first: the name may be taken
        try:
            self._take(load(sources, pages=pages, wired=wired, progress=progress))
        except BaseException:
            self.service.close()
            raise

    @property
    def loaded(self) -> Loaded:
        """The version that is served."""
        loaded = self._loaded
        if loaded is None:
            raise ClosedError(f"the file server {self.service.name!r} was closed")
        return loaded

    @property
    def version(self) -> int:
        """Its number: the first is 1."""
        return self.loaded.version

    def reload(self, files: Files | None = None, *, progress: Progress | None = None) -> Loaded:
        """Load a new version beside the old one, then serve it instead, in one step.

        Parameters
        ----------
        files : optional
            Other files than before.
        progress : callable, optional
            As of `load`.

        Returns
        -------
        Loaded
            What is served now.

        Raises
        ------
        ClosedError, and as `load`
            The old version is served on.
        """
        with self._lock:
            old = self.loaded
            sources = old.sources if files is None else as_sources(files)
            return self._take(
                load(
                    sources,
                    pages=self._pages,
                    wired=self._wired,
                    progress=progress,
                    version=old.version + 1,
                )
            )

    def changed_files(self) -> list[FileSource]:
        """List the files that are no longer what was loaded: changed, replaced or gone."""
        return list(changed(self.loaded))

    def _take(self, loaded: Loaded) -> Loaded:
        """Share a version in place of the one before. Nothing of it is shared if that fails."""
        shares: dict[str, tuple[Any, dict[str, Any]]] = {ALL: (loaded.descriptor, {})}
        for entry in loaded.entries:
            # An array without elements has a share too, of a byte that it does not use.
            part = SubMemoryDescriptor(loaded.descriptor, entry.offset, max(entry.nbytes, 1))
            order = "F" if entry.column_major else "C"
            form: dict[str, Any] = {"shape": entry.shape, "dtype": entry.dtype, "order": order}
            shares[entry.name] = part, {"content": entry.content} if entry.content else form
        old = self._loaded
        with self.service.together():
            for entry in old.entries if old is not None else ():
                if entry.name not in shares:
                    self.service.unshare(entry.name)
            for name, (descriptor, form) in shares.items():
                self.service.share(name, descriptor, **form)
        # Not closed: a client may be getting the old one just now. It goes when nobody has it.
        self._loaded = loaded
        self.service.notify(NEW_VERSION, loaded.version)
        return loaded

    def statistics(self) -> FileServerStatistics:
        """Tell what is served, and to how many; raises `ClosedError`."""
        loaded, service = self.loaded, self.service
        return FileServerStatistics(
            version=loaded.version,
            arrays=len(loaded.entries),
            nbytes=loaded.descriptor.length,
            clients=len(service.clients()),
            opens=service.opens,
            opened_bytes=service.opened_bytes,
        )

    def close(self) -> None:
        """End the service and let go of the memory; clients keep what they have. Again: no-op."""
        self.service.close()
        self._loaded = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        loaded = self._loaded
        state = "closed" if loaded is None else f"version {loaded.version}, {loaded.descriptor!r}"
        return f"<FileServer {self.service.name!r}: {state}>"
