"""``zolightning fit`` on local files, with a tiny model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from test_data_likelihood import writer
from test_data_prompts import make_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig

from zolightning.commands.fit import Fit
from zolightning.ledger import read
from zolightning.ledger.format import Method

pytestmark = pytest.mark.integration

ROWS: dict[str, list[dict[str, Any]]] = {
    "sst2": [{"sentence": f"{word} film {i}", "label": i % 2} for i, word in enumerate(["dull", "great"] * 12)],
    "drop": [
        {"passage": f"film {i}", "question": "how long?", "answers_spans": {"spans": ["long"]}} for i in range(16)
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fit")
    writer().save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    for name, rows in ROWS.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def run(folder: Path, task: str, **settings: Any) -> None:
    quick = {"steps": 4, "validations": 2, "batch_size": 4, "lr": 1e-3, "offline": True}
    store = f"sqlite:///{folder}/mlflow.db"
    Fit(
        task,
        store=store,
        **{**quick, "model": str(folder / "model"), "out": str(folder), "data": str(folder / f"{task}.jsonl"), **settings},
    )()


@pytest.mark.parametrize(
    ("task", "settings"),
    [
        ("sst2", {"objective": "accuracy", "eps": 5e-2, "shots": 4}),
        ("sst2", {"recipe": "adamw", "view": "lora", "demonstrations": 2}),
        ("drop", {"recipe": "mezo-prefix", "objective": "f1"}),
    ],
)
def test_trains_chooses_on_validation_and_reports_on_test(
    folder: Path, task: str, settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run(folder, task, **settings)
    sizes, before, after = [
        line for line in capsys.readouterr().out.splitlines() if task in line or "as it is" in line or "after" in line
    ]
    assert "to train" in sizes
    score = "f1 0." if task == "drop" else "accuracy 0."
    assert score in before
    assert score in after
    assert "best on validation (step=" in after


@pytest.mark.parametrize(("recipe", "added"), [("mezo-lora", ".lora_"), ("mezo-prefix", "virtual_tokens")])
def test_recipes_bring_their_view(folder: Path, recipe: str, added: str) -> None:
    out = folder / recipe
    run(folder, "sst2", recipe=recipe, out=str(out))
    (path,) = out.rglob("ledger.zo")
    (method,) = [record for record in read(path) if isinstance(record, Method)]
    assert all(added in name for group in method.groups for name in group)


def test_steps_0_is_the_baseline(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(folder, "sst2", steps=0, demonstrations=3)
    out = capsys.readouterr().out
    assert "as it is: accuracy 0." in out
    assert "after training" not in out


PAIRS = [(i, *pair) for i in range(12) for pair in [("dull", 1), ("great", 5)]]
FILES = {
    "csv": "review,stars\n" + "".join(f'"A {word}, long film {i}",{stars} stars\n' for i, word, stars in PAIRS),
    "bom": "\ufefftext,label\n" + "".join(f"{word} film {i},{stars}\n" for i, word, stars in PAIRS),
}


@pytest.mark.parametrize(("kind", "columns"), [("csv", "review, stars"), ("bom", None)])
def test_own_file_of_labelled_texts(folder: Path, kind: str, columns: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    table = folder / f"{kind}.csv"
    table.write_text(FILES[kind], encoding="utf-8")
    run(folder, "classify", data=str(table), columns=columns)
    out = capsys.readouterr().out
    assert "classify: 12 to train, 6 to validation, 6 to test" in out
    assert "best on validation (step=" in out


def test_own_file_of_prompts_and_answers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = folder / "answers.csv"
    table.write_text("prompt,answer\n" + "".join(f"how long is film {i}?,long\n" for i in range(16)))
    run(folder, "answer", data=str(table), template="film: {prompt}", objective="f1", steps=2, validations=1)
    assert "as it is: f1 0." in capsys.readouterr().out


BROKEN = {
    "empty": ("", "no rows; columns 'text' and 'label' with at least two labels are needed"),
    "header": ("text,label\n", "no rows; columns 'text' and 'label'"),
    "one class": ("text,label\na,x\nb,x\n", "every row has the label 'x'; at least two labels are needed"),
    "column": ("text,mark\na,x\nb,y\n", "line 2: no column 'label'; found 'text', 'mark'"),
    "commas": ("text,label\na, b,x\n", "line 2: more fields than the header has"),
    "quote": ('text,label\n"a,x\nb,y\n', "malformed CSV: unexpected end of data"),
    "blank": ("text,label\n ,x\nb,y\n", "line 2: blank text in column 'text'"),
    "few": ("text,label\na,x\nb,y\n", "too few rows"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_file_is_one_line(kind: str, folder: Path) -> None:
    content, message = BROKEN[kind]
    (folder / "broken.csv").write_text(content)
    with pytest.raises(ValueError, match=re.escape(message)):
        run(folder, "classify", data=str(folder / "broken.csv"))


def test_label_that_training_does_not_have(folder: Path) -> None:
    parts = folder / "parts"
    parts.mkdir()
    (parts / "train.csv").write_text("text,label\na,x\nb,y\n")
    (parts / "validation.csv").write_text("text,label\nc,z\n")
    with pytest.raises(ValueError, match="label 'z' does not occur in the training rows, which have 'x', 'y'"):
        run(folder, "classify", data=str(parts))


def test_demonstrations_may_not_take_all_of_training(folder: Path) -> None:
    with pytest.raises(ValueError, match="`demonstrations=99` leave no example to train on"):
        run(folder, "sst2", demonstrations=99)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "sst3"}, "`task='sst3'` is unknown; allowed: 'sst2', 'rte', .*; did you mean 'sst2'"),
        (
            {"task": "sst2", "recipe": "mezzo"},
            "`recipe='mezzo'` is unknown; allowed: 'adamw', .*; did you mean 'mezo'",
        ),
        ({"task": "sst2", "recipe": "reft"}, "trains vectors that .*intervene` puts into the model"),
        ({"task": "sst2", "recipe": "zeroqat"}, "trains layers that .*fake_quantize` makes"),
        ({"task": "sst2", "recipe": "adamw", "select": "all"}, "`eps` and `select` are of ZOStrategy's recipes"),
        ({"task": "sst2", "recipe": "adamw", "eps": 1e-3}, "`eps` and `select` are of ZOStrategy's recipes"),
        ({"task": "sst2", "recipe": "adamw", "objective": "accuracy"}, "needs a gradient, and `objective=accuracy` has none"),
        ({"task": "sst2", "recipe": "forward-gradient", "objective": "f1"}, "forward-gradient needs a gradient"),
        ({"task": "sst2", "steps": -3}, "`steps` must be >= 0, got -3"),
        ({"task": "sst2", "validations": 0}, "`validations` must be >= 1, got 0"),
        ({"task": "sst2", "train": 0}, "`train` must be >= 1, got 0"),
        ({"task": "sst2", "max_length": 1}, "`max_length` must be >= 2, got 1"),
        ({"task": "sst2", "eps": -1.0}, "eps=...\\)` must be a finite number > 0, got -1"),
        ({"task": "sst2", "objective": "acuracy"}, "`objective='acuracy'` is unknown; .*; did you mean 'accuracy'"),
        ({"task": "classify"}, "`fit classify` trains on your own file; give it with `--data FILE`"),
        ({"task": "classify", "data": "x.csv", "columns": "a"}, "`columns` must be two names"),
        ({"task": "sst2", "columns": "a,b"}, "`columns` and `template` are for classify and answer; sst2 has its own"),
    ],
)
def test_bad_input_is_refused_before_anything_is_loaded(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Fit(**settings)()


@pytest.mark.parametrize(("tier", "view"), [("disk", None), ("cpu", "lora")])
def test_offloaded_weights_end_with_the_same_scores(
    folder: Path, tier: Any, view: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {**writer().config.to_dict(), "hidden_size": 256, "intermediate_size": 320}
    AutoModelForCausalLM.from_config(LlamaConfig(**config)).save_pretrained(folder / "wide")
    make_tokenizer().save_pretrained(folder / "wide")
    said = []
    for offload in (None, tier):
        run(folder, "sst2", model=str(folder / "wide"), objective="accuracy", offload=offload, view=view, eps=5e-2)
        said.append([line for line in capsys.readouterr().out.splitlines() if ": accuracy" in line])
    assert said[0] == said[1] and len(said[0]) == 2


def test_offload_and_backprop_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="backward pass"):
        run(folder, "sst2", recipe="adamw", offload="disk")
