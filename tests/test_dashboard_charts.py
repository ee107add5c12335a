"""The dashboard's small parts: what is packed for the charts, the view's address, colours, safe text, exports."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import struct
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("streamlit", reason="the dashboard's packages are not installed")

from dashboard_stores import HOSTILE, log, make_store
from zolightning_dashboard import addresses, budgets, export, facts, palette, report, text, view, words
from zolightning_dashboard.charts import still
from zolightning_dashboard.charts.lines import Look, Member, Plotter
from zolightning_dashboard.charts.memo import Memo
from zolightning_dashboard.charts.pack import Drawing, Line, Mark, compact, pack
from zolightning_dashboard.scene import Scene, Store, look
from zolightning_dashboard.source import SourceError, open_source
from zolightning_dashboard.view import View

START = 1_700_000_000_000


def unpack(message: bytes) -> dict[str, Any]:
    """A plain reading of the wire format, as charts/unpack.js does it."""
    (length,) = struct.unpack_from("<I", message)
    header: dict[str, Any] = json.loads(message[4 : 4 + length])
    start = -(-(4 + length) // 8) * 8

    def array(ref: tuple[str, int, int]) -> np.ndarray[Any, Any]:
        return np.frombuffer(message, f"<{ref[0]}", ref[2], start + ref[1])

    for chart in header["charts"].values():
        chart["x"] = array(chart["x"])
        lines = []
        for id_, role, y, index, first in chart["lines"]:
            places = array(index) if index is not None else first + np.arange(y[2])
            lines.append({"id": id_, "role": role, "y": array(y), "places": places})
        chart["lines"] = lines
    return header


curves = st.lists(st.tuples(st.integers(0, 400), st.floats(width=32)), max_size=60, unique_by=lambda p: p[0]).map(sorted)


@given(st.lists(curves, max_size=5))
def test_packed_lines_read_back_at_their_x(lines: list[list[tuple[int, float]]]) -> None:
    drawn = [
        Line(f"run {i}", "line", np.array([x for x, _ in points], float), np.array([y for _, y in points], float))
        for i, points in enumerate(lines)
    ]
    marks = [Mark("run 0", "nan", np.array([3.0]), np.array([2]))]
    header = unpack(pack("board", "live", {"loss": Drawing(drawn, marks, "note")}, zoom=(1.0, 2.0)))
    chart = header["charts"]["loss"]
    assert (header["board"], header["part"], header["zoom"], chart["note"]) == ("board", "live", [1.0, 2.0], "note")
    assert chart["marks"] == [["run 0", "nan", [3.0], [2]]]
    assert (np.diff(chart["x"]) > 0).all()
    for line, found in zip(drawn, chart["lines"], strict=True):
        assert (found["id"], found["role"]) == (line.id, line.role)
        np.testing.assert_array_equal(chart["x"][found["places"]], line.x)
        np.testing.assert_array_equal(found["y"], line.y)


@given(st.lists(st.floats(allow_nan=True, allow_infinity=False), min_size=1, max_size=30))
def test_compacting_shows_nobody_another_value(values: list[float]) -> None:
    exact = np.array(values)
    found = compact(exact).astype(float)
    assert (np.isnan(found) == np.isnan(exact)).all()
    finite = exact[np.isfinite(exact)]
    if len(finite):
        with np.errstate(over="ignore"):
            span = finite.max() - finite.min()
        assert np.abs(found[np.isfinite(exact)] - finite).max() <= 1e-4 * span


def test_large_offsets_keep_double_precision() -> None:
    assert compact(1e9 + np.arange(100.0)).dtype == np.float64
    assert compact(np.linspace(0, 1, 100)).dtype == np.float32


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """One long run, one short, two seeds of one method, one with a hostile name, and one that is going on."""
    path = tmp_path_factory.mktemp("charts") / "mlflow.db"
    client = make_store(path)
    rng = np.random.default_rng(0)
    for name, count, params, ended in (
        ("long", 5000, {"lr": "1"}, True),
        ("short", 50, {"lr": "2"}, True),
        ("seed 0", 50, {"lr": "3", "seed": "0"}, True),
        ("seed 1", 50, {"lr": "3", "seed": "1"}, True),
        (HOSTILE[0], 50, {HOSTILE[0]: HOSTILE[0]}, True),
        ("=live", 200, {"lr": "5"}, False),
    ):
        run = client.create_run("0", start_time=START, run_name=name, tags={"zo.method": name.split()[0]}).info.run_id
        for key, value in params.items():
            client.log_param(run, re.sub(r"[^\w ]", "_", key), value)
        values = rng.normal(size=count)
        values[5] = 99.0
        log(client, run, "loss", [(s, START + 1000 * s, float(v)) for s, v in enumerate(values)])
        log(client, run, "memory/peak", [(0, START, 2.0**30 * count / 100)])
        log(client, run, "memory/weights", [(0, START, 2.0**28)])
        if "seed" in params:
            log(client, run, "at its own steps", [(s + int(params["seed"]), START, 1.0) for s in (0, 2, 4)])
        if ended:
            client.set_terminated(run, end_time=START + 1000 * count)
    source = open_source(f"sqlite:///{path}")
    return look(Store(source, Plotter(source)), ())


def drawn(scene: Scene, shown: View, keys: tuple[str, ...] = ("loss",)) -> dict[str, dict[str, Any]]:
    how = Look(shown.axis, shown.smoothing, shown.log, shown.zoom)
    return {part: unpack(one) for part, one in scene.store.plotter.messages("b", keys, scene.members(shown), how).items()}


def by_name(scene: Scene, name: str) -> str:
    return next(run.id for run in scene.runs if run.name == name)


def test_short_runs_are_drawn_as_logged_and_long_ones_keep_their_peak(scene: Scene) -> None:
    chart = drawn(scene, View())["settled"]["charts"]["loss"]
    lines = {line["id"]: line for line in chart["lines"]}
    short = lines[by_name(scene, "short")]
    np.testing.assert_array_equal(chart["x"][short["places"]], np.arange(50.0))
    assert all(line["y"].max() == 99.0 for line in lines.values())
    assert len(lines[by_name(scene, "long")]["y"]) < 5000
    assert "points at a time" in chart["note"]


def test_a_zoom_brings_every_point_in_it(scene: Scene) -> None:
    found = drawn(scene, View(zoom=(1000.0, 1100.0)))["settled"]
    line = next(one for one in found["charts"]["loss"]["lines"] if one["id"] == by_name(scene, "long"))
    x = found["charts"]["loss"]["x"][line["places"]]
    series = scene.store.source.series(by_name(scene, "long"), "loss")
    inside = (x >= 1000) & (x <= 1100)
    np.testing.assert_array_equal(x[inside], np.arange(1000.0, 1101.0))
    np.testing.assert_allclose(line["y"][inside], series.value[1000:1101], rtol=1e-3, atol=1e-3)
    assert found["charts"]["loss"]["note"] == ""


def test_raw_points_stay_behind_the_smoothed_line(scene: Scene) -> None:
    plain = drawn(scene, View())["live"]["charts"]["loss"]["lines"]
    smooth = drawn(scene, View(smoothing=0.9))["live"]["charts"]["loss"]["lines"]
    assert [line["role"] for line in plain] == ["line"]
    assert [line["role"] for line in smooth] == ["raw", "line"]
    assert smooth[1]["y"].std() < smooth[0]["y"].std()


def test_seeds_become_a_mean_with_its_deviation(scene: Scene) -> None:
    chart = drawn(scene, View(group=True))["settled"]["charts"]["loss"]
    ours = next(m for m in scene.members(View(group=True)) if len(m.runs) == 2)
    lines = {line["role"]: line["y"] for line in chart["lines"] if line["id"] == ours.id}
    values = np.stack([scene.store.source.series(run.id, "loss").value for run in ours.runs])
    np.testing.assert_allclose(lines["line"], values.mean(0), atol=1e-2)
    np.testing.assert_allclose(lines["high"] - lines["line"], values.std(0, ddof=1), atol=2e-2)
    assert scene.labels(View(group=True))[ours.id].endswith("(n=2)")


def test_a_mean_that_is_not_of_points_says_so(scene: Scene) -> None:
    charts = drawn(scene, View(group=True), ("loss", "at its own steps"))["settled"]["charts"]
    assert "between the seeds' own points" in charts["at its own steps"]["note"]
    assert "between" not in charts["loss"]["note"]


def test_values_without_a_place_on_a_log_axis_are_marked(scene: Scene) -> None:
    chart = drawn(scene, View(log=True))["live"]["charts"]["loss"]
    value = scene.store.source.series(by_name(scene, "=live"), "loss").value
    dropped = [mark for mark in chart["marks"] if mark[1] == "dropped"]
    assert sum(sum(mark[3]) for mark in dropped) == (value <= 0).sum()
    assert np.isnan(chart["lines"][0]["y"]).sum() == (value <= 0).sum()


def test_many_lines_stay_within_a_megabyte(scene: Scene) -> None:
    long = next(run for run in scene.runs if run.name == "long")
    members = [Member((replace(long),), False)] * 200
    sizes = scene.store.plotter.messages("b", ["loss"], members, Look("step"))
    assert sum(len(one) for one in sizes.values()) < 1_000_000


def test_memory_is_drawn_in_gib(scene: Scene) -> None:
    lines = drawn(scene, View(), ("memory/peak",))["live"]["charts"]["memory/peak"]["lines"]
    assert lines[0]["y"].tolist() == [2.0]


def test_memo_keeps_the_latest_and_forgets_the_oldest() -> None:
    memo: Memo[int] = Memo(2)
    made: list[int] = []

    def make(n: int) -> int:
        made.append(n)
        return n

    for n in (1, 2, 1, 3, 1, 2):
        assert memo.get(n, lambda n=n: make(n)) == n  # type: ignore[misc]
    assert made == [1, 2, 3, 2]


ids = st.lists(st.text("0123456789abcdef", min_size=32, max_size=32), unique=True, max_size=40)


@given(ids, ids)
def test_a_style_stays_whatever_comes_later_and_is_its_own(first: list[str], later: list[str]) -> None:
    alone = palette.styles(first)
    together = palette.styles([*first, *(one for one in later if one not in first)])
    assert all(together[one] == alone[one] for one in first)
    most = len(palette.LIGHT) * len(palette.DASHES)
    assert len(set(list(together.values())[:most])) == len(list(together)[:most])


@pytest.mark.parametrize(("colors", "paper"), [(palette.LIGHT, "#ffffff"), (palette.DARK, "#0e1117")])
def test_colours_are_told_apart_by_any_eye(colors: tuple[str, ...], paper: str) -> None:
    linear = np.array([_linear(one) for one in colors])
    for eye in (np.eye(3), *_COLOUR_BLIND):  # Okabe and Ito's well-known eight come to 0.076 here
        seen = _oklab(np.clip(linear @ eye.T, 0, 1))
        apart = np.linalg.norm(seen[:, None] - seen[None], axis=-1)[np.triu_indices(len(colors), 1)]
        assert apart.min() > 0.08
    light = linear @ _LUMINANCE
    ground = _linear(paper) @ _LUMINANCE
    contrast = (np.maximum(light, ground) + 0.05) / (np.minimum(light, ground) + 0.05)
    assert contrast.min() >= 2.95


# Machado et al. (2009), severity 1: protan, deutan, tritan
_COLOUR_BLIND = np.array(
    [
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
    ]
)
_LUMINANCE = np.array([0.2126, 0.7152, 0.0722])
_LMS = np.array(
    [[0.41222147, 0.53633254, 0.05144599], [0.2119035, 0.68069955, 0.10739696], [0.08830246, 0.28171884, 0.6299787]]
)
_LAB = np.array(
    [[0.21045426, 0.79361779, -0.00407205], [1.9779985, -2.42859221, 0.45059371], [0.0259040, 0.7827718, -0.8086758]]
)


def _linear(color: str) -> np.ndarray[Any, Any]:
    value = np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def _oklab(linear: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.cbrt(np.clip(linear @ _LMS.T, 0, None)) @ _LAB.T


@given(st.text(max_size=300), st.integers(1, 100))
def test_plain_text_is_one_short_line_that_directs_nothing(given_text: str, limit: int) -> None:
    shown = text.plain(given_text, limit)
    inner = shown.strip("\u2068\u2069")
    assert len(inner) <= limit
    assert not re.search("[\x00-\x1f\x7f-\x9f\u200e\u200f\u061c\u202a-\u202e\u2066-\u2069\u2028\u2029]", inner)
    assert (shown[:1] == "\u2068") == (shown[-1:] == "\u2069")


@pytest.mark.parametrize("name", ["run 1", "zo/lr=1e-3", "emoji 🧪 é", "a_b*c"])
def test_ordinary_text_is_left_alone(name: str) -> None:
    assert text.plain(name) == name


@given(st.text(max_size=100))
def test_code_spans_hold_everything(given_text: str) -> None:
    shown = text.code(given_text)
    fence = re.match("`+", shown)
    assert fence is not None
    ticks = fence[0]
    assert shown.endswith(ticks)
    inside = shown[len(ticks) : -len(ticks)]
    assert ticks not in re.findall("`+", inside)


words_ = st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters=","), min_size=1, max_size=12)
hexes = st.text("0123456789abcdef", min_size=10, max_size=10)
floats = st.floats(-60_000, 60_000, width=16)
views = st.builds(
    View,
    store=words_,
    experiments=st.lists(words_.filter(lambda w: w != "none"), max_size=3).map(tuple),
    filter=words_,
    runs=st.none() | st.lists(hexes, max_size=3).map(tuple),
    without=st.lists(hexes, max_size=3).map(tuple),
    by=st.lists(words_, max_size=3).map(tuple),
    color=st.sampled_from(view.COLORS),
    rank=words_,
    most=st.integers(1, view.MOST_LINES),
    columns=st.lists(words_, max_size=3).map(tuple),
    pinned=st.lists(hexes, max_size=3).map(tuple),
    run=words_,
    parameter=words_,
    keys=st.lists(words_, max_size=3).map(tuple),
    sections=st.lists(words_, max_size=3).map(tuple),
    axis=st.sampled_from(list(view.AXES)),
    smoothing=st.sampled_from([0.0, 0.5, 0.999]),
    log=st.booleans(),
    group=st.booleans(),
    budget=st.none() | st.floats(0.125, 100, width=16),
    quality=words_,
    target=st.none() | floats,
    at=st.none() | st.integers(0, 10**9),
    zoom=st.none() | st.tuples(floats, floats).filter(lambda z: z[0] < z[1]),
    hidden=st.lists(hexes, max_size=3).map(tuple),
    live=st.booleans(),
)


@given(views)
def test_a_view_reads_back_from_its_address(shown: View) -> None:
    query = {name: [value] if isinstance(value, str) else value for name, value in view.write(shown).items()}
    assert view.read(query) == shown


@given(
    st.dictionaries(
        st.sampled_from([*View.__dataclass_fields__, "key", "column", "section", "other"]), st.lists(st.text(), max_size=3)
    )
)
def test_any_address_reads(query: dict[str, list[str]]) -> None:
    found = view.read(query)
    assert found.axis in view.AXES and 0 <= found.smoothing < 1
    assert found.zoom is None or found.zoom[0] < found.zoom[1]


def test_a_fresh_view_has_an_empty_address() -> None:
    assert view.write(View()) == {}


def test_credentials_are_not_shown() -> None:
    assert addresses.shown_address("https://me:secret@host:5000/x") == "https://host:5000/x"
    assert addresses.shown_address("sqlite:///a@b.db") == "sqlite:///a@b.db"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.123456, "0.1235"),
        (12345.6, "12,346"),
        (1e-5, "1e-05"),
        (-2.5, "−2.5"),
        (math.nan, "NaN"),
        (-math.inf, "−∞"),
        (100, "100"),
    ],
)
def test_numbers_in_words(value: float, shown: str) -> None:
    assert words.number(value) == shown


@pytest.mark.parametrize(("seconds", "shown"), [(3.2, "3.2 s"), (59.6, "1 min"), (3661, "1 h 1 min"), (90000, "1 d 1 h")])
def test_durations_in_words(seconds: float, shown: str) -> None:
    assert words.duration(seconds) == shown


@given(st.lists(st.floats(0.01, 500), min_size=1, max_size=8))
def test_a_suggested_budget_lies_on_its_slider(peaks: list[float]) -> None:
    budget = budgets.suggested(peaks)
    assert budget in budgets.SIZES
    assert budgets.largest(peaks, budget) > max([*peaks, budget])


def test_parts_and_other_make_up_the_peak(scene: Scene) -> None:
    runs = list(scene.runs)
    parts = budgets.parts(runs, scene.store.source)
    assert set(parts) == {"weights", "other"}
    for i, run in enumerate(runs):
        total = sum(values[i] for values in parts.values())
        assert total == pytest.approx(max(budgets.peak(run, scene.store.source), 0.25))


def test_devices_are_read_from_tags(scene: Scene) -> None:
    run = scene.runs[0]
    told = replace(run, tags={**run.tags, "zo.device_memory": str(12 * 2**30)})
    lying = replace(run, tags={"zo.device_memory": "<b>"})
    assert budgets.devices([told, lying, run]) == {12.0: "device: 12 GiB"}


def test_progress_and_pace(scene: Scene) -> None:
    run = next(run for run in scene.runs if run.name == "=live")
    said = replace(run, params={"max_steps": "398"})
    found = facts.facts(said, scene.store.source, None)
    assert (found.step, found.total, found.pace) == (199, 398, pytest.approx(1.0))
    assert found.left == pytest.approx(199)
    assert facts.total_steps(replace(run, params={"max_steps": "-1"})) is None


def test_csv_has_every_point_and_no_formula(scene: Scene) -> None:
    rows = list(csv.DictReader(io.StringIO(export.curves_csv(scene, View(), ["loss"]))))
    counts = Counter(row["run_id"] for row in rows)
    assert counts == {run.id: len(scene.store.source.series(run.id, "loss").step) for run in scene.runs}
    live = [row for row in rows if row["run_id"] == by_name(scene, "=live")]
    assert {row["run"] for row in live} == {"'=live"}
    assert [float(row["value"]) for row in live] == scene.store.source.series(live[0]["run_id"], "loss").value.tolist()
    zoomed = export.curves_csv(scene, View(zoom=(10.0, 19.0), runs=(by_name(scene, "short"),)), ["loss"])
    assert len(zoomed.splitlines()) == 11


class _Tags(HTMLParser):
    """Collects what a browser would take for elements."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.handlers: set[str] = set()
        self.links: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.add(tag)
        self.handlers |= {name for name, _ in attrs if name.startswith("on")}
        self.links |= {value or "" for name, value in attrs if name in ("src", "href", "xlink:href")}


