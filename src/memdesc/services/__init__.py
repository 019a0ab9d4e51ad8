"""Services and connections: who has memory, who may see it, and the way between them.

The way, from below:

* `protocol`: the messages, typed; each capability's in a module of its own
* `folder`: where services live in the file system
* `channel`: one connected socket and its messages; `requests`: questions and their answers
* `peer`: one end of a connection, the same on both sides: mappings pushed both ways
* `copier`: copyin and copyout through a connection
* `limits`: what one side lets the other take
* `accepting`: the service's end, its name and its clients; `link`: the client's end

The capabilities, each with what a service and its user clients have of it and, in a module of its
own, what a connection has: a program that only connects loads nothing of the other side.

* `sharing`, `shared`: descriptors under names (`arrays`: as NumPy sees them)
* `queues`, `opening`: a data queue for each client (`errands`: what takes too long for the I/O
  thread)
* `streams`, `subscribing`: slots of memory, filled by the service, seen in place by its clients
* `events`, `listening`: what a service tells its clients of (`arrivals`: waiting for it)
* `calls`: a service's methods, called by its clients

* `describing`: what a service tells those who look after it (`memdesc ls`), who are no clients

And what they make together: `service`, `user_client` (the driver's side), `connection`.
"""
