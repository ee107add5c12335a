import re

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from zolightning.data import Encoded, Example, PromptTemplate, collate, encode, verbalizer_ids

CORPUS = ["a great film It was great", "a terrible film It was terrible", "this one is long and dull"] * 20
BINARY = ("negative", "positive")


def make_tokenizer(wrap: str = "<s> $A") -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer whose texts start with <s>, as Llama's do."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(CORPUS, trainer)
    core.post_processor = processors.TemplateProcessing(single=wrap, special_tokens=[("<s>", 0), ("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.mark.parametrize("template", ["It was", "{text} and {text} It was", "{Text}"])
def test_template_needs_one_text(template: str) -> None:
    with pytest.raises(ValueError, match=r"must contain \{text\} exactly once"):
        PromptTemplate(template)


@pytest.mark.parametrize(
    ("verbalizers", "message"),
    [
        ((" a",), "at least two distinct"),
        ((" a", " a"), "at least two distinct"),
        ((" a", ""), "not be empty"),
    ],
)
def test_verbalizers_must_differ(verbalizers: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PromptTemplate(verbalizers=verbalizers)


def test_text_may_contain_braces() -> None:
    assert PromptTemplate().render("{text} {0}") == "{text} {0} It was"


def test_verbalizer_ids_follow_the_prompt(tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = PromptTemplate()
    ids = verbalizer_ids(tokenizer, prompt, BINARY)
    assert ids.dtype == torch.int64
    assert [tokenizer.decode(i) for i in ids] == [" terrible", " great"]
    for word, i in zip(prompt.verbalizers, ids.tolist(), strict=True):
        assert tokenizer("x It was" + word)["input_ids"] == [*tokenizer("x It was")["input_ids"], i]


def test_one_verbalizer_per_label(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match=r"2 verbalizers .* for 3 labels \(a, b, c\)"):
        verbalizer_ids(tokenizer, PromptTemplate(), ("a", "b", "c"))


def test_verbalizer_of_several_tokens_is_named(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match=re.escape("' sublime' must be one token of the vocabulary but becomes ['Ġ")):
        verbalizer_ids(tokenizer, PromptTemplate(verbalizers=(" great", " sublime")), BINARY)


def test_verbalizer_that_merges_with_the_prompt_is_named(tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = PromptTemplate("{text} It was grea", verbalizers=("t", " dull"))
    with pytest.raises(ValueError, match="verbalizer 't' changes the tokens of the prompt"):
        verbalizer_ids(tokenizer, prompt, BINARY)


def test_tokenizer_that_ends_texts_is_refused() -> None:
    with pytest.raises(ValueError, match="changes the tokens of the prompt"):
        verbalizer_ids(make_tokenizer("<s> $A </s>"), PromptTemplate(), BINARY)


def test_encode(tokenizer: PreTrainedTokenizerFast) -> None:
    items = encode(tokenizer, [Example("a film", 1), Example("dull", 0)], PromptTemplate())
    assert items == [
        Encoded(tokenizer("a film It was")["input_ids"], 1),
        Encoded(tokenizer("dull It was")["input_ids"], 0),
    ]
    assert items[0].input_ids[0] == tokenizer.bos_token_id
    assert encode(tokenizer, [], PromptTemplate()) == []


@pytest.mark.parametrize("text", ["this film is long and dull " * 30, "x" * 300, "好" * 200])
def test_long_text_loses_its_end(text: str, tokenizer: PreTrainedTokenizerFast) -> None:
    [item] = encode(tokenizer, [Example(text, 0)], PromptTemplate("Film: {text} It was"), max_length=24)
    assert 20 <= len(item.input_ids) <= 24
    decoded = tokenizer.decode(item.input_ids, skip_special_tokens=True)
    assert decoded.startswith("Film: " + text[:3])
    assert decoded.endswith(" It was")


def test_template_longer_than_the_limit(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match=r"max_length=2 is too short: even the template .* takes 3 tokens"):
        encode(tokenizer, [Example("a film", 0)], PromptTemplate(), max_length=2)


def test_collate_pads_on_the_left() -> None:
    batch = collate([Encoded([5, 6, 7], 1), Encoded([8], 0)], pad_id=9)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [9, 9, 8]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert batch["labels"].tolist() == [1, 0]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
