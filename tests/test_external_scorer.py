"""Scorers that are programs or servers: real ones, small."""

from __future__ import annotations

import pickle
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from services import Service, serving

from zolightning.objectives import CommandScorer, HttpScorer
from zolightning.objectives.transport import AnswerError

LENGTHS = """
import json, sys
for line in sys.stdin:
    print("seen", line.strip(), file=open(sys.argv[1], "a"))
    print(len(json.loads(line)["prediction"]), flush=True)
"""


def items(*texts: str) -> list[dict[str, str]]:
    return [{"prediction": text} for text in texts]


def program(code: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", code, *arguments]


def test_command_is_asked_once_for_each_item(tmp_path: Path) -> None:
    scorer = CommandScorer(program(LENGTHS, str(tmp_path / "log")))
    assert scorer(items("ab", "abc", "ab")).tolist() == [2.0, 3.0, 2.0]
    process = scorer.transport._process
    assert scorer(items("abc", "ä", "")).tolist() == [3.0, 1.0, 0.0]
    assert scorer.transport._process is process  # it goes on
    scorer.close()
    assert len((tmp_path / "log").read_text().splitlines()) == 4
    assert scorer(items("ab")).dtype == torch.float64  # from memory, no program needed
    assert scorer.transport._process is None


def test_command_may_answer_all_at_the_end_and_more_than_a_pipe_holds() -> None:
    code = "import sys, json\nfor line in sys.stdin: print(json.dumps({'score': len(line), 'pad': 'x' * 9000}), flush=True)"
    scorer = CommandScorer(program(code))
    texts = ["y" * (1000 + i) for i in range(200)]
    assert scorer(items(*texts)).diff().tolist() == [1.0] * 199
    scorer.close()


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import time; time.sleep(60)", "gave no answer within 0.5 s"),
        ("import sys; sys.exit(3)", "ended with exit code 3 before it had answered"),
        ("print('nan', flush=True); input()", "answered 'nan', which is not JSON"),
        ("print('NaN', flush=True); input()", "finite number.*got nan"),
        ("print('fine', flush=True); input()", "answered 'fine', which is not JSON"),
        ("print('{\"x\": 1}', flush=True); input()", "finite number"),
        ("input(); print('1\\n2', flush=True); input()", "answered '2' beyond one line for each item"),
        ("print('2', flush=True); input(); print('1', flush=True); input()", "answered '[12]' beyond one line"),
    ],
)
def test_command_errors_are_clear(code: str, message: str) -> None:
    scorer = CommandScorer(program(code), timeout=0.5 if "sleep" in code else 30)
    with pytest.raises(AnswerError, match=message):
        _ask_twice(scorer)
    scorer.close()


def _ask_twice(scorer: CommandScorer) -> None:
    scorer(items("a"))
    time.sleep(0.2)  # what is beyond the first answer may come after it
    scorer(items("b"))


def test_command_starts_again_after_an_error(tmp_path: Path) -> None:
    code = "import sys, os\np = sys.argv[1]\nif not os.path.exists(p):\n open(p, 'w')\n sys.exit(1)\n"
    scorer = CommandScorer(program(code + "for line in sys.stdin: print(1, flush=True)", str(tmp_path / "flag")))
    with pytest.raises(AnswerError, match="exit code 1"):
        scorer(items("a"))
    assert scorer(items("a")).tolist() == [1.0]
    copy = pickle.loads(pickle.dumps(scorer))
    assert copy.transport._process is None
    assert copy(items("b")).tolist() == [1.0]
    scorer.close()
    copy.close()


def test_command_that_does_not_exist_and_bad_settings() -> None:
    with pytest.raises(AnswerError, match="cannot be started"):
        CommandScorer(["no-such-program-at-all"])(items("a"))
    with pytest.raises(ValueError, match="list of the program and its arguments, got 'wc -l'"):
        CommandScorer("wc -l")
    with pytest.raises(ValueError, match=r"CommandTransport\(timeout=...\)` must be .* got 0"):
        CommandScorer(["wc"], timeout=0)
    with pytest.raises(ValueError, match=r"HttpScorer\(cache_size=...\)` must be >= 0, got -1"):
        HttpScorer("http://127.0.0.1", cache_size=-1)
    with pytest.raises(ValueError, match="http:// or https://, got 'ftp://x'"):
        HttpScorer("ftp://x")


def lengths(asked: Any) -> Any:
    return {"scores": [len(item["prediction"]) for item in asked["items"]]}


@pytest.fixture
def server() -> Iterator[Service]:
    with serving(lengths) as service:
        yield service


def test_http_scores_are_cached_up_to_their_number(server: Service) -> None:
    scorer = HttpScorer(server.url, cache_size=2)
    assert scorer(items("ab", "abc", "ab")).tolist() == [2.0, 3.0, 2.0]
    assert scorer(items("abc")).tolist() == [3.0]
    assert server.asked == 1
    scorer(items("x"))  # 'ab' was asked for longest ago
    scorer(items("abc", "x"))
    assert server.asked == 2
    scorer(items("ab"))
    assert server.asked == 3


def test_http_tries_again_and_says_when_it_gives_up(server: Service) -> None:
    server.failures = 2
    assert HttpScorer(server.url, retries=2)(items("ab")).tolist() == [2.0]
    server.failures = 2
    with pytest.raises(AnswerError, match=r"failed, 1 retries included.*503"):
        HttpScorer(server.url, retries=1)(items("ab"))


@pytest.mark.parametrize(
    ("answer", "message"), [([1.0, 2.0], "must answer with 1 scores"), ({"x": 1}, "1 scores"), ([None], "got None")]
)
def test_http_answers_are_checked(server: Service, answer: Any, message: str) -> None:
    server.reply = lambda asked: answer
    with pytest.raises(AnswerError, match=message):
        HttpScorer(server.url)(items("ab"))


def test_http_waits_no_longer_than_the_timeout_for_a_busy_server(server: Service) -> None:
    server.failures, server.retry_after = 1, "3600"
    assert HttpScorer(server.url, timeout=1.0)(items("ab")).tolist() == [2.0]


@pytest.mark.parametrize("url", ["http://localhost:port/x", "http://"])
def test_http_bad_addresses_are_said_to_be_those(url: str) -> None:
    with pytest.raises(AnswerError, match="failed, 3 retries included"):
        HttpScorer(url)(items("a"))


def test_http_answers_must_be_json(server: Service) -> None:
    server.raw = b"oops"
    with pytest.raises(AnswerError, match="something that is not JSON"):
        HttpScorer(server.url)(items("a"))


def test_http_nobody_there() -> None:
    with pytest.raises(AnswerError, match="failed, 0 retries included"):
        HttpScorer("http://127.0.0.1:9/", retries=0)(items("a"))
