import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
)

from zolightning.data import Encoded, candidate_logits, collate
from zolightning.data.candidates import _rows_suffice

SMALL = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
PROMPTS = [[3, 4, 5, 6, 7, 8], [9, 10], [11, 12, 13]]
CANDIDATES = torch.tensor([7, 40, 3])


def llama(**options: object) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**SMALL, intermediate_size=32, tie_word_embeddings=True, **options))


def opt() -> PreTrainedModel:
    return OPTForCausalLM(OPTConfig(**SMALL, ffn_dim=32, max_position_embeddings=64, word_embed_proj_dim=8))


def gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2))


def phi() -> PreTrainedModel:
    model = PhiForCausalLM(PhiConfig(**SMALL, intermediate_size=32))
    assert model.lm_head.bias is not None
    return model


def gemma2() -> PreTrainedModel:  # caps its logits after the output embedding
    config = Gemma2Config(**SMALL, intermediate_size=32, num_key_value_heads=2, head_dim=8, final_logit_softcapping=0.5)
    return Gemma2ForCausalLM(config)


FAST: list[Callable[[], PreTrainedModel]] = [
    llama,
    opt,
    gpt2,
    phi,
    lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL, intermediate_size=32)),
    lambda: BloomForCausalLM(BloomConfig(vocab_size=50, hidden_size=16, n_layer=2, n_head=2)),
]


def build(make: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # away from the tiny initial weights, and no bias at zero
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def batch() -> dict[str, Tensor]:
    return collate([Encoded(ids, 0) for ids in PROMPTS], pad_id=1)


@torch.no_grad()
def one_by_one(model: PreTrainedModel) -> Tensor:
    """Give the full model's logits for each unpadded prompt."""
    rows = [model(input_ids=torch.tensor([ids])).logits[0, -1, CANDIDATES] for ids in PROMPTS]
    return torch.stack(rows)


@pytest.mark.parametrize("make", FAST)
def test_equals_the_full_model_without_padding(make: Callable[[], PreTrainedModel]) -> None:
    model = build(make)
    with torch.no_grad():
        logits = candidate_logits(model, batch(), CANDIDATES)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, one_by_one(model), atol=1e-5, rtol=1e-5)
    assert _rows_suffice[model]


def test_model_specific_head_falls_back_to_the_full_model() -> None:
    model = build(gemma2)
    with torch.no_grad():
        logits = candidate_logits(model, batch(), CANDIDATES)
    torch.testing.assert_close(logits, one_by_one(model), atol=1e-5, rtol=1e-5)
    assert not _rows_suffice[model]


def test_wrapped_head_falls_back_to_the_full_model() -> None:
    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    model = build(llama)
    head = Doubled(16, 50, bias=False)
    model.set_output_embeddings(head)
    with torch.no_grad():
        logits = candidate_logits(model, batch(), CANDIDATES)
    torch.testing.assert_close(logits, one_by_one(model), atol=1e-5, rtol=1e-5)


def test_follows_later_changes_of_the_weights() -> None:
    model = build(llama)
    with torch.no_grad():
        before = candidate_logits(model, batch(), CANDIDATES)
        for parameter in model.parameters():
            parameter.mul_(1.1)
        after = candidate_logits(model, batch(), CANDIDATES)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, one_by_one(model), atol=1e-5, rtol=1e-5)


def test_gradient_equals_the_full_model() -> None:
    model = build(llama)
    twin = copy.deepcopy(model)
    candidate_logits(model, batch(), CANDIDATES).logsumexp(-1).sum().backward()
    inputs = {key: value for key, value in batch().items() if key != "labels"}
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    twin(**inputs, position_ids=positions).logits[:, -1, CANDIDATES].logsumexp(-1).sum().backward()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-4)


def test_keeps_the_training_mode_of_each_module() -> None:
    model = build(llama).train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    candidate_logits(model, batch(), CANDIDATES)
    assert [module.training for module in model.modules()] == modes


def test_half_precision_gives_float32() -> None:
    model = build(llama).to(torch.bfloat16)
    with torch.no_grad():
        logits = candidate_logits(model, batch(), CANDIDATES)
    assert logits.dtype == torch.float32
    assert _rows_suffice[model]
    torch.testing.assert_close(logits, one_by_one(model).float(), atol=0.1, rtol=0.05)
