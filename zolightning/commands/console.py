"""Parts that the commands share: the names that a person gives them, and the lines that they answer as they work."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path

from .._answers import did_you_mean


def say(line: str) -> None:
    """Print a line now."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def pick(names: Sequence[str] | str | None, known: Collection[str]) -> list[str]:
    """The ``methods`` asked for, a list or names separated by commas, each once and in the order given.

    Raises:
        ValueError: a name that is not among the known ones.
    """
    asked = names.split(",") if isinstance(names, str) else names or ()
    wanted = list(dict.fromkeys(name.strip() for name in asked if name.strip()))
    for name in wanted:
        if name not in known:
            hint = did_you_mean(name, known)
            raise ValueError(f"`methods`: {name!r} is unknown; allowed: {', '.join(known)}{hint}")
    return wanted


def make_folder(out: str) -> None:
    """Make the folder that a command was given as ``out``, and see that files can be written to it.

    Raises:
        ValueError: they cannot.
    """
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise ValueError(f"`out={out!r}` cannot be written to: {error}; give a folder that can, as `--out ~/runs`") from error
