"""How the commands read their options: hyphens in names, flags without a value, and the closest name for a wrong one."""

from __future__ import annotations

import re
from typing import Any, NoReturn

from jsonargparse import ActionYesNo, ArgumentParser
from jsonargparse._core import ArgumentGroup

from .._answers import did_you_mean


def _as_option(args: tuple[str, ...], kwargs: dict[str, Any]) -> tuple[str, ...]:
    """``--max_length`` becomes ``--max-length``, and a bool ``--memory`` with ``--no-memory``; changes ``kwargs``."""
    if not args or not args[0].startswith("--"):
        return args
    if kwargs.get("type") is bool:
        del kwargs["type"]
        kwargs["action"] = ActionYesNo(no_prefix="no-")
    return tuple(name.replace("_", "-") for name in args)


class _Group(ArgumentGroup):
    def add_argument(self, *args: str, **kwargs: Any) -> Any:
        return super().add_argument(*_as_option(args, kwargs), **kwargs)


class Parser(ArgumentParser):
    """A jsonargparse parser with options as people type them."""

    _group_class = _Group

    def add_argument(self, *args: str, **kwargs: Any) -> Any:
        return super().add_argument(*_as_option(args, kwargs), **kwargs)

    def parse_args(self, args: Any = None, *rest: Any, **kwargs: Any) -> Any:
        return super().parse_args(None if args is None else self._words(args), *rest, **kwargs)

    def _words(self, words: list[str]) -> list[str]:
        """The words with underscores in options' names and values of flags accepted too, as in ``--report_only true``."""
        said: list[str] = []
        for word in words:
            name, equals, value = word.partition("=")
            if name.startswith("--"):
                name = name.replace("_", "-")
            if not equals and said and self._is_flag(said[-1]) and word.lower() in ("true", "false"):
                name, equals, value = said.pop(), "=", word
            if equals and self._is_flag(name) and value.lower() in ("true", "false"):
                said.append(name if value.lower() == "true" else name.replace("--", "--no-", 1))
            else:
                said.append(f"{name}{equals}{value}")
        return said

    def _is_flag(self, name: str) -> bool:
        return isinstance(self._option_string_actions.get(name), ActionYesNo) and not name.startswith("--no-")

    def error(self, message: str, *args: Any, **kwargs: Any) -> NoReturn:
        """Name the error, with the closest option where one was misspelled."""
        for word in re.findall(r"(?<![\w-])--[\w.-]+", message):
            if word not in self._option_string_actions:
                message += did_you_mean(word, self._option_string_actions)
        super().error(message, *args, **kwargs)
