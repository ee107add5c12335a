"""The command line: verbs that load when they are asked for, options as people type them, one line for what is wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module

import pytest
from jsonargparse import auto_cli

from zolightning import _version, cli
from zolightning.commands.parser import Parser


def command(run: str, verify: bool = False, memory: bool = True, max_length: int = 3) -> tuple[str, bool, bool, int]:
    """Answer with the options. Example: answer here

    Args:
        run: Where.
        verify: Whether to compare.
        memory: Whether to measure.
        max_length: At most.
    """
    return run, verify, memory, max_length


def answer(*words: str) -> tuple[str, bool, bool, int]:
    return auto_cli(command, args=list(words), parser_class=Parser, prog="answer", print_config="--print-config")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), (False, True, 3)),
        (("--verify", "--no-memory"), (True, False, 3)),
        (("--max-length", "5"), (False, True, 5)),
        (("--max_length=5", "--no-verify"), (False, True, 5)),  # as older versions had it
        (("--verify", "true", "--memory=False"), (True, False, 3)),
    ],
)
def test_options(words: tuple[str, ...], expected: tuple[bool, bool, int]) -> None:
    assert answer(*words, "here") == answer("here", *words) == ("here", *expected)


def test_help_has_hyphens_and_a_wrong_option_its_closest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        answer("--help")
    shown = capsys.readouterr().out
    assert "--max-length" in shown
    assert "--no-memory" in shown
    assert "max_length" not in shown.replace("MAX_LENGTH", "")
    with pytest.raises(SystemExit):
        answer("here", "--print-config")
    assert "max_length: 3" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        answer("here", "--maxlength", "5")
    assert "did you mean '--max-length'?" in capsys.readouterr().err


def test_help_imports_nothing_that_is_slow() -> None:
    script = (
        "import sys; from zolightning.cli import main; main(sys.argv[1:]); "
        "assert not {'torch', 'jsonargparse', 'numpy'} & set(sys.modules)"
    )
    shown = [
        subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, check=True).stdout
        for words in ((), ("--help",))
    ]
    assert shown[0] == shown[1]
    assert all(verb in shown[0] for verb in cli.VERBS)


@pytest.mark.parametrize("verb", cli.VERBS)
def test_each_verb_has_its_summary_and_an_example(verb: str) -> None:
    place, summary = cli.VERBS[verb]
    module, function = place.split(":")
    doc = getattr(import_module(f"zolightning.{module}"), function).__doc__
    first, example = doc.split("\n")[0].split(" Example: ")
    assert first == summary
    assert example.startswith(f"zolightning {verb}")


def test_version_and_a_wrong_verb(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert _version.__version__ in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"zolightning: the verb 'demmo' is unknown; allowed: demo, .*; did you mean 'demo'"):
        cli.main(["demmo"])


def test_an_interrupt_while_a_verb_loads_is_no_traceback() -> None:
    script = """
import os, signal, sys
class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            os.kill(os.getpid(), signal.SIGINT)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
sys.meta_path.insert(0, Interrupt())
from zolightning.cli import main
main(["replay", "run"])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 130
    assert not done.stderr


def test_send_pending_without_its_file() -> None:
    with pytest.raises(SystemExit, match=r"zolightning: .*pending-metrics-4f0c\.jsonl"):
        cli.main(["send-pending", "pending-metrics-4f0c.jsonl"])
