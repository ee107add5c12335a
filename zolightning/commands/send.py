"""``zolightning send-pending``: metrics that waited in a file when a run ended before its store was back."""

from __future__ import annotations

from .console import say


def send(path: str, store: str = "sqlite:///mlflow.db") -> None:
    """Send metrics that a run could not send. Example: zolightning send-pending pending-metrics-4f0c.jsonl --store http://host:5000

    Args:
        path: The file ``pending-metrics-<run id>.jsonl`` that the run left. It is kept, and may be sent again.
        store: The MLflow tracking URI of the run's store.
    """
    from ..records.outbox import send_pending

    say(f"{store} has the {send_pending(path, store)} entries of {path}")
