from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import tiny_causal_lm
from test_data_candidates import gemma2
from test_data_prompts import make_tokenizer
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from zolightning.data import (
    answer_log_likelihood,
    candidates,
    generate_answers,
    likelihood,
    text_cache,
    tokens_written,
)
from zolightning.noise import Rademacher
from zolightning.space import build_view
from zolightning.types import Key, PerExample, Term

Adjust = Callable[[Tensor, Tensor], Tensor]

SEQUENCES = [[3, 4, 5, 6, 7, 8], [9, 10, 11], [12, 13, 14, 15]]
LENGTHS = torch.tensor([2, 1, 3])


def padded(sequences: list[list[int]]) -> dict[str, Tensor]:
    width = max(map(len, sequences))
    return {
        "input_ids": torch.tensor([[0] * (width - len(s)) + s for s in sequences]),
        "attention_mask": torch.tensor([[0] * (width - len(s)) + [1] * len(s) for s in sequences]),
    }


@torch.no_grad()
def textbook(model: nn.Module, sequence: list[int], length: int) -> float:
    log_probs = model(input_ids=torch.tensor([sequence])).logits[0].double().log_softmax(-1)
    return float(sum(log_probs[i - 1, sequence[i]] for i in range(len(sequence) - length, len(sequence)))) / length


@pytest.mark.parametrize("chunk", [1, 200, 1 << 24])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_is_the_mean_log_probability_of_the_last_tokens(kind: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(likelihood, "CHUNK", chunk)
    model = (gemma2() if kind == "gemma2" else tiny_causal_lm(kind)).eval()
    found = answer_log_likelihood(model, padded(SEQUENCES), LENGTHS)
    wanted = [textbook(model, s, n) for s, n in zip(SEQUENCES, LENGTHS.tolist(), strict=True)]
    torch.testing.assert_close(found, torch.tensor(wanted), rtol=0, atol=2e-5)


def test_the_head_sees_answers_alone_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(likelihood, "CHUNK", 3 * 32 * 2)
    model = tiny_causal_lm("llama").eval()
    answer_log_likelihood(model, padded(SEQUENCES), LENGTHS)  # compares with the model's own logits once
    seen: list[int] = []
    model.lm_head.register_forward_hook(lambda module, args, out: seen.append(out.shape[1]))
    answer_log_likelihood(model, padded(SEQUENCES), LENGTHS)
    assert seen == [2, 1]


def test_a_frozen_head_is_not_copied_for_each_sequence(tokenizer: PreTrainedTokenizerFast) -> None:
    """As PyTorch does where the states are a strided view: here it would be 3 copies, of a real vocabulary gigabytes."""
    model = writer().requires_grad_(False)
    batch, ids = padded(SEQUENCES), torch.tensor([1, 2])
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
        answer_log_likelihood(model, batch, LENGTHS)
        candidates._full_logits(model, batch, ids)
        likelihood._own_logits(model, batch, 2)
        generate_answers(model, tokenizer, batch, 2)
    shapes = [shape for event in profiled.events() if event.name == "aten::bmm" for shape in event.input_shapes]
    assert not [shape for shape in shapes if shape[0] > 1 and model.lm_head.out_features in shape]


def test_nothing_to_score_and_no_prompt() -> None:
    model = tiny_causal_lm("llama").eval()
    assert answer_log_likelihood(model, padded(SEQUENCES), torch.tensor([2, 0, 1]))[1] == 0.0
    with pytest.raises(ValueError, match="answers of up to 6 tokens do not fit sequences of 6"):
        answer_log_likelihood(model, padded(SEQUENCES), torch.tensor([6, 1, 1]))


# ---- generation --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer()
    tokenizer.pad_token = "</s>"
    tokenizer.padding_side = "left"
    return tokenizer


def writer(seed: int = 3) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=400, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        initializer_range=0.5, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


PROMPTS = ["a great film", "this one is long and dull It was", "a"]


@torch.no_grad()
def greedy(
    model: nn.Module, tokenizer: PreTrainedTokenizerFast, prompt: str, tokens: int, adjust: Adjust = lambda _, logits: logits
) -> str:
    """One token after another, no cache, no padding."""
    ids = tokenizer(prompt)["input_ids"]
    start = len(ids)
    for _ in range(tokens):
        logits = model(input_ids=torch.tensor([ids])).logits[:, -1]
        ids.append(int(adjust(torch.tensor([ids[start:]], dtype=torch.long), logits).argmax()))
        if ids[-1] == tokenizer.eos_token_id or "\n" in tokenizer.decode(ids[start:]):
            break
    return tokenizer.decode(ids[start:], skip_special_tokens=True).split("\n")[0].strip()


def test_answers_are_the_textbook_greedy_ones(tokenizer: PreTrainedTokenizerFast) -> None:
    model = writer()
    found = generate_answers(model, tokenizer, tokenizer(PROMPTS, padding=True, return_tensors="pt"), 8)
    assert found == [greedy(model, tokenizer, prompt, 8) for prompt in PROMPTS]
    assert len(set(found)) > 1


def test_answers_from_encoded_text_are_those_from_whole_prompts(tokenizer: PreTrainedTokenizerFast) -> None:
    model = writer()
    batch = tokenizer([f"{prompt} . It was" for prompt in PROMPTS], padding=True, return_tensors="pt")
    encoded = text_cache._encode(model, batch, 2)
    assert encoded is not None and encoded["input_ids"].shape == (3, 2)
    wanted = generate_answers(model, tokenizer, batch, 8)
    assert generate_answers(model, tokenizer, encoded, 8) == wanted
    assert generate_answers(model, tokenizer, encoded, 8) == wanted, "the text is as it was"


@pytest.mark.parametrize("encoded", [False, True])
def test_logits_are_adjusted_by_what_was_written(tokenizer: PreTrainedTokenizerFast, encoded: bool) -> None:
    """No token twice: the prompt's tokens are not among those that were written."""

    def adjust(written: Tensor, logits: Tensor) -> Tensor:
        return logits.scatter(1, written, -math.inf)

    model, prompts = writer(), [f"{prompt} . It was" for prompt in PROMPTS]
    batch: Any = tokenizer(prompts, padding=True, return_tensors="pt")
    behind = text_cache._encode(model, batch, 2) if encoded else batch
    found = generate_answers(model, tokenizer, behind, 8, adjust)
    assert found == [greedy(model, tokenizer, prompt, 8, adjust) for prompt in prompts]
    assert found != generate_answers(model, tokenizer, batch, 8)


def test_written_tokens_are_counted_to_the_end_of_each_answer(tokenizer: PreTrainedTokenizerFast) -> None:
    model, ends = writer(), {tokenizer.eos_token_id, *tokenizer("\n", add_special_tokens=False)["input_ids"][-1:]}
    model.lm_head.bias = nn.Parameter(torch.zeros(len(model.lm_head.weight)))
    model.lm_head.bias.data[list(ends)] = 3.0  # some answers end early
    counts = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt)["input_ids"]
        start = len(ids)
        while len(ids) < start + 8 and ids[-1] not in ends:
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        counts.append(len(ids) - start)
    before = tokens_written()
    generate_answers(model, tokenizer, tokenizer(PROMPTS, padding=True, return_tensors="pt"), 8)
    assert tokens_written() - before == sum(counts)
    assert len(set(counts)) > 1


