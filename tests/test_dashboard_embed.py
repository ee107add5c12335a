"""A page of the dashboard inside a notebook."""

from __future__ import annotations

from urllib.parse import parse_qs, urlsplit

import pytest

pytest.importorskip("streamlit", reason="the dashboard's packages are not installed")

from zolightning_dashboard.embed import PAGES, embed
from zolightning_dashboard.page import SCREENS
from zolightning_dashboard.view import View, read


def test_the_frame_shows_what_was_asked_for() -> None:
    fields = {"filter": 'reft lr<1e-3 "a&b"', "keys": ("train/loss", "val/loss"), "axis": "elapsed", "by": ("seed",)}
    found = embed("curves", url="http://127.0.0.1:9000/", height=500, **fields)
    address = urlsplit(found.address)
    assert (address.netloc, address.path) == ("127.0.0.1:9000", "/curves")
    assert read(parse_qs(address.query)) == View(**fields)
    assert parse_qs(address.query)["embed"] == ["true"]
    html = found._repr_html_()
    assert html.startswith('<iframe src="http://127.0.0.1:9000/curves?') and 'height="500"' in html
    assert html.count('"') == 10 and "<1e-3" not in html  # nothing of the view leaves the attribute


def test_every_page_can_be_framed() -> None:
    assert tuple(SCREENS) == PAGES
    assert urlsplit(embed("overview").address).path == "/"


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"page": "nothing"}, ValueError),
        ({"url": "javascript:alert(1)"}, ValueError),
        ({"height": 5}, ValueError),
        ({"smooth": 0.5}, TypeError),
    ],
)
def test_nonsense_is_refused(wrong: dict[str, object], error: type[Exception]) -> None:
    with pytest.raises(error):
        embed(**wrong)  # type: ignore[arg-type]
