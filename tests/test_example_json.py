"""The program that scores JSON answers, and the numbers that examples/json_rewards.py and generation_f1.py train."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import load_example
from torch import nn

from zolightning.data import Example

F1, JSON = load_example("generation_f1"), load_example("json_rewards")
WANTED = '{"rating":"good","length":"short","film":"yes"}'


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        (WANTED, 1),
        ('{"film": "yes", "length": "short", "rating": "good", "more": 1}', 1),
        ('{"rating":"good","length":"long","film":"yes"}', 0.75),
        ("{}", 0.25),
        ('["good", "short", "yes"]', 0),
        ('{"rating":"good","length":"short"', 0),
        ("", 0),
    ],
)
def test_an_answer_is_scored_by_its_fields(answer: str, score: float) -> None:
    assert JSON.fields(answer, [WANTED]) == score
    assert JSON.exact(answer, [WANTED]) == (score == 1)


@pytest.mark.parametrize(
    ("text", "label", "values"),
    [
        ("A fine Movie!", 1, ("good", "short", "yes")),
        ("It is filmed badly.", 0, ("bad", "short", "no")),
        (" ".join(["word"] * 16), 0, ("bad", "short", "no")),
        (" ".join(["story"] * 17), 1, ("good", "long", "yes")),
    ],
)
def test_the_right_answer_is_a_function_of_the_sentence(text: str, label: int, values: tuple[str, ...]) -> None:
    assert tuple(json.loads(JSON.right(Example(text, label))).values()) == values


def test_a_bias_moves_the_logits_of_its_tokens_at_the_last_position() -> None:
    torch.manual_seed(0)
    head, bias, states = nn.Linear(4, 7), JSON.TokenBias([5, 2], scale=2.0), torch.randn(3, 1, 4)
    before = head(states)
    head.register_forward_hook(bias)
    assert torch.equal(head(states), before)
    bias.numbers.data.copy_(torch.tensor([1.0, -3.0]))
    wanted = before.clone()
    wanted[..., 5] += 2
    wanted[..., 2] -= 6
    torch.testing.assert_close(head(states), wanted)


def test_each_kind_of_token_has_its_number() -> None:
    """The textbook's way: token by token, the last kind that fits."""
    torch.manual_seed(0)
    bias, logits = F1.CopyBias(joints=[4, 5], end=6, scale=2.0), torch.randn(2, 8)
    bias.numbers.data.copy_(numbers := torch.tensor([1.0, -0.5, -2.0, 0.25]))
    sentence, written = torch.tensor([[1, 2, 4], [3, 3, 6]]), torch.tensor([[2, 4], [0, 5]])
    wanted = logits.clone()
    for row in range(2):
        for token in range(8):
            kinds = (token in sentence[row], token in (4, 5), token in written[row], token == 6)
            fit = [number for kind, number in zip(kinds, numbers.tolist(), strict=True) if kind]
            wanted[row, token] += 2 * fit[-1] if fit else 0.0
    torch.testing.assert_close(bias(sentence, written, logits), wanted)
    nothing = torch.empty(2, 0, dtype=torch.long)
    torch.testing.assert_close(bias(sentence, nothing, logits)[1, 5], logits[1, 5] - 1.0)
