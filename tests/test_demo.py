"""The demo end to end on a tiny model, and its parts."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from helpers import Task as TinyTask
from helpers import batches, fit, loader, mlp, quiet_trainer, tiny_causal_lm
from mlflow import MlflowClient
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from test_data_model import save_tiny
from test_tasks_fit import BROKEN, FILES

from zolightning import ZOStrategy
from zolightning.blackbox.llamacpp import library
from zolightning.cli import main
from zolightning.commands.demo.expected import Workload
from zolightning.commands.demo.main import plan, possible, prepare
from zolightning.commands.demo.methods import PROFILES, select_methods
from zolightning.commands.demo.module import PromptClassifier, PromptData
from zolightning.commands.demo.probe import C, LinearProbe
from zolightning.commands.demo.progress import Progress
from zolightning.commands.demo.report import markdown_table, text_table, write
from zolightning.commands.demo.run import Result, Task, run, splits
from zolightning.data import (
    Encoded,
    Example,
    PromptTemplate,
    collate,
    encode,
    general_text,
    load_causal_lm,
    text_perplexity,
)
from zolightning.data.candidates import last_states
from zolightning.methods.recipes import RECIPES

pytestmark = pytest.mark.integration

PNG = b"\x89PNG\r\n\x1a\n"


def result(method: str, seed: int, accuracy: float) -> Result:
    times = [{"step": s, "seconds": 2.0 * s, "cpu_seconds": 4.0 * s} for s in range(4)]
    history = [time | {"loss": 1.0 - 0.05 * time["seconds"], "accuracy": accuracy} for time in times]
    spent = {"seconds": 10.0 + seed, "cpu_seconds": 20.0 + 2 * seed, "forward_passes": 120, "examples": 960}
    return Result(method, method.upper(), seed, accuracy, 0.5, 2_000_000_000, history=history if seed else [], **spent)


def test_table_has_mean_and_spread() -> None:
    results = [result("zo", 1, 0.8), result("zo", 2, 0.9), result("zero", 0, 0.5)]
    header, _, zo, zero = (" ".join(line.split()) for line in text_table(results).splitlines())
    assert header == "method accuracy % test loss peak memory GB train s CPU s forward passes examples"
    assert zo == "ZO (2 seeds) 85.0 ± 7.1 0.500 ± 0.000 2.00 12 ± 1 23 ± 1 120 960"
    assert zero == "ZERO 50.0 0.500 2.00 10 20 120 960"
    assert markdown_table(results).splitlines()[2].startswith("| ZO (2 seeds) | 85.0 ± 7.1 |")
    forgot = [replace(results[0], perplexity=40.0), replace(results[1], perplexity=42.0), results[2]]
    assert [line.rpartition("|")[0].rpartition("| ")[2] for line in markdown_table(forgot).splitlines()] == [
        *("perplexity ", "---: "),
        *("41.0 ± 1.4 ", "– "),
    ]


def test_report_files(tmp_path: Path) -> None:
    results = [result("zo", 1, 0.8), result("zo", 2, 0.9), result("zero", 0, 0.5)]
    picture = write(results, tmp_path, {"model": "tiny"})
    assert picture.read_bytes().startswith(PNG)
    saved = json.loads((tmp_path / "results.json").read_text())
    assert saved["settings"] == {"model": "tiny"}
    assert saved["origin"].keys() == {"command", "date", "commit", "versions"}
    assert [Result(**r) for r in saved["results"]] == results


def test_plan_repeats_the_methods_that_train() -> None:
    methods = select_methods(PROFILES["full"], None)
    assert {"zero-shot", "zo", "mezo", "adamw", "checkpointed", "lora"} <= {m.name for m in methods}
    runs = [(m.name, seed) for m, seed in plan(methods, 2)]
    assert all([s for n, s in runs if n == name] == [0, 1] for name in ("zo", "mezo", "adamw", "lora"))
    assert [s for n, s in runs if n == "zero-shot"] == [0]
    assert [s for m, s in plan(methods) if m.name == "zo"] == [0, 1, 2]


def test_names_of_methods() -> None:
    quick = PROFILES["quick"]
    for given in ("reft, zo", ["reft", "zo"], "reft,zo,,reft"):
        assert [m.name for m in select_methods(quick, given)] == ["reft", "zo"]
    assert [m.name for m in select_methods(quick, "reft")] == ["reft"]
    assert select_methods(quick, "") == quick.methods


def test_unknown_method_and_seeds() -> None:
    with pytest.raises(ValueError, match=r"`methods`: 'sgd' is unknown; allowed: zero-shot, zo, "):
        select_methods(PROFILES["quick"], ["zo", "sgd"])
    with pytest.raises(ValueError, match="`seeds` must be >= 1, got 0"):
        plan((), 0)


def few_texts(folder: Path, count: int = 40) -> Task:
    save_tiny(folder / "model")
    (folder / "texts.csv").write_text("\n".join(["text,label", *(f"film {i},{i % 2}" for i in range(count))]))
    store, out = f"sqlite:///{folder}/mlflow.db", str(folder / "out")
    return Task(model=str(folder / "model"), data=str(folder / "texts.csv"), store=store, out=out, offline=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"verbalizers": (" sublime", " great")}, "' sublime' must be one token"),
        ({"verbalizers": (" terrible", " great", " dull")}, "3 verbalizers .* for 2 labels"),
        ({"template": "no place for it"}, r"must contain \{text\} exactly once"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_first_run(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepare(replace(few_texts(tmp_path), **changes))


def test_too_few_texts_are_refused_before_the_first_run(tmp_path: Path) -> None:
    task = few_texts(tmp_path)
    prepare(task, 28)
    with pytest.raises(ValueError, match="28 texts to train on fill no batch of 29; give more"):
        prepare(task, 29)


def test_a_folder_that_cannot_be_made_is_refused_before_the_first_run(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(ValueError, match=r"`out='.*out'` cannot be written to: .*; give a folder that can"):
        prepare(few_texts(tmp_path))


def test_of_sorted_files_some_are_drawn(tmp_path: Path) -> None:
    for part in ("train", "validation", "test"):
        (tmp_path / f"{part}.csv").write_text("\n".join(["text,label", *(f"{part} {i},{i // 50}" for i in range(100))]))
    task = Task(data=str(tmp_path), validation=20, test=30)
    found = splits(task)
    assert [len(part) for part in found[:3]] == [100, 20, 30]
    assert all({example.label for example in part} == {0, 1} for part in found[:3])
    assert found == splits(task)


def test_first_look_at_a_model_may_be_a_probe(tmp_path: Path) -> None:
    """Without a validation before it: the check of the model's head must not be taken for the user's step."""
    save_tiny(tmp_path)
    model, tokenizer = load_causal_lm(str(tmp_path), offline=True)
    items = encode(tokenizer, [Example(f"film {i}", i % 2) for i in range(8)], PromptTemplate())
    strategy = ZOStrategy(seed=0, select="re:proj")
    trainer = pl.Trainer(
        strategy=strategy,
        max_steps=1,
        limit_val_batches=0,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = PromptClassifier(model, torch.tensor([5, 6]), lambda p: torch.optim.SGD(p, lr=1e-3))
    trainer.fit(module, PromptData(items, items, items, tokenizer.pad_token_id, batch_size=4))
    assert strategy.last_record is not None
    assert len(strategy.last_record.terms) == 4


@pytest.mark.parametrize("labels", [2, 3])
def test_a_linear_probe_is_logistic_regression_on_the_states(labels: int) -> None:
    """Its logits are scikit-learn's own on the states of all steps; until each label was seen, nothing is fitted."""
    torch.manual_seed(0)
    model = tiny_causal_lm("llama")
    made = [Encoded(torch.randint(1, 30, (5,)).tolist(), i % labels if i >= 4 else 0) for i in range(24)]
    encoded = [collate(made[i : i + 4], 0) for i in range(0, 24, 4)]
    module = LinearProbe(model, torch.arange(labels), lambda p: torch.optim.SGD(p, lr=1.0))
    quiet_trainer("auto", max_steps=1).fit(module, loader(encoded))
    assert not module.head.weight.any()
    quiet_trainer("auto").fit(module, loader(encoded[1:]))
    with torch.no_grad():
        states = torch.cat([last_states(model, batch) for batch in encoded])
        got = torch.cat([module(batch) for batch in encoded]).log_softmax(-1)
    twin = make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=1000))
    twin.fit(states, torch.cat([batch["labels"] for batch in encoded]))
    torch.testing.assert_close(got, torch.tensor(twin.predict_log_proba(states)).float(), rtol=1e-4, atol=1e-4)
    assert not any(p.requires_grad for p in model.parameters())


