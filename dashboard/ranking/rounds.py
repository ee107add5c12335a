"""The folder between a training that asks and a person who ranks. Nothing of Streamlit, and nothing of the training's package.

``question.json`` is the training's question of now; ``rankings/<id>.json`` its answer, written once; ``stop`` says that the
person has had enough. The training holds ``training.lock`` while it runs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

from filelock import FileLock, Timeout

FORMAT = 1


class RoundError(ValueError):
    """The folder holds something else than a training puts there."""


@dataclass(frozen=True)
class Round:
    """A question of a training.

    Args:
        id: of the cards' content, so that the same cards are the same question after a restart.
        kind: ``ranking``; ``blind``, which of two is better; or ``end``, nothing more.
        round: counted from 1.
        top: how many are to be told apart.
        cards: each {"text": …} or {"picture": a PNG in base 64}.
        words: of the training, shown with it.
    """

    id: str
    kind: str
    round: int
    top: int
    cards: tuple[dict[str, str], ...]
    words: str = ""


def question(folder: Path) -> Round | None:
    """The question of now, answered or not; None before a training has asked anything.

    Raises:
        RoundError: the file is damaged, or of another version.
    """
    path = folder / "question.json"
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise RoundError(f"{path} cannot be read ({error}). Start the training again: it writes it anew") from error
    try:
        if found["format"] != FORMAT:
            raise RoundError(f"{path} has the format {found['format']!r}, and this page reads {FORMAT}: update the older one")
        cards = tuple(_card(card) for card in found["cards"])
        return Round(_name(found["id"]), str(found["kind"]), int(found["round"]), int(found["top"]), cards, str(found["words"]))
    except RoundError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise RoundError(f"{path} is no question of a training ({error!r}); one that is started again mends it") from error


def _name(id_: str) -> str:
    if not id_.isalnum():
        raise ValueError(f"the id {id_!r:.80} is no name of a file")
    return id_


def _card(card: dict[str, str]) -> dict[str, str]:
    (kind, value), *more = card.items()
    if kind not in ("text", "picture") or more:
        raise ValueError(f"a card is a text or a picture, got {kind!r:.80}")
    return {kind: str(value)}


def answered(folder: Path, asked: Round) -> bool:
    """Whether this round has its ranking."""
    return _ranking(folder, asked).exists()


def answer(folder: Path, asked: Round, groups: Sequence[Sequence[int]], by: str) -> bool:
    """Keep the ranking of a round; False where it had one, which stays.

    Args:
        folder: the training's.
        asked: the question.
        groups: numbers of cards, the best first, equal ones together.
        by: whose page it was.

    Raises:
        RoundError: a card that there is not, or one twice.
    """
    named = [number for group in groups for number in group]
    if len(set(named)) < len(named) or not set(named) <= set(range(len(asked.cards))):
        raise RoundError(f"a ranking names some of the {len(asked.cards)} cards, each once; got {groups!r:.200}")
    said = {"id": asked.id, "kind": asked.kind, "round": asked.round, "ranking": [[*group] for group in groups], "by": by}
    path = _ranking(folder, asked)
    path.parent.mkdir(exist_ok=True)
    draft = path.with_name(f".{uuid4().hex}")
    try:
        with draft.open("x", encoding="utf-8") as file:
            json.dump({**said, "at": datetime.now(UTC).isoformat(timespec="seconds")}, file)
            file.flush()
            os.fsync(file.fileno())
        os.link(draft, path)  # unlike a rename it never replaces the file of another page
    except FileExistsError:
        return False
    finally:
        draft.unlink(missing_ok=True)
    return True


def stop(folder: Path) -> None:
    """Have the training end where it asks next."""
    (folder / "stop").touch()


def stopping(folder: Path) -> bool:
    """The training has not yet seen that it is to end."""
    return (folder / "stop").exists()


def runs(folder: Path) -> bool:
    """Whether a training works on this folder now."""
    lock = FileLock(folder / "training.lock")
    with suppress(OSError):
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return True
        lock.release()
    return False


def count(folder: Path) -> int:
    """Rankings so far."""
    return sum(1 for _ in (folder / "rankings").glob("*.json"))


def _ranking(folder: Path, asked: Round) -> Path:
    return folder / "rankings" / f"{asked.id}.json"
