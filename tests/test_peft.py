"""Few weights on a frozen model: what they compute, and that they train, restore and replay like all others."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_same, quiet_trainer, weights
from ledgers import Noted, parameters
from test_data_likelihood import padded, tokenizer, writer  # noqa: F401
from test_tasks import FILMS, splits
from torch import Tensor, nn
from torch.optim import SGD
from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

from zolightning import ZOStrategy
from zolightning.adapt.peft import NAME, ia3, lora, prefix, prompt
from zolightning.data import answer_log_likelihood, candidate_logits, generate_answers
from zolightning.ledger import read, replay
from zolightning.methods import recipes
from zolightning.tasks import TaskData, TaskModule, WordReader

SHOWN = [7, 30, 12, 55]
SEQUENCES = [[3, 4, 5, 6, 7, 8], [9, 10, 11]]


def opt() -> nn.Module:
    config = OPTConfig(
        vocab_size=400, hidden_size=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=64,
        init_std=0.5, word_embed_proj_dim=16, dropout=0.0,
    )  # fmt: skip
    return OPTForCausalLM(config).eval()


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(vocab_size=400, n_embd=16, n_layer=2, n_head=2, initializer_range=0.5)).eval()


@pytest.mark.parametrize("make", [writer, opt, gpt2])
@pytest.mark.parametrize("tune", [prefix, prompt])
def test_begins_as_if_the_tokens_stood_before(make: Callable[[], Any], tune: Callable[..., Any]) -> None:
    plain = make()
    tuned = tune(copy.deepcopy(plain), SHOWN)
    ids, batch = torch.tensor(SEQUENCES[0])[None], padded(SEQUENCES)
    candidates, lengths = torch.tensor([5, 6, 300]), torch.tensor([2, 1])
    longer = padded([SHOWN + s for s in SEQUENCES])
    with torch.no_grad():
        found, wanted = tuned(input_ids=ids).logits, plain(input_ids=torch.tensor([SHOWN + SEQUENCES[0]])).logits
        torch.testing.assert_close(found, wanted[:, len(SHOWN) :], rtol=1e-4, atol=1e-4)
        for read in (
            lambda model, items: candidate_logits(model, items, candidates),
            lambda model, items: answer_log_likelihood(model, items, lengths),
        ):
            torch.testing.assert_close(read(tuned, batch), read(plain, longer), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [writer, opt, gpt2])
@pytest.mark.parametrize("tune", [prefix, prompt])
def test_generates_as_if_the_tokens_stood_before(make: Any, tune: Any, tokenizer: Any) -> None:  # noqa: F811
    plain = make()
    tuned = tune(copy.deepcopy(plain), SHOWN)
    found = generate_answers(tuned, tokenizer, padded(SEQUENCES), 6)
    assert found == generate_answers(plain, tokenizer, padded([SHOWN + s for s in SEQUENCES]), 6)
    assert found != generate_answers(plain, tokenizer, padded(SEQUENCES), 6)


def test_tokens_are_drawn_by_seed_or_given() -> None:
    first, again, other = (prefix(writer(), 3, seed).state_dict() for seed in (0, 0, 1))
    names = [name for name in first if NAME in name]
    assert len(names) == 4
    assert all(torch.equal(first[n], again[n]) and not torch.equal(first[n], other[n]) for n in names)
    for tokens, message in ((0, "must be >= 1"), ([], "ids between 0 and 399"), ([400], r"399, got \[400\]")):
        with pytest.raises(ValueError, match=message):
            prefix(writer(), tokens)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="already has virtual tokens"):
        prompt(prefix(writer()))
    with pytest.raises(TypeError, match="causal language model, got Linear"):
        prefix(nn.Linear(2, 2))


def test_adapters_change_nothing_at_first_and_freeze_the_rest() -> None:
    plain, ids = writer(), torch.tensor(SEQUENCES[:1])
    for tune in (lora, ia3):
        tuned = tune(copy.deepcopy(plain))
        assert all(("lora_" in n) or ("ia3_" in n) for n, p in tuned.named_parameters() if p.requires_grad)
        with torch.no_grad():
            torch.testing.assert_close(tuned(input_ids=ids).logits, plain(input_ids=ids).logits)
    ranks = [p.shape for n, p in lora(copy.deepcopy(plain), r=3, targets=["down_proj"]).named_parameters() if p.requires_grad]
    assert ranks == [(3, 24), (16, 3)] * 2
    with pytest.raises(ValueError, match=r"`lora\(r=..., alpha=...\)` must be >= 1 and > 0, got 0 and 16"):
        lora(plain, r=0)


def test_recipes_have_the_papers_hyperparameters() -> None:
    assert (recipes.MEZO_LORA.eps, recipes.MEZO_LORA.lr) == (1e-2, 1e-4)
    assert (recipes.MEZO_PREFIX.eps, recipes.MEZO_PREFIX.lr) == (1e-1, 1e-2)


VIEWS: dict[str, tuple[Callable[[nn.Module], Any], ZOStrategy, int]] = {
    "mezo-lora": (lora, ZOStrategy("mezo-lora", seed=1), 4 * 2 * 8 * 16),
    "lora, a direction for each example": (lora, ZOStrategy(select="all", lr=1e-3, seed=1), 4 * 2 * 8 * 16),
    "ia3": (ia3, ZOStrategy("spsa", select="all", lr=1e-3, seed=1), 2 * (16 + 16 + 24)),
    "mezo-prefix": (prefix, ZOStrategy("mezo-prefix", seed=1), 2 * 2 * 5 * 16),
    "prompt": (prompt, ZOStrategy("spsa", select="all", eps=1e-2, lr=1e-3, seed=1), 20 * 16),
    "last block": (lambda model: model, ZOStrategy("spsa", select="last:1", lr=1e-3, seed=1), 4 * 256 + 3 * 16 * 24 + 32),
    "BitFit": (lambda _: opt().train(), ZOStrategy("spsa", select="re:bias$", lr=1e-3, seed=1), 2 * 9 * 16 + 16),
    "norms, by pattern": (lambda model: model, ZOStrategy("spsa", select="re:norm", lr=1e-3, seed=1), 5 * 16),
}


def classifier(tune: Callable[[nn.Module], Any], tokenizer: Any) -> tuple[TaskModule, TaskData]:  # noqa: F811
    torch.manual_seed(0)  # adapters draw their first weights
    reader = WordReader(tokenizer, (" terrible", " great"))
    module = TaskModule(tune(writer().train()), reader, make_optimizer=lambda ps: SGD(ps, lr=1e-3))
    return module, TaskData(splits(FILMS), reader, batch_size=4)


@pytest.mark.parametrize("name", VIEWS)
def test_trains_and_replays_bit_for_bit(name: str, tokenizer: Any, tmp_path: Path) -> None:  # noqa: F811
    tune, given, size = VIEWS[name]
    strategy = ZOStrategy(given.config, ledger=tmp_path / "ledger.zo")
    module, data = classifier(tune, tokenizer)
    noted = Noted()
    trainer = quiet_trainer(strategy, max_steps=4, num_sanity_val_steps=0, callbacks=[noted])
    trainer.fit(module, data)
    base, after = noted.weights[0], weights(module)
    moved = [n for n, w in after.items() if not torch.equal(w, base[n])]
    assert sum(after[n].numel() for n in moved) == size
    rebuilt = parameters(base)
    replay(read(tmp_path / "ledger.zo"), rebuilt)
    assert_same({n: p.detach() for n, p in rebuilt.items()}, after)


@pytest.mark.parametrize("name", VIEWS)
def test_probes_leave_every_bit(name: str, tokenizer: Any) -> None:  # noqa: F811
    tune, given, _ = VIEWS[name]
    module, data = classifier(tune, tokenizer)
    before: dict[str, Tensor] = weights(module)
    config = given.config.override(lr=0.0)
    quiet_trainer(ZOStrategy(config), max_steps=2, num_sanity_val_steps=0).fit(module, data)
    assert_same(weights(module), before)
    objective = module.objective

    def failing(model: nn.Module, batch: Any) -> Any:
        objective(model, batch)
        raise RuntimeError("inside a probe")

    module.objective = failing
    with pytest.raises(RuntimeError, match="inside a probe"):
        quiet_trainer(ZOStrategy(given.config), max_steps=2, num_sanity_val_steps=0).fit(module, data)
    assert_same(weights(module), before)
