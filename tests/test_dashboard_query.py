"""The filter: which runs a line of text means."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest
from zolightning_dashboard.query import QueryError, number, pick
from zolightning_dashboard.source import Run


def run(id_: str, name: str, params: dict[str, Any], tags: dict[str, str], **metrics: float) -> Run:
    latest = {key.replace("__", "/"): (9, 0, value) for key, value in metrics.items()}
    texts = {key: str(value) for key, value in params.items()}
    return Run(id_, name, "1", "FINISHED", 100.0, 160.0, texts, tags, tuple(sorted(latest)), latest)


DEFAULT, REFT = ({"zo.method": "ZO", "zo.recipe": recipe} for recipe in ("default", "reft"))
ADAMW = {"zo.method": "backprop AdamW"}
RUNS = [
    run("a1", "Default seed 0", {"lr": "1e-3", "opt/eps": 0.001}, DEFAULT, val__loss=0.5),
    run("b2", "reft one", {"lr": "5e-4", "opt/eps": 0.01}, REFT, val__loss=0.3),
    run(
        "c3",
        "reft two",
        {"lr": "0.001", "note": "with 100% (a+b)"},
        REFT,
        val__loss=math.nan,
    ),
    run("d4", "adamw", {"optimizer": "AdamW", "lr": "2e-5"}, ADAMW, val__loss=0.2, memory__peak=2**31),
]
STATES = {"a1": "finished", "b2": "killed", "c3": "diverged", "d4": "live"}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", "abcd"),
        ("   ", "abcd"),
        ("REFT", "bc"),
        ("seed default", "a"),
        ('"reft two"', "c"),
        ("-killed", "acd"),
        ("live", "d"),
        ("b2", "b"),
        ("/^reft (one|two)$/", "bc"),
        ("-/seed \\d/", "bcd"),
        ("lr<1e-3", "bd"),
        ("lr=1e-3", "ac"),
        ("lr!=0.001", "bd"),
        ("-lr=0.001", "bd"),
        ("lr<=1e-3 lr>=5e-4", "abc"),
        ("eps>0.005", "b"),
        ("opt/eps>0.005", "b"),
        ("params.eps=0.001", "a"),
        ("tags.recipe=reft", "bc"),
        ("recipe=reft -killed", "c"),
        ("lr<1e-3 recipe=reft -killed", ""),
        ("loss<=0.3", "bd"),
        ("metrics.val/loss<1", "abd"),
        ("metrics.lr<1", ""),
        ("peak>=2GiB", "d"),
        ("val/loss<30%", "d"),
        ("optimizer=adamw", "d"),
        ("optimizer~^adam", "d"),
        ("recipe!~re", "a"),
        ('note="with 100% (a+b)"', "c"),
        ("status=killed or recipe=default", "ab"),
        ("method=ZO loss<0.4 OR adamw", "bd"),
        ("seconds<=1min", "abcd"),
        ("seconds>1min", ""),
        ("step>=9", "abcd"),
        ("nothing=1", ""),
        ("-nothing=1", "abcd"),
        ("lr<banana", ""),
        # still being typed
        ("lr<", "abcd"),
        ("-", "abcd"),
        ("-lr<", "abcd"),
        ("adamw or", "d"),
        ("or", "abcd"),
        ('"', ""),
        ("<", ""),
    ],
)
def test_what_a_text_means(text: str, found: str) -> None:
    assert "".join(run.id[0] for run in pick(text, RUNS, STATES)) == found


@pytest.mark.parametrize("text", ["/(/", "name~[", "-/*/", "/(a+)+$/", "/(a|a)*b/", r"/((a\)|b)+)+/"])
def test_a_bad_regular_expression_is_named(text: str) -> None:
    with pytest.raises(QueryError, match="“"):
        pick(text, RUNS, STATES)


@pytest.mark.parametrize("text", ["lr<(", "'; DROP TABLE runs; --", "\u202e", "a" * 5000, "=" * 50, "% _ ? * [x]", "{{7*7}}"])
def test_any_text_is_a_query(text: str) -> None:
    assert pick(text, RUNS, STATES) in ([], RUNS)


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 1e-3), ("80%", 0.8), ("2GiB", 2.0**31), ("1.5k", 1500), ("2 h", None), ("2h", 7200), ("x", None), ("-.5", -0.5)],
)
def test_numbers_and_units(text: str, value: float | None) -> None:
    assert number(text) == value


def test_a_thousand_runs_are_picked_between_two_keystrokes() -> None:
    runs = [
        run(f"{i:032x}", f"run {i} reft", {f"p{k}": i * k for k in range(30)} | {"lr": i / 1000}, {"zo.recipe": "reft"}, loss=i)
        for i in range(1000)
    ]
    began = time.process_time()
    found = pick("lr<0.5 recipe=reft p7>100 -killed /run \\d+/", runs, {})
    seconds = time.process_time() - began
    assert [one.name for one in found] == [f"run {i} reft" for i in range(15, 500)]
    print(f"{1000 * seconds:.1f} ms for 1,000 runs")
