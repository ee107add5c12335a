"""Where downloads, converted models and built kernels are kept, and whether that place is only the user's."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path


def cache_dir() -> Path:
    """The cache folder, not created: ``$ZOLIGHTNING_CACHE``, else one in the user's cache directory."""
    if chosen := os.environ.get("ZOLIGHTNING_CACHE"):
        return Path(chosen).expanduser().absolute()
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "zolightning"


def private(path: Path) -> bool:
    """Whether nobody but this user and root can change the file at ``path`` or replace it.

    Args:
        path: a file or folder that exists.
    """
    if os.name != "posix":
        return True  # a user's folders are only the user's there
    end = path.resolve()
    return all(_guarded(place.stat(), place == end) for place in (end, *end.parents))


def _guarded(info: os.stat_result, end: bool) -> bool:
    if info.st_uid not in (0, os.geteuid()):
        return False
    if info.st_mode & stat.S_ISVTX and not end:
        return True  # as /tmp: others may add to it, but not replace our files
    return not info.st_mode & (stat.S_IWOTH if _own_group(info.st_gid) else stat.S_IWOTH | stat.S_IWGRP)


def _own_group(number: int) -> bool:
    """Whether it is the group that many systems give only to one user, named as the user."""
    import grp
    import pwd

    try:
        return grp.getgrgid(number).gr_name == pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return False
