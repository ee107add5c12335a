"""A client: a session whose steps are joined with those of others, and a replay of what came of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from ..engine.session import Session
from ..engine.updates import UpdateStats, apply_update
from ..ledger.format import Check, LedgerError, Step
from ..ledger.recorder import header_of, method_of, options_of, unplain
from ..methods.config import ZOConfig
from ..methods.estimators import Estimator
from ..methods.optimizers import is_plain_sgd
from ..methods.surrogate import Surrogate
from ..parallel import Alone, Part
from ..parallel.ranks import Joint, Standing
from ..probing.batches import batch_examples
from ..space import Leaf
from ..space.fingerprint import fingerprint
from ..types import Answer, Batch, Estimate, Forward, Key, PerExample, Point, Prepare, Shared, Tangent, Term
from .follower import Follower
from .messages import Reply, Task
from .opening import Opening, plain


class Client(Follower):
    """One client of a federation, whose data stays with it.

    Args:
        module: with the federation's base weights; they are trained in place.
        batches: of its data, gone through again and again, as a DataLoader.
        config: the method, the same for all clients.
        optimizer: the same for all; its learning rates are those of the first client.
        forward: batch → loss, or losses of shape (B,).
        examples: that its numbers stand for; None: those that it saw in the round.
        prepare: makes of a batch, once for all probes of a step, the value that ``forward`` gets; None: it gets the batch.

    Raises:
        ValueError: the method has parts that no federation can share.
    """

    def __init__(
        self,
        module: nn.Module,
        batches: Iterable[Batch],
        config: ZOConfig,
        optimizer: Optimizer,
        forward: Forward,
        *,
        examples: int | None = None,
        prepare: Prepare | None = None,
    ) -> None:
        super().__init__(module)
        self.config = federated(config)
        self._forward, self._prepare, self._examples = forward, prepare, examples
        self._batches = _endless(batches)
        self._held = [next(self._batches)]
        self._place = _Place()
        self.session = Session(module, optimizer, self.config, apply=self._apply, ranks=self._place)
        estimator = self.session.estimator
        self._surrogate = estimator if isinstance(estimator, Surrogate) else None
        self._lrs = tuple(float(group["lr"]) for group in optimizer.param_groups)
        self._moves = False
        self.opening = self._describe(optimizer)

    def _describe(self, optimizer: Optimizer) -> Opening:
        leaves = self.session.subspace(self._forward, self._held[0], prepare=self._prepare).view.leaves
        if self._surrogate is not None:
            self._surrogate.bind(leaves)
        stepper, names = self.session.stepper(optimizer), {id(p): name for name, p in self._parameters.items()}
        settings = plain({**self.config.to_dict(), "lrs": self._lrs})
        header = header_of(self.module, self.session.seed, 0, settings, fingerprint(self._parameters.items()))
        method, options = method_of(names, 0, stepper, leaves), options_of(0, stepper)
        if reason := method.unsupported or unplain(stepper, options):
            raise ValueError(f"a federation needs steps that can be replayed: {reason}")
        return Opening.unpack(Opening(header, method, options).pack())

    def _heard(self, step: Step) -> None:
        if self._surrogate is not None:
            self._surrogate.hear(step.step, step.terms)

    def work(self, task: Task) -> Reply:
        """Catch up, take the local steps, and leave the weights where the ledger has them.

        Raises:
            LedgerError: the server's ledger and this client do not fit.
            ValueError: local steps by another optimizer than plain SGD.
        """
        self.catch_up(task.records, task.since)
        if task.head != self.head:
            raise LedgerError(f"the server stands at {task.head.hex()}, this client at {self.head.hex()}; start it again")
        session = self.session
        optimizer = session.optimizers[0]
        self._moves, self._place.slot, self._place.slots = task.local_steps > 1, task.slot, task.slots if task.own else 1
        if self._moves and not is_plain_sgd(session.stepper(optimizer)):
            raise ValueError("`local_steps` > 1 averages moves of plain SGD; use optimizer='sgd', or local_steps=1")
        for group, lr in zip(optimizer.param_groups, task.lrs, strict=True):
            group["lr"] = lr
        session.step = task.step
        if self._surrogate is not None:
            self._surrogate.begin_round()
        before = [p.detach().clone() for p in self._trained()] if self._moves else []
        records: list[Step | Check] = [Check(self.step, self.fingerprint())] if task.check else []
        seen = 0
        try:
            for _ in range(task.local_steps):
                batch = self._next()
                seen += batch_examples(batch) or 1
                records.append(self._one(batch, task))
        finally:
            for parameter, value in zip(self._trained(), before, strict=False):
                parameter.data.copy_(value)
        return Reply.of(self._examples or seen, records, self.head, session.seed)

    def _one(self, batch: Batch, task: Task) -> Step:
        """A local step; its terms have the client's own numbers."""
        session = self.session
        if session.estimate(self._forward, batch, prepare=self._prepare) is None:
            session.step += 1
            return Step(session.step - 1, 0, (), (), float("nan"))
        record = session.update()
        terms = record.terms if self._moves else self._place.estimate.terms
        slots = self._place.slots
        own = tuple(Term(key._replace(query=key.query // slots), c) for key, c in terms)
        return Step(record.step, 0, own, (), record.loss, record.unread)

    def _apply(
        self, optimizer: Optimizer, leaves: Sequence[Leaf], terms: Sequence[Term], key: Key, *, measure: bool = False
    ) -> UpdateStats:
        """Local moves only: the federation's steps come by the ledger."""
        return apply_update(optimizer, leaves, terms, key, measure=measure) if self._moves else UpdateStats()

    def _trained(self) -> list[Tensor]:
        return [leaf.parameter for leaf in self.session.view().leaves]

    def _next(self) -> Batch:
        return self._held.pop() if self._held else next(self._batches)


def federated(config: ZOConfig) -> ZOConfig:
    """The settings in a federation: equal on all clients, of which none decides for itself.

    Raises:
        ValueError: a part of the method looks at one client's losses.
    """
    if config.conservative or config.backprop is not None:
        name = "conservative" if config.conservative else "backprop"
        raise ValueError(f"`{name}` depends on one client's data, and no ledger record says it; leave it out of a federation")
    if config.anchor:
        raise ValueError("`anchor` in a federation is not there; leave it out")
    changes: dict[str, Any] = {"estimator": copy.deepcopy(config.estimator)}  # it may keep what it was told
    if config.lr == "auto":
        changes["lr"] = "module"
    if config.seed is None:
        changes["seed"] = 0
    return config.override(**changes)


class _Place(Alone):
    """This client among the clients of a round, as a session asks for it."""

    slot, slots = 0, 1
    estimate = Estimate((), (), 0)
    """The last one, under the run's keys."""

    def part(self, estimator: Estimator, key: Key, before: int, batch: Batch) -> Part:
        return Part(estimator, key) if self.slots == 1 else _Own(estimator, key, self.slot, self.slots)

    def join(self, key: Key, parts: Sequence[Part], looks: Sequence[float], standing: Callable[[bool], Standing]) -> Joint:
        joint = super().join(key, parts, looks, standing)
        self.estimate = joint.estimate
        return joint


class _Own(Part):
    """A micro-batch whose direction i has the number i·slots + slot."""

    def __init__(self, estimator: Estimator, key: Key, slot: int, slots: int) -> None:
        super().__init__(estimator, key)
        self._slot, self._slots = slot, slots

    def ask(self, examples: int | None) -> Sequence[Point]:
        return [self._moved(point) for point in super().ask(examples)]

    def tell(self, answers: Sequence[Answer]) -> Estimate:
        estimate = super().tell(answers)
        self.estimate = estimate._replace(terms=tuple(Term(self._key(key), c) for key, c in estimate.terms))
        return self.estimate

    def _key(self, key: Key) -> Key:
        return key._replace(query=key.query * self._slots + self._slot)

    def _moved(self, point: Point) -> Point:
        if isinstance(point, PerExample):
            return point._replace(queries=point.queries * self._slots + self._slot)
        if isinstance(point, Tangent):
            return Tangent(self._key(point.key))
        return Shared(tuple(Term(self._key(key), c) for key, c in point.terms))


def _endless(batches: Iterable[Batch]) -> Iterator[Batch]:
    while True:
        before = 0
        for batch in batches:
            before += 1
            yield batch
        if not before:
            raise ValueError("a client's loader gave no batch")
