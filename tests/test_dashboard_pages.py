"""The pages of runs, sweeps, health and one run: their parts without a browser."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("streamlit", reason="the dashboard's packages are not installed")

from dashboard_stores import log, make_store
from zolightning_dashboard.charts.lines import Plotter
from zolightning_dashboard.charts.sweep import Axis, Trial, against, means, parallel, spans
from zolightning_dashboard.columns import Cell, Column, available, column, read, usual
from zolightning_dashboard.matching import match
from zolightning_dashboard.scene import Scene, Store, look
from zolightning_dashboard.screens.sweep import swept
from zolightning_dashboard.source import Run, SourceError, open_source
from zolightning_dashboard.source.artifacts import contents, files, folder
from zolightning_dashboard.view import View

START = 1_700_000_000_000


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four runs of two rates and two seeds, with a file and a link that leads away."""
    path = tmp_path_factory.mktemp("pages") / "sweep.db"
    client = make_store(path)
    experiment = client.create_experiment("sweep", artifact_location=(path.parent / "files").as_uri())
    for i in range(4):
        tags = {"zo.method": "ZO" if i < 2 else "AdamW", "team": "a"}
        run = client.create_run(experiment, start_time=START + i, run_name=f"fit-seed{i}", tags=tags).info.run_id
        for name, value in {"opt/lr": "1e-3" if i % 2 else "0.1", "seed": str(i), "act": "gelu" if i else "relu"}.items():
            client.log_param(run, name, value)
        log(client, run, "val/accuracy", [(1, START, 0.5), (2, START, 0.6 + i / 10), (3, START, 0.1)])
        log(client, run, "memory/peak", [(1, START, 2.0**30), (2, START, (1 + i) * 2.0**30)])
        if i:
            log(client, run, "train/loss", [(1, START, 1.0), (2, START, math.nan)])
        client.set_terminated(run, "FINISHED", end_time=START + 5000)
        if not i:
            client.log_text(run, "the film was <b>great</b>", "samples/step2.txt")
            secret = path.parent / "secret.txt"
            secret.write_text("not for you")
            (path.parent / "files" / run / "artifacts" / "link.txt").symlink_to(secret)
    return path


@pytest.fixture(scope="module")
def scene(store: Path) -> Iterator[Scene]:
    source = open_source(f"sqlite:///{store}")
    yield look(Store(source, Plotter(source)), ())
    source.close()


def named(scene: Scene, name: str) -> Run:
    return next(run for run in scene.runs if run.name == name)


# ---- columns -----------------------------------------------------------------------------------------------------------


def test_a_cell_is_the_run_s_own_value(scene: Scene) -> None:
    columns = [column(one) for one in ("params.opt/lr", "best.val/accuracy", "last.val/accuracy", "best.memory/peak", "status")]
    cells = read(scene, [[run] for run in scene.runs], [one for one in columns if one is not None])
    assert [[cell.value for cell in cells[one]] for one in cells] == [
        [1e-3, 0.1, 1e-3, 0.1],
        pytest.approx([90, 80, 70, 60]),
        pytest.approx([10] * 4),
        pytest.approx([4, 3, 2, 1]),
        ["diverged"] * 3 + ["finished"],
    ]


def test_a_group_has_mean_and_deviation_of_numbers_and_what_its_texts_share(scene: Scene) -> None:
    view = View(by=("opt/lr",))
    groups = scene.groups(view)
    assert scene.group_names(groups, view) == ["lr=1e-3", "lr=0.1"]
    accuracy, act, team = Column("best", "val/accuracy"), Column("params", "act"), Column("tags", "team")
    cells = read(scene, groups, [accuracy, act, team])
    assert cells[accuracy][0] == pytest.approx(Cell(80.0, math.sqrt(200)))
    assert [cell.value for cell in cells[act]] == ["gelu", "…"]
    assert [cell.value for cell in cells[team]] == ["a", "a"]


def test_what_was_not_logged_is_no_number(scene: Scene) -> None:
    cells = read(scene, [[run] for run in scene.runs], [Column("last", "train/loss")])
    (found,) = cells.values()
    assert found[-1].value is None
    assert all(math.isnan(cell.value) for cell in found[:-1] if isinstance(cell.value, float))


