from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from zolightning_dashboard.source import Run, Series
from zolightning_dashboard.transforms import (
    Curve,
    Grid,
    at_step,
    band,
    broken,
    by_counter,
    by_elapsed,
    by_step,
    differing,
    first_reaching,
    goal,
    grid,
    legends,
    log_axis,
    marks,
    pareto,
    rows,
    seed_groups,
    smooth,
    stretches,
    summarise,
    thin,
)
from zolightning_dashboard.transforms.groups import coincide, interpolate

FINITE = st.floats(-1e6, 1e6)
ANY = st.one_of(FINITE, st.sampled_from([math.nan, math.inf, -math.inf]))


def series(points: Sequence[tuple[int, float]], start: float = 0.0) -> Series:
    """Points of (step, value), a second apart."""
    return Series(
        np.array([step for step, _ in points], np.int64),
        start + np.arange(len(points), dtype=float),
        np.array([value for _, value in points], float),
    )


def curve(points: Sequence[tuple[float, float]]) -> Curve:
    return Curve(np.array([x for x, _ in points], float), np.array([y for _, y in points], float))


def points(curve: Curve) -> list[tuple[float, float]]:
    return list(zip(curve.x.tolist(), curve.y.tolist(), strict=True))


def run(id_: str = "r", started: float = 0.0, experiment: str = "0", name: str = "", **about: dict[str, str]) -> Run:
    return Run(id_, name or id_, experiment, "RUNNING", started, math.nan, **about)


curves = st.lists(st.tuples(st.integers(0, 60), ANY), max_size=80).map(lambda p: curve(sorted(p, key=lambda one: one[0])))


# ---- x axes ------------------------------------------------------------------------------------------------------------


def test_elapsed_counts_from_the_runs_start_in_order_of_time() -> None:
    late = Series(np.array([1, 2, 3]), np.array([105.0, 103.0, 109.0]), np.array([1.0, 2.0, 3.0]))
    assert points(by_elapsed(late, run(started=100.0))) == [(3.0, 2.0), (5.0, 1.0), (9.0, 3.0)]
    assert points(by_elapsed(late, run(started=math.nan))) == [(0.0, 2.0), (2.0, 1.0), (6.0, 3.0)]
    assert points(by_elapsed(series([]), run())) == []
    assert points(by_step(series([(3, 1.0), (3, 2.0)]))) == [(3.0, 1.0), (3.0, 2.0)]


def test_a_counter_is_joined_where_steps_meet_and_between_them_but_never_beyond() -> None:
    seen = series([(10, 160.0), (20, 320.0), (40, 800.0)])
    metric = series([(0, 0.1), (10, 0.2), (15, 0.3), (20, math.nan), (35, 0.4), (40, 0.5), (41, 0.6)])
    found = by_counter(metric, seen)
    assert found.x.tolist() == [160.0, 240.0, 320.0, 680.0, 800.0]
    assert repr(found.y.tolist()) == "[0.2, 0.3, nan, 0.4, 0.5]"


@given(
    st.lists(st.tuples(st.integers(0, 30), st.one_of(st.integers(0, 1000), st.just(math.nan))), max_size=12),
    st.lists(st.tuples(st.integers(-5, 35), FINITE), max_size=12),
)
def test_the_counter_join_against_the_textbook(counter: list[tuple[int, float]], metric: list[tuple[int, float]]) -> None:
    counter.sort(key=lambda p: p[0])
    metric.sort(key=lambda p: p[0])
    known = {step: value for step, value in counter if math.isfinite(value)}  # the last of a step

    def place(step: int) -> float | None:
        before = max((s for s in known if s <= step), default=None)
        after = min((s for s in known if s >= step), default=None)
        if before is None or after is None:
            return None
        part = 0.0 if before == after else (step - before) / (after - before)
        return known[before] + part * (known[after] - known[before])

    expected = sorted(((x, y) for step, y in metric if (x := place(step)) is not None), key=lambda p: p[0])
    found = by_counter(series(metric), series(counter))
    np.testing.assert_allclose(found.x, [x for x, _ in expected], rtol=1e-12, atol=1e-9)
    assert sorted(found.y.tolist()) == sorted(y for _, y in expected)


# ---- smoothing -----------------------------------------------------------------------------------------------------------


