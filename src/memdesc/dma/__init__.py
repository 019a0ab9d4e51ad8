"""Devices on the same pages: a disk by O_DIRECT and io_uring."""
