"""The ranks of a run that has several."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from ..methods.estimators import Estimator
from ..methods.ranking import Ranking
from ..noise import Distribution
from ..probing.batches import batch_examples, leaves
from ..space.fingerprint import combined, mixed
from ..types import Answer, Batch, Estimate, Key, PerExample, Point, Tangent, Term
from .exchange import Exchange, RanksError
from .greeting import Greeting, refuse_strangers
from .layout import Parallel
from .merging import joined, mean, merge
from .message import Flag, Message
from .part import Part, Share, told
from .ranks import Joint, Standing

T = TypeVar("T")


class Team:
    """The ranks of torch.distributed's default group, this process among them.

    Args:
        parallel: how they share a step.

    Raises:
        ValueError: there are too many or too few for it.
    """

    def __init__(self, parallel: Parallel | None = None) -> None:
        self.parallel = parallel or Parallel()
        self.exchange = Exchange(self.parallel.timeout)
        self.rank, self.size = self.exchange.rank, self.exchange.size
        self.exchange.where = self._where
        self.layout = self.parallel.layout(self.rank, self.size)
        self.ledger = ""
        """Where the run's replay ledger is, for messages."""
        self._step = 0
        self._module: nn.Module | None = None
        self._wishes: set[int] = set()
        self._anew: set[int] = set()
        self._checked = False

    @contextmanager
    def leaving(self) -> Iterator[None]:
        """Around code that belongs to one rank: after an error in it the others are not waited for."""
        try:
            yield
        except BaseException as error:
            self.exchange.broken = self.exchange.broken or f"this rank has left the others: {error!r}"
            raise

    def decide(self, make: Callable[[], T]) -> T:
        return self.exchange.decide(make)

    def traffic(self) -> dict[str, float]:
        """Costs of this rank's exchanges so far, by the ends of the metrics' names."""
        spent = self.exchange.traffic
        return {"ranks/size": self.size, "ranks/bytes": spent.sent, "ranks/exchange_seconds": spent.seconds}

    # set-up

    def begin(self, module: nn.Module, estimator: Estimator, noise: Distribution, settings: Mapping[str, Any]) -> None:
        """Check that the ranks belong together, and give all of them the weights of rank 0.

        Raises:
            RanksError: a rank runs another program, or cannot get the weights.
            ValueError: the estimator's points cannot be spread over the ranks.
        """
        self._module, self._estimator = module, estimator
        self._wishes, self._anew, self._checked = set(), set(), False
        self._refuse_estimator(estimator)
        tensors = tensors_of(module)
        here = Greeting.of(tensors, self.parallel.mode, noise, settings)
        if len(set(self.exchange.gather(_digest(repr(here))))) > 1:
            refuse_strangers([Greeting(*each) for each in self.exchange.values(here)])
        self.equalize(tensors)

    def equalize(self, tensors: Mapping[str, Tensor]) -> list[str]:
        """Give every rank the tensors of rank 0; the names of those that were not equal.

        Raises:
            RanksError: a tensor cannot be sent.
        """
        hashes = mixed(tensors.items())
        if len(set(self.exchange.gather(_digest(repr(hashes))))) == 1:
            return []
        found = self.exchange.values(hashes)
        names = [name for name in tensors if any(other[name] != found[0][name] for other in found)]
        for name in names:
            if type(tensors[name]) not in (Tensor, nn.Parameter):
                raise RanksError(
                    f"{name!r} is a {type(tensors[name]).__name__} with other values on some ranks, and such weights are not "
                    "sent; load the same ones on every rank"
                )
        self.exchange.share(tensors[name].data for name in names)
        return names

    def _refuse_estimator(self, estimator: Estimator) -> None:
        if isinstance(estimator, Ranking):
            raise ValueError("`Ranking` shows its candidates to one oracle, so it runs in one process; use devices=1")
        shares = self.layout.shares(estimator.ask(Key(0, 0)))
        if not all(shares):
            what = "directions" if self.layout.whole else "points"
            raise ValueError(
                f"`parallel={self.parallel.mode!r}` spreads the {what} of a step over {self.layout.members} ranks, and "
                f"{estimator!r} has {sum(map(bool, shares))}; raise num_queries, or use parallel='data'"
            )

    def _where(self) -> str:
        kept = f", and its ledger {self.ledger} holds the steps before" if self.ledger else ""
        return (
            f"The run was at optimizer step {self._step}{kept}; it can go on from its last checkpoint, on any number of ranks."
        )

    # a step

    def part(self, estimator: Estimator, key: Key, before: int, batch: Batch) -> Part:
        layout = self.layout
        sow(key, before, layout.group)
        digest = 0
        if layout.members > 1:
            held = [(str(i), leaf) for i, leaf in enumerate(leaves(batch)) if isinstance(leaf, Tensor)]
            digest = int(combined(mixed(held))[:16], 16)
        return Share(estimator, key, batch_examples(batch) or 1, layout, digest)

    def stale(self, place: int, holds: bool) -> bool:
        """Rank 0 finds it, so the ranks agree on when in the exchange before."""
        if not holds:
            self._wishes.add(place)
        return place in self._anew

    def found(self, place: int) -> None:
        """The subspace of this optimizer is found."""
        self._anew.discard(place)
        self._wishes.discard(place)

    def join(self, key: Key, parts: Sequence[Part], looks: Sequence[float], standing: Callable[[bool], Standing]) -> Joint:
        """Exchange the step.

        Raises:
            RanksError: a rank is gone, at another step, or has other weights.
        """
        self._step = key.step
        check = not self._checked or key.step % self.parallel.check_every == 0
        mine, self._checked = standing(check), True
        packed = self._message(key, parts, looks, mine).pack()
        messages = [Message.unpack(data) for data in self.exchange.gather(packed)]
        if len(steps := {message.step for message in messages}) > 1:
            raise RanksError(f"the ranks are at different steps, {sorted(steps)}; a rank came late or lost one; restart it")
        agreed = self._agreed(mine) if len({message.digest for message in messages}) > 1 else None
        if any(Flag.ANEW in message.flags for message in messages):
            self._anew.add(mine.place)
        size, estimates, examples = self.layout.members, [], []
        for group in range(self.layout.groups):
            of_group = messages[group * size : (group + 1) * size]
            if (estimate := self._of_group(key, group, of_group)) is not None:
                estimates.append(estimate)
                examples.append(of_group[0].examples)
        estimate = joined(estimates, examples)._replace(forwards=sum(message.forwards for message in messages))
        seen = [(float(message.examples or 1), message.looks) for message in messages if message.looks]
        looked = [mean([(n, each[i]) for n, each in seen]) for i in range(len(seen[0][1]))] if seen else ()
        return Joint(estimate, looked, agreed)

    def means(self, values: Sequence[float], examples: int) -> list[float]:
        """One more exchange."""
        packed = torch.tensor([float(examples), *values], dtype=torch.float64).numpy().tobytes()
        rows = [np.frombuffer(data, dtype=np.float64).tolist() for data in self.exchange.gather(packed)]
        seen = [row for row in rows if row[0] > 0]
        return [mean([(row[0], row[i]) for row in seen]) for i in range(1, len(values) + 1)]

    def _message(self, key: Key, parts: Sequence[Part], looks: Sequence[float], standing: Standing) -> Message:
        local, shares = merge([part.estimate for part in parts]), [part for part in parts if isinstance(part, Share)]
        flags = Flag.ANEW * (standing.place in self._wishes)
        flags |= Flag.OWN * any(part.own for part in shares)
        spread = self.layout.members > 1
        values = [v for part in shares for answer in part.answers for v in _numbers(answer)] if spread else local.coefficients
        return Message(
            step=key.step,
            examples=sum(part.examples for part in parts),
            forwards=local.forwards,
            digest=standing.digest(),
            batch=sum(part.digest for part in shares) % (1 << 64),
            flags=Flag(flags),
            sizes=tuple(part.own for part in shares) if spread else (),
            loss=local.loss,
            looks=tuple(looks),
            values=tuple(values),
        )

    def _of_group(self, key: Key, group: int, messages: Sequence[Message]) -> Estimate | None:
        """The joint answers of a group's members; None where they were given no point."""
        first = messages[0]
        if not all(message.examples for message in messages):
            return None
        if self.layout.members == 1:
            if Flag.OWN in first.flags:
                keys = [self.layout.term(Term(key._replace(query=i), 0.0), group).key for i in range(len(first.values))]
            else:
                keys = self._estimator.directions(key)
            return Estimate(tuple(map(Term, keys, first.values)), (first.loss,), first.forwards)
        if len({(message.batch, message.sizes) for message in messages}) > 1:
            ranks = [group * self.layout.members + i for i in range(self.layout.members)]
            raise RanksError(
                f"`parallel={self.parallel.mode!r}` needs equal batches on the ranks {ranks}; they differ at step {key.step}: "
                "give the loader's sampler a seed of its own, or leave the sampler to the Trainer"
            )
        return self._assembled(key, group, messages)

    def _assembled(self, key: Key, group: int, messages: Sequence[Message]) -> Estimate:
        told_, taken = [], 0
        left = [iter(message.values) for message in messages]
        for size in messages[0].sizes:
            at = key._replace(query=taken)
            points = self._estimator.ask(at, size or None)
            answers = [Answer(math.nan)] * len(points)
            for numbers, places in zip(left, self.layout.shares(points), strict=True):
                for place in places:
                    answers[place] = _answer(points[place], numbers)
            told_.append(told(self.layout, group, self._estimator, at, answers))
            taken += size * self._estimator.num_queries
        return merge(told_)

    def _agreed(self, mine: Standing) -> Standing:
        """Rank 0's settings and the weights that any rank read; an error where weights or steps differ."""
        found = [Standing.received(each) for each in self.exchange.values(mine)]
        if len({each.place for each in found}) > 1:
            raise RanksError(f"the ranks step different optimizers at step {mine.step}: {[each.place for each in found]}")
        if len({each.weights for each in found}) > 1:
            self._refuse_weights(mine.step)
        return found[0]._replace(read=frozenset().union(*(each.read for each in found)))

    def _refuse_weights(self, step: int) -> None:
        assert self._module is not None
        hashes = self.exchange.values(mixed(self._module.named_parameters()))
        for name, value in hashes[0].items():
            if odd := [rank for rank, other in enumerate(hashes) if other[name] != value]:
                raise RanksError(
                    f"the weights of the ranks have come apart before step {step}: {name!r} on rank {odd[0]} is not that on "
                    f"rank 0; they are compared every {self.parallel.check_every} steps. {self.exchange.where()}"
                )


def sow(key: Key, before: int, group: int) -> None:
    """Set all generators by step, micro-batch and group: ranks that see one batch draw the same, others do not."""
    seed = int.from_bytes(blake2b(repr((tuple(key[:2]), before, group)).encode(), digest_size=8).digest(), "little")
    torch.manual_seed(seed)
    np.random.seed(seed % (1 << 32))
    random.seed(seed)


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers, which are to be equal on all ranks."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _digest(text: str) -> bytes:
    return blake2b(text.encode(), digest_size=8).digest()


def _numbers(answer: Answer) -> list[float]:
    if answer.losses is not None:
        values: list[float] = answer.losses.tolist()
        return values
    return [answer.loss] if answer.slope is None else [answer.loss, answer.slope]


def _answer(point: Point, numbers: Iterator[float]) -> Answer:
    if isinstance(point, PerExample):
        losses = torch.tensor([next(numbers) for _ in range(point.queries.numel())], dtype=torch.float64)
        return Answer(losses.mean().item(), losses)
    return Answer(next(numbers), slope=next(numbers) if isinstance(point, Tangent) else None)
