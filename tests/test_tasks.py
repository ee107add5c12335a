"""Tasks as values: prompts, parts, readers; and all kinds trained by one module."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same, quiet_trainer, weights
from test_data_likelihood import writer
from test_data_prompts import make_tokenizer
from torch.optim import SGD
from transformers import BertConfig, BertForMaskedLM, RobertaConfig, RobertaForMaskedLM

from zolightning import ZOStrategy
from zolightning.data import answer_log_likelihood
from zolightning.tasks import (
    TASKS,
    Item,
    MaskReader,
    OptionReader,
    TaskData,
    TaskModule,
    TaskSplits,
    TextReader,
    TextTask,
    WordReader,
    few_shot,
    in_context,
    load_task,
    reader_for,
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    tokenizer = make_tokenizer()
    tokenizer.pad_token = "</s>"
    return tokenizer


# ---- prompts -----------------------------------------------------------------------------------------------------------

YES_NO = ("Yes", "No")
PUBLISHED: dict[str, tuple[dict[str, Any], str, tuple[str, ...], set[int], tuple[str, ...]]] = {
    "sst2": ({"sentence": "a fine film", "label": 1}, "a fine film It was", (" terrible", " great"), {1}, ("great",)),
    "rte": (
        {"premise": "A rained.", "hypothesis": "It rained.", "label": 0},
        'A rained.\nDoes this mean that "It rained." is true? Yes or No?\n', YES_NO, {0}, ("Yes",),
    ),
    "cb": (
        {"premise": "P.", "hypothesis": "h", "label": 2},
        'Suppose P. Can we infer that "h"? Yes, No, or Maybe?\n', ("Yes", "No", "Maybe"), {2}, ("Maybe",),
    ),
    "boolq": (
        {"passage": "Salt is salty.", "question": "is salt salty", "label": 1},
        "Salt is salty. Is salt salty?\n", ("No", "Yes"), {1}, ("Yes",),
    ),
    "wsc": (
        {"text": "Ann saw Bea. She waved.", "span1_text": "Bea", "span2_text": "She", "label": 0},
        'Ann saw Bea. She waved.\nIn the previous sentence, does the pronoun "she" refer to Bea? Yes or No?\n',
        ("No", "Yes"), {0}, ("No",),
    ),
    "wic": (
        {"word": "bank", "sentence1": "A bank.", "sentence2": "To bank.", "label": 0},
        'Does the word "bank" have the same meaning in these two sentences? Yes, No?\nA bank.\nTo bank.\n',
        ("No", "Yes"), {0}, ("No",),
    ),
    "multirc": (
        {"paragraph": "P.", "question": "Q?", "answer": "A", "label": 1},
        'P.\nQuestion: Q?\nI found this answer "A". Is that correct? Yes or No?\n', ("No", "Yes"), {1}, ("Yes",),
    ),
    "copa": (
        {"premise": "My shadow fell. ", "question": "cause", "choice1": "The sun rose.", "choice2": "I sat.", "label": 0},
        "My shadow fell because", (" the sun rose.", " I sat."), {0}, (" the sun rose.",),
    ),
    "record": (
        {"passage": "Text.\n@highlight\nOne", "query": "@placeholder won", "entities": ["X", "Y", "Z"], "answers": ["Y", "Z"]},
        "Text.\n- One\n-", (" X won", " Y won", " Z won"), {1, 2}, (" Y won", " Z won"),
    ),
    "squad": (
        {"title": "T", "context": "C.", "question": " Q? ", "answers": {"text": ["a", "b"], "answer_start": [0, 1]}},
        "Title: T\nContext: C.\nQuestion: Q?\nAnswer:", (), set(), ("a", "b"),
    ),
    "drop": (
        {"passage": "P.", "question": "How many?", "answers_spans": {"spans": ["3"], "types": ["number"]}},
        "Passage: P.\nQuestion: How many?\nAnswer:", (), set(), ("3",),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TASKS)
def test_presets_have_the_published_prompts(name: str) -> None:
    row, prompt, options, right, references = PUBLISHED[name]
    assert TASKS[name].item(row) == Item(prompt, options, frozenset(right), references)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "words", "template": "{x}"}, "kind 'words' needs words"),
        ({"kind": "text", "template": "{x}", "words": ("a", "b")}, "kind 'text' takes no words"),
        ({"kind": "words", "template": "{x}", "words": ("a", "a")}, "at least two and differ"),
        ({"kind": "mask", "template": "{x}", "words": ("a", "b")}, "belongs only in the template of kind 'mask'"),
    ],
)
def test_contradicting_tasks_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TextTask(**fields)


def test_few_shot_and_in_context() -> None:
    items = [TASKS["sst2"].item({"sentence": f"s{i}", "label": i % 2}) for i in range(20)]
    chosen = few_shot(items, 3, seed=1)
    assert sorted(min(item.right) for item in chosen) == [0, 0, 0, 1, 1, 1]
    assert chosen == few_shot(items, 3, seed=1) != few_shot(items, 3, seed=2)
    with pytest.raises(ValueError, match=r"few_shot\(k=11\)` must be .* at most the items of each answer"):
        few_shot(items, 11)
    shown = in_context(items[:1], items[1:3])[0]
    assert shown.prompt == "s1 It was great\n\ns2 It was terrible\n\ns0 It was"
    assert shown[1:] == items[0][1:]
    written = TASKS["drop"].item(PUBLISHED["drop"][0])
    assert in_context([written], [written])[0].prompt.startswith("Passage: P.\nQuestion: How many?\nAnswer: 3\n\nPassage")
    assert Item("x is {mask}.", (" bad", " good"), frozenset([1])).answered == "x is good."


# ---- rows --------------------------------------------------------------------------------------------------------------


def rows(count: int, name: str = "s") -> list[dict[str, Any]]:
    return [{"sentence": f"{name}{i}", "label": i % 2} for i in range(count)]


def save(path: Path, table: list[dict[str, Any]]) -> None:
    if path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, table)))
    else:
        import pandas as pd

        frame = pd.DataFrame(table)
        frame.to_csv(path, index=False) if path.suffix == ".csv" else frame.to_parquet(path)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_parts_of_a_folder_are_never_mixed(tmp_path: Path, suffix: str) -> None:
    for part in ("train", "dev", "test"):
        save(tmp_path / f"{part}{suffix}", rows(10, part))
    found = load_task(TASKS["sst2"], tmp_path, train=4, validation=3, test=5)
    assert [len(part) for part in found] == [4, 3, 5]
    for part, name in zip(found, ("train", "dev", "test"), strict=True):
        assert all(item.prompt.startswith(name) for item in part)
    again = load_task(TASKS["sst2"], tmp_path, train=4, validation=3, test=5, seed=1)
    assert again.train != found.train
    assert again.test == found.test


def test_without_a_test_part_validation_is_reported_and_chosen_by_is_held_out_of_training(tmp_path: Path) -> None:
    save(tmp_path / "train.jsonl", rows(30, "train"))
    save(tmp_path / "validation.jsonl", rows(8, "held"))
    found = load_task(TASKS["sst2"], tmp_path, train=100, validation=6)
    assert {item.prompt for item in found.test} == {f"held{i} It was" for i in range(8)}
    train, validation = ({item.prompt for item in part} for part in found[:2])
    assert (len(train), len(validation), len(train & validation)) == (24, 6, 0)


def test_one_file_is_split(tmp_path: Path) -> None:
    save(tmp_path / "all.jsonl", rows(40) + rows(10))  # ten of them twice
    found, other = (load_task(TASKS["sst2"], tmp_path / "all.jsonl", seed=seed) for seed in (0, 1))
    prompts = [item.prompt for part in found for item in part]
    assert len(set(prompts)) == len(prompts) == 40
    assert other.test == found.test
    assert other.validation != found.validation


def test_a_question_with_two_answers_comes_into_one_part_alone(tmp_path: Path) -> None:
    save(tmp_path / "all.jsonl", [*rows(40), *({**row, "label": 1 - row["label"]} for row in rows(40))])
    found = load_task(TASKS["sst2"], tmp_path / "all.jsonl")
    prompts = [item.prompt for part in found for item in part]
    assert len(set(prompts)) == len(prompts) == 40


def test_of_a_sorted_test_file_some_are_drawn(tmp_path: Path) -> None:
    for part in ("train", "validation", "test"):
        save(tmp_path / f"{part}.csv", [{"sentence": f"{part}{i}", "label": i // 50} for i in range(100)])
    test = load_task(TASKS["sst2"], tmp_path, test=20).test
    assert len(test) == 20
    assert {min(item.right) for item in test} == {0, 1}
    with pytest.raises(ValueError, match=r"`load_task\(test=...\)` must be >= 1, got -1"):
        load_task(TASKS["sst2"], tmp_path, test=-1)


@pytest.mark.parametrize("name", TASKS)
def test_local_files_of_each_shape(tmp_path: Path, name: str) -> None:
    for part in ("train", "validation", "test"):
        save(tmp_path / f"{part}.parquet", [PUBLISHED[name][0]] * 2)
    found = load_task(TASKS[name], tmp_path)
    assert found.test[0] == TASKS[name].item(PUBLISHED[name][0])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x", "label": 0}, r"row 2: no column 'sentence'; there are 'text', 'label'"),
        ({"sentence": "x", "label": 2}, r"row 2: label 2 is not one of the 2 labels"),
        ({"sentence": "x"}, r"row 2: no column 'label'"),
        ({"sentence": "x", "label": 0.7}, r"row 2: column 'label' must hold whole numbers, got 0.7"),
        ({"sentence": "x", "label": "good"}, r"row 2: column 'label' must hold whole numbers, got 'good'"),
        ({"sentence": "x", "label": None}, r"row 2: no value in column 'label'"),
        ({"sentence": None, "label": 1}, r"row 2: no value in column 'sentence'"),
        ({"sentence": 3, "label": 1}, r"row 2: 'int' object has no attribute 'strip'"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    save(tmp_path / "all.jsonl", [*rows(1), row])
    with pytest.raises(ValueError, match=message):
        load_task(TASKS["sst2"], tmp_path / "all.jsonl")


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        ("text", {"x": math.nan, "answers": "y"}, "no value in column 'x'"),
        ("text", {"x": "y", "answers": None}, "no value in column 'answers'"),
        ("text", {"x": "y", "answers": [None]}, "no answer in column 'answers'"),
        ("options", {"x": "y", "options": "ab", "label": 0}, "column 'options' must hold a list of texts, .* got 'ab'"),
        ("options", {"x": "y", "options": ["a", None], "label": 0}, "column 'options' must hold a list of texts"),
        ("options", {"x": "y", "options": ["a", "b"], "label": 0.5}, "column 'label' must hold whole numbers, got 0.5"),
    ],
)
def test_values_that_are_no_answer_or_text_are_refused(kind: Any, row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TextTask(kind, "{x}").item(row)


def test_whole_numbers_and_single_texts_of_any_kind_are_taken() -> None:
    for label in (1, 1.0, "1", "1.0", True):
        assert TASKS["sst2"].item({"sentence": "x", "label": label}).right == {1}
        assert TextTask("options", "{x}").item({"x": "y", "options": ["a", "b"], "label": label}).right == {1}
    for answers, references in (("a text", ("a text",)), (3, ("3",)), (2.5, ("2.5",)), (["a", 4], ("a", "4"))):
        assert TextTask("text", "{x}").item({"x": "y", "answers": answers}).references == references


def test_sentences_are_stripped() -> None:
    assert TASKS["sst2"].item({"sentence": "a charming journey . ", "label": 1}).prompt == "a charming journey . It was"


def test_without_datasets_or_rows_it_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        ImportError, match=r"nyu-mll/glue/sst2 needs .*`pip install \"zolightning\[tasks\]\"`, or give a folder"
    ):
        load_task(TASKS["sst2"])
    with pytest.raises(ValueError, match="no source"):
        load_task(TextTask("text", "{x}"))
    save(tmp_path / "all.jsonl", rows(2))
    with pytest.raises(ValueError, match="too few rows: 2 for train, 0 for validation, 0 for test"):
        load_task(TASKS["sst2"], tmp_path / "all.jsonl")


# ---- readers -----------------------------------------------------------------------------------------------------------

FILMS = [
    Item(f"a {adjective} film It was", (" terrible", " great"), frozenset([label]), (["terrible", "great"][label],))
    for label, adjective in enumerate(["long and dull", "great", "terrible", "fine"])
    for label in [label % 2]
]


def test_words_are_the_models_logits_after_each_prompt(tokenizer: Any) -> None:
    model, reader = writer(), WordReader(tokenizer, (" terrible", " great"))
    batch = reader.collate(FILMS)
    with torch.no_grad():
        scores = reader.scores(model, batch)
        for item, found in zip(FILMS, scores, strict=True):
            logits = model(input_ids=torch.tensor([tokenizer(item.prompt)["input_ids"]])).logits[0, -1]
            torch.testing.assert_close(found, logits[reader.ids], rtol=1e-4, atol=1e-5)
    assert tokenizer.convert_ids_to_tokens(reader.ids.tolist()) == ["Ġterrible", "Ġgreat"]


QUESTIONS = [
    Item("this one is", (" dull", " a great film", " long and terrible"), frozenset([2])),
    Item("a film", (" is great", " It was"), frozenset([0, 1])),
]


def test_options_are_average_log_likelihoods_and_missing_ones_never_win(tokenizer: Any) -> None:
    model, reader = writer(), OptionReader(tokenizer)
    with torch.no_grad():
        scores = reader.scores(model, reader.collate(QUESTIONS))
        for item, found in zip(QUESTIONS, scores, strict=True):
            for option, score in zip(item.options, found, strict=False):
                ids, start = tokenizer(item.prompt + option)["input_ids"], len(tokenizer(item.prompt)["input_ids"])
                log_probs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
                wanted = sum(log_probs[i - 1, ids[i]] for i in range(start, len(ids))) / (len(ids) - start)
                torch.testing.assert_close(score, wanted, rtol=1e-4, atol=1e-5)
        assert scores[1, 2] == -torch.inf
        assert reader.evaluate(model, reader.collate(QUESTIONS))["accuracy"][1] == 1.0
        for objective in reader.objectives().values():
            assert torch.as_tensor(objective(model, reader.collate(QUESTIONS))).isfinite().all()


def test_a_right_answer_is_any_of_the_right_ones(tokenizer: Any) -> None:
    model, reader = writer(), OptionReader(tokenizer)
    item = Item("a film", (" is great", " It was", " dull"), frozenset([0, 1]))
    batch, one = reader.collate([item]), reader.collate([item._replace(right=frozenset([0]))])
    with torch.no_grad():
        a, b, wrong = reader.scores(model, batch)[0]
        losses = {name: torch.as_tensor(loss(model, batch)).item() for name, loss in reader.objectives().items()}
        chances = torch.stack([a, b, wrong]).softmax(0)
        assert losses["cross_entropy"] == pytest.approx(-math.log(chances[0] + chances[1]), rel=1e-5)
        assert losses["soft_accuracy"] == pytest.approx(torch.sigmoid(wrong - max(a, b)).item(), rel=1e-5)
        twin = F.cross_entropy(reader.scores(model, one), torch.tensor([0]), reduction="none")
        torch.testing.assert_close(reader.objectives()["cross_entropy"](model, one), twin, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_masks_are_the_models_logits_at_the_mask(tokenizer: Any, kind: str) -> None:
    masked = make_tokenizer("<s> $A </s>")
    masked.add_special_tokens({"mask_token": "<mask>", "pad_token": "<pad>"})
    size = {"vocab_size": len(masked), "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    settings = {**size, "num_attention_heads": 2, "max_position_embeddings": 512, "pad_token_id": masked.pad_token_id}
    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig(**settings)) if kind == "bert" else RobertaForMaskedLM(RobertaConfig(**settings))
    model.eval()
    task = TextTask("mask", "{text} It was{mask} and dull", (" terrible", " great"))
    items = [task.item({"text": text, "label": 1}) for text in ("a film", "this one is long")]
    reader = reader_for(task, masked)
    assert isinstance(reader, MaskReader)
    with torch.no_grad():
        scores = reader.scores(model, reader.collate(items))
        for item, found in zip(items, scores, strict=True):
            ids = torch.tensor([masked(item.prompt.replace("{mask}", "<mask>"))["input_ids"]])
            at = ids[0].tolist().index(masked.mask_token_id)
            logits = model(input_ids=ids).logits[0, at]
            torch.testing.assert_close(found, logits[reader.ids], rtol=1e-4, atol=1e-5)


def test_text_is_taught_and_generated(tokenizer: Any) -> None:
    model, reader = writer(), TextReader(tokenizer, max_new_tokens=4)
    items = [Item("a film", references=("is great", "dull")), Item("this one is", references=("long",))]
    batch = reader.collate(items)
    with torch.no_grad():
        losses = reader.objectives()["likelihood"](model, batch)
        ids = tokenizer("a film is great\n")["input_ids"]
        count = len(ids) - len(tokenizer("a film")["input_ids"])
        one = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.int64)}
        torch.testing.assert_close(losses[:1], -answer_log_likelihood(model, one, torch.tensor([count])))  # type: ignore[index]
        answers = reader.answers(model, batch)
        perfect = reader.collate([Item(i.prompt, references=(a or " ",)) for i, a in zip(items, answers, strict=True)])
        assert reader.evaluate(model, perfect)["exact_match"].tolist() == [1.0, 1.0]


def test_long_prompts_lose_their_beginning_and_keep_the_first_token(tokenizer: Any) -> None:
    reader = WordReader(tokenizer, (" terrible", " great"), max_length=5)
    ids = reader.collate([FILMS[0]])["input_ids"][0].tolist()
    whole = tokenizer(FILMS[0].prompt)["input_ids"]
    assert ids == whole[:1] + whole[-4:]


def test_a_long_prompt_leaves_room_for_the_answer(tokenizer: Any) -> None:
    reader = TextReader(tokenizer, max_new_tokens=4, max_length=10)
    batch = reader.collate([Item("a film that is long and dull " * 9, references=("long",))])
    assert batch["input_ids"].shape == (1, 6)
    assert batch["answered_ids"].shape == (1, 10)
    with pytest.raises(ValueError, match=r"`max_new_tokens` must .* at least 2 of max_length=5 tokens .* got 4"):
        TextReader(tokenizer, max_new_tokens=4, max_length=5)


def test_readers_follow_the_kind_and_refuse_what_they_cannot_read(tokenizer: Any) -> None:
    assert isinstance(reader_for(TASKS["sst2"], tokenizer), WordReader)
    assert isinstance(reader_for(TASKS["rte"], tokenizer), OptionReader)  # "Yes" is two tokens of this tokenizer
    assert isinstance(reader_for(TASKS["copa"], tokenizer), OptionReader)
    assert isinstance(reader_for(TASKS["drop"], tokenizer), TextReader)
    with pytest.raises(ValueError, match="different single tokens"):
        WordReader(tokenizer, (" great", " terribly"))
    with pytest.raises(ValueError, match="different single tokens"):
        WordReader(tokenizer, ("eat", "and"), prompt="It was gr")  # one word with the prompt's last
    with pytest.raises(ValueError, match="no padding token"):
        WordReader(make_tokenizer(), (" terrible", " great"))
    with pytest.raises(ValueError, match=r"answer .* fewer than max_length=3"):
        OptionReader(tokenizer, max_length=3).collate(QUESTIONS)
    with pytest.raises(ValueError, match="`objective='f2'` is unknown for a TextReader; allowed: likelihood, f1, exact_match"):
        TaskModule(writer(), TextReader(tokenizer), "f2")


# ---- training ----------------------------------------------------------------------------------------------------------


def splits(items: list[Item]) -> TaskSplits:
    return TaskSplits(items * 8, items, items)


WRITTEN = [Item("a film", references=("is great",)), Item("this one is", references=("long",))] * 2


@pytest.mark.parametrize(
    ("items", "kind", "objective"),
    [
        (FILMS, "words", "cross_entropy"), (FILMS, "words", "accuracy"), (FILMS, "words", "f1"),
        (QUESTIONS * 2, "options", "cross_entropy"), (QUESTIONS * 2, "options", "likelihood"),
        (QUESTIONS * 2, "options", "soft_accuracy"), (WRITTEN, "text", "likelihood"), (WRITTEN, "text", "f1"),
    ],
)  # fmt: skip
def test_every_kind_trains_by_forward_passes(tokenizer: Any, items: list[Item], kind: str, objective: str) -> None:
    words = WordReader(tokenizer, (" terrible", " great"))
    reader = {"words": words, "options": OptionReader(tokenizer), "text": TextReader(tokenizer, 4)}[kind]
    module = TaskModule(writer().train(), reader, objective)
    trainer = quiet_trainer(ZOStrategy(lr=1e-3, eps=5e-2, select="re:layers"), max_steps=3, num_sanity_val_steps=0)
    before = weights(module)
    trainer.fit(module, TaskData(splits(items), reader, batch_size=4))
    strategy: Any = trainer.strategy
    assert len(strategy.last_record.raw) == (1 if objective == "f1" and kind == "words" else 4)  # a direction for each example
    if strategy.last_record.ties < len(strategy.last_record.raw):
        assert any(not torch.equal(before[n], w) for n, w in weights(module).items())
    tested = trainer.test(module, TaskData(splits(items), reader), verbose=False)[0]
    assert set(tested) == ({"test/f1", "test/exact_match"} if kind == "text" else {"test/accuracy", "test/loss"})


def test_lr_0_leaves_every_bit_and_own_objectives_are_taken(tokenizer: Any) -> None:
    reader = TextReader(tokenizer, 4)

    def brevity(model: torch.nn.Module, batch: Any) -> float:
        return sum(map(len, reader.answers(model, batch))) / 100

    module = TaskModule(writer(), reader, brevity, lambda ps: SGD(ps, lr=0.0))
    before = weights(module)
    trainer = quiet_trainer(ZOStrategy("spsa", eps=5e-2), max_steps=2, num_sanity_val_steps=0)
    trainer.fit(module, TaskData(splits(WRITTEN), reader, batch_size=4))
    assert_same(weights(module), before)


def test_by_backprop_it_learns_the_same_objective(tokenizer: Any) -> None:
    reader = OptionReader(tokenizer)
    module = TaskModule(writer().train(), reader, "likelihood", lambda ps: SGD(ps, lr=0.05), decay_steps=20)
    data = TaskData(splits(QUESTIONS * 2), reader, batch_size=4)
    trainer = quiet_trainer(max_steps=20, max_epochs=None, num_sanity_val_steps=0)
    before = trainer.test(module, data, verbose=False)[0]["test/loss"]
    trainer.fit(module, data)
    assert trainer.test(module, data, verbose=False)[0]["test/loss"] < before
