"""Models, labelled texts and prompts for fine-tuning, with a cache for what has to be fetched."""

from zolightning.cache import cache_dir
from zolightning.data.artifacts import SMOLLM2, VADER, Artifact
from zolightning.data.batches import SimilarLengths
from zolightning.data.candidates import candidate_logits
from zolightning.data.fetch import FetchError, fetch
from zolightning.data.generation import generate_answers
from zolightning.data.likelihood import answer_log_likelihood
from zolightning.data.model import load_causal_lm, model_name
from zolightning.data.prompts import Encoded, PromptTemplate, collate, common_ending, encode, verbalizer_ids
from zolightning.data.table import read_table
from zolightning.data.text import Example, Splits, film_snippets
from zolightning.data.text_cache import encode_text

__all__ = [
    "SMOLLM2",
    "VADER",
    "Artifact",
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
    "generate_answers",
    "load_causal_lm",
    "model_name",
    "read_table",
    "verbalizer_ids",
]
