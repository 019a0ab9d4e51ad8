"""Data queues of a service: one for each client that opens it.

* `books`: what both directions have: the clients' ends, what they hold, and their end
* `producers`: the service produces, each client consumes
* `consumers`: each client produces, the service consumes
* `parts`: what a service, its user clients and a connection have of it
"""

from memdesc.services.queues.books import QueueTotal
from memdesc.services.queues.consumers import ClientConsumers
from memdesc.services.queues.producers import ClientProducers, PutStatistics

__all__ = ["ClientConsumers", "ClientProducers", "PutStatistics", "QueueTotal"]
