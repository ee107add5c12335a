"""Calls in processes of their own: what they start with, what they give back, and how they fail."""

from __future__ import annotations

import os

import pytest
import torch

from zolightning.commands.processes import OwnProcess, ProcessFailed

pytestmark = pytest.mark.integration


def seen(name: str) -> tuple[int, int, str | None]:
    return os.getpid(), torch.get_num_threads(), os.environ.get(name)


def test_a_call_has_its_own_process_threads_and_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ZO_SEEN", raising=False)
    pid, threads, value = OwnProcess(threads=3, environment={"ZO_SEEN": "yes"}).call(seen, "ZO_SEEN")
    assert pid != os.getpid()
    assert (threads, value) == (3, "yes")
    assert "ZO_SEEN" not in os.environ


def test_a_process_that_ends_without_an_answer_is_an_error_with_its_exit_code() -> None:
    with pytest.raises(ProcessFailed, match="ended with exit code 3") as caught:
        OwnProcess().call(os._exit, 3)
    assert caught.value.exitcode == 3
