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
