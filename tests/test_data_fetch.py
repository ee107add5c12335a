"""Fetching is tested against real pip runs, on a folder or a local HTTP server as the package index."""

import hashlib
import io
import logging
import multiprocessing
import os
import sys
import tarfile
import threading
import time
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal

import pytest

from zolightning.data import Artifact, FetchError, fetch
from zolightning.data.fetch import cached_path
from zolightning.data.http_download import http_download

pytestmark = pytest.mark.integration


def artifact_of(path: Path, kind: Literal["wheel", "sdist"] = "wheel") -> Artifact:
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    return Artifact("tiny-demo", "1.0", path.name, digest, len(content), kind, "test data")


def build_wheel(folder: Path) -> Path:
    path = folder / "tiny_demo-1.0-py3-none-any.whl"
    info = "tiny_demo-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("tiny_demo/data.bin", os.urandom(200_000))
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-demo\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty folder that is pip's only index; the cache is empty too."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("ZOLIGHTNING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


class Server(ThreadingHTTPServer):
    """A package index with one file, which it can cut off; keeps the requests for the file."""

    daemon_threads = True

    def __init__(self, file: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.filename, self.content = file.name, file.read_bytes()
        self.bytes_per_reply = len(self.content)
        self.ranges: list[str | None] = []
        self.honour_ranges = True
        self.pause_s = 0.0
        self.link = f"/files/{self.filename}#sha256=0"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/simple"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        if self.path == "/simple/tiny-demo/":
            self._reply(200, f'<a href="{self.server.link}">x</a>'.encode(), "text/html")
        elif self.path.startswith("/files/"):
            wanted = self.headers["Range"]
            self.server.ranges.append(wanted)
            resume = wanted is not None and self.server.honour_ranges
            start = int(wanted.removeprefix("bytes=").rstrip("-")) if resume else 0
            self._reply(206 if resume else 200, self.server.content[start:], "application/octet-stream")
        else:
            self.send_error(404)

    def _reply(self, status: int, body: bytes, content_type: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: self.server.bytes_per_reply] if status == 206 or b"PK" in body[:2] else body)
        if status == 200 and content_type != "text/html":
            self.wfile.flush()
            time.sleep(self.server.pause_s)
        self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(index: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A local HTTP index that offers a tiny wheel and is the only one configured."""
    server = Server(build_wheel(index))
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", server.url)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_wheel_is_fetched_once_then_used_offline(index: Path, caplog: pytest.LogCaptureFixture) -> None:
    wheel = build_wheel(index)
    artifact = artifact_of(wheel)
    with caplog.at_level(logging.INFO):
        path = fetch(artifact)
    assert path.read_bytes() == wheel.read_bytes()
    assert "fetching tiny-demo 1.0 (0.2 MB)" in caplog.text
    wheel.unlink()
    assert fetch(artifact, offline=True) == path
    leftovers = {file.name for file in path.parent.iterdir()} - {path.name, path.name + ".lock"}
    assert leftovers == {path.name + ".verified"}


def test_sdist_code_does_not_run_unless_the_hash_fits(index: Path, tmp_path: Path) -> None:
    sdist = index / "tiny-demo-1.0.tar.gz"
    trace = tmp_path / "trace"
    setup = f"open({str(trace)!r}, 'w').close()\nfrom setuptools import setup\nsetup(name='tiny-demo')\n"
    with tarfile.open(sdist, "w:gz") as bundle:
        info = tarfile.TarInfo("tiny-demo-1.0/setup.py")
        info.size = len(setup)
        bundle.addfile(info, io.BytesIO(setup.encode()))
    good = artifact_of(sdist, "sdist")
    sdist.write_bytes(sdist.read_bytes() + b"tampered")
    actual = hashlib.sha256(sdist.read_bytes()).hexdigest()
    with pytest.raises(FetchError, match=f"expected SHA-256 {good.sha256}, got {actual}"):
        fetch(good)
    assert not trace.exists()
    assert not cached_path(good).exists()


def test_nothing_cached_and_no_index(index: Path) -> None:
    artifact = Artifact("tiny-demo", "1.0", "tiny_demo-1.0-py3-none-any.whl", "0" * 64, 12_300_000, "wheel", "")
    with pytest.raises(FetchError) as caught:
        fetch(artifact)
    message = str(caught.value)
    assert "could not get tiny-demo 1.0 (12.3 MB)" in message
    assert "pip download: " in message
    assert "HTTP: not tried, since PIP_NO_INDEX is set" in message
    assert f"copy it to\n  {cached_path(artifact)}" in message


def test_unreachable_index_says_what_was_tried(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = build_wheel(index)
    artifact = artifact_of(wheel)
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    cached_path(artifact).parent.mkdir(parents=True)
    cached_path(artifact).with_name(wheel.name + ".part").write_bytes(b"PK")  # straight to HTTP: pip is slow here
    with pytest.raises(FetchError, match=r"HTTP: http://127\.0\.0\.1:9/simple/tiny-demo/: .*refused"):
        fetch(artifact)


def test_index_login_never_shows_up(index: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://user:secret@127.0.0.1:9/simple")
    with pytest.raises(OSError, match="needs a login") as caught:
        http_download(artifact_of(build_wheel(index)), tmp_path / "part")
    assert "secret" not in str(caught.value)


def test_offline_without_the_file(index: Path) -> None:
    artifact = artifact_of(build_wheel(index))
    with pytest.raises(FetchError, match="not in the cache, and offline mode is on"):
        fetch(artifact, offline=True)
    assert not cached_path(artifact).parent.exists()


def test_file_copied_by_hand_is_accepted(index: Path) -> None:
    wheel = build_wheel(index)
    artifact = artifact_of(wheel)
    cached_path(artifact).parent.mkdir(parents=True)
    cached_path(artifact).write_bytes(wheel.read_bytes())
    assert fetch(artifact, offline=True) == cached_path(artifact)


def test_corrupt_cached_file_is_fetched_again(index: Path, caplog: pytest.LogCaptureFixture) -> None:
    wheel = build_wheel(index)
    artifact = artifact_of(wheel)
    path = fetch(artifact)
    spoiled = bytearray(wheel.read_bytes())
    spoiled[1000] ^= 1
    path.write_bytes(spoiled)
    with pytest.raises(FetchError, match="the cached file is corrupt"):
        fetch(artifact, offline=True)
    assert fetch(artifact).read_bytes() == wheel.read_bytes()
    assert "the cached file is corrupt" in caplog.text


def test_verified_file_is_not_hashed_again(index: Path) -> None:
    path = fetch(artifact := artifact_of(build_wheel(index)))
    status = path.stat()
    path.write_bytes(b"x" * status.st_size)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert fetch(artifact, offline=True) == path  # same size and time: taken on trust
    os.utime(path)
    with pytest.raises(FetchError, match="corrupt"):
        fetch(artifact, offline=True)


@pytest.mark.skipif(os.name != "posix", reason="modes")
def test_note_that_others_may_have_written_is_not_trusted(index: Path) -> None:
    path = fetch(artifact := artifact_of(build_wheel(index)))
    status = path.stat()
    path.write_bytes(b"x" * status.st_size)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    path.parent.chmod(0o777)
    with pytest.raises(FetchError, match="corrupt"):
        fetch(artifact, offline=True)


def test_note_that_is_garbage(index: Path) -> None:
    path = fetch(artifact := artifact_of(build_wheel(index)))
    path.with_name(path.name + ".verified").write_bytes(b"\xff\x00")
    assert fetch(artifact, offline=True) == path


def test_concurrent_processes_get_one_good_file(index: Path) -> None:
    wheel = build_wheel(index)
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    workers = [context.Process(target=fetch, args=(artifact_of(wheel),)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert fetch(artifact_of(wheel), offline=True).read_bytes() == wheel.read_bytes()


def test_fetch_over_http(server: Server, index: Path) -> None:
    assert fetch(artifact_of(index / server.filename)).read_bytes() == server.content


def test_broken_download_is_continued(server: Server, index: Path) -> None:
    server.bytes_per_reply = 90_000
    assert fetch(artifact_of(index / server.filename)).read_bytes() == server.content
    assert server.ranges[-2:] == ["bytes=90000-", "bytes=180000-"]


def test_bytes_of_a_failed_pip_run_are_kept(server: Server, index: Path) -> None:
    server.bytes_per_reply, server.pause_s = 150_000, 1.5
    assert fetch(artifact_of(index / server.filename)).read_bytes() == server.content
    assert server.ranges == [None, "bytes=150000-"]


def test_partial_file_of_an_earlier_run_is_continued(server: Server, index: Path) -> None:
    artifact = artifact_of(index / server.filename)
    part = cached_path(artifact).with_name(server.filename + ".part")
    part.parent.mkdir(parents=True)
    part.write_bytes(server.content[:150_000])
    assert fetch(artifact).read_bytes() == server.content
    assert server.ranges == ["bytes=150000-"]
    assert not part.exists()


def test_server_without_ranges_starts_over(server: Server, index: Path, tmp_path: Path) -> None:
    server.honour_ranges = False
    part = tmp_path / "part"
    part.write_bytes(b"other bytes")
    http_download(artifact_of(index / server.filename), part)
    assert part.read_bytes() == server.content


def test_corrupt_download_is_refused(server: Server, index: Path) -> None:
    artifact = artifact_of(index / server.filename)
    server.content = server.content[:-1] + b"?"
    actual = hashlib.sha256(server.content).hexdigest()
    with pytest.raises(FetchError, match=f"HTTP: corrupt download: expected SHA-256 {artifact.sha256}, got {actual}"):
        fetch(artifact)
    assert [path.suffix for path in cached_path(artifact).parent.iterdir()] == [".lock"]


def test_server_that_sends_without_end(server: Server, index: Path, tmp_path: Path) -> None:
    """What is kept of it is bounded, and the hash tells."""
    artifact = artifact_of(index / server.filename)
    server.content += bytes(10_000_000)
    server.bytes_per_reply = len(server.content)
    http_download(artifact, part := tmp_path / "part")
    assert part.stat().st_size == artifact.size + 1
    with pytest.raises(FetchError, match="HTTP: corrupt download"):
        fetch(artifact)


def test_planted_link_is_not_written_through(server: Server, index: Path, tmp_path: Path) -> None:
    artifact = artifact_of(index / server.filename)
    (tmp_path / "precious").write_text("mine")
    part = cached_path(artifact).with_name(server.filename + ".part")
    part.parent.mkdir(parents=True)
    part.symlink_to(tmp_path / "precious")
    assert fetch(artifact).read_bytes() == server.content
    assert (tmp_path / "precious").read_text() == "mine"


@pytest.mark.parametrize(
    "link", ["file:///etc/tiny_demo-1.0-py3-none-any.whl", "ftp://127.0.0.1/tiny_demo-1.0-py3-none-any.whl"]
)
def test_index_that_points_elsewhere(server: Server, index: Path, tmp_path: Path, link: str) -> None:
    artifact = artifact_of(index / server.filename)
    server.link = link
    with pytest.raises(OSError, match=f"not tried, since '{link}' is no address of a web server"):
        http_download(artifact, tmp_path / "part")


def test_file_missing_from_the_index(server: Server, index: Path, tmp_path: Path) -> None:
    artifact = artifact_of(index / server.filename)
    server.link = "/files/tiny_demo-2.0-py3-none-any.whl"
    with pytest.raises(OSError, match=r"does not list tiny_demo-1\.0"):
        http_download(artifact, tmp_path / "part")