@given(st.lists(ANY, max_size=400), st.one_of(st.just(0.0), st.floats(0.001, 0.999)))
def test_smoothing_against_the_textbook(values: list[float], weight: float) -> None:
    average, debias = 0.0, 1.0
    expected = []
    for value in values:
        if math.isfinite(value):
            average = weight * average + (1 - weight) * value
            debias *= weight
            expected.append(average / (1 - debias) if weight else value)
        else:
            expected.append(value)
    line = curve(list(enumerate(values)))
    found = smooth(line, weight)
    np.testing.assert_allclose(found.y, expected, rtol=1e-9, atol=1e-6)
    assert found.x.tolist() == line.x.tolist()


def test_smoothing_keeps_a_constant_and_refuses_other_weights() -> None:
    constant = curve([(i, 3.5) for i in range(1000)])
    np.testing.assert_allclose(smooth(constant, 0.999).y, 3.5, rtol=1e-12)
    for weight in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match=r"must lie between 0 and 0\.999"):
            smooth(constant, weight)


# ---- thinning ------------------------------------------------------------------------------------------------------------


def shown(line: Curve, to: Grid) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points(line) if to.low <= x <= to.high + 1e-9 and math.isfinite(y)]


@given(
    st.lists(curves, min_size=1, max_size=4),
    st.integers(1, 9),
    st.one_of(st.none(), st.tuples(st.integers(0, 30), st.integers(1, 40))),
)
def test_thinning_against_the_textbook(lines: list[Curve], buckets: int, zoom: tuple[int, int] | None) -> None:
    to = grid(lines, buckets, None if zoom is None else (zoom[0], zoom[0] + zoom[1]))
    width = (to.high - to.low) / to.buckets
    thinned = thin(lines, to)
    shared = set()
    for line, thin_line in zip(lines, thinned, strict=True):
        assert (np.diff(thin_line.x) > 0).all(), "a chart has one point for each x"
        assert not np.isinf(thin_line.y).any()
        real, drawn = shown(line, to), shown(thin_line, to)
        inside = [x for x, _ in points(line) if to.low <= x <= to.high]
        if len(drawn) == len(real) and np.allclose([x for x, _ in drawn], [x for x, _ in real], atol=1e-9):
            assert [y for _, y in drawn] == [y for _, y in real]
            continue
        assert len(inside) > buckets or sum(len(one.x) for one in lines) > 4 * buckets
        shared |= {x for x, _ in drawn}
        assert len(drawn) <= 4 * buckets
        for bucket in range(buckets):
            in_bucket = [y for x, y in real if min(buckets - 1, int((x - to.low) * (buckets / (to.high - to.low)))) == bucket]
            kept = [y for x, y in drawn if to.low + bucket * width <= x < to.low + (bucket + 1) * width]
            assert bool(kept) == bool(in_bucket)
            if kept:
                assert (kept[0], kept[-1], min(kept), max(kept)) == (
                    in_bucket[0],
                    in_bucket[-1],
                    min(in_bucket),
                    max(in_bucket),
                )
                rest = iter(in_bucket)
                assert all(y in rest for y in kept), "in the order in which they were logged"
    assert len(shared) <= 4 * buckets, "thinned lines share their x"


@given(curves, st.integers(80, 200))
def test_few_points_stay_as_they_are(line: Curve, buckets: int) -> None:
    (found,) = thin([line], grid([line], buckets))
    np.testing.assert_allclose(found.x, line.x, rtol=1e-12, atol=1e-300)
    assert repr(found.y.tolist()) == repr([y if math.isfinite(y) else math.nan for y in line.y.tolist()])


def test_lines_run_to_the_edge_of_the_range() -> None:
    line = curve([(i, float(i)) for i in range(1000)])
    for buckets in (5, 500):
        (found,) = thin([line], Grid(100.5, 200.5, buckets))
        assert (found.x[0], found.x[-1]) == (100.0, 201.0)
        assert (found.y[0], found.y[-1]) == (100.0, 201.0)
    (found,) = thin([line], Grid(2000.0, 3000.0, 5))
    assert points(found) == [(999.0, 999.0)]


def test_a_peak_survives_and_a_gap_breaks_the_line() -> None:
    y = np.zeros(100_000)
    y[54_321] = 1.0
    y[70_000:80_000] = np.nan
    line = Curve(np.arange(100_000.0), y)
    (found,) = thin([line], grid([line], 100))
    assert found.y[np.isfinite(found.y)].max() == 1.0
    assert len(found.x) <= 400
    between = found.y[(found.x > 70_000) & (found.x < 80_000)]
    assert len(between)
    assert np.isnan(between).all()


