"""A module around something that answers and gives no gradient; its backward pass asks more and takes differences."""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..noise import DISTRIBUTIONS, sample
from ..objectives.transport import AnswerError, Transport
from ..types import Key

Predict = Callable[[Tensor], Tensor]
Differences = Literal["rge", "groups", "cge"]


class BudgetError(RuntimeError):
    """The next request would take more queries than are allowed."""


class Served:
    """A program or a server as a function of tensors: each row goes out as a list of numbers, a list or number comes back.

    Args:
        transport: see :mod:`zolightning.objectives.transport`.
    """

    def __init__(self, transport: Transport) -> None:
        self.transport = transport

    def __call__(self, rows: Tensor) -> Tensor:
        """(B, …) → (B, …)."""
        answers = self.transport.ask([json.dumps(row) for row in rows.tolist()])
        try:
            return torch.tensor(answers, dtype=torch.float32)
        except (TypeError, ValueError) as error:
            raise AnswerError(f"{self.transport}: expected numbers in lists of one shape, got {answers!r:.200}") from error


class BlackBox(nn.Module):
    r"""y = f(z), where f only answers. Its backward pass estimates the gradient of the loss ℓ from more answers:

    .. math:: a = \frac{c}{\mu} \sum_{i=1}^{q} \big\langle \nabla_y \ell,\; f(z + \mu u_i) - f(z) \big\rangle \, u_i

    so the modules before it are trained by the backprop of :math:`a^\top z`, under any Trainer; its own weights are never
    needed. ZO-AE-DS, arXiv:2203.14195. Every example has directions of its own. Where no gradient is asked for, as under
    :class:`~zolightning.ZOStrategy`, it answers and asks nothing more.

    Args:
        predict: (B, …) → (B, k) scores, a function of each row only: a function, a served model (:class:`Served`), an engine.
        queries: q, directions for each example, >= 1; None: as many as z has numbers.
        estimator: 'rge': random directions on the unit sphere, c = d/q. 'groups': ±1 on q groups of coordinates that are drawn
            anew each time, c = 1; the estimates add up. 'cge': the coordinates, which takes q = d.
        mu: length of a step along a coordinate, or a unit direction, > 0.
        batch_size: rows in one request at most, >= 1.
        budget: queries in all at most, >= 0; None: any number.
        cache_size: answers that are remembered, >= 0: a question that comes twice is not sent again.
        seed: of the directions.

    Raises:
        ValueError: a setting out of range.
    """

    def __init__(
        self,
        predict: Predict,
        queries: int | None = None,
        estimator: Differences = "groups",
        mu: float = 5e-3,
        *,
        batch_size: int = 1024,
        budget: int | None = None,
        cache_size: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if estimator not in ("rge", "groups", "cge"):
            raise ValueError(f"`BlackBox(estimator={estimator!r})` is unknown; allowed: 'rge', 'groups', 'cge'")
        if not (math.isfinite(mu) and mu > 0):
            raise ValueError(f"`BlackBox(mu=...)` must be a finite number > 0, got {mu}")
        for name, value, least in (
            ("queries", queries, 1), ("batch_size", batch_size, 1), ("budget", budget, 0), ("cache_size", cache_size, 0)
        ):  # fmt: skip
            if value is not None and value < least:
                raise ValueError(f"`BlackBox({name}=...)` must be >= {least}, got {value}")
        self.predict, self.directions, self.estimator, self.mu = predict, queries, estimator, float(mu)
        self.batch_size, self.budget, self.cache_size, self.seed = batch_size, budget, cache_size, seed
        self.queries = 0
        """Rows that ``predict`` has been given."""
        self._backwards = 0
        self._known: OrderedDict[bytes, Tensor] = OrderedDict()
        self._wide: int | None = None

    def forward(self, z: Tensor) -> Tensor:
        """(B, k), differentiable where ``z`` asks for a gradient.

        Raises:
            BudgetError: the queries are used up; nothing was sent.
            AnswerError: another number of answers, another shape, or one that is not finite.
        """
        return _Differentiable.apply(z, self) if torch.is_grad_enabled() and z.requires_grad else self.ask(z)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def ask(self, rows: Tensor) -> Tensor:
        """(B, k): the answers, as they are."""
        rows = rows.detach()
        if not len(rows):
            raise ValueError("the batch holds no examples; a black box needs at least one")
        if not self.cache_size:
            self._allow(len(rows))
            return torch.cat([self._request(some) for some in torch.split(rows, self.batch_size)])
        names = [row.cpu().contiguous().numpy().tobytes() for row in rows]
        known = {name: self._known[name] for name in names if name in self._known}
        new = {name: n for n, name in enumerate(names) if name not in known}
        self._allow(len(new))
        for some in torch.split(torch.tensor([*new.values()], dtype=torch.int64), self.batch_size):
            if len(some):
                answers = {names[n]: answer for n, answer in zip(some.tolist(), self._request(rows[some]), strict=True)}
                known |= answers
                self._remember(answers)  # at once: if the next request fails, these are not sent again
        self._remember(known)
        return torch.stack([known[name] for name in names])

    def _allow(self, more: int) -> None:
        if self.budget is not None and self.queries + more > self.budget:
            raise BudgetError(
                f"{self.queries} of {self.budget} queries are used, and the next {more} would be too many; raise "
                "`BlackBox(budget=...)`, or stop here: nothing was sent"
            )

    def _remember(self, answers: Mapping[bytes, Tensor]) -> None:
        for name, answer in answers.items():
            self._known[name] = answer
            self._known.move_to_end(name)
        while len(self._known) > self.cache_size:
            self._known.popitem(last=False)

    def _request(self, rows: Tensor) -> Tensor:
        answers = self.predict(rows)
        self.queries += len(rows)  # queries that failed before an answer are not counted
        shape = tuple(answers.shape) if isinstance(answers, Tensor) else (type(answers).__name__,)
        if len(shape) != 2 or shape[0] != len(rows) or self._wide not in (None, shape[1]):
            raise AnswerError(f"a black box must answer with scores ({len(rows)}, {self._wide or 'k'}), got {shape}")
        if not answers.isfinite().all():
            raise AnswerError("a black box answered with numbers that are not finite; no gradient was made of them")
        self._wide = shape[1]
        return answers.detach().to(rows.device)

    def gradient(self, z: Tensor, answers: Tensor, slope: Tensor) -> Tensor:
        """The estimate of ∇_z ℓ, of z's shape.

        Args:
            z: (B, …).
            answers: f(z), (B, k).
            slope: ∇_y ℓ there, (B, k).
        """
        flat = z.detach().flatten(1)
        count, size = flat.shape
        many = size if self.directions is None else self.directions
        if self.estimator == "cge" and many != size:
            raise ValueError(f"`BlackBox(estimator='cge')` takes one query a coordinate, {size}, got {many}; use 'groups'")
        many = min(many, size) if self.estimator == "groups" else many
        step = max(1, self.batch_size // many)
        parts = []
        for first in range(0, count, step):
            some = slice(first, first + step)
            u = self._directions(torch.arange(first, min(count, first + step)), many, size).to(z.device, z.dtype)
            probes = (flat[some, None] + self.mu * u).reshape(-1, *z.shape[1:])
            changes = self.ask(probes).view(len(u), many, -1).double() - answers[some, None].double()
            slopes = torch.einsum("bqk,bk->bq", changes, slope[some].double()) / self.mu
            parts.append(torch.einsum("bq,bqd->bd", slopes.to(z.dtype), u))
        self._backwards += 1
        return torch.cat(parts).view_as(z) * (size / many if self.estimator == "rge" else 1.0)

    def _directions(self, examples: Tensor, many: int, size: int) -> Tensor:
        """(B, q, d): those of the examples in this backward pass."""
        if self.estimator == "cge":
            return torch.eye(size).expand(len(examples), size, size)
        key, start = Key(self.seed, self._backwards), torch.zeros_like(examples)
        if self.estimator == "rge":
            queries = (examples[:, None] * many + torch.arange(many)).flatten()
            u = sample(DISTRIBUTIONS["gaussian"](), key, 0, start.repeat_interleave(many), size, queries)
            return F.normalize(u, dim=1).view(len(examples), many, size)
        signs = sample(DISTRIBUTIONS["rademacher"](), key, 0, start, size, examples)
        ranks = sample(DISTRIBUTIONS["gaussian"](), key, 1, start, size, examples).argsort(1).argsort(1)
        own: Tensor = ranks[:, None] % many == torch.arange(many)[:, None]
        return signs[:, None] * own

    def get_extra_state(self) -> dict[str, int]:
        return {"queries": self.queries, "backwards": self._backwards}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.queries, self._backwards = int(state["queries"]), int(state["backwards"])

    def extra_repr(self) -> str:
        return f"queries={self.directions}, estimator={self.estimator!r}, mu={self.mu}"


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, box: BlackBox) -> Tensor:
        answers = box.ask(z)
        ctx.save_for_backward(z, answers)
        ctx.box = box
        return answers.clone()

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Any:
        z, answers = ctx.saved_tensors
        return ctx.box.gradient(z, answers, slope), None
