"""Ctrl-C and SIGTERM wait for the end of an update, and reach whoever handles them then."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import PLAIN, Task, assert_same, batches, loader, mlp, quiet_trainer, weights
from ledgers import Noted, parameters
from torch.optim import SGD, AdamW

from zolightning import ZOStrategy
from zolightning.engine.uninterrupted import uninterrupted
from zolightning.ledger import read, replay
from zolightning.space import DenseLeaf, together

SIGNALS = [signal.SIGINT, signal.SIGTERM]


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    saved = {number: signal.getsignal(number) for number in SIGNALS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in saved.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_waits_and_arrives(number: signal.Signals) -> None:
    seen: list[str] = []
    signal.signal(number, lambda *_: seen.append("handled"))
    with uninterrupted():
        signal.raise_signal(number)
        signal.raise_signal(number)
        seen.append("block")
    assert seen == ["block", "handled", "handled"]


def test_ctrl_c_becomes_keyboard_interrupt_after_the_block() -> None:
    seen: list[str] = []

    def work() -> None:
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            seen.append("whole")
        seen.append("never")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert seen == ["whole"]


def test_handlers_are_restored() -> None:
    def mine(*_: Any) -> None:
        pass

    signal.signal(signal.SIGTERM, mine)
    with uninterrupted():
        assert signal.getsignal(signal.SIGTERM) is not mine
    assert signal.getsignal(signal.SIGTERM) is mine
    with pytest.raises(ValueError, match="own"), uninterrupted():
        raise ValueError("own")
    assert signal.getsignal(signal.SIGTERM) is mine
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("order", [SIGNALS, SIGNALS[::-1]])
def test_handlers_are_restored_though_both_raise(order: list[signal.Signals]) -> None:
    def leave(*_: Any) -> None:
        raise SystemExit(3)

    signal.signal(signal.SIGTERM, leave)
    with pytest.raises((KeyboardInterrupt, SystemExit)), uninterrupted():
        list(map(signal.raise_signal, order))
    assert signal.getsignal(signal.SIGTERM) is leave
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.SIG_DFL])
def test_what_python_does_not_handle_stays_as_it_is(handler: Any) -> None:
    """An ignored signal stays ignored; the default of SIGTERM still ends the process, which a ledger survives."""
    signal.signal(signal.SIGTERM, handler)
    with uninterrupted():
        assert signal.getsignal(signal.SIGTERM) is handler
    assert signal.getsignal(signal.SIGTERM) is handler


def test_one_within_another() -> None:
    seen: list[str] = []
    signal.signal(signal.SIGTERM, lambda *_: seen.append("handled"))
    with uninterrupted():
        with uninterrupted():
            signal.raise_signal(signal.SIGTERM)
        seen.append("inner is over")
    assert seen == ["inner is over", "handled"]


def test_in_another_thread_it_does_nothing() -> None:
    seen: list[Any] = []

    def work() -> None:
        with uninterrupted():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]


def test_training_in_another_thread(tmp_path: Path) -> None:
    module, main = Task(mlp()), Task(mlp())
    trainer = quiet_trainer(ZOStrategy(PLAIN, ledger=tmp_path / "ledger.zo"))
    thread = threading.Thread(target=trainer.fit, args=(module, loader(batches(4))))
    thread.start()
    thread.join()
    quiet_trainer(ZOStrategy(PLAIN)).fit(main, loader(batches(4)))
    assert_same(weights(module), weights(main))
    assert read(tmp_path / "ledger.zo").last == 4


@pytest.mark.parametrize("optimizer", [lambda p: SGD(p, lr=0.1), lambda p: AdamW(p, lr=0.1)], ids=["sgd", "adamw"])
def test_ctrl_c_in_a_slow_update_leaves_the_weights_of_a_whole_step(
    optimizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real SIGINT from another thread, in the middle of step 3, when some parameters are updated and some are not."""
    noted, calls, fired = Noted(), [0], []
    all_at_once, gradient = together.sgd_all_, DenseLeaf.gradient

    def interrupt() -> None:
        fired.append(True)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)

    def slow(targets: Any, dist: Any, terms: Any, leaves: Any, *rest: Any) -> None:
        calls[0] += 1
        for i in range(len(targets)):
            if calls[0] == 3 + 1 and i == 1:
                interrupt()
            all_at_once(targets[i : i + 1], dist, terms, leaves[i : i + 1], *rest)

    def slow_gradient(self: DenseLeaf, *args: Any) -> Any:
        calls[0] += 1
        if calls[0] == 3 * 4 + 2:  # the second of the four parameters
            interrupt()
        return gradient(self, *args)

    monkeypatch.setattr(together, "sgd_all_", slow)
    monkeypatch.setattr(DenseLeaf, "gradient", slow_gradient)
    module, whole = Task(mlp(), optimizer=optimizer), Task(mlp(), optimizer=optimizer)
    trainer = quiet_trainer(ZOStrategy(PLAIN, ledger=tmp_path / "ledger.zo"), callbacks=[noted])
    with pytest.raises(SystemExit):  # Lightning's answer to Ctrl-C
        trainer.fit(module, loader(batches(10)))
    assert fired and trainer.interrupted
    monkeypatch.undo()
    ledger = read(tmp_path / "ledger.zo")
    assert (ledger.last, ledger.torn, ledger.damage) == (4, 0, "")
    rebuilt = parameters(noted.weights[0])
    assert replay(ledger, rebuilt).checked == 4
    assert_same(rebuilt, weights(module))  # type: ignore[arg-type]
    quiet_trainer(ZOStrategy(PLAIN)).fit(whole, loader(batches(4)))
    assert_same(weights(module), weights(whole))
