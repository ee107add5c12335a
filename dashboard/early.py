"""The charts of an address before Streamlit is up.

Streamlit needs about a second before it draws anything. The page Curves fetches its points beside that, draws them, and hands
the charts over when Streamlit has a place for each (charts/early.js).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route
from streamlit import config, file_util

from . import downloads
from .charts.live import code
from .source.base import SourceError

# without an encoding Streamlit compresses, which takes longer than it saves
_HEADERS = {"X-Content-Type-Options": "nosniff", "Content-Encoding": "identity"}
_FRESH = {**_HEADERS, "Cache-Control": "no-cache"}
_KEPT = {**_HEADERS, "Cache-Control": "immutable, max-age=31536000"}


def routes(store: str) -> list[Route]:
    """What the server answers beside Streamlit.

    Args:
        store: MLflow tracking URI.
    """
    js, css = code()
    module = f"{js}\nzo.early({json.dumps(css)});"
    name = f"zo/early-{hashlib.sha256(module.encode()).hexdigest()[:16]}.js"
    html = (Path(file_util.get_static_dir()) / "index.html").read_text("utf-8")
    html = html.replace("</head>", f'<script type="module" async src="./{name}"></script></head>', 1)

    def page(_: Request) -> Response:
        return HTMLResponse(html, headers=_FRESH)

    def script(_: Request) -> Response:
        return Response(module, media_type="text/javascript", headers=_KEPT)

    def answer(find: Callable[[Mapping[str, Sequence[str]]], bytes | None]) -> Callable[[Request], Response]:
        def respond(request: Request) -> Response:
            if not _from_here(request):
                return Response("Another site asked for this, or another name than `server.allowedHosts` has.", 403)
            try:
                found = find({name: request.query_params.getlist(name) for name in request.query_params})
            except SourceError:
                found = None  # the page will say why
            return Response(found, 200 if found else 204, _FRESH)

        return respond

    return [
        Route("/curves", page),
        Route(f"/{name}", script),
        Route("/zo/charts", answer(lambda query: charts(store, query))),
        Route("/zo/match", answer(lambda query: matches(store, query))),
        *downloads.routes(store, _from_here),
    ]


def charts(store: str, query: Mapping[str, Sequence[str]]) -> bytes | None:
    """The charts of the page Curves, as :func:`dashboard.charts.pack.bundle` packs them; None when there is nothing to draw.

    Args:
        store: MLflow tracking URI.
        query: of the page's address, values by name.

    Raises:
        SourceError: the store cannot be read.
    """
    from .charts.lines import Look  # not before the server answers: that takes a while
    from .charts.pack import bundle
    from .scene import look, open_store
    from .screens import curves, parts
    from .session import FIRST_BOARD
    from .view import read

    view = read(query)
    scene = look(open_store(store), view.experiments)
    keys = curves.chosen(scene, view)
    if not keys:
        return None
    how = Look(view.axis, view.smoothing, view.log, view.zoom)
    messages = scene.store.plotter.messages(FIRST_BOARD, keys, scene.members(view), how)
    return bundle(parts.lines(scene, view, FIRST_BOARD), curves.shells(keys, view, FIRST_BOARD), messages.values())


def matches(store: str, query: Mapping[str, Sequence[str]]) -> bytes:
    """The runs that the address's filter leaves, as JSON; see :func:`matching.match`."""
    from .matching import match
    from .view import read

    return json.dumps(match(store, read(query))).encode()


def _from_here(request: Request) -> bool:
    """As Streamlit checks its websocket: by a name of this server, and from one of its own pages."""
    hosts = config.get_option("server.allowedHosts")
    own = "*" in hosts or request.url.hostname in hosts
    return own and request.headers.get("sec-fetch-site", "same-origin") in ("same-origin", "none")
