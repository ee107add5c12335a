"""Files that the server makes when their link is followed. A link does not die with the run of the script that drew it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple
from urllib.parse import urlencode

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from .addresses import shown_address
from .scene import Scene, look, open_store
from .source import SourceError
from .view import View, read, write

_HEADERS = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}


class File(NamedTuple):
    """A kind of file.

    Args:
        name: of the saved file.
        mime: its media type.
        make: writes it, given the store, the view and the store's address as it may be shown.
    """

    name: str
    mime: str
    make: Callable[[Scene, View, str], str]


def _report(scene: Scene, view: View, store: str) -> str:
    from .report import report

    return report(scene, view, store)


def _curves(scene: Scene, view: View, store: str) -> str:
    from .export import curves_csv
    from .screens.curves import chosen

    return curves_csv(scene, view, chosen(scene, view))


REPORT = File("comparison.html", "text/html", _report)
CURVES = File("curves.csv", "text/csv", _curves)
_served = False


def link(file: File, view: View) -> str | None:
    """Where the file of a view is; None when Streamlit serves the page by itself, which takes no routes of ours.

    Args:
        file: which.
        view: of the page.
    """
    return f"./zo/{file.name}?{urlencode(write(view), doseq=True)}" if _served else None


def routes(store: str, allowed: Callable[[Request], bool]) -> list[Route]:
    """The server's answers to these links.

    Args:
        store: MLflow tracking URI.
        allowed: the request comes from a page of this server.
    """
    global _served
    _served = True
    return [Route(f"/zo/{file.name}", _answer(file, store, allowed)) for file in (REPORT, CURVES)]


def _answer(file: File, store: str, allowed: Callable[[Request], bool]) -> Callable[[Request], Response]:
    def answer(request: Request) -> Response:
        if not allowed(request):
            return Response("Another site asked for this, or another name than `server.allowedHosts` has.", 403)
        query: Mapping[str, Sequence[str]] = {name: request.query_params.getlist(name) for name in request.query_params}
        view = read(query)
        try:
            found = file.make(look(open_store(store), view.experiments), view, shown_address(store))
        except SourceError as error:
            return Response(str(error), 503, media_type="text/plain")
        return Response(
            found, headers={**_HEADERS, "Content-Disposition": f'attachment; filename="{file.name}"'}, media_type=file.mime
        )

    return answer
