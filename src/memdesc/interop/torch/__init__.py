"""PyTorch: tensors over descriptors, and a DataLoader whose workers write where a GPU reads.

* `tensor`             a tensor over a descriptor, a mapping, or an array that lives in one
* `SharedDataLoader`   torch's `DataLoader`, with batches in slots that both sides have mapped
* `LoaderStatistics`   what it did

PyTorch is imported when one of them is first asked for; without it that is a
`ModuleNotFoundError` which says what to install.
"""

from __future__ import annotations

from memdesc.vm.later import later

TYPE_CHECKING = False
if TYPE_CHECKING:
    from memdesc.interop.torch.loader import (
        LoaderStatistics as LoaderStatistics,
        SharedDataLoader as SharedDataLoader,
    )
    from memdesc.interop.torch.tensors import tensor as tensor

__all__ = ["tensor", "SharedDataLoader", "LoaderStatistics"]

_LATER = {
    "tensor": "memdesc.interop.torch.tensors",
    "SharedDataLoader": "memdesc.interop.torch.loader",
    "LoaderStatistics": "memdesc.interop.torch.loader",
}

if not TYPE_CHECKING:
    __getattr__, __dir__ = later(__name__, _LATER)
