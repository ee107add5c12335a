"""Scores from outside: another program, or a server. What is asked twice is answered from memory."""

from __future__ import annotations

import json
import math
import queue
import subprocess
import threading
import time
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import IO, Any

import torch
from torch import Tensor

Item = Mapping[str, Any]


class ScorerError(RuntimeError):
    """The scorer did not answer, or not with a finite number for each item."""


class ExternalScorer(ABC):
    """Items → their scores, asked from somewhere else.

    An item is a dict that JSON can hold, such as ``{"prediction": "…", "references": ["…"]}``; equal items are asked once, so
    the scorer must be a function of the item alone. In ``zo_objective`` return ``1 - scorer(items)`` where higher is better.

    Args:
        timeout: seconds that the answers to one batch may take, > 0.
        cache_size: how many scores are remembered, the latest asked for first; >= 0.
    """

    def __init__(self, timeout: float = 60.0, cache_size: int = 100_000) -> None:
        name = type(self).__name__
        if not (math.isfinite(timeout) and timeout > 0):
            raise ValueError(f"`{name}(timeout=...)` must be a finite number of seconds > 0, got {timeout}")
        if cache_size < 0:
            raise ValueError(f"`{name}(cache_size=...)` must be >= 0, got {cache_size}")
        self.timeout, self.cache_size = timeout, cache_size
        self._known: OrderedDict[str, float] = OrderedDict()

    def __call__(self, items: Sequence[Item]) -> Tensor:
        """(B,) float64: a score for each of B items.

        Raises:
            ScorerError: no answer in time, or one that is not a finite number.
            TypeError: an item that JSON cannot hold.
        """
        lines = [json.dumps(item, sort_keys=True) for item in items]
        scores = {line: self._known[line] for line in lines if line in self._known}
        new = [line for line in dict.fromkeys(lines) if line not in scores]
        if new:
            scores |= zip(new, map(self._number, self._ask(new)), strict=True)
        self._remember(scores)
        return torch.tensor([scores[line] for line in lines], dtype=torch.float64)

    @abstractmethod
    def _ask(self, lines: Sequence[str]) -> list[Any]:
        """One answer for each item, given as a line of JSON: a number, or a dict with 'score'."""

    def _number(self, answer: Any) -> float:
        value = answer.get("score") if isinstance(answer, dict) else answer
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ScorerError(f"{self}: expected a finite number, or an object with one as 'score'; got {answer!r:.200}")
        return float(value)

    def _remember(self, scores: Mapping[str, float]) -> None:
        for line, score in scores.items():
            self._known[line] = score
            self._known.move_to_end(line)
        while len(self._known) > self.cache_size:
            self._known.popitem(last=False)


