"""Text from outside, made safe to show: it stays text, on one line, and cannot reorder or hide the text around it."""

from __future__ import annotations

import re
import unicodedata

_ISOLATE, _END = "\u2068", "\u2069"
_DIRECTING = dict.fromkeys([0x200E, 0x200F, 0x061C, *range(0x202A, 0x202F), *range(0x2066, 0x206A)])


def plain(text: str, limit: int = 80) -> str:
    """One line of text: control characters become spaces, long text ends in "…", right-to-left text is isolated.

    Args:
        text: anything.
        limit: longest result in characters, isolating marks not counted, >= 1.
    """
    if text.isascii() and text.isprintable():  # nearly all names: nothing to look at but spaces
        return _short(" ".join(text.split()), limit)
    line = "".join(" " if unicodedata.category(c) in ("Cc", "Zl", "Zp", "Cs") else c for c in text.translate(_DIRECTING))
    line = re.sub(r"\s+", " ", line).strip()
    line = _short(line, limit)
    turned = any(unicodedata.bidirectional(c) in ("R", "AL", "AN") for c in line)
    return f"{_ISOLATE}{line}{_END}" if turned else line


def _short(line: str, limit: int) -> str:
    return line if len(line) <= limit else line[: limit - 1].rstrip() + "…"


def code(text: str, limit: int = 300) -> str:
    """The text as a code span for places that read Markdown: nothing in it is interpreted."""
    line = plain(text, limit)
    fence = "`" * (max((len(run) for run in re.findall("`+", line)), default=0) + 1)
    pad = " " if line.startswith("`") or line.endswith("`") or not line else ""
    return f"{fence}{pad}{line}{pad}{fence}"
