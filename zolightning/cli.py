"""The ``zolightning`` command."""

from __future__ import annotations

import logging
import sys

_FLAGS = {"--verify", "--offline", "--report_only"}  # jsonargparse takes a bool only with its value


def send(path: str, store: str = "sqlite:///mlflow.db") -> None:
    """Send metrics that a run could not. Example: zolightning send-pending pending-metrics-4f0c.jsonl --store http://host:5000

    Args:
        path: the file ``pending-metrics-<run id>.jsonl`` that the run left; it is kept, and may be sent again.
        store: MLflow tracking URI of the run's store.
    """
    from .commands.console import say
    from .records.outbox import send_pending

    say(f"{store} has the {send_pending(path, store)} entries of {path}")


def main(args: list[str] | None = None) -> None:
    """The verbs of ``zolightning``; see ``zolightning --help``."""
    from jsonargparse import auto_cli

    from .commands.bench.main import bench
    from .commands.dash import dash
    from .commands.demo.main import demo
    from .commands.fit import fit
    from .commands.replay import replay_run
    from .commands.sweep.main import sweep

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for noisy in ("alembic", "mlflow", "httpx"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    verbs = {"demo": demo, "fit": fit, "sweep": sweep, "dash": dash, "bench": bench, "replay": replay_run, "send-pending": send}
    words = sys.argv[1:] if args is None else args
    given = [
        f"{word}=true" if word in _FLAGS and value.lower() not in ("true", "false") else word
        for word, value in zip(words, [*words[1:], ""], strict=True)
    ]
    try:
        auto_cli(verbs, args=given)
    except (ValueError, OSError, ImportError) as error:  # bad input and missing files: one line, no traceback
        sys.exit(f"zolightning: {error}")


if __name__ == "__main__":
    main()