def test_progress_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    fit(TinyTask(mlp()), batches(3), callbacks=[Progress(seconds=0.0)], max_steps=3)
    lines = capsys.readouterr().out.split("\n")
    assert re.fullmatch(r"      step 1 of 3, loss \d+\.\d{3}", lines[0])
    assert re.fullmatch(r"      step 2 of 3, loss \d+\.\d{3}, 0\.\d minutes of training left", lines[1])
    assert len([line for line in lines if line.startswith("      step ")]) == 3


def test_expected_time_is_the_arithmetic_at_the_measured_speed(tmp_path: Path) -> None:
    """Twice the speed or half the steps is half the time, but for the start of the runs; backprop costs a forward more."""
    save_tiny(tmp_path)
    model, tokenizer = load_causal_lm(str(tmp_path), offline=True)
    prompts = encode(tokenizer, [Example(f"film {i}", i % 2) for i in range(8)], PromptTemplate())
    work = Workload.of(Task(validation=0, test=0), model, prompts)
    head = model.get_output_embeddings()
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    tokens = sum(len(p.input_ids) for p in prompts) / len(prompts)
    assert work.operations == 2 * tokens * sum(layer.weight.numel() for layer in layers)
    methods = {m.name: replace(m, steps=1000, batch_size=16) for m in PROFILES["quick"].methods}

    def seconds(name: str, flops: float = 1e6) -> float:
        return work.seconds([methods[name]], flops) - work.seconds([methods[name]], 1e30)

    assert seconds("zo") == pytest.approx(2 * seconds("zo", 2e6))
    assert seconds("adamw") == pytest.approx(1.5 * seconds("spsa"))
    assert seconds("checkpointed") == pytest.approx(2 * seconds("spsa"))
    assert seconds("zo") / 2 < seconds("reft") < 2 * seconds("zo")