def test_the_report_stands_alone_and_runs_nothing(scene: Scene) -> None:
    html = report.report(scene, View(smoothing=0.5, keys=("loss", "memory/peak")), "sqlite:///<i>")
    tags = _Tags()
    tags.feed(html)
    assert not tags.found & {"script", "img", "iframe", "object", "embed", "link", "i"}
    assert not tags.handlers
    assert all(link.startswith("#") for link in tags.links)
    assert html.count("<svg") == 2
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html and "seed 1" in html
    assert "not finite" in report.report(scene, View(log=True), "x")


def test_still_charts_never_read_names_as_html() -> None:
    bars = still.stacked_memory(["<b>"], {"weights": [1.0], "other": [0.5]}, 2.0, "GiB", dark=False)
    dots = still.trade_off("t", "x", "y", [still.Dot("<b>", 1.0, 2.0, "#fff", True)], dark=True, log_x=False)
    assert bars["tooltip"]["renderMode"] == dots["tooltip"]["renderMode"] == "richText"
    json.dumps([bars, dots])


def test_of_many_dots_those_that_can_be_told_apart_are_drawn() -> None:
    colors = ("#111111", "#222222")
    dots = [still.Dot(f"run {i}", 1.0 + i % 3, i % 100 / 100, colors[i % 2], i == 0, i % 5 > 0) for i in range(1200)]
    seen = still.uncovered(dots, 1.0, 3.0, log_x=False)
    assert dots[0] in seen and len(seen) < len(dots) / 2
    assert {(dot.x, dot.color, dot.ended) for dot in seen} == {(dot.x, dot.color, dot.ended) for dot in dots}
    near = {(dot.x, dot.color, dot.ended, round(80 * dot.y / 0.99)) for dot in seen}
    assert all((dot.x, dot.color, dot.ended, round(80 * dot.y / 0.99)) in near for dot in dots)
    assert still.uncovered(dots[:150], 1.0, 3.0, log_x=False) == dots[:150]


