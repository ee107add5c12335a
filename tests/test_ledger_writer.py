"""The ledger's file under real faults: a full disk, no permission, two runs at once, a file that goes away, odd clocks."""

from __future__ import annotations

import os
import random
import re
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import PLAIN, Task, assert_same, batches, loader, mlp, quiet_trainer, weights
from ledgers import HEADER, SEED, Idle, Noted, a_step, file_size_limit, parameters, small_disk

from zolightning import LedgerCheckpointIO, ZOStrategy
from zolightning.ledger import LedgerError, claim, read, replay
from zolightning.ledger import writer as writer_module
from zolightning.ledger.format import Step, opening
from zolightning.ledger.writer import LedgerWriter

RECORDS = [a_step(number, directions=32) for number in range(40)]  # 12 KB


def new_writer(path: Path) -> LedgerWriter:
    return LedgerWriter(claim(path), SEED, opening(HEADER))


def untroubled(folder: Path) -> bytes:
    writer = new_writer(folder / "untroubled.zo")
    for record in RECORDS:
        writer.append(record)
    writer.close()
    return writer.path.read_bytes()


def told(caught: Any) -> list[str]:
    return [str(w.message) for w in caught if issubclass(w.category, RuntimeWarning)]


# ---- appending


def test_only_ever_appends_and_hands_each_record_over_at_once(tmp_path: Path) -> None:
    writer = new_writer(tmp_path / "ledger.zo")
    before = writer.path.read_bytes()
    for count, record in enumerate(RECORDS[:6], 1):
        writer.append(record)
        now = writer.path.read_bytes()
        assert now.startswith(before) and len(now) > len(before)
        assert list(read(writer.path)) == RECORDS[:count]
        before = now
    writer.close()
    assert writer.path.read_bytes() == before
    writer.close()  # again: nothing


def test_no_record_after_the_end(tmp_path: Path) -> None:
    writer = new_writer(tmp_path / "ledger.zo")
    writer.close()
    with pytest.raises(LedgerError, match=r"ledger\.zo was closed when its run ended"):
        writer.append(RECORDS[0])
    writer.sync()
    assert list(read(writer.path)) == []


def test_goes_to_the_disk_every_few_seconds_and_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, synced = [100.0], []
    real = os.fsync
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(os, "fsync", lambda handle: (synced.append(now[0]), real(handle)))
    writer = new_writer(tmp_path / "ledger.zo")
    synced.clear()
    for record in RECORDS[:12]:
        writer.append(record)
        now[0] += 1.0
    assert synced == [105.0, 110.0]
    writer.close()
    assert synced == [105.0, 110.0, 112.0]


def test_what_is_there_makes_room(tmp_path: Path) -> None:
    path = tmp_path / "ledger.zo"
    path.write_bytes(b"first")
    (tmp_path / "ledger.zo.1").write_bytes(b"taken")
    new_writer(path).close()
    assert (tmp_path / "ledger.zo.2").read_bytes() == b"first"
    assert (tmp_path / "ledger.zo.1").read_bytes() == b"taken"
    new_writer(path).close()
    assert (tmp_path / "ledger.zo.3").read_bytes() == path.read_bytes() == opening(HEADER)


def test_interrupts_tear_no_record(tmp_path: Path) -> None:
    """Ctrl-C again and again at any moment: what was appended, once or not at all, reads as a whole ledger."""
    writer = new_writer(tmp_path / "ledger.zo")
    stop, armed, interrupts, appended = threading.Event(), False, 0, 0

    def interrupt(*_: object) -> None:
        nonlocal armed
        if armed:  # one that is raised outside of the writer would end the test
            armed = False
            raise KeyboardInterrupt

    def storm() -> None:
        while not stop.wait(random.random() * 1e-3):
            os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=storm)
    old = signal.signal(signal.SIGINT, interrupt)
    try:
        thread.start()
        while interrupts < 100:
            try:
                armed = True
                while True:
                    writer.append(RECORDS[appended % 40])
                    appended += 1
            except KeyboardInterrupt:
                interrupts += 1
    finally:
        armed = False
        stop.set()
        thread.join()
        signal.signal(signal.SIGINT, old)
    writer.close()
    ledger = read(writer.path)
    assert (ledger.torn, ledger.damage) == (0, "")
    assert appended <= ledger.steps <= appended + interrupts


