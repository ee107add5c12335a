"""The user's own labelled texts, from CSV, JSONL or parquet files."""

import csv
import json
import logging
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, TextIO

from .._answers import needs
from .text import Example, Splits, distinct, split_classes

logger = logging.getLogger(__name__)

_STEMS = {"train": ("train",), "validation": ("validation", "valid", "dev"), "test": ("test",)}


class _Row(NamedTuple):
    line: int
    text: str
    label: str


def read_table(
    path: str | Path,
    *,
    text: str = "text",
    label: str = "label",
    seed: int = 0,
    validation: float = 0.1,
    test: float = 0.2,
) -> Splits:
    """Return the labelled texts of a .csv, .jsonl (UTF-8) or .parquet file, or of a folder of such files.

    `text` and `label` name the columns. Labels are strings or whole numbers; they are numbered in sorted
    order (as numbers when all are). A file is split class by class by `seed`; `validation` and `test` are
    the shares held out, and a repeated text is dropped so that it cannot lie in two parts. A folder holds
    train, validation (or valid, dev) and test files, taken as they are.

    Raises FileNotFoundError for a missing file and ValueError, with file and line, for anything wrong in one.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path, text, label)
    if min(validation, test) < 0 or validation + test >= 1:
        raise ValueError(f"validation={validation} and test={test} must be shares of at least 0 that sum to less than 1")
    rows = _read_rows(path, text, label)
    names = _label_names(path, rows)
    kept = distinct(rows, lambda row: row.text)
    if len(kept) < len(rows):
        logger.warning("%s: dropped %d rows whose text occurs earlier in it", path, len(rows) - len(kept))
    random.Random(seed).shuffle(kept)
    by_class = [[Example(row.text, i) for row in kept if row.label == name] for i, name in enumerate(names)]
    held = [_held(path, name, len(group), validation, test) for name, group in zip(names, by_class, strict=True)]
    return split_classes(by_class, held, names, seed)


def table_labels(path: str | Path, *, text: str = "text", label: str = "label") -> tuple[str, ...]:
    """Return the names of a table's labels in the order of their numbers; of a folder, those of its train file.

    Raises as :func:`read_table`.
    """
    path = Path(path)
    file = split_files(path, needed=("train",))["train"] if path.is_dir() else path
    return _label_names(file, _read_rows(file, text, label))


def _held(path: Path, name: str, rows: int, validation: float, test: float) -> tuple[int, int]:
    """Return how many of a label's rows go to validation and test: at least one of each that is wanted."""
    held = [max(1, round(share * rows)) if share else 0 for share in (validation, test)]
    if rows <= sum(held):
        raise ValueError(
            f"{path}: too few rows to split: label {name!r} has {rows} distinct texts, at least "
            f"{sum(held) + 1} are needed with validation={validation} and test={test}; "
            "add rows or lower the shares"
        )
    return held[0], held[1]


def _read_folder(folder: Path, text: str, label: str) -> Splits:
    files = split_files(folder)
    tables = {split: _read_rows(file, text, label) for split, file in files.items()}
    names = _label_names(files["train"], tables["train"])
    splits = Splits([], [], [], names)
    for split, part in zip(files, splits[:3], strict=True):
        for row in tables[split]:
            if row.label not in names:
                raise ValueError(
                    f"{files[split]}, line {row.line}: label {row.label!r} does not occur in "
                    f"{files['train'].name}, which has {', '.join(map(repr, names))}"
                )
            part.append(Example(row.text, names.index(row.label)))
    return splits


def split_files(folder: Path, needed: Iterable[str] = ("train", "validation", "test")) -> dict[str, Path]:
    """Return the folder's train, validation (or valid, dev) and test files, those that are there.

    Raises FileNotFoundError for one of `needed` that is missing, ValueError for a part with several files.
    """
    files = {}
    for split, stems in _STEMS.items():
        wanted = [stem + suffix for stem in stems for suffix in SUFFIXES]
        found = [folder / name for name in wanted if (folder / name).is_file()]
        if len(found) > 1:
            raise ValueError(f"{folder} has several {split} files: {', '.join(f.name for f in found)}; keep one")
        if found:
            files[split] = found[0]
        elif split in needed:
            raise FileNotFoundError(f"{folder} has no {split} file; add one of {', '.join(wanted)}")
    return files


