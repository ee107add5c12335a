"""Models, labelled texts and prompts for fine-tuning, with a cache for downloads."""

from ..cache import cache_dir
from .artifacts import SMOLLM2, VADER, Artifact
from .batches import SimilarLengths
from .beginning import Beginning
from .candidates import candidate_logits
from .fetch import FetchError, fetch
from .general_text import general_text, text_perplexity
from .generation import generate_answers, tokens_written
from .likelihood import answer_log_likelihood
from .model import load_causal_lm, model_name
from .prompts import Encoded, PromptTemplate, collate, common_ending, encode, verbalizer_ids
from .table import read_table
from .text import Example, Splits, film_snippets
from .text_cache import encode_text

__all__ = [
    "SMOLLM2",
    "VADER",
    "Artifact",
    "Beginning",
    "Encoded",
    "Example",
    "FetchError",
    "PromptTemplate",
    "SimilarLengths",
    "Splits",
    "answer_log_likelihood",
    "cache_dir",
    "candidate_logits",
    "collate",
    "common_ending",
    "encode",
    "encode_text",
    "fetch",
    "film_snippets",
    "general_text",
    "generate_answers",
    "load_causal_lm",
    "model_name",
    "read_table",
    "text_perplexity",
    "tokens_written",
    "verbalizer_ids",
]