def command(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "zolightning.cli", *args], capture_output=True, text=True, timeout=600, check=False
    )


def test_help_shows_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["demo", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "zolightning demo --profile quick" in shown
    assert ", ".join(m.name for m in PROFILES["quick"].methods) in shown.replace("- ", "-")


def test_the_row_in_llama_cpp_is_left_out_where_it_cannot_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    methods = PROFILES["quick"].methods
    assert possible(methods, "some/model", named=False) == [m for m in methods if m.name != "gguf"]
    assert "the row 'gguf' is left out: it trains inside the GGUF file" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"the method 'gguf' cannot run: .* --model is some/model"):
        possible(select_methods(PROFILES["quick"], "gguf"), "some/model", named=True)
    monkeypatch.setitem(sys.modules, "llama_cpp", None)  # as if it were not installed
    library.cache_clear()
    assert len(possible(methods, None, named=False)) == len(methods) - 1
    assert "pip install 'zolightning[llamacpp]'" in capsys.readouterr().out
    with pytest.raises(ImportError, match=r"the method 'gguf' cannot run: llama.cpp cannot be used here"):
        possible(select_methods(PROFILES["quick"], "gguf"), None, named=True)
    assert possible(select_methods(PROFILES["quick"], "zo"), None, named=True)
    library.cache_clear()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--data", "no-such.csv"], "no-such.csv"),
        (["--methods", "zo,sgd"], "'sgd' is unknown"),
    ],
)
def test_bad_input_is_one_line(args: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message) as caught:  # a text: Python prints it and ends with 1
        main(["demo", *args])
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_file_is_one_line(kind: str, tmp_path: Path) -> None:
    """Before a model is loaded or a run is begun."""
    content, message = BROKEN[kind]
    (tmp_path / "texts.csv").write_text(content)
    with pytest.raises(SystemExit, match=re.escape(message)) as caught:
        main(
            [
                "demo",
                "--data",
                str(tmp_path / "texts.csv"),
                "--store",
                f"sqlite:///{tmp_path}/m.db",
                "--out",
                str(tmp_path / "o"),
            ]
        )
    assert "\n" not in str(caught.value).strip()
    assert {path.name for path in tmp_path.iterdir()} == {"texts.csv"}


