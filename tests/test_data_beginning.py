from __future__ import annotations

import copy
import gc
import pickle
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import tiny_causal_lm
from test_data_candidates import gemma2
from test_data_likelihood import PROMPTS, SEQUENCES, greedy, padded, tokenizer, writer  # noqa: F401
from torch import Tensor, nn
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from zolightning.data import Beginning, beginning, candidates, encode_text, generate_answers
from zolightning.noise import Rademacher
from zolightning.probing.batches import repeat_batch
from zolightning.space import build_view
from zolightning.types import Key

BEGIN = [5, 9, 2, 7]


def grouped() -> nn.Module:
    """Two heads of queries share the keys and values of one."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.5,
    )  # fmt: skip
    return LlamaForCausalLM(config)


MODELS = {"llama": lambda: tiny_causal_lm("llama"), "gpt2": lambda: tiny_causal_lm("gpt2"), "grouped": grouped}


@torch.no_grad()
@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_logits_behind_a_beginning_are_those_of_whole_prompts(kind: str, copied: bool) -> None:
    model, ids = MODELS[kind]().eval(), torch.tensor([1, 2, 3])
    whole = candidates.candidate_logits(model, padded([BEGIN + sequence for sequence in SEQUENCES]), ids)
    begin = Beginning(model, BEGIN)
    assert not begin.copied
    begin.copied = copied
    behind = candidates.candidate_logits(model, begin(padded(SEQUENCES)), ids)
    torch.testing.assert_close(behind, whole, rtol=0, atol=2e-5)


@torch.no_grad()
def test_a_model_with_a_sliding_window_gets_copies() -> None:
    model, ids = gemma2().eval(), torch.tensor([1, 2, 3])
    begin = Beginning(model, BEGIN)
    assert begin.copied
    whole = candidates.candidate_logits(model, padded([BEGIN + sequence for sequence in SEQUENCES]), ids)
    behind = candidates.candidate_logits(model, begin(padded(SEQUENCES)), ids)
    torch.testing.assert_close(behind, whole, rtol=0, atol=2e-5)


@torch.no_grad()
def test_other_attention_gets_copies_and_stays_as_it_is() -> None:
    model = grouped()
    model.set_attn_implementation("eager")
    assert Beginning(model, BEGIN).copied
    assert model.config._attn_implementation == "eager"
    forgetful = grouped()  # attends to each row's own tokens only
    real = beginning.attention

    def forgets(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: object, **kwargs: object) -> object:
        return real(module, query, key.clone(), value, *args, **kwargs)  # type: ignore[arg-type]

    beginning._register()
    AttentionInterface.register(beginning.ATTENTION, forgets)
    try:
        assert Beginning(forgetful, BEGIN).copied
        assert forgetful.config._attn_implementation == "sdpa"
    finally:
        AttentionInterface.register(beginning.ATTENTION, real)


@torch.no_grad()
@pytest.mark.parametrize("kind", MODELS)
def test_the_model_gives_the_same_bits_without_a_beginning(kind: str) -> None:
    model, batch = MODELS[kind]().eval(), padded(SEQUENCES)
    before = model(**batch).logits, model.generate(**batch, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert not Beginning(model, BEGIN).copied
    after = model(**batch).logits, model.generate(**batch, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert all(map(torch.equal, before, after))


@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_the_textbook_one_of_keys_side_by_side(masked: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    first = [torch.randn(1, 2, 7, 8, generator=generator) for _ in range(2)]
    query, key, value = (torch.randn(3, heads, 5, 8, generator=generator) for heads in (6, 2, 2))
    mask = torch.ones(5, 5, dtype=torch.bool).tril().repeat(3, 1, 1, 1)
    if masked:
        mask[1, 0, :, 0] = False
    pairs = zip(first, (key, value), strict=True)
    keys, values = (torch.cat((a.expand(3, -1, -1, -1), b), 2).repeat_interleave(3, 1) for a, b in pairs)
    wide = torch.cat((mask.new_ones(3, 1, 5, 7), mask), -1)
    wanted = F.scaled_dot_product_attention(query, keys, values, wide, scale=0.3).transpose(1, 2)
    key.beginning = *first, beginning._Turn(True)  # type: ignore[attr-defined]
    found, _ = beginning.attention(nn.Identity(), query, key, value, mask if masked else None, scaling=0.3)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


def test_answers_behind_a_beginning_are_the_textbook_greedy_ones(tokenizer: PreTrainedTokenizerFast) -> None:  # noqa: F811
    model, begin, prompts = writer(), "one great film .", [f" {prompt} . It was" for prompt in PROMPTS]
    wanted = [greedy(model, tokenizer, begin + prompt, 8) for prompt in prompts]
    others = tokenizer(prompts, padding=True, add_special_tokens=False, return_tensors="pt")
    batch = Beginning(model, tokenizer(begin)["input_ids"])(others)
    assert "beginning" in batch
    assert generate_answers(model, tokenizer, batch, 8) == wanted
    encoded = encode_text(model, batch, 2)  # compares its answers with those of the batch
    assert encoded is not None and encoded["input_ids"].shape == (3, 2)
    for _ in range(2):
        assert generate_answers(model, tokenizer, encoded, 8) == wanted, "the text is as it was"


@torch.no_grad()
def test_no_row_has_keys_and_values_of_the_beginning() -> None:
    model = grouped().eval()
    encoded = encode_text(model, Beginning(model, BEGIN)(padded(SEQUENCES)), 1)
    assert encoded is not None
    assert all(tensor.shape == (3, 2, 5, 4) for layer in encoded["text"] for tensor in layer)


@torch.no_grad()
def test_a_cache_goes_with_its_last_reference() -> None:
    """Not at the next garbage collection: each probe makes one, with the keys and values of all rows."""
    model = grouped().eval()
    encoded = encode_text(model, Beginning(model, BEGIN)(padded(SEQUENCES)), 1)
    assert encoded is not None
    cache = candidates.text_cache(encoded)
    layer = weakref.ref(cache.layers[0])
    gc.disable()
    try:
        del cache
        assert layer() is None
    finally:
        gc.enable()


@torch.no_grad()
@pytest.mark.parametrize("other", [lambda model: model.set_attn_implementation("eager"), None])
def test_a_model_that_would_not_read_the_beginning_is_refused(other: Callable[[Any], None] | None) -> None:
    model, ids = grouped().eval(), torch.tensor([1, 2, 3])
    twin = copy.deepcopy(model)
    batch = Beginning(model, BEGIN)(padded(SEQUENCES))
    encoded = encode_text(model, batch, 1)
    assert encoded is not None
    if other is not None:
        other(model)
    for one in (batch, encoded):
        with pytest.raises(RuntimeError, match="did not read the beginning"):
            candidates._full_logits(model if other else twin, one, ids)


@torch.no_grad()
def test_a_second_beginning_that_is_copied_leaves_the_first() -> None:
    model, ids = grouped().eval(), torch.tensor([1, 2, 3])
    first = Beginning(model, BEGIN)
    assert Beginning(model, BEGIN[:1]).copied  # has no halves
    assert not first.copied
    whole = candidates.candidate_logits(model, padded([BEGIN + sequence for sequence in SEQUENCES]), ids)
    torch.testing.assert_close(candidates.candidate_logits(model, first(padded(SEQUENCES)), ids), whole, rtol=0, atol=2e-5)


_OTHER = """
import pickle, sys, torch
from zolightning.data import candidates
model, batch, wanted = pickle.load(open(sys.argv[1], "rb"))
with torch.no_grad():
    found = candidates.candidate_logits(model, batch, torch.tensor([1, 2, 3]))
torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
"""


@torch.no_grad()
def test_model_and_beginning_go_to_another_process(tmp_path: Path) -> None:
    model, path = grouped().eval(), tmp_path / "both"
    batch = Beginning(model, BEGIN)(padded(SEQUENCES))
    path.write_bytes(pickle.dumps((model, batch, candidates.candidate_logits(model, batch, torch.tensor([1, 2, 3])))))
    done = subprocess.run([sys.executable, "-c", _OTHER, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 2, 3])
def test_a_repeated_batch_reads_the_same_beginning(rows: int) -> None:
    """Also where the number of examples is that of the heads."""
    model, ids = grouped().eval(), torch.tensor([1, 2, 3])
    encoded = encode_text(model, Beginning(model, BEGIN)(padded(SEQUENCES[:rows])), 1)
    once = candidates.candidate_logits(model, encoded, ids)
    twice = candidates.candidate_logits(model, repeat_batch(encoded, rows, 2), ids)
    torch.testing.assert_close(twice, once.repeat(2, 1), rtol=0, atol=2e-6)


@torch.no_grad()
def test_a_probe_reads_the_beginning_too(tokenizer: PreTrainedTokenizerFast) -> None:  # noqa: F811
    """The perturbed model's answers, with the beginning's keys and values of before."""
    model, begin = writer(), "one great film ."
    others = tokenizer(PROMPTS, padding=True, add_special_tokens=False, return_tensors="pt")
    shared, copied = Beginning(model, tokenizer(begin)["input_ids"]), Beginning(model, tokenizer(begin)["input_ids"])
    copied.copied = True
    view = build_view(model, model.parameters(), Rademacher(), structure="rank1")
    with view.along(Key(5, 0, 0), 0.3):
        found, wanted = (generate_answers(model, tokenizer, way(others), 8) for way in (shared, copied))
    assert found == wanted != generate_answers(model, tokenizer, shared(others), 8)
