"""Files that runs left in folders of this machine: listed and read, never written, and nothing outside of the run's folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit
from urllib.request import url2pathname

MOST_FILES = 1000


class Artifact(NamedTuple):
    """A file or a folder that a run left.

    Args:
        path: below the run's folder, with "/" between its parts.
        size: in bytes; None: it is a folder.
    """

    path: str
    size: int | None


def folder(uri: str) -> Path | None:
    """The folder of an artifact address; None: it is on no disk of this machine.

    Args:
        uri: ``file:///path`` or an absolute path.
    """
    parts = urlsplit(uri)
    if parts.scheme == "file" and parts.netloc in ("", "localhost"):
        return Path(url2pathname(parts.path))
    path = Path(uri)
    return path if not parts.scheme and path.is_absolute() else None


def files(root: Path) -> list[Artifact]:
    """All files below a folder, by path, at most :data:`MOST_FILES`. Links are passed over: they may lead elsewhere."""
    found: list[Artifact] = []
    for here, folders, names in os.walk(root):
        folders.sort()
        for name in sorted(names):
            path = Path(here, name)
            if not path.is_symlink() and path.is_file():
                found.append(Artifact(path.relative_to(root).as_posix(), path.stat().st_size))
        if len(found) >= MOST_FILES:
            break
    return found[:MOST_FILES]


def contents(root: Path, path: str, most: int) -> bytes:
    """The beginning of a file.

    Args:
        root: the run's folder.
        path: below it.
        most: bytes to read.

    Raises:
        OSError: there is no such file, or it is not below the folder.
    """
    there = (root / path).resolve()
    if not there.is_relative_to(root.resolve()):
        raise PermissionError(f"{path} is not in the run's folder")
    with there.open("rb") as file:
        return file.read(most)
