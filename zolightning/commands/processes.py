"""Runs in processes of their own, so that the peak of memory is the run's only, and the silence of libraries in them."""

from __future__ import annotations

import logging
import multiprocessing
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


class ProcessFailed(RuntimeError):
    """A process ended without an answer; its own message is on standard error.

    Args:
        exitcode: The exit code of the process; -9 where the system killed it, as it does when memory runs out.
    """

    def __init__(self, exitcode: int | None) -> None:
        super().__init__(f"the process ended with exit code {exitcode}")
        self.exitcode = exitcode


@dataclass(frozen=True)
class OwnProcess:
    """The settings of a process for one call.

    Args:
        threads: The number of CPU threads of PyTorch. Default: PyTorch's number.
        environment: Environment variables that the process starts with.
        preload: A module. On Linux a server imports it once for all processes.
    """

    threads: int | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    preload: str | None = None

    def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """``function(*args, **kwargs)`` in a fresh process; all of these and the answer must be picklable.

        Raises:
            ProcessFailed: The process ended without an answer.
        """
        server = self.preload is not None and sys.platform.startswith("linux")
        context = multiprocessing.get_context("forkserver" if server else "spawn")
        if server:
            context.set_forkserver_preload([str(self.preload)])
        receive, send = context.Pipe(duplex=False)
        with _variables(self.environment):
            process = context.Process(target=_answer, args=(send, self.threads, function, args, kwargs))  # type: ignore[attr-defined]
            process.start()
        send.close()
        wait([receive, process.sentinel])  # the process may die while a child of its own still holds the pipe
        answers: list[T] = []
        with suppress(EOFError):
            if receive.poll():
                answers.append(receive.recv())
        process.join()
        if not answers:
            raise ProcessFailed(process.exitcode)
        return answers[0]


def _answer(
    send: Connection, threads: int | None, function: Callable[..., object], args: tuple[object, ...], kwargs: dict[str, object]
) -> None:
    if threads is not None:
        torch.set_num_threads(threads)
    send.send(function(*args, **kwargs))


@contextmanager
def _variables(values: Mapping[str, str]) -> Iterator[None]:
    """Environment variables for processes that start within."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


_NO_NEWS = "LeafSpec|not have many workers|in eval mode|gradient_checkpointing_enable|val_check_interval"


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Leaves out messages of Lightning and bitsandbytes that say nothing of a run, such as a Trainer's about devices."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "bitsandbytes")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", f".*({_NO_NEWS}).*")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
