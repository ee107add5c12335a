"""Scores from outside: another program, or a server. An item that is scored twice is answered from memory."""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .transport import AnswerError, CommandTransport, HttpTransport, Transport

Item = Mapping[str, object]


class ExternalScorer:
    """Items → their scores, asked from somewhere else.

    An item is a dict that JSON can hold, such as ``{"prediction": "…", "references": ["…"]}``; equal items are asked once, so
    the scorer must be a function of the item only. In ``zo_objective`` return ``1 - scorer(items)`` where higher is better.

    Args:
        transport: asks for the scores: an answer is a number, or an object with one as 'score'.
        cache_size: how many scores are remembered, the latest asked for first; >= 0.
    """

    def __init__(self, transport: Transport, cache_size: int = 100_000) -> None:
        if cache_size < 0:
            raise ValueError(f"`{type(self).__name__}(cache_size=...)` must be >= 0, got {cache_size}")
        self.transport, self.cache_size = transport, cache_size
        self._known: OrderedDict[str, float] = OrderedDict()

    def __call__(self, items: Sequence[Item]) -> Tensor:
        """(B,) float64: a score for each of B items.

        Raises:
            AnswerError: no answer in time, or one that is not a finite number.
            TypeError: an item that JSON cannot hold.
        """
        lines = [json.dumps(item, sort_keys=True) for item in items]
        scores = {line: self._known[line] for line in lines if line in self._known}
        new = [line for line in dict.fromkeys(lines) if line not in scores]
        if new:
            scores |= zip(new, map(self._number, self.transport.ask(new)), strict=True)
        self._remember(scores)
        return torch.tensor([scores[line] for line in lines], dtype=torch.float64)

    def _number(self, answer: object) -> float:
        value = answer.get("score") if isinstance(answer, dict) else answer
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise AnswerError(
                f"{self.transport}: expected a finite number, or an object with one as 'score'; got {answer!r:.200}"
            )
        return float(value)

    def _remember(self, scores: Mapping[str, float]) -> None:
        for line, score in scores.items():
            self._known[line] = score
            self._known.move_to_end(line)
        while len(self._known) > self.cache_size:
            self._known.popitem(last=False)

    def close(self) -> None:
        """End the program or connection of the transport; it is started again when it is needed."""
        self.transport.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.transport!r})"


class CommandScorer(ExternalScorer):
    """A program that reads an item a line (JSON) and writes its score a line.

    See :class:`~zolightning.objectives.transport.CommandTransport`.

    Args:
        command: program and arguments; no shell.
        timeout: seconds that one batch may take, > 0, the program's start included.
        cache_size: scores remembered.
    """

    def __init__(self, command: Sequence[str], timeout: float = 60.0, cache_size: int = 100_000) -> None:
        super().__init__(CommandTransport(command, timeout), cache_size)


class HttpScorer(ExternalScorer):
    """A server that takes ``POST {"items": [...]}`` and answers ``{"scores": [...]}``, or the bare list.

    Args:
        url, timeout, retries, headers: see :class:`~zolightning.objectives.transport.HttpTransport`.
        cache_size: scores remembered.
    """

    def __init__(
        self,
        url: str,
        timeout: float = 60.0,
        retries: int = 3,
        headers: Mapping[str, str] | None = None,
        cache_size: int = 100_000,
    ) -> None:
        super().__init__(HttpTransport(url, timeout, retries, headers, answers="scores"), cache_size)
