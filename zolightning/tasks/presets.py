"""The tasks of MeZO's OPT experiments, arXiv:2305.17333, in its prompt forms (its table of prompts and its code)."""

from __future__ import annotations

from functools import partial
from typing import Any

from .item import Row, TextTask


def _boolq(row: Row) -> Row:
    question = row["question"].rstrip("?") + "?"
    return {**row, "question": question[:1].upper() + question[1:]}


def _copa(row: Row) -> Row:
    if row["question"] not in ("cause", "effect"):
        raise ValueError(f"COPA's question must be 'cause' or 'effect', got {row['question']!r}")
    premise = row["premise"].rstrip().removesuffix(".") + (" because" if row["question"] == "cause" else " so")
    return {**row, "premise": premise, "options": [_lowered(row["choice1"]), _lowered(row["choice2"])]}


def _lowered(choice: str) -> str:
    """' the sun was rising.': within a sentence, so without the first capital, unless it is 'I'."""
    first, space, rest = choice.partition(" ")
    return " " + (first if first == "I" else first.lower()) + space + rest


def _record(row: Row) -> Row:
    entities: list[Any] = list(row["entities"])
    return {
        **row,
        "passage": row["passage"].replace("@highlight\n", "- "),
        "options": [" " + row["query"].replace("@placeholder", entity) for entity in entities],
        "label": [place for place, entity in enumerate(entities) if entity in row["answers"]],
    }


def _wsc(row: Row) -> Row:
    return {**row, "span2_text": row["span2_text"].lower()}


def _stripped(row: Row, column: str = "question") -> Row:
    return {**row, column: row[column].strip()}


SST2 = TextTask(
    "words", "{sentence} It was", (" terrible", " great"), prepare=partial(_stripped, column="sentence"),
    source=("nyu-mll/glue", "sst2"),
)  # fmt: skip

RTE = TextTask(
    "words", '{premise}\nDoes this mean that "{hypothesis}" is true? Yes or No?\n', ("Yes", "No"),
    source=("aps/super_glue", "rte"),
)  # fmt: skip

CB = TextTask(
    "words", 'Suppose {premise} Can we infer that "{hypothesis}"? Yes, No, or Maybe?\n', ("Yes", "No", "Maybe"),
    source=("aps/super_glue", "cb"),
)  # fmt: skip

BOOLQ = TextTask(
    "words", "{passage} {question}\n", ("No", "Yes"), prepare=_boolq, source=("aps/super_glue", "boolq")
)  # fmt: skip

WSC = TextTask(
    "words", '{text}\nIn the previous sentence, does the pronoun "{span2_text}" refer to {span1_text}? Yes or No?\n',
    ("No", "Yes"), prepare=_wsc, source=("aps/super_glue", "wsc.fixed"),
)  # fmt: skip

WIC = TextTask(
    "words",
    'Does the word "{word}" have the same meaning in these two sentences? Yes, No?\n{sentence1}\n{sentence2}\n',
    ("No", "Yes"), source=("aps/super_glue", "wic"),
)  # fmt: skip

MULTIRC = TextTask(
    "words", '{paragraph}\nQuestion: {question}\nI found this answer "{answer}". Is that correct? Yes or No?\n',
    ("No", "Yes"), source=("aps/super_glue", "multirc"),
)  # fmt: skip

COPA = TextTask("options", "{premise}", prepare=_copa, source=("aps/super_glue", "copa"))

RECORD = TextTask("options", "{passage}\n-", prepare=_record, source=("aps/super_glue", "record"))

SQUAD = TextTask(
    "text", "Title: {title}\nContext: {context}\nQuestion: {question}\nAnswer:", answers="answers.text", prepare=_stripped,
    source=("rajpurkar/squad",),
)  # fmt: skip

DROP = TextTask(
    "text", "Passage: {passage}\nQuestion: {question}\nAnswer:", answers="answers_spans.spans", prepare=_stripped,
    source=("ucinlp/drop",),
)  # fmt: skip

TASKS: dict[str, TextTask] = {
    "sst2": SST2,
    "rte": RTE,
    "cb": CB,
    "boolq": BOOLQ,
    "wsc": WSC,
    "wic": WIC,
    "multirc": MULTIRC,
    "copa": COPA,
    "record": RECORD,
    "squad": SQUAD,
    "drop": DROP,
}
