"""``zolightning rank``: the page on which a person ranks, in a process of its own."""

from __future__ import annotations

from .dash import replace_by


def rank(folder: str, port: int = 8502, host: str = "127.0.0.1") -> None:
    """Rank the candidates that a training shows, by mouse or keyboard, in the browser. Example: zolightning rank runs/faces

    Args:
        folder: The folder of the training's ``Person(folder)``. It may start before or after the training.
        port: The port to listen on.
        host: The address to listen on. Default: this machine only. The page asks for no password.
    """
    replace_by("-P", "-m", "zolightning_dashboard.ranking", folder, "--port", str(port), "--host", host)
