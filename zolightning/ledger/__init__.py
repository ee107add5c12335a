"""The replay ledger: a base and a few numbers a step, from which the weights of any step are rebuilt bit for bit."""

from ..space.fingerprint import fingerprint
from .base import base_path, load_base, save_base
from .format import LedgerError
from .pending import PendingLedger
from .reader import Ledger, locate, read
from .recorder import Position, Recorder
from .replay import Replayed, replay
from .writer import Claim, claim

__all__ = [
    "Claim",
    "Ledger",
    "LedgerError",
    "PendingLedger",
    "Position",
    "Recorder",
    "Replayed",
    "base_path",
    "claim",
    "fingerprint",
    "load_base",
    "locate",
    "read",
    "replay",
    "save_base",
]
