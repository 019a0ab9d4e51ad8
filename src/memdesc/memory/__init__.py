"""What lies behind a descriptor: memfds, how they are sealed, and what may happen to them.

* `limits`: how much memory there is to be had, before the kernel kills for it
* `lifecycle`: the one table of states that rules seals, grants, snapshots, growth, recycling, fork
* `page_kinds`: base and huge pages
* `closing`: descriptors of strangers closed without waiting for them
* `memfd`: the VM objects themselves: created, received, or found in another task
"""
