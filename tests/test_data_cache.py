import hashlib
import multiprocessing
import os
import sys
from pathlib import Path

import pytest

from zolightning import cache
from zolightning.cache import cache_dir, private
from zolightning.data.atomic import atomic_file, atomic_folder, file_lock, sha256


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


posix = pytest.mark.skipif(os.name != "posix", reason="modes and owners")


@posix
@pytest.mark.parametrize("target", ["folder", "folder/file"])
@pytest.mark.parametrize(
    ("mode", "own_group", "mine"),
    [(0o700, False, True), (0o755, False, True), (0o775, True, True), (0o775, False, False), (0o777, True, False)],
)
def test_place_that_others_may_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, mode: int, own_group: bool, mine: bool
) -> None:
    """The file, its folder, or one above it: in a folder that others may write, a file can be replaced."""
    monkeypatch.setattr(cache, "_own_group", lambda number: own_group)
    inner = tmp_path / "folder" / "inner"
    inner.mkdir(parents=True)
    (inner / "file").touch()
    assert private(inner / "file")
    for changed in (tmp_path / "folder", inner, inner / "file"):
        before = changed.stat().st_mode
        changed.chmod(mode)
        assert private(inner / "file") == mine
        changed.chmod(before)


@posix
def test_sticky_folder_guards_what_is_in_it_but_is_not_private(tmp_path: Path) -> None:
    (tmp_path / "tmp" / "mine").mkdir(parents=True)
    (tmp_path / "tmp").chmod(0o1777)
    assert private(tmp_path / "tmp" / "mine")
    assert not private(tmp_path / "tmp")


@posix
def test_link_counts_as_what_it_points_to(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    (tmp_path / "link").symlink_to(tmp_path / "open")
    assert not private(tmp_path / "link")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root can give files away")
def test_place_of_another_user(tmp_path: Path) -> None:
    (tmp_path / "theirs" / "mine").mkdir(parents=True)
    os.chown(tmp_path / "theirs", 65534, 65534)
    assert not private(tmp_path / "theirs" / "mine")


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
        worker.join(120)
    assert target.read_text() == "100"