@pytest.mark.parametrize("kind", FILES)
def test_files_of_spreadsheets_are_taken(kind: str, tmp_path: Path) -> None:
    """With quotes around commas, and with a byte order mark."""
    task = few_texts(tmp_path)
    (tmp_path / "texts.csv").write_text(FILES[kind], encoding="utf-8")
    columns = {"text": "review", "label": "stars"} if kind == "csv" else {}
    prepare(replace(task, **columns))
    found = splits(replace(task, **columns))
    assert [len(part) for part in found[:3]] == [18, 2, 4]
    assert all("film" in example.text and '"' not in example.text for part in found[:3] for example in part)


def test_demo_on_a_local_model_and_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_tiny(tmp_path / "model", layers=2)
    rows = [f"film number {i} is {('dull', 'fine')[i % 2]},{i % 2}" for i in range(120)]
    (tmp_path / "reviews.csv").write_text("\n".join(["text,label", *rows]))
    store, out = f"sqlite:///{tmp_path}/mlflow.db", tmp_path / "out"
    model, data = str(tmp_path / "model"), str(tmp_path / "reviews.csv")
    done = command(
        *("demo", "--model", model, "--data", data, "--offline", "--methods", "reft", "--threads", "1"),
        *("--store", store, "--out", str(out), "--forgetting", "True"),
    )
    assert done.returncode == 0, done.stderr
    assert "ZO (ReFT vectors)" in done.stdout
    assert "1 run, about 1 min" in done.stdout
    assert "CPU seconds in all" in done.stdout
    assert "zolightning dash --store" in done.stdout
    assert (out / "comparison.png").read_bytes().startswith(PNG)
    (reft,) = json.loads((out / "results.json").read_text())["results"]
    task = Task(model=model, data=data, offline=True, store=store, out=str(out))
    others = select_methods(PROFILES["quick"], "zero-shot,zo,probe")
    results = {method.name: run(task, method, 0, general_text()) for method in others} | {"reft": Result(**reft)}
    steps = {m.name: m.steps for m in PROFILES["quick"].methods}
    assert results["zo"].forward_passes == 2 * steps["zo"]
    assert results["reft"].forward_passes == (1 + 2 * RECIPES["reft"].num_queries) * steps["reft"]  # the text, once a step
    assert results["probe"].forward_passes == steps["probe"]
    assert results["zero-shot"].forward_passes == 0
    assert all(0 < r.peak_memory < 4e9 for r in results.values())
    untrained = text_perplexity(*load_causal_lm(str(tmp_path / "model"), offline=True), general_text())
    assert results["zero-shot"].perplexity == results["probe"].perplexity == pytest.approx(untrained, rel=1e-5)
    assert untrained != results["zo"].perplexity != results["reft"].perplexity
    client = MlflowClient(store)
    experiment = client.get_experiment_by_name("zolightning-demo")
    assert experiment is not None
    logged = {r.info.run_name: r for r in client.search_runs([experiment.experiment_id])}
    assert set(logged) == {"zero-shot-seed0", "zo-seed0", "reft-seed0", "probe-seed0"}
    for name, one in logged.items():
        assert one.info.status == "FINISHED"
        assert one.data.metrics["test/accuracy"] == pytest.approx(results[name.removesuffix("-seed0")].accuracy)
        assert one.data.metrics["summary/perplexity"] == pytest.approx(results[name.removesuffix("-seed0")].perplexity)
