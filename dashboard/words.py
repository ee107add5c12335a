"""Numbers as people read them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

GIB = 2**30
_COUNTS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))
_BYTES = ((2.0**40, "TiB"), (2.0**30, "GiB"), (2.0**20, "MiB"), (2.0**10, "KiB"), (1.0, "B"))
_PERCENTS = re.compile(r"accuracy|(?<![a-z])(acc|f1|auc|auroc|auprc)(?![a-z])|exact_match", re.IGNORECASE)


def number(value: float) -> str:
    """About four significant digits; "–" for nothing, words for nan and infinity."""
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    size = abs(value)
    if size != 0 and (size < 1e-3 or size >= 1e15):
        return _minus(f"{value:.3g}")
    if size >= 1e4:
        return _minus(f"{value:,.0f}")
    places = max(0, 3 - math.floor(math.log10(size))) if size else 0
    rounded = f"{value:,.{places}f}"
    return _minus(rounded.rstrip("0").rstrip(".") if "." in rounded else rounded)


def known(value: float) -> str:
    """A number; "–" where nan means that there is none."""
    return "–" if math.isnan(value) else number(value)


def count(value: float) -> str:
    """1234567 as "1.23M"."""
    for unit, suffix in _COUNTS:
        if abs(value) >= unit:
            return _minus(f"{value / unit:.3g}{suffix}")
    return _minus(f"{value:.3g}")


def byte_unit(sizes: Iterable[float]) -> tuple[float, str]:
    """The unit for a column or an axis of bytes, from its largest value: how many bytes it has, and its name.

    Args:
        sizes: in bytes; those that are not finite do not count.
    """
    most = max((size for size in sizes if math.isfinite(size)), default=GIB)
    return next(((unit, name) for unit, name in _BYTES if most >= 0.1 * unit), _BYTES[-1]) if most else _BYTES[1]


def memory(size: float) -> str:
    """Bytes in the unit that suits them."""
    if not math.isfinite(size):
        return "–"
    unit, name = byte_unit([size]) if size else (1.0, "B")
    return f"{size / unit:.0f} {name}" if unit < GIB and (size >= 10 * unit or unit == 1) else f"{size / unit:.2f} {name}"


def percent(share: float, places: int = 1) -> str:
    """A share of 1 in percent; "–" for nan."""
    return "–" if math.isnan(share) else _minus(f"{100 * share:.{places}f} %")


def change_in_percent(share: float) -> str:
    """How much more or less, in whole percent: "−74 %"."""
    return f"{_signed(100 * share, '.0f')} %"


def times(ratio: float) -> str:
    """How many times as much: "2.1×"."""
    return f"{ratio:.0f}×" if ratio >= 10 else f"{ratio:.2g}×"


def change(difference: float, key: str) -> str:
    """One value of a metric less another: shares in points, which are hundredths; no sign before zero."""
    return f"{_signed(100 * difference, '.1f')} pts" if is_share(key) else _signed(difference, ".3g")


def several(count: int, thing: str) -> str:
    """ "1 more seed has", "3 more seeds have"."""
    return f"{count} {thing} has" if count == 1 else f"{count:,} {thing}s have"


def duration(seconds: float) -> str:
    """Seconds as "48 s", "3 min 20 s", "2 h 5 min", "3 d 4 h"."""
    if not math.isfinite(seconds):
        return "–"
    whole = round(seconds)
    if whole < 60:
        return f"{max(0.0, seconds):.1f} s" if seconds < 10 else f"{whole} s"
    for unit, name, small, small_name in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= unit:
            rest = whole % unit // small
            return f"{whole // unit} {name}" + (f" {rest} {small_name}" if rest else "")
    raise AssertionError


def ago(seconds: float) -> str:
    """How long since something happened, coarsely, so that it changes rarely."""
    return "just now" if seconds < 60 else f"{duration(seconds // 60 * 60)} ago"


def is_share(key: str) -> bool:
    """The metric is a share of 1 that people read as percent: an accuracy, an F1."""
    return bool(_PERCENTS.search(key))


def is_bytes(key: str) -> bool:
    """The metric is in bytes by our convention."""
    return key.startswith("memory/") or key == "summary/peak_memory"


def _signed(value: float, form: str) -> str:
    text = f"{value:+{form}}"
    return _minus(text) if float(text) else text[1:]


def _minus(text: str) -> str:
    return text.replace("-", "−") if text.startswith("-") else text
