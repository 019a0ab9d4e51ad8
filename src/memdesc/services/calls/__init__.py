"""Calls: a service's methods, called by its clients.

* `outgoing`  what a call or its result is made of when it is sent: records, and memory beside them
* `incoming`  the same as it arrives: checked, mapped or copied
* `methods`   a function's signature as what its arguments are checked against
* `workers`   the threads and the event loop that handlers run in
* `running`   one call on the service's side, from its arrival to its answer
* `serving`   what a service and its user clients have of it
* `lent`      a client's private memory while calls use it
* `pending`   one call on the client's side, as a future
* `calling`   what a connection has of it
"""