@pytest.mark.parametrize("structure", ["dense", "rank1"])
def test_inside_a_probe_the_perturbed_model_answers(tokenizer: PreTrainedTokenizerFast, structure: str) -> None:
    model = writer()
    before = copy.deepcopy(model.state_dict())
    batch = tokenizer(PROMPTS, padding=True, return_tensors="pt")
    view = build_view(model, model.parameters(), Rademacher(), structure=structure)  # type: ignore[arg-type]
    plain = generate_answers(model, tokenizer, batch, 8)
    for eps in (0.3, -0.3):
        moved = copy.deepcopy(model)
        for leaf in view.leaves:
            moved.get_parameter(leaf.name).data.copy_(leaf.perturbed([Term(Key(5, 0, 0), eps)]))
        wanted = generate_answers(moved, tokenizer, batch, 8)
        assert wanted != plain
        with torch.no_grad(), view.along(Key(5, 0, 0), eps):
            assert generate_answers(model, tokenizer, batch, 8) == wanted
            assert generate_answers(model, tokenizer, batch, 8) == wanted  # again the same
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_each_example_of_a_batch_is_answered_along_its_own_direction(tokenizer: PreTrainedTokenizerFast) -> None:
    model = writer()
    batch = tokenizer(PROMPTS, padding=True, return_tensors="pt")
    view = build_view(model, model.parameters(), Rademacher(), structure="rank1")
    offsets = torch.tensor([0.3, -0.3, 0.0])
    with torch.no_grad(), view.at(PerExample(Key(5, 0), torch.arange(3), offsets)):
        found = generate_answers(model, tokenizer, batch, 8)
    for place, (answer, offset) in enumerate(zip(found, offsets.tolist(), strict=True)):
        with torch.no_grad(), view.along(Key(5, 0, place), offset):
            assert generate_answers(model, tokenizer, batch, 8)[place] == answer
