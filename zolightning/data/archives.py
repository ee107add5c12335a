"""Read single named members of wheels and source archives; nothing is ever unpacked wholesale."""

import io
import shutil
import stat
import tarfile
import zipfile
from pathlib import Path, PurePosixPath


def extract_zip_member(archive: Path, member: str, target: Path) -> None:
    """Write one regular file of a zip archive or wheel to `target`.

    Raises FileNotFoundError for a member that is not there, ValueError for an unsafe one.
    """
    _check_name(archive, member)
    with zipfile.ZipFile(archive) as bundle:
        try:
            info = bundle.getinfo(member)
        except KeyError:
            raise FileNotFoundError(f"{archive} holds no member {member!r}") from None
        kind = stat.S_IFMT(info.external_attr >> 16)
        if info.is_dir() or kind not in (0, stat.S_IFREG):
            raise ValueError(f"{archive}: member {member!r} is not a regular file; refusing to read it")
        with bundle.open(info) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)


def read_tar_member(archive: Path | bytes, member: str) -> bytes:
    """Return one regular file of a .tar.gz archive; `archive` is a path, or bytes for one inside another.

    Raises FileNotFoundError for a member that is not there, ValueError for an unsafe one.
    """
    _check_name(archive, member)
    # "r:gz" and not "r|gz" or "r": exactly one container format is accepted.
    source = io.BytesIO(archive) if isinstance(archive, bytes) else archive.open("rb")
    with source, tarfile.open(fileobj=source, mode="r:gz") as bundle:
        try:
            info = bundle.getmember(member)
        except KeyError:
            raise FileNotFoundError(f"{_name(archive)} holds no member {member!r}") from None
        stream = bundle.extractfile(info) if info.isreg() else None
        if stream is None:
            raise ValueError(f"{_name(archive)}: member {member!r} is not a regular file; refusing to read it")
        return stream.read()


def _check_name(archive: Path | bytes, member: str) -> None:
    path = PurePosixPath(member)
    if not member or path.is_absolute() or ".." in path.parts or "\\" in member or ":" in member:
        raise ValueError(f"{_name(archive)}: unsafe member name {member!r}; allowed are relative paths without '..'")


def _name(archive: Path | bytes) -> str:
    return "inner archive" if isinstance(archive, bytes) else str(archive)
