"""The kinds of memory descriptor, one a file, over one abstract base.

* `base`: `MemoryDescriptor`: what every kind can do (`mappable`: the mapping half of it)
* `buffer`: `BufferMemoryDescriptor`: memory of our own, made to be shared
* `address_range`: memory that lies in this or another task already
* `sub`, `multi`: a part of one descriptor; several as one
* `received`: what a peer gave
"""