# ---- a disk that takes nothing


@pytest.fixture(params=["full disk", "size limit"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Path, Any]]:
    """A folder, and a context in which its disk is full."""
    if request.param == "size limit":
        yield tmp_path, lambda: file_size_limit(6_000)
        return
    with small_disk(tmp_path / "disk") as fill:
        if fill is None:
            pytest.skip("may not mount a small disk")

        class Full:
            def __enter__(self) -> None:
                fill(True)

            def __exit__(self, *_: Any) -> None:
                fill(False)

        yield tmp_path / "disk", Full


def test_full_disk_loses_nothing_and_is_told_once(disk: tuple[Path, Any], tmp_path: Path) -> None:
    folder, full = disk
    writer = new_writer(folder / "ledger.zo")
    for record in RECORDS[:5]:
        writer.append(record)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with full():
            for record in RECORDS[5:35]:
                writer.append(record)
                writer.sync()
            assert writer.trouble
            halted = read(writer.path)
            assert list(halted) == RECORDS[: halted.steps] and 5 <= halted.steps < 35 and not halted.damage
            assert len(told(caught)) == 1
            assert "cannot be written now" in told(caught)[0] and "kept in memory, training goes on" in told(caught)[0]
        for record in RECORDS[35:]:
            writer.append(record)
        assert not writer.trouble
        writer.close()
    assert told(caught)[1:] == [f"the ledger {writer.path} is complete again"]
    assert writer.path.read_bytes() == untroubled(tmp_path)


def test_disk_that_stays_full_is_told_at_the_end(disk: tuple[Path, Any]) -> None:
    folder, full = disk
    writer = new_writer(folder / "ledger.zo")
    with full(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for record in RECORDS:
            writer.append(record)
        writer.close()
    first, last = told(caught)
    assert "kept in memory" in first
    assert re.search(r"lacks its last records \(.*\); it is intact up to where it ends", last)
    ledger = read(writer.path)
    assert list(ledger) == RECORDS[: ledger.steps] and ledger.steps < 40 and not ledger.damage


def test_full_disk_from_the_first_byte(disk: tuple[Path, Any], tmp_path: Path) -> None:
    folder, full = disk
    mine = claim(folder / "ledger.zo")
    with file_size_limit(10) if folder == tmp_path else full():
        with pytest.warns(RuntimeWarning, match="kept in memory"):
            writer = LedgerWriter(mine, SEED, opening(HEADER))
        writer.append(RECORDS[0])
    with pytest.warns(RuntimeWarning, match="complete again"):
        writer.append(RECORDS[1])
    writer.close()
    assert list(read(writer.path)) == RECORDS[:2]


def test_training_goes_on_while_the_disk_is_full(disk: tuple[Path, Any], tmp_path: Path) -> None:
    """The run is the run, the ledger is complete in the end, and what happened is said once."""
    folder, full = disk
    states: list[Any] = []

    class Faults(Noted):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
            super().on_train_batch_start(trainer, pl_module)
            if batch_idx == 20:
                states.append(full())
                states[0].__enter__()
            if batch_idx == 170:
                states[0].__exit__(None, None, None)

    items = batches(180)
    calm, troubled, noted = Task(mlp()), Task(mlp()), Faults()
    quiet_trainer(ZOStrategy(PLAIN, num_queries=4, ledger=tmp_path / "calm.zo")).fit(calm, loader(items))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quiet_trainer(ZOStrategy(PLAIN, num_queries=4, ledger=folder / "ledger.zo"), callbacks=[noted]).fit(
            troubled, loader(items)
        )
    assert_same(weights(troubled), weights(calm))
    assert [message.split("ledger.zo ")[1][:20] for message in told(caught)] == ["cannot be written no", "is complete again"]
    assert (folder / "ledger.zo").read_bytes() == (tmp_path / "calm.zo").read_bytes()


# ---- a place that cannot be written to


@pytest.fixture(params=["under a file", "read-only disk", "no permission"])
def closed_folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "closed"
    if request.param == "under a file":
        folder.write_text("a file")
        yield folder
    elif request.param == "read-only disk":
        with small_disk(folder, "64k", "ro") as fill:
            if fill is None:
                pytest.skip("may not mount a disk")
            yield folder
    else:
        if os.geteuid() == 0:
            pytest.skip("root may write everywhere")
        folder.mkdir(mode=0o500)
        yield folder


@pytest.mark.parametrize("name", ["ledger.zo", "sub/ledger.zo"])
def test_a_path_that_was_asked_for_is_needed(closed_folder: Path, name: str) -> None:
    module = Task(mlp())
    before = weights(module)
    with pytest.raises(OSError, match="closed"):
        quiet_trainer(ZOStrategy(PLAIN, ledger=closed_folder / name)).fit(module, loader(batches(3)))
    assert_same(weights(module), before)


def test_the_default_place_is_not(closed_folder: Path, tmp_path: Path) -> None:
    module, free = Task(mlp()), Task(mlp())
    trainer = quiet_trainer(ZOStrategy(PLAIN), logger=Idle(closed_folder))
    with pytest.warns(
        UserWarning, match=r"this run keeps no replay ledger: .*closed.*; *say|this run keeps no replay ledger: "
    ):
        trainer.fit(module, loader(batches(3)))
    quiet_trainer(ZOStrategy(PLAIN)).fit(free, loader(batches(3)))
    assert_same(weights(module), weights(free))


# ---- two runs, one path


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[tuple[Path, int]]:
    """A path that another process writes to, and that process."""
    path = tmp_path / "ledger.zo"
    ready, tell = os.pipe()
    process = os.fork()
    if not process:
        held = claim(path)
        os.write(tell, bytes(held.path.name, "ascii"))
        signal.pause()
        os._exit(0)
    assert os.read(ready, 100) == b"ledger.zo"
    os.close(ready), os.close(tell)
    yield path, process
    _kill(process)


def _kill(process: int) -> None:
    with suppress(ProcessLookupError, ChildProcessError):
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)


