"""Tasks of a person's own files: texts with labels, or prompts with answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from ..data.table import table_labels
from .item import Row, TextTask

OwnKind = Literal["classify", "answer"]
COLUMNS: dict[str, tuple[str, str]] = {"classify": ("text", "label"), "answer": ("prompt", "answer")}
"""Kind → the columns of the question and of the right answer."""

_TEMPLATES = {"classify": "{text}\nLabel:", "answer": "{prompt}"}


def own_task(kind: OwnKind, path: str | Path, columns: Sequence[str] | None = None, template: str | None = None) -> TextTask:
    """The task that a table holds: 'classify' chooses among the labels' names, 'answer' writes the answer.

    Args:
        kind: 'classify' or 'answer'.
        path: a .csv, .jsonl or .parquet file, or a folder of them as :func:`~zolightning.tasks.load_task` reads it.
        columns: names of the two columns. None: 'text' and 'label', or 'prompt' and 'answer'.
        template: the text that the model reads before its answer; '{text}' or '{prompt}' stands for the first column, any other
            '{column}' for that one. None: the text and 'Label:' on a line of its own, or the prompt as it is.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not two columns, a column that is missing, or fewer than two labels.
    """
    first, second = COLUMNS[kind]
    if columns is None:
        columns = (first, second)
    if len(columns) != 2:
        raise ValueError(f"`columns` must be two names, of the {first} and of the {second}, got {list(columns)!r}")
    question, right = columns
    template = template or _TEMPLATES[kind]
    if kind == "answer":
        return TextTask("text", template, answers=right, prepare=partial(_renamed, question=question, name=first))
    names = table_labels(path, text=question, label=right)
    numbers = {name: number for number, name in enumerate(names)}
    prepare = partial(_numbered, question=question, name=first, right=right, numbers=numbers)
    return TextTask("words", template, tuple(f" {name}" for name in names), prepare=prepare)


def _renamed(row: Row, question: str, name: str) -> Row:
    return {**row, name: row[question].strip()}


def _numbered(row: Row, question: str, name: str, right: str, numbers: Mapping[str, int]) -> Row:
    label = str(row[right]).strip()
    if label not in numbers:
        raise ValueError(f"label {label!r} does not occur in the training rows, which have {', '.join(map(repr, numbers))}")
    return {**_renamed(row, question, name), "label": numbers[label]}