def test_our_scripts_never_write_html() -> None:
    for script in Path(still.__file__).parent.glob("*.js"):
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", script.read_text()), script.name


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("postgresql://me:secret@db.example:5432/mlflow", "postgresql://db.example:5432/mlflow"),
        ("http://me:se@cr/et@host:5000/path", "http://host:5000/path"),
        ("mysql://me:secret@[::1/x", "mysql://[::1/x"),
        ("http://host:5000/?password=secret&x=1", "http://host:5000/?password=…&x=1"),
        ("sqlite:////data/a@b.db", "sqlite:////data/a@b.db"),
        ("http://host:5000", "http://host:5000"),
    ],
)
def test_no_message_shows_a_password(uri: str, shown: str) -> None:
    assert addresses.shown_address(uri) == shown
    message = str(SourceError(f"the store {uri!r} cannot be read"))
    assert shown in message and "secret" not in message and "se@cr" not in message
    if not uri.startswith(("http", "sqlite")):
        with pytest.raises(SourceError) as refused:
            open_source(uri)
        assert "secret" not in str(refused.value)


def test_a_servers_password_goes_into_no_address() -> None:
    with pytest.raises(SourceError, match=r"^http://127\.0\.0\.1:1/x does not answer") as refused:
        open_source("http://me:secret@127.0.0.1:1/x")
    error: BaseException | None = refused.value
    while error is not None:  # a log shows what caused it too
        assert "secret" not in f"{error} {error!r}"
        error = error.__cause__ or error.__context__