def test_second_run_is_refused_by_name(holder: tuple[Path, int]) -> None:
    path, _ = holder
    module = Task(mlp())
    before = weights(module)
    with pytest.raises(LedgerError, match=r"another run writes to the ledger .*ledger\.zo; give this one a path of its own"):
        quiet_trainer(ZOStrategy(PLAIN, ledger=path)).fit(module, loader(batches(2)))
    assert_same(weights(module), before)


def test_second_run_in_a_folder_takes_the_next_name(holder: tuple[Path, int]) -> None:
    path, _ = holder
    for _ in range(2):
        quiet_trainer(ZOStrategy(PLAIN), enable_checkpointing=True, default_root_dir=path.parent).fit(
            Task(mlp()), loader(batches(2))
        )
    assert read(path.with_name("ledger-2.zo")).steps == read(path.with_name("ledger-2.zo.1")).steps == 2
    assert not path.exists()


def test_a_killed_run_leaves_its_path_free(holder: tuple[Path, int]) -> None:
    path, process = holder
    _kill(process)
    again = claim(path)
    assert again.path == path
    with pytest.raises(LedgerError, match="another run writes"):
        claim(path)
    again.release()


def test_two_runs_in_one_process(tmp_path: Path) -> None:
    first = claim(tmp_path / "ledger.zo")
    with pytest.raises(LedgerError, match="another run writes"):
        claim(tmp_path / "ledger.zo")
    first.release()
    claim(tmp_path / "ledger.zo").release()


def test_a_run_that_fails_leaves_its_path_free(tmp_path: Path) -> None:
    def broken(net: Any, batch: Any) -> Any:
        raise RuntimeError("on purpose")

    path = tmp_path / "ledger.zo"
    with pytest.raises(RuntimeError, match="on purpose"):
        quiet_trainer(ZOStrategy(PLAIN, ledger=path)).fit(Task(mlp(), broken), loader(batches(2)))
    claim(path).release()
    assert not path.exists()  # no step, no ledger


