"""One name for a run, whatever else is selected; one for a group."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from zolightning_dashboard.grouping import group_label, groups_by
from zolightning_dashboard.names import group_names, run_names
from zolightning_dashboard.source import Run

ZO = {"zo.method": "ZO (reft)"}


def run(id_: str, name: str, params: Mapping[str, str] = {}, tags: Mapping[str, str] = ZO) -> Run:
    return Run(id_, name, "1", "FINISHED", 0.0, 1.0, params, tags)


def test_a_run_is_called_by_its_own_name() -> None:
    assert run_names([run("a", "one"), run("b", " two\n")]) == {"a": "one", "b": "two"}


def test_runs_of_one_name_are_told_apart_by_their_parameters_else_by_their_ids() -> None:
    same = [run("a", "fit", {"lr": "1e-3"}), run("b", "fit", {"lr": "1e-4"}), run("c", "other", {"lr": "7"})]
    assert run_names(same) == {"a": "fit (lr=1e-3)", "b": "fit (lr=1e-4)", "c": "other"}
    alike = [run("aaaaaaaa", "fit"), run("bbbbbbbb", "fit")]
    assert run_names(alike) == {"aaaaaaaa": "fit (aaaaaa)", "bbbbbbbb": "fit (bbbbbb)"}


def test_a_name_does_not_depend_on_the_selection() -> None:
    runs = [run(str(i), "fit" if i < 3 else f"run {i}", {"lr": str(i)}) for i in range(6)]
    names = run_names(runs)
    assert group_names([[one] for one in runs[2:5]], names) == [names[one.id] for one in runs[2:5]]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("reft-seed1", "reft-seed2"), "reft"),
        (("reft-seed10", "reft-seed11"), "reft"),
        (("adamw, seed=0", "adamw, seed=1"), "adamw"),
        (("lr 1e-3 #1", "lr 1e-3 #2"), "lr 1e-3"),
        (("same", "same"), "same"),
        (("a", "b"), "ZO (reft)"),
        (("zo-0", "zo-1"), "ZO (reft)"),
        (("شغل 1", "شغل 2"), "\u2068شغل\u2069"),
    ],
)
def test_a_group_is_called_by_what_its_names_share(names: tuple[str, ...], expected: str) -> None:
    runs = [run(str(i), name, {"seed": str(i)}) for i, name in enumerate(names)]
    assert group_names([runs], run_names(runs)) == [expected]


def test_groups_of_one_name_are_told_apart() -> None:
    runs = [run(f"{lr}{seed}", f"fit-{seed}", {"lr": lr, "seed": str(seed)}) for lr in ("1e-3", "1e-4") for seed in (0, 1)]
    assert group_names([runs[:2], runs[2:]], run_names(runs)) == ["fit (lr=1e-3)", "fit (lr=1e-4)"]


def test_grouping_by_parameters_and_tags() -> None:
    runs = [run("a", "x", {"lr": "1e-3"}), run("b", "y", {"lr": "0.001"}), run("c", "z", {"lr": "1"}), run("d", "w")]
    assert [[one.id for one in group] for group in groups_by(runs, ("lr", "zo.method"))] == [["a", "b"], ["c"], ["d"]]
    assert group_label(runs[0], ("lr", "zo.method")) == "lr=1e-3, ZO (reft)"
    assert group_label(runs[3], ("opt/lr",)) == "lr=–"
