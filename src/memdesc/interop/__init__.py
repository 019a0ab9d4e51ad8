"""Our memory in what others made: one module for each. Each imports its library only when used.

* `arrays`            NumPy arrays that live in descriptors
* `multiprocessing`   such arrays as handles through Process, Queue, Pipe and Pool
* `shared_memory`     the interface of `multiprocessing.shared_memory`
* `torch`             tensors, and batches that workers write where a GPU reads them
"""
