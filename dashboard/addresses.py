"""Store addresses as they may be shown and shared, and text that may hold one."""

from __future__ import annotations

import re

_USER = re.compile(r"(?<=://)(?:[^\s?'\"]*:[^\s?'\"]*@|[^\s/?#'\"]*@)")  # a password may hold a slash
_SECRET = re.compile(r"([?&][^=&\s]*(?:pass|pwd|secret|token|key)[^=&\s]*=)[^&\s'\"]+", re.IGNORECASE)


def shown_address(uri: str) -> str:
    """The address without a user's name or password."""
    return masked(uri)


def masked(text: str) -> str:
    """The text, with no user's name, password or token in any address in it."""
    return _SECRET.sub(r"\1…", _USER.sub("", text))
