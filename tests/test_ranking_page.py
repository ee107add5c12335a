"""A person ranks in a browser: by mouse, by keyboard, over restarts of the training and of the page."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from ranked_training import SCRIPT, Painter, train

from zolightning.blackbox.person import Person
from zolightning.ledger import read, replay
from zolightning.methods.ranking import EndOfRanking, Groups, RankingError

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

PATIENCE = 600_000
"""Milliseconds after which a browser test gives up: far more than it takes where other jobs leave it little time."""

# ---- the folder, without a browser ---------------------------------------------------------------------------------------


@pytest.fixture
def rounds() -> Any:
    pytest.importorskip("streamlit", reason="the dashboard's packages are not installed")
    from zolightning_dashboard.ranking import rounds

    return rounds


@contextmanager
def asking(person: Person, candidates: Sequence[Any], top: int = 2) -> Iterator[list[Any]]:
    """What came of asking, in a thread; it is ended by the block's end at the latest."""
    found: list[Any] = []

    def ask() -> None:
        try:
            found.append(person(candidates, top))
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    yield found
    thread.join(60)
    assert not thread.is_alive()


def asked(rounds: Any, folder: Path) -> Any:
    while (found := rounds.question(folder)) is None or rounds.answered(folder, found):
        time.sleep(0.01)
    return found


def test_question_and_answer_go_through_the_folder(rounds: Any, tmp_path: Path) -> None:
    said: list[str] = []
    person = Person(tmp_path / "f", words="the best", every=0.01, say=said.append)
    assert not rounds.runs(tmp_path)
    pictures = [torch.rand(3, 5), np.zeros((2, 2, 3), np.uint8), SCRIPT]
    with asking(person, pictures) as found:
        told = asked(rounds, tmp_path / "f")
        assert rounds.runs(tmp_path / "f")
        assert (told.kind, told.round, told.top, told.words) == ("ranking", 1, 2, "the best")
        assert [*told.cards[0]] == [*told.cards[1]] == ["picture"]
        assert told.cards[2] == {"text": SCRIPT}
        for bad in ([[3]], [[0], [0]], [[-1]]):
            with pytest.raises(rounds.RoundError, match="each once"):
                rounds.answer(tmp_path / "f", told, bad, "me")
        assert rounds.answer(tmp_path / "f", told, [[2], [0, 1]], "me")
        assert not rounds.answer(tmp_path / "f", told, [[0]], "another")  # the first one counts
    assert found == [[[2], [0, 1]]]
    assert person(pictures, 2) == [[2], [0, 1]]  # not asked again
    assert "zolightning rank" in said[0] and len(said) == 1
    person.close()
    assert Person(tmp_path / "f", every=0.01, say=said.append)(pictures, 2) == [[2], [0, 1]]
    assert [path.suffix for path in (tmp_path / "f" / "rankings").iterdir()] == [".json"]


def test_stopping_ends_this_training_only(rounds: Any, tmp_path: Path) -> None:
    person = Person(tmp_path, every=0.01, say=str)
    rounds.stop(tmp_path)  # left over: meant for the training before
    with asking(person, ["a", "b"], 1) as found:
        asked(rounds, tmp_path)
        rounds.stop(tmp_path)
    assert isinstance(found[0], EndOfRanking)
    assert not rounds.stopping(tmp_path)


@pytest.mark.integration
def test_bad_folders_and_candidates_are_said(rounds: Any, tmp_path: Path) -> None:
    person, other = (Person(tmp_path, every=0.01, say=str) for _ in range(2))
    with pytest.raises(RankingError, match="not finite"):
        person([torch.full((2, 2), torch.nan), "b"], 1)
    with pytest.raises(RankingError, match=r"shape \(3,\) is no picture"):
        person([torch.zeros(3), "b"], 1)
    with pytest.raises(ValueError, match="> 0 seconds, got 0"):
        Person(tmp_path, every=0)
    with asking(person, ["a", "b"], 1):
        told = asked(rounds, tmp_path)
        with pytest.raises(RuntimeError, match="another training asks in"):
            other(["a", "b"], 1)
        rounds.answer(tmp_path, told, [[1]], "me")
    (tmp_path / "rankings" / f"{told.id}.json").write_text('{"ranking": [[7]]}')
    with pytest.raises(RankingError, match=r"is damaged .*delete it"):
        person(["a", "b"], 1)
    fine = json.loads((tmp_path / "question.json").read_text())
    for written, message in (
        ("{", "cannot be read"), ("[]", "is no question"), (json.dumps({**fine, "format": 9}), "has the format 9"),
        (json.dumps({**fine, "id": "../../x"}), "no name of a file"),
        (json.dumps({**fine, "cards": [{"html": "x"}]}), "got 'html'"),
    ):  # fmt: skip
        (tmp_path / "question.json").write_text(written)
        with pytest.raises(rounds.RoundError, match=message):
            rounds.question(tmp_path)


