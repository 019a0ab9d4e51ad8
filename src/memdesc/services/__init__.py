"""Services and connections: who has memory, who may see it, and the way between them.

* `protocol`: the messages, typed
* `folder`: where services live in the file system
* `loop`: the one I/O thread of a process
* `channel`: one connected socket: messages, requests and their answers
* `peer`: one end of a connection, the same on both sides: mappings pushed both ways
* `copier`: copyin and copyout through a connection
* `service`, `user_client`: the driver's side
* `connection`: the client's side
"""
