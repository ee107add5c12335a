"""Federated training: clients send projected gradients and losses, and a ledger is the protocol; no weight travels.

The server keeps a replay ledger (:mod:`zolightning.ledger`) and never sees the model. A client that joins late, or comes
back, replays the ledger and stands at the bits of all others.
"""

from .client import Client
from .messages import Refused, Reply, Task
from .rules import Rules
from .server import Round, Server
from .simulation import Simulated, simulate
from .tracking import RoundLog

__all__ = ["Client", "Refused", "Reply", "Round", "RoundLog", "Rules", "Server", "Simulated", "Task", "simulate"]
