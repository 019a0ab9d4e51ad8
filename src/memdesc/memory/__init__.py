"""What lies behind a descriptor: memfds, how they are sealed, and what may happen to them.

Objects:

* `lifecycle`: the one table of states that rules seals, grants, snapshots, growth, recycling, fork
* `memfd`: the VM objects that this process made; `foreign`: those of others
* `lease`: whether anyone else has an object; `closing`: strangers' descriptors, without waiting

Allocating:

* `allocation`: an object with its owner's view: kept or fresh, of the pages that suit
* `recycler`: freed memory kept for the next buffers; `kept`: what of it suits whom; `pressure`:
  when memory gets short
* `limits`: how much there is to be had, before the kernel kills for it
* `page_kinds`, `made_of`: base and huge pages, and what memory is really made of
* `populate`, `transparent`, `placing`: faulting pages in, on several CPUs, huge where that is cheap

`zone_map` is the private memory of zones, which is never shared.
"""
