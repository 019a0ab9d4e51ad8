"""PyTorch itself, or an error that says how to have it."""

from __future__ import annotations

from memdesc.vm.telling import needed

with needed("memdesc.interop.torch", "PyTorch", "torch"):
    import torch
    from torch.utils import _pytree as pytree
    from torch.utils.data import DataLoader, default_collate
    from torch.utils.data._utils.collate import (
        collate,
        default_collate_fn_map,
    )

__all__ = ["DataLoader", "collate", "default_collate", "default_collate_fn_map", "pytree", "torch"]