@given(st.lists(curves, min_size=1, max_size=3), st.integers(1, 50), st.booleans())
def test_marks_count_every_point_without_a_place(lines: list[Curve], buckets: int, log: bool) -> None:
    to = grid(lines, buckets)
    for line in lines:
        kinds = {
            "nan": [x for x, y in points(line) if math.isnan(y)],
            "inf": [x for x, y in points(line) if y == math.inf],
            "-inf": [x for x, y in points(line) if y == -math.inf],
            "dropped": [x for x, y in points(line) if math.isfinite(y) and y <= 0 and log],
        }
        found = {mark.kind: mark for mark in marks(line, to, log)}
        assert found.keys() == {kind for kind, places in kinds.items() if places}
        for kind, mark in found.items():
            assert mark.points.sum() == len(kinds[kind])
            assert mark.x[0] == kinds[kind][0]
            assert set(mark.x.tolist()) <= set(kinds[kind]), "marks stand at the true x"


def test_a_log_axis_says_what_it_leaves_out() -> None:
    line, dropped = log_axis(curve([(0, 1.0), (1, 0.0), (2, -3.0), (3, math.nan), (4, 2.0), (5, math.inf)]))
    assert dropped == 2
    assert repr(line.y.tolist()) == "[1.0, nan, nan, nan, 2.0, inf]"


# ---- groups --------------------------------------------------------------------------------------------------------------


def textbook(values: Sequence[float]) -> tuple[float, float, int]:
    known = [v for v in values if math.isfinite(v)]
    return statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else math.nan, len(known)


@given(st.lists(curves, min_size=1, max_size=4))
def test_a_band_of_coinciding_points_against_the_textbook(lines: list[Curve]) -> None:
    members = [dict(points(line)) for line in lines if len(line.x)]  # the last of each x
    expected = []
    for x in sorted({x for member in members for x in member}):
        across = [member for member in members if min(member) <= x <= max(member)]
        if all(x in member for member in across) and any(math.isfinite(member[x]) for member in across):
            expected.append((x, *textbook([member[x] for member in across])))
    found = coincide([curve(sorted(member.items())) for member in members]) if members else band([])
    assert found.exact
    assert found.x.tolist() == [x for x, *_ in expected]
    np.testing.assert_allclose(found.mean, [mean for _, mean, _, _ in expected], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(found.std, [std for _, _, std, _ in expected], rtol=1e-6, atol=1e-6)
    assert found.n.tolist() == [n for *_, n in expected]


def test_a_member_counts_from_its_first_point_to_its_last() -> None:
    found = band([curve([(0, 1.0), (1, 2.0), (2, 3.0)]), curve([(0, 3.0), (1, 4.0)]), curve([(1, 6.0), (2, math.nan)])])
    assert found.exact
    assert found.x.tolist() == [0.0, 1.0, 2.0]
    assert found.n.tolist() == [2, 3, 1]
    assert found.mean.tolist() == [2.0, 4.0, 3.0]
    assert repr(found.std.round(12).tolist()) == repr([round(math.sqrt(2), 12), 2.0, math.nan])


def test_members_that_meet_at_their_start_alone_are_read_off_their_lines() -> None:
    found = band([curve([(0, 1.0), (4, 5.0), (8, 9.0)]), curve([(0, 3.0), (6, 9.0), (12, 15.0)])])
    assert not found.exact  # what the longer one has beyond the other's end is no meeting
    assert found.x.tolist() == [0.0, 4.0, 6.0, 8.0, 12.0]
    assert found.n.tolist() == [2, 2, 2, 2, 1]
    assert found.mean.tolist() == [2.0, 6.0, 8.0, 10.0, 15.0]


def test_members_that_never_meet_are_read_off_their_lines_and_it_says_so() -> None:
    a, b = curve([(0, 0.0), (2, 2.0), (4, 4.0)]), curve([(1, 11.0), (3, 13.0), (5, math.nan)])
    found = band([a, b])
    assert not found.exact
    assert found.x.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert found.n.tolist() == [1, 2, 2, 2, 1]
    assert found.mean.tolist() == [0.0, 6.0, 7.0, 8.0, 4.0]
    many = [Curve(np.arange(3000.0) + shift, np.arange(3000.0)) for shift in (0.0, 0.5)]
    found = interpolate(many)
    assert len(found.x) == 1000
    np.testing.assert_allclose(found.mean[1:-1], (found.x - 0.25)[1:-1])


# ---- summaries -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "better"),
    [
        ("train/loss", "min"),
        ("val_accuracy", "max"),
        ("test/f1", "max"),
        ("top5_acc", "max"),
        ("val/perplexity", "min"),
        ("memory/peak", "min"),
        ("speed/train_seconds", "min"),
        ("speed/steps_per_second", "max"),
        ("eval/exact_match", "max"),
        ("Accuracy", "max"),
        ("hessian_trace", "min"),
        ("remap_error", "min"),
        ("my metric", "min"),
    ],
)
def test_the_goal_follows_the_words_of_a_name(key: str, better: str) -> None:
    assert goal(key) == better


