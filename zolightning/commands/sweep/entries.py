"""The entries that a sweep compares."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..console import pick
from ..demo.methods import ADAMW, CHECKPOINTED, LORA, QLORA, REFT, VECTORS, Method


@dataclass(frozen=True)
class Entry:
    """A method, and the learning rates to try."""

    method: Method
    """Its own ``lr``, ``steps`` and ``seeds`` are not used."""

    lrs: tuple[float, ...]
    """Learning rates; of several, each trains for the tuning budget, and the lowest validation loss decides."""

    amount: float | None = None
    """A budget of its own, in the sweep's unit; None: the sweep's."""

    seeds: int | None = None
    """Final runs; None: the sweep's."""

    precision: str | None = None
    """Trainer(precision=...); None: the task's."""

    def __post_init__(self) -> None:
        if not self.lrs or min(self.lrs) <= 0:
            raise ValueError(f"`lrs` of {self.method.name} must be numbers > 0, got {list(self.lrs)}")
        if self.seeds is not None and self.seeds < 1:
            raise ValueError(f"`seeds` of {self.method.name} must be >= 1, got {self.seeds}")


def _zo(name: str, title: str, *lrs: float, recipe: str | None = None, batch_size: int = 16, **overrides: object) -> Entry:
    method = Method(name, title, recipe=recipe or name, batch_size=batch_size, decay=True, overrides=overrides)
    return Entry(method, lrs)


PUBLISHED = Method("mezo-published", "MeZO, published step in fp32", published=True)

ENTRIES = {
    entry.method.name: entry
    for entry in (
        _zo("default", "ZO (default recipe)", 1e-3, 2e-3, 4e-3, batch_size=32),
        Entry(replace(REFT, batch_size=32), (2e-2, 4e-2, 8e-2)),
        _zo("spsa", "dense SPSA, middle blocks", 5e-4, 1e-3, 2e-3),
        _zo("spsa-all", "dense SPSA, all weights", 2e-4, 5e-4, 1e-3, recipe="spsa", select="all"),
        _zo("mezo", "MeZO, exact", 1e-5, 3e-5, 1e-4),
        Entry(PUBLISHED, (1e-6, 1e-5, 3e-5, 1e-4), precision="32-true"),
        Entry(ADAMW, (1e-5, 2e-5, 5e-5)),
        Entry(CHECKPOINTED, (1e-5, 2e-5, 5e-5)),
        Entry(LORA, (2e-4, 5e-4, 1e-3)),
        Entry(QLORA, (2e-4, 5e-4, 1e-3)),
        Entry(replace(VECTORS, batch_size=32), (3e-4, 1e-3, 3e-3)),
    )
}
"""Ready-made entries, for ``--methods``."""


def choose(entries: list[Entry] | None, methods: list[str] | str | None) -> list[Entry]:
    """The entries of a sweep, or the ready-made ones, narrowed down to ``methods``.

    Raises:
        ValueError: unknown or doubled name, doubled title.
    """
    known = ENTRIES if entries is None else {entry.method.name: entry for entry in entries}
    for what in ("name", "title"):  # runs are found by the one, and grouped in the table by the other
        given = [getattr(entry.method, what) for entry in entries or ()]
        if len(set(given)) < len(given):
            raise ValueError(f"each entry needs a method {what} of its own, got {given}")
    wanted = pick(methods, known) or known
    return [entry for name, entry in known.items() if name in wanted]
