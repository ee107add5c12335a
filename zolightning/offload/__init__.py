"""Training models that do not fit: weights in host memory or on a disk, one matrix at a time where operations read it."""

from .attach import attach, left_in_memory
from .disk import DiskTier
from .entry import Entry
from .export import export
from .files import OffloadError
from .notes import resume
from .options import Offload
from .parts import entries_of, rows_together
from .pretrained import from_pretrained
from .residency import StoredParameter, bind, move, stored
from .store import Store
from .tiers import HostTier, Tier
from .walk import Walk

__all__ = [
    "DiskTier",
    "Entry",
    "HostTier",
    "Offload",
    "OffloadError",
    "Store",
    "StoredParameter",
    "Tier",
    "Walk",
    "attach",
    "bind",
    "entries_of",
    "export",
    "from_pretrained",
    "left_in_memory",
    "move",
    "resume",
    "rows_together",
    "stored",
]