@given(st.lists(st.tuples(st.integers(0, 20), ANY), max_size=30), st.sampled_from(["min", "max"]), st.integers(-1, 22))
def test_summaries_against_the_textbook(logged: list[tuple[int, float]], better: str, step: int) -> None:
    logged.sort(key=lambda p: p[0])
    found = summarise(series(logged), "min" if better == "min" else "max")
    finite = [(s, v) for s, v in logged if math.isfinite(v)]
    assert (found.points, found.not_finite) == (len(logged), len(logged) - len(finite))
    if finite:
        best = (min if better == "min" else max)(v for _, v in finite)
        assert (found.best, found.best_step) == (best, next(s for s, v in finite if v == best))
    else:
        assert math.isnan(found.best)
        assert found.best_step is None
    last = logged[-1] if logged else (None, math.nan)
    assert repr((found.last_step, found.last)) == repr(last)
    before = [(v, s) for s, v in logged if s <= step]
    assert repr(at_step(series(logged), step)) == repr(before[-1] if before else (math.nan, None))


def test_rows_of_a_table() -> None:
    runs = [run("a"), run("b"), run("c")]
    logged = {"a": series([(0, 2.0), (10, 1.0), (20, 3.0)]), "b": series([]), "c": series([(15, 5.0)])}
    found = rows(runs, logged, "min", step=12)
    assert [(row.run_id, row.summary.best, row.summary.best_step, row.summary.last, row.at_step) for row in found] == [
        ("a", 1.0, 10, 3.0, 10),
        ("c", 5.0, 15, 5.0, None),
    ]
    assert [row.at for row in rows(runs, logged, "min")] == [3.0, 5.0]


# ---- trade-offs ------------------------------------------------------------------------------------------------------------

small = st.one_of(st.integers(0, 4).map(float), st.just(math.nan))


@given(st.lists(st.tuples(small, small), max_size=12), st.sampled_from(["min", "max"]), st.sampled_from(["min", "max"]))
def test_the_pareto_front_against_the_textbook(places: list[tuple[float, float]], better_x: str, better_y: str) -> None:
    def no_worse(p: float, q: float, better: str) -> bool:
        return p <= q if better == "min" else p >= q

    def beats(p: tuple[float, float], q: tuple[float, float]) -> bool:
        return no_worse(p[0], q[0], better_x) and no_worse(p[1], q[1], better_y) and p != q

    known = [p for p in places if not any(map(math.isnan, p))]
    expected = [p in known and not any(beats(q, p) for q in known) for p in places]
    x, y = (np.array([p[i] for p in places], float) for i in (0, 1))
    found = pareto(x, y, "min" if better_x == "min" else "max", "min" if better_y == "min" else "max")
    assert found.tolist() == expected


def test_a_target_is_reached_at_a_logged_point_or_never() -> None:
    line = curve([(10, 1.0), (20, math.nan), (30, 0.4), (40, 0.6), (50, 0.2)])
    assert first_reaching(line, 0.5, "min") == 30.0
    assert first_reaching(line, 0.1, "min") is None
    assert first_reaching(line, 0.4, "min") == 30.0
    assert first_reaching(line, 0.6, "max") == 10.0
    assert first_reaching(line, 2.0, "max") is None
    assert first_reaching(curve([(1, -math.inf)]), 0.0, "min") is None
    assert first_reaching(curve([]), 0.0, "min") is None


# ---- parameters ------------------------------------------------------------------------------------------------------------