@pytest.mark.parametrize("after", [True, False, None])
def test_before_and_after_are_shown_blind(rounds: Any, tmp_path: Path, after: bool | None) -> None:
    person, found = Person(tmp_path, every=0.01, say=str), []
    thread = threading.Thread(target=lambda: found.append(person.prefers("before", "after")))
    thread.start()
    told = asked(rounds, tmp_path)
    assert told.kind == "blind"
    texts = [card["text"] for card in told.cards]
    assert sorted(texts) == ["after", "before"]
    rounds.answer(tmp_path, told, [[0, 1]] if after is None else [[texts.index("after" if after else "before")]], "me")
    thread.join(60)
    assert found == [after]


# ---- in a browser --------------------------------------------------------------------------------------------------------


@pytest.mark.integration
def test_a_person_ranks_by_mouse_and_keyboard_over_restarts(tmp_path: Path) -> None:
    pytest.importorskip("playwright", reason="the browser tests need Playwright: pip install playwright")
    from browser import find_chromium, open_browser

    if find_chromium() is None:
        pytest.skip("no Chromium found: apt-get install chromium")
    with open_browser() as browser:
        _rank(browser, tmp_path / "faces", tmp_path / "server.log")


def _rank(browser: Browser, folder: Path, log: Path) -> None:
    from browser import started

    command = ("-P", "-m", "zolightning_dashboard.ranking", str(folder))
    with _training(folder) as training:
        with started(command, log) as server:
            _until_it_asks(folder, training)
            page = browser.new_context().new_page()
            page.set_default_timeout(PATIENCE)
            page.goto(server.url)
            cards = page.locator(".zo-rank-card")
            _heading(page, "Round 1")
            cards.nth(1).click()  # by mouse, with a mistake
            page.get_by_role("button", name="Undo (U)").click()
            cards.nth(2).click()
            cards.nth(0).click()
            second = browser.new_context().new_page()  # another user
            second.set_default_timeout(PATIENCE)
            second.goto(server.url)
            second.locator(".zo-rank-card").nth(1).click()
            assert cards.locator(".zo-rank-place").all_inner_texts() == ["2nd", "", "1st"]
            page.get_by_role("button", name="Send (Enter)").click()
            for each in (page, second):
                _heading(each, "Round 2")
            page.keyboard.press("2")  # by keyboard; fast keys keep their order
            page.keyboard.press("e")
            page.keyboard.press("1")
            page.keyboard.press("3")
            page.keyboard.press("u")
            page.keyboard.press("Enter")
            _heading(page, "Round 3")
            training.kill()  # in the middle
            training.wait()
            page.get_by_text("The training does not run now").wait_for()
            page.keyboard.press("3")
            page.keyboard.press("1")
            page.keyboard.press("Enter")
            page.get_by_text("The next round comes by itself").wait_for()
        with _training(folder) as again, started(command, log, server.port):  # both were ended; the page comes back by itself
            _heading(page, "Round 4")
            page.keyboard.press("1")
            page.reload()
            _heading(page, "Round 4")
            page.wait_for_function("document.querySelector('.zo-rank-place').textContent === '1st'")
            page.get_by_role("button", name="Stop").click()
            page.get_by_role("button", name="Press again to end the training").click()
            _heading(page, "Which is better?")
            page.keyboard.press("2")
            page.keyboard.press("Enter")
            _heading(page, "The end")
            assert again.wait() == 0
            assert page.evaluate("window.owned") is None
    _compare(folder)


def _compare(folder: Path) -> None:
    """Killed and resumed or not: the same three rankings give the same weights, and the ledger has them."""
    result = torch.load(folder / "result.pt")
    rankings = iter([[[2], [0]], [[1, 0]], [[2], [0]]])

    def oracle(candidates: Sequence[Any], top: int) -> Groups:
        if (ranking := next(rankings, None)) is None:
            raise EndOfRanking("enough")
        return ranking

    twin = train(oracle, folder / "twin")
    assert torch.equal(twin.x, result["x"])
    assert not torch.equal(twin.x, Painter().x)
    rebuilt = Painter()
    replay(read(folder / "ledger.zo"), dict(rebuilt.named_parameters()))
    assert torch.equal(rebuilt.x, result["x"])
    kept = [json.loads(path.read_text()) for path in (folder / "rankings").iterdir()]
    assert sorted((one["round"], one["kind"]) for one in kept) == [(1, "ranking"), (2, "ranking"), (3, "ranking"), (4, "blind")]
    assert result["better"] is not None


def _until_it_asks(folder: Path, training: subprocess.Popen[bytes]) -> None:
    while not (folder / "question.json").exists():
        assert training.poll() is None, folder.with_suffix(".log").read_text()
        time.sleep(0.05)


def _heading(page: Page, title: str) -> None:
    page.get_by_role("heading", name=title, exact=True).wait_for()
    if title != "The end":  # the cards of the question before, which take no key any more, may stay for a moment
        page.wait_for_function(
            """title => {
              const rows = [...document.querySelectorAll(".zo-rank-cards")];
              return rows.length === 1 && rows[0].dataset.title === title;
            }""",
            arg=title,
        )


@contextmanager
def _training(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    script = Path(__file__).with_name("ranked_training.py")
    folder.parent.mkdir(exist_ok=True)
    with folder.with_suffix(".log").open("ab") as out:
        process = subprocess.Popen([sys.executable, script, folder], cwd=folder.parent, stdout=out, stderr=out)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
