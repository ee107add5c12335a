"""A page of the dashboard inside a notebook: ``embed("curves", filter="reft lr<1e-3", keys=("train/loss",))``.

The dashboard runs beside the notebook (``zolightning dash``); its server lets notebooks of the same machine frame its pages.
"""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import Any
from urllib.parse import urlencode, urlsplit

from .serve import DEFAULT_PORT, LOOPBACK
from .view import View, write

PAGES = ("overview", "runs", "curves", "memory", "tradeoffs", "sweep", "health", "diff", "run")


@dataclass(frozen=True)
class Embedded:
    """A page in a frame; a notebook shows it where it is the last value of a cell.

    Args:
        address: of the page.
        height: of the frame in pixels.
    """

    address: str
    height: int

    def _repr_html_(self) -> str:
        return (
            f'<iframe src="{escape(self.address)}" width="100%" height="{self.height}" style="border: 0" '
            f'title="zolightning dashboard"></iframe>'
        )


def embed(page: str = "curves", *, url: str = f"http://{LOOPBACK}:{DEFAULT_PORT}", height: int = 800, **view: Any) -> Embedded:
    """Show a page of a dashboard that is running.

    Args:
        page: one of :data:`PAGES`.
        url: where the dashboard listens.
        height: of the frame in pixels, >= 100.
        view: fields of :class:`view.View`, such as ``filter``, ``keys``, ``axis``, ``by``.

    Raises:
        ValueError: there is no such page, or `url` is no web address.
        TypeError: the view has no such field.
    """
    if page not in PAGES:
        raise ValueError(f"`embed({page!r})` is no page; give one of {', '.join(PAGES)}")
    if urlsplit(url).scheme not in ("http", "https"):
        raise ValueError(f"`embed(url=...)` must begin with http:// or https://, got {url!r}")
    if height < 100:
        raise ValueError(f"`embed(height=...)` must be >= 100, got {height}")
    query = urlencode({**write(View(**view)), "embed": "true"}, doseq=True)
    return Embedded(f"{url.rstrip('/')}/{'' if page == PAGES[0] else page}?{query}", height)
