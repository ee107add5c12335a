"""The ``zolightning`` command: its verbs, each imported when it is asked for."""

from __future__ import annotations

import argparse
import logging
import sys
from importlib import import_module

from ._answers import did_you_mean
from ._version import __version__

VERBS = {
    "demo": ("commands.demo.main:Demo", "Fine-tune one model by ZO and by backprop, and compare them."),
    "fit": ("commands.fit:Fit", "Train a model on a task of MeZO's paper, or on your own file."),
    "sweep": ("commands.sweep.main:sweep", "Compare methods and learning rates over seeds at equal budgets."),
    "plan": ("commands.plan.main:plan", "Say which methods fit a machine."),
    "dash": ("commands.dash:dash", "Watch and compare runs live in the browser."),
    "rank": ("commands.rank:rank", "Rank the candidates that a training shows, by mouse or keyboard, in the browser."),
    "bench": ("commands.bench.main:Bench", "Measure time and memory of a ZO step, two forwards, MeZO and backprop."),
    "federated": ("commands.federated:Federated", "Make a Flower app: clients keep their data and send coefficients."),
    "replay": ("commands.replay:replay_run", "Rebuild a run's weights at any step from its ledger."),
    "send-pending": ("commands.send:send", "Send metrics that a run could not send."),
}
"""Verb → the place of its function, or of the dataclass of its options, and the first sentence of its help."""

_EXAMPLES = """\
examples:
  zolightning demo                                    about twelve minutes on two cores
  zolightning sweep --seconds 300 --methods default,adamw,lora
  zolightning dash --store sqlite:///mlflow.db        http://localhost:8501
  zolightning VERB --help                             the options of a verb, with an example
"""


def main(args: list[str] | None = None) -> None:
    """Run a verb of ``zolightning``; see ``zolightning --help``."""
    words = sys.argv[1:] if args is None else args
    try:
        verb = _verb(words)
        if verb is not None:
            _run(verb, words[1:])
    except KeyboardInterrupt:
        sys.exit(130)  # as a shell reports it; who interrupts needs no traceback
    except (ValueError, OSError, ImportError) as error:  # bad input and missing files: one line, no traceback
        sys.exit(f"zolightning: {error}")


def _verb(words: list[str]) -> str | None:
    """The verb that is asked for; None after the answer to a person who asks for help."""
    parser = argparse.ArgumentParser(
        "zolightning",
        description="Zeroth-order fine-tuning for PyTorch Lightning: train in the memory that inference needs.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"zolightning {__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB")
    for name, (_, summary) in VERBS.items():
        verbs.add_parser(name, help=summary, add_help=False)
    if not words or words[0] in ("-h", "--help"):
        parser.print_help()
        return None
    if words[0] in VERBS:
        return words[0]
    if words[0].startswith("-"):
        parser.parse_args(words[:1])  # answers --version, and refuses all others
    raise ValueError(f"the verb {words[0]!r} is unknown; allowed: {', '.join(VERBS)}{did_you_mean(words[0], VERBS)}")


def _run(verb: str, words: list[str]) -> None:
    from jsonargparse import auto_cli, set_parsing_settings

    from .commands.parser import Parser

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for noisy in ("alembic", "mlflow", "httpx"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    module, function = VERBS[verb][0].split(":")
    command = getattr(import_module(f".{module}", __package__), function)
    set_parsing_settings(docstring_parse_attribute_docstrings=True)  # the options of a dataclass, as in --task.model
    made = auto_cli(command, args=words, prog=f"zolightning {verb}", parser_class=Parser, print_config="--print-config")
    if callable(made):  # a verb with many options is a dataclass of them
        made()


if __name__ == "__main__":
    main()
