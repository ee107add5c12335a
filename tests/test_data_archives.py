import gzip
import io
import tarfile
import zipfile
from pathlib import Path

import pytest

from zolightning.data.archives import extract_zip_member, read_tar_member

UNSAFE = ["../up", "a/../../up", "/etc/passwd", "C:/up", "a\\..\\up", ""]


def tar_of(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as bundle:
        for info, content in members:
            info.size = len(content)
            bundle.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def test_zip_member(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as bundle:
        bundle.writestr("pkg/data.bin", b"content")
        bundle.writestr("../evil", b"never read")
    extract_zip_member(tmp_path / "a.whl", "pkg/data.bin", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == b"content"
    with pytest.raises(FileNotFoundError, match=r"a\.whl holds no member 'pkg/other'"):
        extract_zip_member(tmp_path / "a.whl", "pkg/other", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_zip_link_is_refused(tmp_path: Path) -> None:
    info = zipfile.ZipInfo("link")
    info.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as bundle:
        bundle.writestr(info, "/etc/passwd")
    with pytest.raises(ValueError, match="not a regular file"):
        extract_zip_member(tmp_path / "a.whl", "link", tmp_path / "out")


def test_tar_member_and_inner_archive(tmp_path: Path) -> None:
    inner = tar_of((tarfile.TarInfo("x/data.txt"), b"content"))
    (tmp_path / "a.tar.gz").write_bytes(tar_of((tarfile.TarInfo("pkg/inner.tar.gz"), inner)))
    assert read_tar_member(tmp_path / "a.tar.gz", "pkg/inner.tar.gz") == inner
    assert read_tar_member(inner, "x/data.txt") == b"content"
    with pytest.raises(FileNotFoundError, match="inner archive holds no member 'x/other'"):
        read_tar_member(inner, "x/other")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE])
def test_tar_links_and_special_files_are_refused(kind: bytes) -> None:
    info = tarfile.TarInfo("member")
    info.type, info.linkname = kind, "/etc/passwd"
    with pytest.raises(ValueError, match="not a regular file"):
        read_tar_member(tar_of((info, b"")), "member")


@pytest.mark.parametrize("name", UNSAFE)
def test_traversal_is_refused(name: str, tmp_path: Path) -> None:
    archive = tar_of((tarfile.TarInfo(name or "x"), b"evil"))
    with pytest.raises(ValueError, match="unsafe member name"):
        read_tar_member(archive, name)
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as bundle:
        bundle.writestr(name or "x", b"evil")
    with pytest.raises(ValueError, match="unsafe member name"):
        extract_zip_member(tmp_path / "a.whl", name, tmp_path / "out")


def test_zip_that_unpacks_to_too_much(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.whl", "w", zipfile.ZIP_DEFLATED) as bundle:
        bundle.writestr("bomb", bytes(10_000_000))
    assert (tmp_path / "a.whl").stat().st_size < 20_000
    with pytest.raises(ValueError, match="member 'bomb' unpacks to 10000000 bytes, allowed are 9999999"):
        extract_zip_member(tmp_path / "a.whl", "bomb", tmp_path / "out", limit=9_999_999)
    assert not (tmp_path / "out").exists()
    extract_zip_member(tmp_path / "a.whl", "bomb", tmp_path / "out", limit=10_000_000)
    assert (tmp_path / "out").stat().st_size == 10_000_000


def test_zip_that_says_less_than_it_holds(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.whl", "w", zipfile.ZIP_DEFLATED) as bundle:
        bundle.writestr("bomb", bytes(10_000_000))
    content = (tmp_path / "a.whl").read_bytes().replace((10_000_000).to_bytes(4, "little"), (100).to_bytes(4, "little"))
    (tmp_path / "a.whl").write_bytes(content)
    with pytest.raises(ValueError, match="is damaged or no archive of its kind"):
        extract_zip_member(tmp_path / "a.whl", "bomb", tmp_path / "out", limit=1000)
    assert (tmp_path / "out").stat().st_size <= 100


def test_tar_that_unpacks_to_too_much() -> None:
    """The member itself, one before it, or a header that asks for gigabytes."""
    small, large = (tarfile.TarInfo("small"), b"x"), (tarfile.TarInfo("large"), bytes(10_000_000))
    for archive in (tar_of(small, large), tar_of(large, small)):
        for member in ("small", "large"):
            with pytest.raises(ValueError, match="inner archive unpacks to more than 9999999 bytes"):
                read_tar_member(archive, member, limit=9_999_999)
    assert read_tar_member(tar_of(large, small), "small", limit=11_000_000) == b"x"
    header = tarfile.TarInfo("header")
    header.type, header.size = tarfile.XHDTYPE, 1 << 40
    with pytest.raises((ValueError, FileNotFoundError)):
        read_tar_member(gzip.compress(header.tobuf()), "small")


@pytest.mark.parametrize(
    "content",
    [b"", b"no archive", gzip.compress(b"no tar" * 1000), tar_of((tarfile.TarInfo("a"), b"x"))[:60]],
    ids=["empty", "no archive", "no tar", "torn"],  # compressed bytes hold the time
)
def test_damaged_tar(content: bytes) -> None:
    with pytest.raises(ValueError, match="inner archive is damaged or no archive of its kind"):
        read_tar_member(content, "a")


def test_damaged_zip(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "whole", "w") as bundle:
        bundle.writestr("a", b"x" * 1000)
    whole = (tmp_path / "whole").read_bytes()
    for content in (b"", b"no archive", whole[:500], whole.replace(b"xxxx", b"xyxx", 1)):
        (tmp_path / "a.whl").write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.whl is damaged or no archive of its kind"):
            extract_zip_member(tmp_path / "a.whl", "a", tmp_path / "out")
