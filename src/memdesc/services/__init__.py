"""Services and connections: who has memory, who may see it, and the way between them.

The way, from below:

* `protocol`: the messages, typed; each capability's in a module of its own
* `folder`: where services live in the file system
* `loop`: the one I/O thread of a process
* `channel`: one connected socket and its messages; `requests`: questions and their answers
* `peer`: one end of a connection, the same on both sides: mappings pushed both ways
* `copier`: copyin and copyout through a connection
* `limits`: what one side lets the other take
* `accepting`: the service's end, its name and its clients; `link`: the client's end

The capabilities, each with what a service, its user clients and a connection have of it:

* `sharing`: descriptors under names
* `queues`: a data queue for each client (`errands`: what takes too long for the I/O thread)
* `streams`: slots of memory, filled by the service and seen in place by its clients
* `events`: what a service tells its clients of (`readable`: waiting for it in asyncio)

* `describing`: what a service tells those who look after it (`memdesc ls`), who are no clients

And what they make together: `service`, `user_client` (the driver's side), `connection`.
"""
