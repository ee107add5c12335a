"""Answers to a package that is not installed, and to a name that is misspelled."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


@contextmanager
def needs(package: str, purpose: str, install: str = "zolightning", advice: str = "") -> Iterator[None]:
    """Import ``package`` inside of this; where it is missing, the error names the exact pip line.

    Args:
        package: the name under which it is imported.
        purpose: the feature that needs it, the beginning of a sentence.
        install: the argument of pip: an extra of this package as ``zolightning[demo]``, or a package of its own.
        advice: another way, the end of the sentence.

    Raises:
        ImportError: it is not installed, or a part of it is missing.
    """
    try:
        yield
    except ImportError as error:
        raise ImportError(
            f'{purpose} needs the package {package}, which cannot be imported ({error}). Run `pip install "{install}"`{advice}.'
        ) from error


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a message about a name that is unknown: the closest known one, or nothing where none is close."""
    close = difflib.get_close_matches(name, list(known), 1)
    return f"; did you mean {close[0]!r}?" if close else ""
