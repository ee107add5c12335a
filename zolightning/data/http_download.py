"""Second way to fetch an artifact: plain HTTP from the package index, which resumes a broken download.

It takes over where pip gives up: pip does not pick up a download interrupted earlier (before 25.1 not even
its own), needs a build backend even to download an sdist, and is missing from some environments.
"""

import http.client
import logging
import os
import re
import ssl
import time
import urllib.error
import urllib.request
from html import unescape
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

from .artifacts import Artifact
from .pip_download import index_url

logger = logging.getLogger(__name__)

TIMEOUT_S = 30.0
STALLS = 3
PAGE_BYTES = 1 << 25


def http_download(artifact: Artifact, part: Path) -> None:
    """Complete `part` to the artifact's size; its content is kept and only the missing part is requested.

    Raises OSError with the reason after three tries in a row without a new byte; `part` then stays for
    the next call.
    """
    url = _file_url(artifact)
    if part.is_symlink():  # planted: its target is not ours to write
        part.unlink()
    stalls = 0
    while (have := part.stat().st_size if part.is_file() else 0) < artifact.size:
        try:
            _append(url, part, have, artifact.size)
            error: Exception = OSError("the server closed the connection early")
        except (OSError, http.client.HTTPException) as caught:
            error = caught
        stalls = 0 if part.is_file() and part.stat().st_size > have else stalls + 1
        if stalls == STALLS or (isinstance(error, urllib.error.HTTPError) and error.code < 500):
            raise OSError(f"{url}: {error}") from error
        if stalls:
            time.sleep(stalls)


def _file_url(artifact: Artifact) -> str:
    """Look the file's address up on the index's project page (PEP 503, which every index serves)."""
    if os.environ.get("PIP_NO_INDEX", "0").lower() not in ("", "0", "false", "no", "off"):
        raise OSError("not tried, since PIP_NO_INDEX is set")
    index = index_url()
    if urlsplit(index).username is not None:
        raise OSError("not tried, since the package index needs a login, which only pip handles")
    page = f"{index.rstrip('/')}/{re.sub(r'[-_.]+', '-', artifact.distribution).lower()}/"
    try:
        with _open(page, {"Accept": "text/html"}) as response:
            text = response.read(PAGE_BYTES).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException) as error:
        raise OSError(f"{page}: {error}") from error
    for link in re.findall(r"""<a\s[^>]*?href\s*=\s*["']([^"']+)""", text):
        url = urljoin(page, unescape(link))
        if unquote(urlsplit(url).path).endswith("/" + artifact.filename):
            return url.partition("#")[0]
    raise OSError(f"{page} does not list {artifact.filename}")


def _append(url: str, part: Path, have: int, size: int) -> None:
    """Append the server's answer, one byte over `size` at most: the hash tells that it was too much."""
    if have:
        logger.info("continuing %s at %.1f MB", part.stem, have / 1e6)
    with _open(url, {"Range": f"bytes={have}-"} if have else {}) as response:
        resumed = response.status == http.client.PARTIAL_CONTENT
        left = size + 1 - (have if resumed else 0)
        with part.open("ab" if resumed else "wb") as stream:
            while block := response.read(min(1 << 18, left)):
                stream.write(block)
                left -= len(block)


def _open(url: str, headers: dict[str, str]) -> http.client.HTTPResponse:
    if urlsplit(url).scheme not in ("http", "https"):
        raise OSError(f"not tried, since {url!r} is no address of a web server")
    authorities = os.environ.get("PIP_CERT") or os.environ.get("REQUESTS_CA_BUNDLE") or None
    context = ssl.create_default_context(cafile=authorities)
    request = urllib.request.Request(url, headers={"User-Agent": "zolightning", **headers})
    response: http.client.HTTPResponse = urllib.request.urlopen(request, timeout=TIMEOUT_S, context=context)
    return response