# ---- a file that somebody touches


def _moved(path: Path) -> None:
    path.rename(path.with_name("moved.zo"))


def _replaced(path: Path) -> None:
    path.unlink()
    path.write_bytes(opening(HEADER))


def _emptied(path: Path) -> None:
    path.write_bytes(b"")


def _extended(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


@pytest.mark.parametrize(
    ("touch", "what"),
    [
        (_moved, "was moved or deleted"),
        (Path.unlink, "was moved or deleted"),
        (_replaced, "was replaced"),
        (_emptied, "was written to by something else"),
        (_extended, "was written to by something else"),
    ],
)
def test_a_file_that_is_touched_is_told_once(touch: Any, what: str, tmp_path: Path) -> None:
    writer = new_writer(tmp_path / "ledger.zo")
    writer.append(RECORDS[0])
    writer.sync()
    assert not writer.trouble
    touch(writer.path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            writer.sync()
        writer.close()
    assert told(caught) == [
        f"the ledger {writer.path} {what} while the run writes to it; the file that is there now lacks its steps"
    ]
    assert writer.trouble == what


def test_a_moved_file_still_gets_every_record(tmp_path: Path) -> None:
    path, away = tmp_path / "ledger.zo", tmp_path / "moved.zo"
    noted = Noted()

    class Mover(Noted):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
            if batch_idx == 2:
                path.rename(away)

    module = Task(mlp())
    with pytest.warns(RuntimeWarning, match="was moved or deleted while the run writes to it"):
        quiet_trainer(ZOStrategy(PLAIN, ledger=path), callbacks=[noted, Mover()]).fit(module, loader(batches(5)))
    rebuilt = parameters(noted.weights[0])
    replay(read(away), rebuilt)
    assert_same(rebuilt, weights(module))  # type: ignore[arg-type]


def test_no_checkpoint_rests_on_a_file_that_went_away(tmp_path: Path) -> None:
    """A position in it could not be found again: the checkpoint is a whole one, and says why."""
    path = tmp_path / "ledger.zo"
    trainer = quiet_trainer(ZOStrategy(PLAIN, ledger=path), plugins=[LedgerCheckpointIO()])

    class Mover(Noted):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
            if trainer.global_step == 2:
                path.unlink()
                trainer.save_checkpoint(tmp_path / "x.ckpt")

    trainer.callbacks.append(Mover())  # type: ignore[attr-defined]
    module = Task(mlp())
    with (
        pytest.warns(RuntimeWarning, match="was moved or deleted"),
        pytest.warns(
            UserWarning, match="checkpoints are whole ones, not positions in the ledger: the ledger .* lacks the last"
        ),
    ):
        trainer.fit(module, loader(batches(3)))
    saved = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert set(saved["state_dict"]) == set(module.state_dict())
    assert saved["zolightning"]["ledger"] is None


# ---- clocks


def test_nothing_in_it_depends_on_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wall clock jumps decades back and forth at each look: the same bytes, except for no byte at all."""
    quiet_trainer(ZOStrategy(PLAIN, ledger=tmp_path / "calm.zo")).fit(Task(mlp()), loader(batches(10)))
    generator, real = random.Random(0), time.time
    monkeypatch.setattr(time, "time", lambda: real() + generator.uniform(-1e9, 1e9))
    quiet_trainer(ZOStrategy(PLAIN, ledger=tmp_path / "jumping.zo")).fit(Task(mlp()), loader(batches(10)))
    assert (tmp_path / "jumping.zo").read_bytes() == (tmp_path / "calm.zo").read_bytes()
    assert any(isinstance(record, Step) for record in read(tmp_path / "calm.zo"))


def test_a_monotonic_clock_that_stands_still_only_delays_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module.time, "monotonic", lambda: 0.0)
    writer = new_writer(tmp_path / "ledger.zo")
    for record in RECORDS:
        writer.append(record)
    assert list(read(writer.path)) == RECORDS
    writer.close()