class CommandScorer(ExternalScorer):
    """A program that reads an item a line (JSON) and writes its score a line, in order, flushing each or at the latest all.

    It is started on first use and goes on for as long as it lives, so what it loads it loads once; after an error it is
    started anew.

    Args:
        command: program and arguments; no shell.
        timeout: seconds that one batch may take, > 0, the program's start included.
        cache_size: scores remembered.
    """

    def __init__(self, command: Sequence[str], timeout: float = 60.0, cache_size: int = 100_000) -> None:
        super().__init__(timeout, cache_size)
        if isinstance(command, str) or not command:
            raise ValueError(f"`CommandScorer(command=...)` must be a list of the program and its arguments, got {command!r}")
        self.command = list(command)
        self._process: subprocess.Popen[str] | None = None
        self._answers: queue.Queue[str] = queue.Queue()

    def _ask(self, lines: Sequence[str]) -> list[Any]:
        deadline = time.monotonic() + self.timeout
        process = self._running()
        assert process.stdin is not None
        try:
            self._refuse_more()
            # in a thread: a program that writes before it has read everything must not wait for us for ever
            threading.Thread(target=_write, args=(process.stdin, lines), daemon=True).start()
            answers = [self._answer(deadline) for _ in lines]
            self._refuse_more()
            return answers
        except BaseException:
            self.close()
            raise

    def _answer(self, deadline: float) -> Any:
        try:
            line = self._answers.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            raise ScorerError(f"{self} gave no answer within {self.timeout:g} s; raise `timeout` or flush") from None
        if not line:
            assert self._process is not None
            raise ScorerError(f"{self} ended with exit code {self._process.wait()} before it had answered; its stderr says why")
        try:
            return json.loads(line)
        except ValueError:
            raise ScorerError(f"{self} answered {line.strip()!r:.200}, which is not JSON; a number is expected") from None

    def _refuse_more(self) -> None:
        """A line that nobody asked for would be taken for the next item's score, and each after it for another's."""
        more = [line for line in list(self._answers.queue) if line]
        if more:
            raise ScorerError(f"{self} answered {more[0].strip()!r:.200} beyond one line for each item; print scores alone")

    def _running(self) -> subprocess.Popen[str]:
        if self._process is not None and self._process.poll() is not None:
            self.close()  # it ended between two batches: its answers are all read
        if self._process is None:
            try:
                self._process = subprocess.Popen(
                    self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
                )
            except OSError as error:
                raise ScorerError(f"{self} cannot be started: {error}") from error
            assert self._process.stdout is not None
            self._answers = queue.Queue()
            threading.Thread(target=_read, args=(self._process.stdout, self._answers), daemon=True).start()
        return self._process

    def close(self) -> None:
        """End the program; it is started again when it is needed."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()

    def __getstate__(self) -> dict[str, Any]:
        """A copy starts a program of its own."""
        return {k: v for k, v in vars(self).items() if k not in ("_process", "_answers")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _process=None, _answers=queue.Queue())

    def __repr__(self) -> str:
        return f"CommandScorer({' '.join(self.command)!r})"


def _write(pipe: IO[str], lines: Sequence[str]) -> None:
    try:
        pipe.write("".join(f"{line}\n" for line in lines))
        pipe.flush()
    except (OSError, ValueError):  # it has ended or was ended: the reader says so
        pass


def _read(pipe: IO[str], answers: queue.Queue[str]) -> None:
    for line in pipe:
        if line.strip():
            answers.put(line)
    answers.put("")


class HttpScorer(ExternalScorer):
    """A server that takes ``POST {"items": [...]}`` and answers ``{"scores": [...]}``, or the bare list.

    Args:
        url: http or https.
        timeout: seconds for one request, > 0; longer than that no "Retry-After" of the server's is waited for.
        retries: how often a request is sent again after no connection, no answer, or status 429 or 5xx, >= 0.
        headers: of every request, such as a token's.
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
        super().__init__(timeout, cache_size)
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"`HttpScorer(url=...)` must start with http:// or https://, got {url!r}")
        if retries < 0:
            raise ValueError(f"`HttpScorer(retries=...)` must be >= 0, got {retries}")
        self.url, self.retries, self.headers = url, retries, dict(headers or {})

    def _ask(self, lines: Sequence[str]) -> list[Any]:
        answer = self._post("{" + f'"items": [{", ".join(lines)}]' + "}")
        scores = answer.get("scores") if isinstance(answer, dict) else answer
        if not isinstance(scores, list) or len(scores) != len(lines):
            raise ScorerError(f"{self} must answer with {len(lines)} scores, a list or {{'scores': list}}; got {answer!r:.200}")
        return scores

    def _post(self, body: str) -> Any:
        import requests
        from requests.adapters import HTTPAdapter
        from urllib3.util import Retry

        timeout = self.timeout

        class Impatient(Retry):
            def get_retry_after(self, response: Any) -> float | None:
                wait = super().get_retry_after(response)
                return None if wait is None else min(wait, timeout)  # a server may say hours

        retry = Impatient(
            self.retries, backoff_factor=0.2, status_forcelist=[429, 500, 502, 503, 504], allowed_methods=None,
            raise_on_status=False,
        )  # fmt: skip
        headers = {"Content-Type": "application/json", **self.headers}
        try:
            with requests.Session() as session:
                session.mount(self.url, HTTPAdapter(max_retries=retry))
                response = session.post(self.url, data=body.encode(), headers=headers, timeout=self.timeout)
                response.raise_for_status()
                return response.json()
        except requests.JSONDecodeError as error:  # one of the next
            raise ScorerError(f"{self} answered something that is not JSON: {error}") from error
        except requests.RequestException as error:
            raise ScorerError(f"{self} failed, {self.retries} retries included: {error}") from error

    def __repr__(self) -> str:
        return f"HttpScorer({self.url!r})"