def _label_names(path: Path, rows: list[_Row]) -> tuple[str, ...]:
    names = {row.label for row in rows}
    if len(names) < 2:
        raise ValueError(f"{path}: every row has the label {names.pop()!r}; at least two labels are needed")
    try:
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    except ValueError:
        return tuple(sorted(names))


def read_records(path: Path) -> Iterator[tuple[int, dict[str, object]]]:
    """Yield the rows of a .csv, .jsonl (UTF-8) or .parquet file as dicts, each with its line (of parquet: row) number.

    Raises FileNotFoundError for a missing file, ValueError, with file and line, for anything wrong in it, ImportError for
    a parquet file without the `pyarrow` package.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file or folder")
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        yield from _parquet_records(path)
        return
    reader = _READERS.get(suffix)
    if reader is None:
        raise ValueError(f"{path}: unknown file type {path.suffix!r}; allowed are {', '.join(SUFFIXES)}")
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            yield from reader(stream, path)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error}); save it as UTF-8") from error


def _read_rows(path: Path, text: str, label: str) -> list[_Row]:
    rows = [_row(record, f"{path}, line {line}", line, text, label) for line, record in read_records(path)]
    if not rows:
        raise ValueError(f"{path}: no rows; columns {text!r} and {label!r} with at least two labels are needed")
    return rows


def _row(record: dict[str, object], where: str, line: int, text: str, label: str) -> _Row:
    for column in (text, label):
        if column not in record:
            found = ", ".join(map(repr, record)) or "none"
            raise ValueError(f"{where}: no column {column!r}; found {found}; name the right column or rename it")
    content, tag = record[text], record[label]
    if content is None or (isinstance(content, str) and not content.strip()):
        raise ValueError(f"{where}: blank text in column {text!r}; fill it in or remove the row")
    if not isinstance(content, str):
        raise ValueError(f"{where}: text in column {text!r} must be a string, got {content!r}")
    if tag is None or not str(tag).strip():
        raise ValueError(f"{where}: missing label in column {label!r}; fill it in or remove the row")
    if not isinstance(tag, str | int):
        raise ValueError(f"{where}: label in column {label!r} must be a string or an integer, got {tag!r}")
    return _Row(line, content.strip(), str(tag).strip())


def _csv_records(stream: TextIO, path: Path) -> Iterator[tuple[int, dict[str, object]]]:
    reader = csv.DictReader(stream, strict=True)
    try:
        for record in reader:
            if None in record:
                raise ValueError(
                    f"{path}, line {reader.line_num}: more fields than the header has; "
                    "put texts that contain commas in double quotes"
                )
            yield reader.line_num, record
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num + 1}: malformed CSV: {error}") from error


def _jsonl_records(stream: TextIO, path: Path) -> Iterator[tuple[int, dict[str, object]]]:
    for number, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:  # the latter for brackets without end
            raise ValueError(f"{path}, line {number}: malformed JSON: {error}; put one object per line") from error
        if not isinstance(record, dict):
            raise ValueError(f"{path}, line {number}: expected a JSON object, got {type(record).__name__}")
        yield number, record


def _parquet_records(path: Path) -> Iterator[tuple[int, dict[str, object]]]:
    with needs("pyarrow", f"reading {path}", "pyarrow", ", or save the file as .jsonl"):
        import pyarrow
        from pyarrow import parquet

    try:
        yield from enumerate(parquet.read_table(path).to_pylist())
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path}: not a parquet file ({error})") from error


_READERS: dict[str, Callable[[TextIO, Path], Iterator[tuple[int, dict[str, object]]]]] = {
    ".csv": _csv_records,
    ".jsonl": _jsonl_records,
}
SUFFIXES = (*_READERS, ".parquet")