def test_columns_have_ids_that_read_back(scene: Scene) -> None:
    options = available(scene.runs)
    assert [column(one.id) for one in options] == options
    assert column("params.") is column("nonsense") is column("") is None
    chosen = [one.id for one in usual(scene.runs, "val/accuracy", "train/loss")]
    assert chosen[:3] == ["status", "best.val/accuracy", "last.train/loss"]
    assert "params.opt/lr" in chosen and set(chosen) <= {one.id for one in options}


# ---- the filter between two keystrokes -------------------------------------------------------------------------------------


def test_the_list_hears_which_runs_a_text_leaves(store: Path, scene: Scene) -> None:
    found = match(f"sqlite:///{store}", View(filter="lr<0.01 zo"))
    assert found == {"ids": [named(scene, "fit-seed1").id[:10]], "trouble": ""}
    nonsense = match(f"sqlite:///{store}", View(filter="/(/"))
    assert nonsense["ids"] is None and "no regular expression" in str(nonsense["trouble"])


# ---- sweeps ------------------------------------------------------------------------------------------------------------


def test_what_was_swept(scene: Scene) -> None:
    assert swept(scene.runs) == ["opt/lr", "seed"]


@pytest.mark.parametrize(("values", "log"), [([1e-5, 1e-1], True), ([1, 2, 3], False), ([0, 1e-3, 1], False), ([], False)])
def test_a_scale_is_logarithmic_where_values_span_much(values: list[float], log: bool) -> None:
    assert spans(values) is log


def test_a_sweep_has_a_dot_for_each_run_and_a_line_through_each_method_s_means() -> None:
    trials = [Trial(f"{m}{x}{s}", m, x, x + s, "#000000") for m in ("a", "b") for x in (1e-3, 1e-1) for s in (0.0, 1.0)]
    options = against("{c}", "loss", trials, dark=False)
    assert [len(one["data"]) for one in options["series"]] == [4, 2, 4, 2]
    assert means(trials[:4]) == [[1e-3, pytest.approx(0.501)], [1e-1, pytest.approx(0.6)]]
    assert options["xAxis"]["type"] == "log" and options["yAxis"]["type"] == "log"
    assert "{c}" not in options["xAxis"]["name"]  # nothing that ECharts takes for a template


def test_parallel_coordinates_have_an_upright_for_each_parameter() -> None:
    axes = [Axis("lr", [1e-3, 1e-1, None]), Axis("act", ["gelu", None, "relu"]), Axis("loss", [1.0, 2.0, math.nan], "min")]
    options = parallel(axes, ["a", "b", "c"], ["#111111"] * 3, dark=True)
    assert [one["type"] for one in options["parallelAxis"]] == ["log", "category", "value"]
    assert options["parallelAxis"][2]["inverse"] is True  # the better end is up
    assert [row["value"] for row in options["series"][0]["data"]] == [[1e-3, "gelu", 1.0], [1e-1, "–", 2.0], ["-", "relu", "-"]]


# ---- files -------------------------------------------------------------------------------------------------------------


def test_files_of_a_run_are_listed_and_read(scene: Scene) -> None:
    run, source = named(scene, "fit-seed0"), scene.store.source
    assert [(one.path, one.size) for one in source.artifacts(run)] == [("samples/step2.txt", 25)]
    assert source.artifact(run, "samples/step2.txt", 8) == b"the film"
    assert source.artifacts(named(scene, "fit-seed1")) == []


@pytest.mark.parametrize("path", ["../../../secret.txt", "link.txt", "/etc/hostname", "samples", "nothing"])
def test_nothing_outside_of_the_run_s_folder_is_read(path: str, scene: Scene) -> None:
    with pytest.raises(SourceError, match="cannot be read"):
        scene.store.source.artifact(named(scene, "fit-seed0"), path, 100)


def test_only_folders_of_this_machine_are_looked_into(tmp_path: Path) -> None:
    assert folder(tmp_path.as_uri()) == folder(str(tmp_path)) == tmp_path
    for uri in ("s3://bucket/x", "mlflow-artifacts:/1/x", "relative/path", "file://elsewhere/x", ""):
        assert folder(uri) is None
    (tmp_path / "a b.txt").write_text("x")
    assert [one.path for one in files(tmp_path)] == ["a b.txt"]
    with pytest.raises(PermissionError):
        contents(tmp_path, "../x", 1)
