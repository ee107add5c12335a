"""How something outside is asked: another program, or a server. Lines of JSON go out, an answer to each comes back."""

from __future__ import annotations

import json
import math
import queue
import subprocess
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import IO, Any


class AnswerError(RuntimeError):
    """Something outside did not answer, or not as it should."""


class Transport(ABC):
    """Asks something outside.

    Args:
        timeout: seconds that the answers to one request may take, > 0.
    """

    def __init__(self, timeout: float = 60.0) -> None:
        if not (math.isfinite(timeout) and timeout > 0):
            raise ValueError(f"`{type(self).__name__}(timeout=...)` must be a finite number of seconds > 0, got {timeout}")
        self.timeout = timeout

    @abstractmethod
    def ask(self, lines: Sequence[str]) -> list[object]:
        """One answer for each item, given as a line of JSON.

        Raises:
            AnswerError: no answer in time, or not one for each item.
        """

    def close(self) -> None:  # noqa: B027  most have nothing to close
        """End the program or connection that it keeps; it is started again when it is needed."""


class CommandTransport(Transport):
    """A program that reads an item a line (JSON) and writes its answer a line, in order, flushing each or at the latest all.

    It is started on first use and goes on for as long as it lives, so it loads its model once; after an error it is
    started anew.

    Args:
        command: program and arguments; no shell.
        timeout: seconds that one batch may take, > 0, the program's start included.
    """

    def __init__(self, command: Sequence[str], timeout: float = 60.0) -> None:
        super().__init__(timeout)
        if isinstance(command, str) or not command:
            raise ValueError(f"`command` must be a list of the program and its arguments, got {command!r}")
        self.command = list(command)
        self._process: subprocess.Popen[str] | None = None
        self._answers: queue.Queue[str] = queue.Queue()

    def ask(self, lines: Sequence[str]) -> list[object]:
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

    def _answer(self, deadline: float) -> object:
        try:
            line = self._answers.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            raise AnswerError(f"{self} gave no answer within {self.timeout:g} s; raise `timeout` or flush") from None
        if not line:
            assert self._process is not None
            raise AnswerError(f"{self} ended with exit code {self._process.wait()} before it had answered; its stderr says why")
        try:
            return json.loads(line)
        except ValueError:
            raise AnswerError(f"{self} answered {line.strip()!r:.200}, which is not JSON") from None

    def _refuse_more(self) -> None:
        """A line that nobody asked for would be taken for the next item's answer, and each after it for another's."""
        more = [line for line in list(self._answers.queue) if line]
        if more:
            raise AnswerError(f"{self} answered {more[0].strip()!r:.200} beyond one line for each item; print nothing else")

    def _running(self) -> subprocess.Popen[str]:
        if self._process is not None and self._process.poll() is not None:
            self.close()  # it ended between two batches: its answers are all read
        if self._process is None:
            try:
                self._process = subprocess.Popen(
                    self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
                )
            except OSError as error:
                raise AnswerError(f"{self} cannot be started: {error}") from error
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

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state, _process=None, _answers=queue.Queue())

    def __repr__(self) -> str:
        return f"CommandTransport({' '.join(self.command)!r})"


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


class HttpTransport(Transport):
    """A server that takes ``POST {"items": [...]}`` and answers ``{"answers": [...]}``, or the bare list.

    Args:
        url: http or https.
        timeout: seconds for one request, > 0; longer than that no "Retry-After" of the server's is waited for.
        retries: how often a request is sent again after no connection, no answer, or status 429 or 5xx, >= 0.
        headers: of every request, such as a token's.
        answers: under which name the answers come.
    """

    def __init__(
        self,
        url: str,
        timeout: float = 60.0,
        retries: int = 3,
        headers: Mapping[str, str] | None = None,
        answers: str = "answers",
    ) -> None:
        super().__init__(timeout)
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"`url` must start with http:// or https://, got {url!r}")
        if retries < 0:
            raise ValueError(f"`retries` must be >= 0, got {retries}")
        self.url, self.retries, self.headers, self.answers = url, retries, dict(headers or {}), answers

    def ask(self, lines: Sequence[str]) -> list[object]:
        answer = self._post("{" + f'"items": [{", ".join(lines)}]' + "}")
        found = answer.get(self.answers) if isinstance(answer, dict) else answer
        if not isinstance(found, list) or len(found) != len(lines):
            raise AnswerError(
                f"{self} must answer with {len(lines)} {self.answers}, a list or {{{self.answers!r}: list}}; "
                f"got {answer!r:.200}"
            )
        return found

    def _post(self, body: str) -> object:
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
            raise AnswerError(f"{self} answered something that is not JSON: {error}") from error
        except requests.RequestException as error:
            raise AnswerError(f"{self} failed, {self.retries} retries included: {error}") from error

    def __repr__(self) -> str:
        return f"HttpTransport({self.url!r})"
