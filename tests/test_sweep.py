"""The sweep: budgets, the choice of learning rates, what is resumed, and the report."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from jsonargparse import ArgumentParser
from mlflow import MlflowClient
from test_data_model import save_tiny
from test_demo import PNG

from zolightning import ZOStrategy
from zolightning.cli import main
from zolightning.commands.bench.reference_mezo import ReferenceMeZO
from zolightning.commands.demo.methods import Method
from zolightning.commands.demo.module import PromptClassifier, PromptData
from zolightning.commands.demo.published import PublishedMeZO
from zolightning.commands.demo.run import Task
from zolightning.commands.sweep.budget import Budget, Meter
from zolightning.commands.sweep.entries import ENTRIES, Entry, choose
from zolightning.commands.sweep.main import sweep
from zolightning.commands.sweep.plan import Plan, choose_lr, finish
from zolightning.commands.sweep.report import ranking, reached, rows, target_accuracy, write
from zolightning.commands.sweep.run import Outcome, Run, train
from zolightning.data import Example, PromptTemplate, encode, load_causal_lm
from zolightning.ledger import read
from zolightning.ledger.format import Step

pytestmark = pytest.mark.integration

EXAMPLES = Path(__file__).parent.parent / "examples" / "sweep"
ZO = Method("zo", "ZO", recipe="default", lr=1e-3, batch_size=4, decay=True)
ADAMW = Method("adamw", "AdamW", lr=1e-3, batch_size=4)


@pytest.fixture
def task(tmp_path: Path) -> Task:
    torch.manual_seed(0)
    save_tiny(tmp_path / "model")
    lines = [f"film number {i} is {('dull', 'fine')[i % 2]},{i % 2}" for i in range(60)]
    (tmp_path / "reviews.csv").write_text("\n".join(["text,label", *lines]))
    return Task(
        model=str(tmp_path / "model"),
        data=str(tmp_path / "reviews.csv"),
        validation=6,
        test=6,
        validations=2,
        store=f"sqlite:///{tmp_path}/mlflow.db",
        experiment="sweep",
        out=str(tmp_path / "out"),
        offline=True,
    )


def outcome(run: Run, accuracy: float, loss: float = 0.5, seconds: float = 10.0) -> Outcome:
    """As if the run had come to that."""
    history = [
        {"seconds": s * seconds, "forward_passes": int(100 * s), "accuracy": s * accuracy, "loss": loss}
        for s in (0.0, 0.5, 1.0)
    ]
    test = {"accuracy": accuracy, "loss": loss} if run.final else None
    return Outcome(run.settings, 50, seconds, seconds, 100, 400, 2_000_000_000, history, test)


@pytest.mark.parametrize(
    ("method", "forwards", "steps"),
    [
        (ZO, 11, 5),  # two a step: another step would not fit
        (replace(ZO, overrides={"num_queries": 2, "select": "re:proj"}), 8, 2),
        (Method("published", "MeZO", published=True, lr=1e-5, batch_size=4), 6, 3),
        (ADAMW, 5, 5),
    ],
)
def test_forward_passes_are_never_exceeded(task: Task, method: Method, forwards: int, steps: int) -> None:
    done = train(Run(task, method, 0, Budget(forwards, "forwards"), 1, final=True))
    assert done.steps == steps
    assert done.forward_passes == done.history[-1]["forward_passes"] <= forwards
    assert done.examples == 4 * steps
    assert done.history[0]["step"] == 0
    assert len(done.history) == 1 + task.validations
    assert done.test is not None and 0 <= done.test["accuracy"] <= 1
    client = MlflowClient(task.store)
    experiment = client.get_experiment_by_name("sweep")
    assert experiment is not None
    (logged,) = client.search_runs([experiment.experiment_id])
    assert logged.info.status == "FINISHED"
    assert ("zo.recipe" in logged.data.tags) == (method is not ADAMW)  # else the dashboard takes it for backprop
    assert logged.data.metrics["forward_passes"] == done.forward_passes
    assert logged.data.metrics["val/accuracy"] == done.history[-1]["accuracy"]
    assert logged.data.metrics["test/accuracy"] == pytest.approx(done.test["accuracy"])


def test_learning_rate_falls_along_the_budget(task: Task) -> None:
    train(Run(task, ZO, 0, Budget(8, "forwards"), 1, final=False))
    (path,) = Path(task.out).rglob("ledger.zo")
    lrs = [record.lrs[0] for record in read(path) if isinstance(record, Step)]
    assert lrs == pytest.approx([1e-3 * (1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)])


@pytest.mark.parametrize("clock", ["wall", "cpu"])
def test_seconds_are_spent_and_no_more_than_a_step_is_left(task: Task, clock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[float] = []
    real = Meter.on_train_batch_end

    def noted(self: Meter, *args: Any) -> None:
        before = self.seconds
        real(self, *args)
        steps.append(self.seconds - before)

    monkeypatch.setattr(Meter, "on_train_batch_end", noted)
    done = train(Run(task, replace(ADAMW, decay=True), 0, Budget(0.2, "seconds", clock), 1, final=False))
    assert done.test is None  # only final runs look at the test examples
    assert done.steps == len(steps)
    assert done.seconds == done.history[-1]["seconds"] == pytest.approx(sum(steps))
    before = sum(steps[:-1])
    assert before < 0.2  # the last step began within the budget,
    assert not steps[:-1] or before + before / len(steps[:-1]) <= 0.2 * (1 + 1e-6)  # and one of the mean cost would have fit
    assert done.seconds + done.seconds / len(steps) > 0.2 * (1 - 1e-6)  # as no other would now


def test_published_steps_are_the_reference(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    model, tokenizer = load_causal_lm(str(tmp_path), offline=True)
    twin = copy.deepcopy(model)
    items = encode(tokenizer, [Example(f"film {i}", i % 2) for i in range(8)], PromptTemplate())
    data, ids = PromptData(items, items, items, tokenizer.pad_token_id, 4), torch.tensor([5, 6])
    flags: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(max_steps=2, limit_val_batches=0, accelerator="cpu", enable_model_summary=False, **flags)
    pl.seed_everything(3, verbose=False)
    trainer.fit(PublishedMeZO(model, ids, lambda p: torch.optim.SGD(p, lr=1e-4)), data)
    assert trainer.global_step == 2

    plain = PromptClassifier(twin, ids, lambda p: torch.optim.SGD(p, lr=1e-4))
    mezo = ReferenceMeZO(twin.parameters(), eps=1e-3, seed=3)
    for batch in data.train_dataloader():
        mezo.step(lambda batch=batch: plain.zo_objective(batch).mean().item(), 1e-4)  # type: ignore[misc]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_learning_rate_is_chosen_on_validation(task: Task) -> None:
    plan = Plan.of(Entry(ZO, (1e-3, 2e-3, 3e-3), seeds=2), task, Budget(100.0), 1, 0.2, 1)
    assert [run.method.lr for run in plan.tuning] == [1e-3, 2e-3, 3e-3]
    assert {run.budget.amount for run in plan.tuning} == {20.0}
    assert not any(run.final for run in plan.tuning)
    assert {run.seed for run in plan.tuning}.isdisjoint(run.seed for run in plan.finals)
    Path(task.out, "runs").mkdir(parents=True)
    assert finish(plan, "", report_only=True) == []
    for run, loss in zip(plan.tuning, (0.6, 0.4, math.nan), strict=True):
        outcome(run, accuracy=0.9, loss=loss).save(run.path)
    assert choose_lr([Outcome.load(run.path) for run in plan.tuning]) == 2e-3
    finals = [replace(run, method=replace(run.method, lr=2e-3)) for run in plan.finals]
    for run in finals:
        outcome(run, accuracy=0.8).save(run.path)
    assert [o.settings for o in finish(plan, "", report_only=True)] == [run.settings for run in finals]
    for run in (*plan.tuning, *plan.finals):
        outcome(run, accuracy=0.9, loss=math.nan).save(run.path)
    assert finish(plan, "", report_only=True) == []  # without a finite loss there is no best learning rate


def test_a_target_without_a_finished_run_leaves_the_rest_of_the_report(task: Task, capsys: pytest.CaptureFixture[str]) -> None:
    entries = [Entry(ZO, (1e-3,)), Entry(ADAMW, (1e-3,))]
    run = Run(task, ZO, 0, Budget(4.0, "forwards"), 1, final=True)
    run.path.parent.mkdir(parents=True)
    outcome(run, accuracy=0.8).save(run.path)
    sweep(entries, forwards=4, seeds=1, target="adamw", task=task, report_only=True)
    shown = capsys.readouterr().out
    assert "no run of adamw, whose accuracy is the target, is finished" in shown
    assert Path(task.out, "table.md").read_text().splitlines()[2].startswith("| ZO |")


def test_too_few_texts_for_a_batch_are_refused(task: Task) -> None:
    with pytest.raises(ValueError, match="42 texts to train on fill no batch of 64; give more"):
        sweep([Entry(replace(ZO, batch_size=64), (1e-3,))], forwards=2, task=task)


def test_files_are_named_by_what_decides_the_outcome(task: Task) -> None:
    run = Run(task, ZO, 0, Budget(10.0), 1, final=True)
    same = replace(run, task=replace(task, store="sqlite:///other.db"))
    others = [
        replace(run, seed=1),
        replace(run, budget=Budget(10.0, "seconds", "cpu")),
        replace(run, method=replace(ZO, overrides={"eps": 1e-2})),
        replace(run, task=replace(task, precision="bf16-true")),
    ]
    assert same.name == run.name
    assert len({run.name, *(other.name for other in others)}) == 5


def test_table_ranks_and_says_what_a_target_took(task: Task, tmp_path: Path) -> None:
    slow, fast = (Run(task, m, 0, Budget(10.0, "seconds", "cpu"), 1, final=True) for m in (ADAMW, ZO))
    done = [outcome(slow, 0.6), outcome(fast, 0.8), outcome(replace(fast, seed=1), 0.5)]
    assert [runs[0].title for runs in ranking(done)] == ["ZO", "AdamW"]
    assert target_accuracy(done, "adamw") == 0.6
    assert target_accuracy(done, "0.75") == 0.75
    assert target_accuracy(done, "mezo") is None
    row = reached(done[1], 0.4)
    assert row is not None and row["seconds"] == 5.0
    assert reached(done[0], 0.7) is None
    zo, adamw = rows(done, 0.7)
    assert zo[0] == "ZO (2 seeds)"
    assert zo[4] == "65.0 ± 21.2"
    assert zo[-2:] == ("10 (1 of 2)", "100 (1 of 2)")
    assert adamw[-2:] == ("–", "–")
    assert write(done, tmp_path / "report", 0.6).read_bytes().startswith(PNG)
    assert json.loads((tmp_path / "report" / "results.json").read_text()) == [asdict(o) for o in done]
    assert (tmp_path / "report" / "table.md").read_text().count("\n") == 4


def test_bad_input_is_refused(task: Task) -> None:
    with pytest.raises(ValueError, match="a budget must be a finite number of forwards > 0, got 0"):
        Budget(0, "forwards")
    with pytest.raises(ValueError, match=r"`lrs` of zo must be numbers > 0, got \[\]"):
        Entry(ZO, ())
    with pytest.raises(ValueError, match=r"'sspa' is unknown; allowed: default, reft, spsa, .*; did you mean 'spsa"):
        choose(None, ["sspa"])
    with pytest.raises(ValueError, match="a method name of its own"):
        choose([Entry(ZO, (1.0,)), Entry(ZO, (2.0,))], None)
    with pytest.raises(ValueError, match="a method title of its own"):
        choose([Entry(ZO, (1.0,)), Entry(replace(ZO, name="other"), (2.0,))], None)
    with pytest.raises(ValueError, match=r"`tuning` must be in \(0, 1\], got 0"):
        Plan.of(Entry(ZO, (1.0,)), task, Budget(1), 1, 0, 1)
    for target in ("best", "80", "nan"):
        with pytest.raises(ValueError, match=rf"`target` must be an accuracy in .* \(default, reft, .*, got '{target}'"):
            sweep(forwards=1, target=target, task=task)
    assert not Path(task.out).exists()
    with pytest.raises(ValueError, match="a run needs one budget; give `seconds` or `forwards`"):
        sweep(task=task)
    for names in (["adamw", "spsa"], "adamw, spsa"):
        assert [entry.method.name for entry in choose(None, names)] == ["spsa", "adamw"]
    assert all(entry.method.name == name for name, entry in ENTRIES.items())


def test_methods_on_the_command_line(task: Task, tmp_path: Path) -> None:
    config = tmp_path / "task.yaml"
    config.write_text(json.dumps({"task": asdict(task)}))
    options = ["sweep", "--config", str(config), "--forwards", "1", "--report_only", "--methods"]
    with pytest.raises(SystemExit, match=r"'adam' is unknown; allowed: default, .*; did you mean 'adamw'"):
        main([*options, "lora,adam"])
    for names in ("lora,adamw", "lora", "[lora, adamw]"):
        with pytest.raises(SystemExit, match="no final run is finished"):
            main([*options, names])
    for value in ("true", "True"):
        with pytest.raises(SystemExit, match="no final run is finished"):
            main(["sweep", "--config", str(config), "--forwards", "1", "--report_only", value])


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_sweeps_in_examples_can_be_planned(path: Path) -> None:
    parser = ArgumentParser()
    parser.add_function_arguments(sweep)
    settings = parser.instantiate(parser.parse_path(path))
    budget = Budget(settings.seconds, "seconds", settings.clock)
    assert len(choose(settings.entries, None)) > 1
    for entry in settings.entries:
        plan = Plan.of(entry, settings.task, budget, settings.seeds, settings.tuning, settings.threads)
        assert plan.finals
        assert bool(plan.tuning) == (len(entry.lrs) > 1)
        assert entry.method.zeroth_order == isinstance(entry.method.strategy(), ZOStrategy)


def test_the_settings_of_a_run_are_those_of_finished_ones(task: Task) -> None:
    """Another field would give each run another name, and a sweep would do finished runs again."""
    (settings,) = {
        tuple(sorted(result["settings"]["task"]))
        for path in EXAMPLES.glob("*/results.json")
        for result in json.loads(path.read_text())
    }
    assert sorted(Run(task, ZO, 0, Budget(8, "forwards"), 1, final=True).settings["task"]) == list(settings)


def test_a_sweep_from_a_file_goes_on_where_it_stopped(task: Task, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    method: dict[str, Any] = {
        "name": "zo",
        "title": "few queries",
        "recipe": "default",
        "batch_size": 4,
        "overrides": {"select": "re:proj"},
    }
    config = {"entries": [{"method": method, "lrs": [1e-3]}], "forwards": 4, "task": asdict(task)}
    path = tmp_path / "sweep.yaml"
    path.write_text(json.dumps(config))  # JSON is YAML
    main(["sweep", "--config", str(path), "--seeds", "1"])
    (run,) = Path(task.out, "runs").glob("*.json")
    written = run.stat().st_mtime_ns
    sweep([Entry(Method(**method), (1e-3,))], forwards=4, seeds=2, target="0.1", task=task)
    assert "few queries (2 seeds)" in capsys.readouterr().out
    assert run.stat().st_mtime_ns == written
    assert len(list(Path(task.out, "runs").glob("*.json"))) == 2
    assert (Path(task.out) / "sweep.png").read_bytes().startswith(PNG)