def test_only_parameters_that_differ_in_value_count() -> None:
    runs = [
        run("a", params={"lr": "1e-3", "seed": "0", "model": "x", "eps": "nan"}),
        run("b", params={"lr": "0.001", "seed": "1", "model": "x", "eps": "NaN"}),
        run("c", params={"lr": "1.0E-3", "seed": "1.0", "model": "X", "extra": "True", "eps": "nan"}),
    ]
    assert differing(runs) == {
        "seed": ("0", "1", "1.0"),
        "model": ("x", "x", "X"),
        "extra": (None, None, "True"),
    }
    assert differing(runs[:1]) == differing([]) == {}


def test_legends_are_short_and_tell_runs_apart() -> None:
    runs = [
        run("a", params={"lr": "1", "eps": "1", "seed": "0"}),
        run("b", params={"lr": "2", "eps": "2", "seed": "0"}),
        run("c", params={"lr": "2", "eps": "2", "seed": "1"}),
    ]
    assert legends(runs) == {"a": "eps=1, seed=0", "b": "eps=2, seed=0", "c": "eps=2, seed=1"}
    assert legends([run("aaaaaaaa1", name="same"), run("bbbbbbbb2", name="same")]) == {
        "aaaaaaaa1": "same (aaaaaa)",
        "bbbbbbbb2": "same (bbbbbb)",
    }
    half = [run("a", name="first", params={"lr": "1"}), run("b", name="second"), run("c", name="third")]
    assert legends(half) == {"a": "first", "b": "second", "c": "third"}
    assert legends([run("a", params={"note": "x" * 500}), run("b", params={"note": "y"})])["a"] == f"note={'x' * 23}…"


@given(st.lists(st.dictionaries(st.sampled_from("abc"), st.sampled_from(["1", "1.0", "2", ""])), max_size=6))
def test_legends_are_each_their_own(params: list[dict[str, str]]) -> None:
    runs = [run(f"{i}-id", name="run", params=one) for i, one in enumerate(params)]
    assert len(set(legends(runs).values())) == len(runs)


def test_runs_that_differ_in_their_seed_go_together() -> None:
    zo = {"zo.method": "ZO", "zo.recipe": "default"}
    runs = [
        run("a", params={"lr": "1e-3", "seed": "0"}, tags=zo),
        run("b", params={"lr": "0.001", "seed": "1", "zo/seed": "7"}, tags=zo),
        run("c", params={"lr": "0.001", "seed": "1"}, tags={"zo.method": "backprop"}),
        run("d", params={"lr": "0.001", "seed": "2"}, tags=zo, experiment="1"),
        run("e"),
        run("f"),
        run("g", params={"lr": "1e-03", "seed": "2"}, tags=zo),
    ]
    assert [[one.id for one in group] for group in seed_groups(runs)] == [["a", "b", "g"], ["c"], ["d"], ["e"], ["f"]]


def test_runs_of_different_length_are_no_seeds_of_each_other() -> None:
    def one(id_: str, steps: int, status: str = "FINISHED", **tags: str) -> Run:
        return Run(id_, id_, "0", status, 0.0, 1.0, {"lr": "1", "seed": id_}, tags, ("loss",), {"loss": (steps, 0, 1.0)})

    runs = [one("a", 1000), one("b", 60), one("c", 980), one("d", 62), one("e", 40, "RUNNING"), one("f", 500, "KILLED")]
    assert [[run.id for run in group] for group in seed_groups(runs)] == [["a", "c", "f"], ["b", "d", "e"]]
    said = [one("g", 60, max_steps="100"), one("h", 100, max_steps="100"), one("i", 60, max_steps="60")]
    assert [[run.id for run in group] for group in seed_groups(said)] == [["g", "h"], ["i"]], "where they say how long they are"
    data = [one("j", 60, data="films"), one("k", 60, data="news")]
    assert len(seed_groups(data)) == 2


def test_a_mean_breaks_where_a_member_ends_and_says_how_many_go_on() -> None:
    long, short = curve([(x, 2.0) for x in range(10)]), curve([(x, 4.0) for x in range(6)])
    found = band([long, short])
    ends = stretches([long, short], found.x)
    assert ends == [(5.0, 2), (9.0, 1)]
    gapped = broken(found, [x for x, _ in ends])
    assert gapped.x.tolist() == [0, 1, 2, 3, 4, 5, 5.5, 6, 7, 8, 9]
    assert repr(gapped.mean.tolist()) == repr([3.0] * 6 + [math.nan] + [2.0] * 4)
    assert stretches([long, long], found.x) == [(9.0, 2)]
    nothing = band([curve([])])
    assert stretches([curve([])], nothing.x) == [] and not len(broken(nothing, []).x)
