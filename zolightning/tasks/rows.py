"""Rows of a task: from Hugging Face's datasets or from local files, in parts that are never mixed."""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from .._answers import needs
from ..data.table import read_records, split_files
from ..data.text import drawn
from .item import Item, Row, TextTask


class TaskSplits(NamedTuple):
    """Three disjoint parts: to train on, to choose by, to report."""

    train: list[Item]
    validation: list[Item]
    test: list[Item]


def load_task(
    task: TextTask,
    path: str | Path | None = None,
    *,
    train: int = 1000,
    validation: int = 500,
    test: int = 1000,
    seed: int = 0,
) -> TaskSplits:
    """The task's questions, in three parts of limited size; defaults as in MeZO's experiments.

    Test questions come from the set's test part, or, where that is missing or has no answers (as GLUE's), from its
    validation part; validation questions then come out of the training part, and never are test questions.

    Args:
        task: the task.
        path: a folder with train and validation, and perhaps test files (.csv, .jsonl, .parquet), or one file, which is
            split. Default: the task's source, through Hugging Face ``datasets``.
        train: The largest number of training questions, drawn by ``seed``.
        validation: The same for the validation examples.
        test: The same for the test examples, which do not change with the seed.
        seed: The seed of the draws.

    Raises:
        ImportError: ``path`` is None and ``datasets`` is not installed.
        OSError: the source cannot be reached.
        ValueError: a row does not fit the task, a number is below 1, or a part would be empty.
    """
    for name, count in (("train", train), ("validation", validation), ("test", test)):
        if count < 1:
            raise ValueError(f"`load_task({name}=...)` must be >= 1, got {count}")
    parts = _parts(task, path)
    # a question that is there twice, even with two answers, must not come into two parts
    trainable = list({(item.prompt, item.options): item for item in parts["train"]}.values())
    held, reported = parts.get("validation", []), parts.get("test", [])
    if not reported:
        reported, held = held, []
    if not reported:
        random.Random(0).shuffle(trainable)  # not by `seed`: an example that one seed reports is trained on by no other
        reported, trainable = _apart(trainable, min(test, len(trainable) // 4))
    generator = random.Random(seed)
    generator.shuffle(trainable)
    if held:
        generator.shuffle(held)
    else:
        held, trainable = _apart(trainable, min(validation, len(trainable) // 3))
    found = TaskSplits(trainable[:train], held[:validation], drawn(reported, test))
    if not all(found):
        sizes = ", ".join(f"{len(part)} for {name}" for name, part in zip(found._fields, found, strict=True))
        raise ValueError(f"too few rows: {sizes}; each part needs at least one")
    return found


def _parts(task: TextTask, path: str | Path | None) -> dict[str, list[Item]]:
    """The parts as their source has them: train always, validation and test where they are."""
    if path is None:
        return _from_hub(task)
    if not Path(path).is_dir():
        return {"train": _items(task, read_records(Path(path)), path)}
    files = split_files(Path(path), needed=("train", "validation"))
    return {name: _items(task, read_records(file), file) for name, file in files.items()}


def _apart(items: list[Item], count: int) -> tuple[list[Item], list[Item]]:
    """The first ``count`` of the items, and all others."""
    return items[:count], items[count:]


def _items(task: TextTask, rows: Iterable[tuple[int, Row]], where: object) -> list[Item]:
    items = []
    for line, row in rows:
        try:
            items.append(task.item(row))
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            message = f"no column {error}; there are {', '.join(map(repr, row))}" if isinstance(error, KeyError) else error
            raise ValueError(f"{where}, row {line}: {message}; the task's template is {task.template!r}") from error
    return items


def _from_hub(task: TextTask) -> dict[str, list[Item]]:
    if not task.source:
        raise ValueError("this task has no source on Hugging Face; give files of your own (`--data` on the command line)")
    name = "/".join(task.source)
    advice = ", or give a folder of .jsonl, .csv or .parquet files (`--data` on the command line)"
    with needs("datasets", f"loading {name}", "zolightning[tasks]", advice):
        import datasets

    try:
        found = datasets.load_dataset(*task.source)
    except Exception as error:  # of many kinds, from many libraries
        raise OSError(
            f"cannot load {name} from Hugging Face ({error}); give a folder of local files (`--data` on the command line)"
        ) from error
    return {
        part: _items(task, enumerate(found[part]), f"{name}, {part}")
        for part in ("train", "validation", "test")
        if part in found and _answered(task, found[part][0])
    }


def _answered(task: TextTask, row: Row) -> bool:
    """Whether the part's rows have answers: benchmarks hide those of their test parts (label −1, or none)."""
    try:
        task.item(row)
    except (KeyError, ValueError, TypeError, AttributeError):
        return False
    return True
