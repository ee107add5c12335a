import hashlib
import multiprocessing
import sys
from pathlib import Path

import pytest

from zolightning.data import cache_dir
from zolightning.data.cache import atomic_file, atomic_folder, file_lock, sha256


def test_cache_dir_from_own_variable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ZOLIGHTNING_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.setenv("ZOLIGHTNING_CACHE", "~/elsewhere")
    assert cache_dir() == Path.home() / "elsewhere"


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="XDG folders")
def test_cache_dir_from_the_platform(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("ZOLIGHTNING_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "zolightning"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "zolightning"


def test_sha256(tmp_path: Path) -> None:
    content = b"zeroth order" * 200_000  # more than one block
    (tmp_path / "f").write_bytes(content)
    assert sha256(tmp_path / "f") == hashlib.sha256(content).hexdigest()


def test_atomic_file_appears_only_when_finished(tmp_path: Path) -> None:
    target = tmp_path / "new" / "f"
    with atomic_file(target) as draft:
        draft.write_text("whole")
        assert not target.exists()
    assert target.read_text() == "whole"


def interrupt(draft: Path) -> None:
    draft.write_text("half")
    raise KeyboardInterrupt


def test_atomic_file_keeps_the_old_content_on_an_error(tmp_path: Path) -> None:
    target = tmp_path / "f"
    target.write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_file(target) as draft:
        interrupt(draft)
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_atomic_folder_replaces_or_vanishes(tmp_path: Path) -> None:
    target = tmp_path / "model"
    for content in ("first", "second"):
        with atomic_folder(target) as draft:
            (draft / content).write_text(content)
        assert [path.name for path in target.iterdir()] == [content]
    with pytest.raises(KeyboardInterrupt), atomic_folder(target) as draft:
        interrupt(draft / "third")
    assert [path.name for path in target.iterdir()] == ["second"]
    assert list(tmp_path.iterdir()) == [target]


def _increment(target: Path, times: int) -> None:
    for _ in range(times):
        with file_lock(target):
            target.write_text(str(int(target.read_text()) + 1))


def test_file_lock_excludes_other_processes(tmp_path: Path) -> None:
    target = tmp_path / "counter"
    target.write_text("0")
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    workers = [context.Process(target=_increment, args=(target, 50)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
    assert target.read_text() == "100"
