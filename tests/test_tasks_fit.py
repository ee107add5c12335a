"""``zolightning fit`` on local files, with a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_data_likelihood import writer
from test_data_prompts import make_tokenizer

from zolightning.commands.fit import fit
from zolightning.ledger import read
from zolightning.ledger.format import Method

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
    fit(
        task,
        data=str(folder / f"{task}.jsonl"),
        model=str(folder / "model"),
        store=store,
        **{**quick, "out": str(folder), **settings},
    )


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
    ],
)
def test_bad_input_is_refused_before_anything_is_loaded(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(**settings)
