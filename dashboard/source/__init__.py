"""Where the dashboard's numbers come from: an MLflow store in an SQLite file or a database, or a tracking server."""

from __future__ import annotations

import re

from ..addresses import masked
from .base import Experiment, MetricSource, NoStoreYet, Run, Series, SourceError
from .rest import RestSource
from .sqlite import SqliteSource

__all__ = [
    "Experiment",
    "MetricSource",
    "NoStoreYet",
    "RestSource",
    "Run",
    "Series",
    "SourceError",
    "SqliteSource",
    "open_source",
]

_SQLITE = "sqlite:///"
_DATABASE = re.compile(r"(postgresql|mysql|mariadb)(\+\w+)?://", re.IGNORECASE)
_ALLOWED = (
    "give sqlite:///path, the path of an SQLite file, postgresql://user@host/database, mysql+pymysql://user@host/database, or "
    "the http:// or https:// address of an `mlflow server`"
)


def open_source(uri: str) -> MetricSource:
    """The source behind an address.

    Args:
        uri: ``sqlite:///path``, the path of an SQLite file, SQLAlchemy's address of a database in PostgreSQL or MySQL, or a
            tracking server's ``http://`` or ``https://`` address.

    Raises:
        NoStoreYet: there is no such file, or nothing in it, so far.
        SourceError: the address is of another kind, or the store cannot be read.
    """
    if re.match(r"https?://.", uri, re.IGNORECASE):
        return RestSource(uri)
    if _DATABASE.match(uri):
        from .database import DatabaseSource  # SQLAlchemy takes a third of a second

        return DatabaseSource(uri)
    if uri.startswith(_SQLITE) and uri != _SQLITE:
        return SqliteSource(uri.removeprefix(_SQLITE))
    if not uri or "://" in uri or uri.startswith(("file:", "sqlite:")) or uri == "databricks":
        raise SourceError(f"the store {masked(uri)!r} cannot be read; {_ALLOWED}")
    return SqliteSource(uri)