@pytest.mark.parametrize(
    ("size", "shown"),
    [
        (1.5 * 2**30, "1.50 GiB"),
        (200 * 2**20, "0.20 GiB"),
        (90 * 2**20, "90 MiB"),
        (86_000, "84 KiB"),
        (12, "12 B"),
        (0, "0 B"),
    ],
)
def test_memory_is_said_in_the_unit_that_suits_it(size: float, shown: str) -> None:
    assert words.memory(size) == shown


def test_numbers_that_are_none_are_not_called_nan() -> None:
    assert (words.percent(math.nan), words.known(math.nan), words.number(math.nan)) == ("–", "–", "NaN")
    assert words.is_share("val_acc") and words.is_share("acc") and not words.is_share("macc_count")
    assert budgets.named(0.05) == "51.2 MiB" and budgets.named(12) == "12 GiB"
    assert view.read({"smoothing": ["0.9995"]}).smoothing == 0.999


def test_a_mean_says_how_many_runs_stand_behind_it(scene: Scene) -> None:
    chart = drawn(scene, View(group=True))["settled"]["charts"]["loss"]
    group = by_name(scene, "seed 0"), by_name(scene, "seed 1")
    assert [(end, n) for id_, end, n in chart["counts"] if id_ in group] == [(49.0, 2)]
    assert drawn(scene, View())["settled"]["charts"]["loss"]["counts"] == []
