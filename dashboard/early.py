"""The part of a page's work that is done before Streamlit is up, which needs about a second before it draws anything.

Every page names the code that it will need, so that the browser has it by then. The page Curves fetches its points beside that,
draws them, and hands the charts over when Streamlit has a place for each (charts/early.js).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route
from streamlit import config, file_util

from . import downloads
from .charts.live import module
from .source.base import SourceError

# without an encoding Streamlit compresses, which takes longer than it saves
_HEADERS = {"X-Content-Type-Options": "nosniff", "Content-Encoding": "identity"}
_FRESH = {**_HEADERS, "Cache-Control": "no-cache"}
_KEPT = {**_HEADERS, "Cache-Control": "immutable, max-age=31536000"}


_IMPORTS = re.compile(r'(?:from|import)"\./([\w.-]+\.js)"')
_EVERYWHERE = ("BidiComponent", "Html", "Checkbox", "LinkButton")
_TABLE, _STILL, _CHOICE = "DataFrame", "EChartsChart", "Selectbox"
PAGES: Mapping[str, Sequence[str]] = {
    "": (_TABLE, _CHOICE),
    "overview": (_TABLE, _CHOICE),
    "runs": (_TABLE,),
    "curves": (),  # its own imports come first
    "memory": (_TABLE, _STILL, _CHOICE, "Slider"),
    "tradeoffs": (_TABLE, _STILL, _CHOICE, "Slider"),
    "sweep": (_STILL, _CHOICE),
    "health": (_TABLE, _CHOICE),
    "diff": (_TABLE, _CHOICE),
    "run": (_TABLE, _CHOICE),
}
"""The pages by their path, and the parts of Streamlit that each has."""


def routes(store: str) -> list[Route]:
    """The server's answers in addition to Streamlit's.

    Args:
        store: MLflow tracking URI.
    """
    name, engine = module()
    static = Path(file_util.get_static_dir())
    html = (static / "index.html").read_text("utf-8")

    def page(*wanted: str) -> Callable[[Request], Response]:
        links = [f'<link rel="modulepreload" crossorigin href="./static/js/{one}">' for one in chunks(static / "js", wanted)]
        text = html.replace("</head>", f'<script type="module" async src="{name}"></script>{"".join(links)}</head>', 1)
        return lambda _: HTMLResponse(text, headers=_FRESH)

    def script(_: Request) -> Response:
        return Response(engine, media_type="text/javascript", headers=_KEPT)

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
        *(Route(f"/{which}", page(*_EVERYWHERE, *some)) for which, some in PAGES.items()),
        Route(name.removeprefix("."), script),
        Route("/zo/charts", answer(lambda query: charts(store, query))),
        Route("/zo/match", answer(lambda query: matches(store, query))),
        *downloads.routes(store, _from_here),
    ]


def chunks(folder: Path, wanted: Sequence[str]) -> list[str]:
    """The files of Streamlit's parts that a page has, and the files that these import.

    Args:
        folder: with Streamlit's code.
        wanted: the parts' names; those that this version of Streamlit does not have are passed over.
    """
    found: dict[str, None] = {}
    for part in wanted:
        for file in folder.glob(f"{part}.*.js"):
            found |= dict.fromkeys([file.name, *_IMPORTS.findall(file.read_text("utf-8"))])
    return [one for one in found if not one.startswith("index.")]


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
