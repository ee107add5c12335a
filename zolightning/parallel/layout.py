"""The work of each rank: the ranks in groups that see a batch each, and the points of a step spread over a group's members."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

from .._answers import did_you_mean
from ..types import Key, PerExample, Point, Shared, Term

Mode: TypeAlias = Literal["data", "query", "sign", "data+sign"]
MODES: tuple[Mode, ...] = ("data", "query", "sign", "data+sign")


@dataclass(frozen=True)
class Parallel:
    """How several ranks share a step.

    Args:
        mode: 'data': a batch for each rank, all points on each. 'query': one batch, the directions spread over the ranks.
            'sign': one batch, the points spread, so that one rank probes θ + eps·z and another θ − eps·z (perturbation
            parallel; DistZO2, arXiv:2507.03211). 'data+sign': a batch for each pair of ranks, which share its points.
        timeout: seconds, > 0, that a rank waits for the others before it ends with an error.
        check_every: optimizer steps, >= 1, between comparisons of the ranks' weights.
        backend: of the process group. None: gloo on CPUs; gloo for numbers and NCCL for tensors on GPUs.
        start_method: of the processes that the Trainer starts on this machine, where nobody else does: 'popen' runs the script
            once more, 'spawn' and 'fork' serve scripts and notebooks whose objects can be sent.

    Raises:
        ValueError: a value is out of range.
    """

    mode: Mode = "data"
    timeout: float = 1800.0
    check_every: int = 64
    backend: str | None = None
    start_method: Literal["popen", "spawn", "fork", "forkserver"] = "popen"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            hint = did_you_mean(str(self.mode), MODES)
            raise ValueError(f"`parallel={self.mode!r}` is unknown; allowed: {', '.join(map(repr, MODES))}{hint}")
        if not self.timeout > 0:
            raise ValueError(f"`Parallel(timeout=...)` must be > 0 seconds, got {self.timeout}")
        if self.check_every < 1:
            raise ValueError(f"`Parallel(check_every=...)` must be >= 1, got {self.check_every}")

    def layout(self, rank: int, size: int) -> Layout:
        """Of the ranks of a run.

        Raises:
            ValueError: an odd number of them cannot make pairs.
        """
        if self.mode == "data+sign" and size % 2:
            raise ValueError(f"`parallel='data+sign'` puts ranks into pairs and needs an even number of them, got {size}")
        members = {"data": 1, "data+sign": 2}.get(self.mode, size)
        return Layout(rank, size, members, whole=self.mode == "query")


class Layout(NamedTuple):
    """Rank r is member r mod m of group r div m.

    Args:
        rank: of this process.
        size: number of ranks.
        members: ranks in a group: they see the same batches, and each runs some of its points.
        whole: the points of a direction stay together.
    """

    rank: int = 0
    size: int = 1
    members: int = 1
    whole: bool = False

    @property
    def groups(self) -> int:
        """Batches that a micro-batch of the run consists of."""
        return self.size // self.members

    @property
    def group(self) -> int:
        return self.rank // self.members

    @property
    def member(self) -> int:
        return self.rank % self.members

    def shares(self, points: Sequence[Point]) -> list[list[int]]:
        """The places of the points that each member runs, dealt out like cards: directions, or single points."""
        units: dict[Hashable, list[int]] = {}
        for place, point in enumerate(points):
            units.setdefault(_direction(point) if self.whole else place, []).append(place)
        shares: list[list[int]] = [[] for _ in range(self.members)]
        for number, places in enumerate(units.values()):
            shares[number % self.members] += places
        return shares

    def point(self, point: Point) -> Point:
        """The group's own, where examples have directions of their own.

        Example i of group g has query i·G + g, the place that it had in a batch dealt out to G groups as samplers do. So a run
        of many groups gives the bits of one process on all of the examples, and no group needs the size of another's batch.
        """
        if self.groups == 1 or not isinstance(point, PerExample):
            return point
        return point._replace(queries=point.queries * self.groups + self.group)

    def term(self, term: Term, group: int) -> Term:
        """The same for the answer at such a point."""
        key = term.key
        return Term(Key(key.seed, key.step, key.query * self.groups + group), term.coefficient)


def _direction(point: Point) -> Hashable:
    if isinstance(point, Shared):
        return tuple(term.key for term in point.terms)
    return int(point.queries[0]) if isinstance(point, PerExample) else point.key
