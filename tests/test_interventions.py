"""Vectors at the last positions: what they do to a model, and that the text before them is encoded once to no other effect."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Task, assert_same, batches, fit, loader, mlp, per_example_mse, quiet_trainer, tiny_causal_lm, weights
from ledgers import Noted, parameters
from torch import Tensor, nn
from torch.optim import SGD
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from zolightning import ZOMixin, ZOStrategy
from zolightning.adapt.interventions import Intervention, at_prompts, idle, intervene, interventions
from zolightning.commands.demo.module import PromptClassifier
from zolightning.data import Encoded, candidate_logits, collate, common_ending, encode_text
from zolightning.ledger import read, replay
from zolightning.noise import Rademacher
from zolightning.space import build_view
from zolightning.types import Key, PerExample

ITEMS = [Encoded([5, 6, 7, 8, 1, 2], 0), Encoded([9, 1, 2], 1), Encoded([3, 4, 11, 1, 2], 1), Encoded([20, 21, 1, 2], 0)]
BATCH = collate(ITEMS, 0)
WORDS = torch.tensor([3, 17])
KINDS = ("llama", "gpt2")


def intervened(kind: str = "llama", trained: bool = True, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = tiny_causal_lm(kind).to(dtype)
    made = intervene(model, 2, {"input_ids": BATCH["input_ids"], "attention_mask": BATCH["attention_mask"]})
    if trained:
        torch.manual_seed(0)
        for one in made:
            one.vectors.data.normal_()
    return model


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_vectors_move_the_last_positions_and_nothing_else(kind: str) -> None:
    plain, ids = tiny_causal_lm(kind), BATCH["input_ids"]
    untrained = intervened(kind, trained=False)
    assert torch.equal(untrained(input_ids=ids).logits, plain(input_ids=ids).logits)
    model = intervened(kind)
    made = interventions(model)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        name for name, _ in model.named_parameters() if name.endswith("intervention.vectors")
    ]
    assert len(made) == 2

    def add(one: Intervention) -> Any:  # the textbook: a vector beside each state, zero but at the end
        def hook(block: nn.Module, args: Any, out: Any) -> Any:
            hidden = out[0] if isinstance(out, tuple) else out
            added = torch.zeros_like(hidden[0])
            added[-2:] = one.scale * one.vectors.view(2, -1)
            return (hidden + added, *out[1:]) if isinstance(out, tuple) else hidden + added

        return hook

    for block, one in zip(plain.model.layers if kind == "llama" else plain.transformer.h, made, strict=True):
        block.register_forward_hook(add(one))
    wanted, got = plain(input_ids=ids).logits, model(input_ids=ids).logits
    torch.testing.assert_close(got, wanted)
    assert torch.equal(got[:, :-2], untrained(input_ids=ids).logits[:, :-2])
    with idle(made):
        assert torch.equal(model(input_ids=ids).logits, untrained(input_ids=ids).logits)
    assert not torch.equal(got[:, -2:], untrained(input_ids=ids).logits[:, -2:])


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_generation_moves_the_prompts_and_leaves_the_answers(kind: str) -> None:
    model = intervened(kind)
    made = interventions(model)
    config = GenerationConfig(max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=0)
    with at_prompts(model):
        found = model.generate(**{k: BATCH[k] for k in ("input_ids", "attention_mask")}, generation_config=config)
    assert not any(one.idle for one in made)
    for item, answer in zip(ITEMS, found[:, -5:].tolist(), strict=True):
        sequence = list(item.input_ids)  # the textbook: no cache, the vectors further from the end with each token
        for written in range(5):
            for one in made:
                one.positions = 2 + written
                one.vectors.data = torch.cat((one.vectors[: 2 * 16], torch.zeros(written * 16)))
            logits = model(input_ids=torch.tensor([sequence])).logits[0, -1]
            logits[0] = -torch.inf
            sequence.append(int(logits.argmax()))
        assert answer == sequence[-5:]


@torch.no_grad()
def test_scales_are_the_sizes_of_hidden_states() -> None:
    model = intervened(trained=False)
    hidden = model(**{k: BATCH[k] for k in ("input_ids", "attention_mask")}, output_hidden_states=True).hidden_states
    first = hidden[1][:, -2:].square().mean().sqrt()
    assert interventions(model)[0].scale == pytest.approx(float(first), rel=1e-5)


@torch.no_grad()
def test_copies_and_saved_states_are_whole() -> None:
    model, ids = intervened(), BATCH["input_ids"]
    before = model(input_ids=ids).logits
    twin = copy.deepcopy(model)
    for one in interventions(twin):
        one.vectors.zero_()
    assert torch.equal(model(input_ids=ids).logits, before), "the copy has hooks of its own"
    assert not torch.equal(twin(input_ids=ids).logits, before)
    fresh = intervened(trained=False)
    interventions(fresh)[0].scale = 99.0
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(input_ids=ids).logits, before)


def test_bad_input_is_refused() -> None:
    model, calibration = tiny_causal_lm("llama"), {"input_ids": BATCH["input_ids"]}
    with pytest.raises(ValueError, match=r"`intervene\(positions=...\)` must be >= 1, got 0"):
        intervene(model, 0, calibration)
    with pytest.raises(ValueError, match="needs a stack of equal blocks"):
        intervene(mlp(), 1, {"input": torch.zeros(1, 4)})
    intervene(model, 2, calibration)
    with pytest.raises(ValueError, match="has interventions already"):
        intervene(model, 2, calibration)
    with pytest.raises(ValueError, match="the prompt has 1 positions, and interventions are made at its last 2"):
        model(input_ids=torch.tensor([[1]]))


def test_the_common_ending_of_prompts() -> None:
    assert common_ending(ITEMS) == 2
    assert common_ending([Encoded([1, 2], 0), Encoded([1, 2], 1)]) == 2
    assert common_ending([Encoded([1, 2], 0), Encoded([1, 3], 1)]) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_encoded_text_gives_the_answers_of_whole_prompts(kind: str, dtype: torch.dtype) -> None:
    model = intervened(kind, dtype=dtype).eval()
    whole = candidate_logits(model, BATCH, WORDS)
    with idle(interventions(model)):
        encoded = encode_text(model, BATCH, 2)
    assert encoded is not None
    assert encoded["input_ids"].shape == (4, 2)
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(candidate_logits(model, encoded, WORDS), whole, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(candidate_logits(model, encoded, WORDS), whole, rtol=tolerance, atol=tolerance)  # and again
    assert encode_text(model, {k: v[:, -2:] for k, v in BATCH.items() if k != "labels"}, 2) is None, "nothing to encode"


@torch.no_grad()
def test_rounding_of_many_blocks_is_no_disagreement() -> None:
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64}
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=30, initializer_range=0.15, **shape)).eval()
    ids = torch.randint(64, (16, 20))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    encoded = encode_text(model, batch, 2)
    assert encoded is not None
    whole, short = candidate_logits(model, batch, WORDS), candidate_logits(model, encoded, WORDS)
    assert not torch.equal(whole, short)
    torch.testing.assert_close(short, whole, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_model_without_such_attention_runs_whole_prompts() -> None:
    model = tiny_causal_lm("gpt2").eval()
    forward = model.transformer.forward

    def without_past(*args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    model.transformer.forward = without_past  # type: ignore[method-assign]
    assert encode_text(model, BATCH, 2) is None


def trained(prepare: bool, tmp_path: Path, **config: Any) -> tuple[PromptClassifier, Any]:
    class Whole(PromptClassifier):
        def zo_prepare(self, batch: Any) -> Any:
            return None

    module = (PromptClassifier if prepare else Whole)(intervened(trained=False), WORDS, lambda p: SGD(p, lr=0.01))
    strategy = ZOStrategy(lr="module", select="all", eps=1e-2, seed=3, ledger=tmp_path / f"{prepare}.zo", **config)
    trainer = quiet_trainer(strategy, callbacks=[noted := Noted()])
    trainer.fit(module, loader([BATCH] * 4))
    assert strategy.last_record is not None
    assert len(strategy.last_record.raw) == 4 * config.get("num_queries", 1), "a direction for each example"
    assert strategy.last_record.forwards == 2 * config.get("num_queries", 1) + prepare
    return module, noted


@pytest.mark.parametrize("config", [{}, {"num_queries": 3}, {"one_batch": False, "noise": "gaussian"}], ids=str)
def test_training_with_encoded_text_is_training(config: dict[str, Any], tmp_path: Path) -> None:
    once, noted = trained(True, tmp_path, **config)
    whole, _ = trained(False, tmp_path, **config)
    assert_same(weights(once), weights(whole), tolerance=2e-3)
    assert any((one.vectors != 0).any() for one in interventions(once))
    rebuilt = parameters(noted.weights[0])
    replay(read(tmp_path / "True.zo"), rebuilt)
    assert_same(rebuilt, weights(once))  # type: ignore[arg-type]


def test_other_trained_weights_leave_the_text_in_the_probes() -> None:
    module = PromptClassifier(intervened(), WORDS, lambda p: SGD(p, lr=0.1))
    module.model.get_input_embeddings().requires_grad_(True)
    assert module.zo_prepare(BATCH) is None
    assert PromptClassifier(tiny_causal_lm("llama"), WORDS, lambda p: SGD(p, lr=0.1)).zo_prepare(BATCH) is None


def test_backprop_on_the_vectors_is_that_of_the_whole_prompt() -> None:
    """The text before the vectors is encoded without a graph: their gradient is the one through the whole prompt."""
    module = PromptClassifier(intervened(), WORDS, lambda p: SGD(p, lr=0.1))
    module.training_step(BATCH).backward()
    found = [one.vectors.grad for one in interventions(module.model)]
    module.zero_grad()
    module.zo_objective(BATCH).mean().backward()
    for gradient, one in zip(found, interventions(module.model), strict=True):
        assert one.vectors.grad is not None and one.vectors.grad.any()
        torch.testing.assert_close(gradient, one.vectors.grad, rtol=1e-4, atol=1e-7)


class Features(ZOMixin, Task):
    """A frozen first layer, whose output all probes share."""

    frozen = True

    def zo_prepare(self, batch: Any) -> Any:
        x, y = batch
        self.prepared = getattr(self, "prepared", 0) + 1
        return torch.tanh(self.net[0](x)), y

    def zo_objective(self, batch: Any) -> Tensor:
        return per_example_mse(self.net[2], batch)


def test_a_step_prepares_once() -> None:
    module = Features(mlp())
    module.net[0].requires_grad_(False)
    before = weights(module)
    strategy = fit(module, batches(4), ZOStrategy(lr="module", select="all", seed=1)).strategy
    assert module.prepared == 4, "once a step; the look at the first batch leaves no trace"
    assert strategy.last_record.forwards == 3  # type: ignore[attr-defined]
    assert torch.equal(module.net[0].weight, before["net.0.weight"])
    assert not torch.equal(module.net[2].weight, before["net.2.weight"])


@pytest.mark.parametrize(("result", "forwards"), [("another", 3), ("the batch", 3), ("nothing", 2)])
def test_preparing_counts_as_a_forward_unless_there_was_nothing_to_prepare(result: str, forwards: int) -> None:
    class Kept(ZOMixin, Task):
        def zo_prepare(self, batch: Any) -> Any:
            return {"another": [*batch], "the batch": batch, "nothing": None}[result]

        def zo_objective(self, batch: Any) -> Tensor:
            return per_example_mse(self.net, batch)

    strategy = fit(Kept(mlp()), batches(2), ZOStrategy(lr="module", seed=1)).strategy
    assert strategy.last_record.forwards == forwards  # type: ignore[attr-defined]


def test_preparing_with_trained_weights_is_refused_and_nothing_is_lost() -> None:
    module = Features(mlp())
    before = weights(module)
    with pytest.raises(RuntimeError, match=r"`zo_prepare` reads the trained parameter 'net\.0\.(weight|bias)'"):
        fit(module, batches(2), ZOStrategy(lr="module", select="all"))
    assert_same(weights(module), before)


def test_backprop_prepares_too() -> None:
    module = Features(mlp())
    module.net[0].requires_grad_(False)
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(module, loader(batches(3)))
    assert module.prepared == 3


@torch.no_grad()
def test_each_example_reads_vectors_of_its_own() -> None:
    model = intervened().eval()
    view = build_view(model, model.parameters(), Rademacher(), structure="rank1")
    assert view.per_example
    queries, offsets = torch.arange(4), torch.tensor([0.3, -0.3, 0.1, 0.5])
    with view.at(PerExample(Key(1, 2), queries, offsets)):
        together = candidate_logits(model, BATCH, WORDS)
    for n in range(4):
        with view.along(Key(1, 2, n), float(offsets[n])):
            torch.testing.assert_close(candidate_logits(model, BATCH, WORDS)[n], together[n], rtol=1e-5, atol=1e-5)
