"""``zolightning demo``: every method on one task, each in its own process, into one MLflow store."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

from ...adapt.matmul import matmul_speed
from ...data import SMOLLM2, VADER, PromptTemplate, encode, fetch, load_causal_lm, verbalizer_ids
from ...records.mlflow_logger import DEFAULT_STORE, prepare_store
from ..console import make_folder, say
from .engine import missing
from .expected import Workload
from .methods import PROFILES, Method, select_methods
from .report import text_table, write
from .run import Result, Task, machine, run_alone, settings, splits

logger = logging.getLogger(__name__)


def demo(
    profile: Literal["quick", "full"] = "quick",
    model: str | None = None,
    data: str | None = None,
    text: str = "text",
    label: str = "label",
    template: str = "{text} It was",
    verbalizers: list[str] | None = None,
    methods: list[str] | str | None = None,
    seeds: int | None = None,
    precision: str = "auto",
    max_length: int = 128,
    threads: int | None = None,
    store: str = DEFAULT_STORE,
    experiment: str = "zolightning-demo",
    out: str = "zolightning-demo",
    offline: bool = False,
) -> None:
    """Fine-tune one model by ZO and by backprop, and compare them. Example: zolightning demo --profile quick --threads 2

    Your own data: ``zolightning demo --model Qwen/Qwen2.5-0.5B --data reviews.csv --verbalizers '[" bad", " good"]'``.

    Args:
        profile: 'quick' takes about a quarter of an hour on two cores; 'full' makes the README's table.
        model: A Hugging Face id or a local folder. Default: SmolLM2-135M, 93 MB from the Python package index.
        data: A CSV or JSONL file, or a folder with train, validation and test files. Default: film-review snippets, 2.5 MB.
        text: The column with the texts.
        label: The column with the labels.
        template: The prompt; {text} stands for the text.
        verbalizers: The next word for each label, with the labels in sorted order. Each must be one token.
        methods: Names separated by commas: zero-shot, zo, reft, gguf, spsa, mezo, adamw, checkpointed, lora. Default:
            all; gguf only where llama.cpp is installed.
        seeds: The number of runs of each ZO method. Default: the profile's number; 'full' runs the default recipe three
            times.
        precision: The precision of the Trainer, which the dtype of a frozen model follows. Default: measured; bf16-mixed
            where this machine multiplies matrices faster in it, else 32-true.
        max_length: The longest prompt, in tokens.
        threads: The number of CPU threads. Default: PyTorch's number.
        store: The MLflow tracking URI of the runs: an SQLite file, or a server's http address.
        experiment: The name of the MLflow experiment.
        out: The folder for the table and the picture.
        offline: Download nothing; use the files in the cache.
    """
    if threads:
        torch.set_num_threads(threads)
    chosen = PROFILES[profile]
    runs = plan(possible(select_methods(chosen, methods), model, named=bool(methods)), seeds)
    task = Task(
        model=model,
        data=data,
        text=text,
        label=label,
        template=template,
        verbalizers=tuple(verbalizers or (" terrible", " great")),
        validation=chosen.validation,
        test=chosen.test,
        validations=chosen.validations,
        max_length=max_length,
        precision=settle_precision(precision),
        store=store,
        experiment=experiment,
        out=out,
        offline=offline,
    )
    workload = prepare(task, max((method.batch_size for method, _ in runs if method.steps), default=1))
    expected = workload.seconds([method for method, _ in runs], matmul_speed().flops[task.dtype])
    say(f"{len(runs)} runs, about {max(1, round(expected / 60))} min on this machine, as busy as it is now")
    results: list[Result] = []
    for i, (method, seed) in enumerate(runs):
        say(f"[{i + 1}/{len(runs)}] {method.title}, seed {seed}" + (f": {method.steps} steps" if method.steps else ""))
        results.append(run_alone(task, method, seed, threads))
        done = results[-1]
        spent = f"{done.process_seconds:.0f} CPU seconds in all"
        say(f"      test accuracy {100 * done.accuracy:.1f} %, loss {done.loss:.3f}; {spent}")
    image = write(results, Path(out), settings(task) | {"machine": machine()})
    say("\n" + text_table(results))
    say(
        "\nTrain seconds leave out validation; CPU seconds are the same on all threads. Peak memory is the run's own process "
        "beyond the Python libraries. Learning rates were chosen on validation examples; the test examples were looked at once."
    )
    say(f"\npicture: {image}\ncompare the runs: zolightning dash --store {store}")


def possible(methods: Sequence[Method], model: str | None, named: bool) -> list[Method]:
    """The methods that can run here; what is left out is said, or an error where it was asked for by name.

    Raises:
        ImportError, ValueError: llama.cpp is not there; or a model other than the demo's.
    """
    why = missing(model) if any(method.engine for method in methods) else ""
    if why and named:
        raise (ValueError if model is not None else ImportError)(f"the method 'gguf' cannot run: {why}")
    if why:
        say(f"without the row 'gguf': {why}")
    return [method for method in methods if not (method.engine and why)]


def plan(methods: Sequence[Method], seeds: int | None = None) -> list[tuple[Method, int]]:
    """Which runs there are; ``seeds`` replaces the number of runs of the ZO methods."""
    if seeds is not None and seeds < 1:
        raise ValueError(f"`seeds` must be >= 1, got {seeds}")
    return [(m, s) for m in methods for s in range(seeds if seeds and m.zeroth_order else m.seeds)]


def settle_precision(asked: str) -> str:
    """Trainer(precision=...) for 'auto': bf16-mixed where bfloat16 products are much faster here, else 32-true, and said."""
    if asked != "auto":
        return asked
    settled = "bf16-mixed" if matmul_speed().fastest == torch.bfloat16 else "32-true"
    say(f"precision {settled}, the faster one here; --precision sets another")
    return settled


def prepare(task: Task, batch_size: int = 1) -> Workload:
    """Fetch and check everything before the first run, so that errors show now.

    Args:
        task: The settings that all runs share.
        batch_size: the most examples that a run takes a step.

    Returns:
        What the duration of runs follows from.

    Raises:
        ValueError: texts, labels, prompt and verbalizers do not fit each other, or there are too few texts.
    """
    prompt = PromptTemplate(task.template, task.verbalizers)
    if task.model is None and task.data is None:
        say(f"needs {SMOLLM2.filename} ({SMOLLM2.size / 1e6:.0f} MB) and {VADER.filename} ({VADER.size / 1e6:.1f} MB), once")
    if task.data is None:
        fetch(VADER, offline=task.offline)
    found = splits(task)
    if len(found.train) < batch_size:
        raise ValueError(
            f"{len(found.train)} texts to train on fill no batch of {batch_size}; give more, or methods with smaller batches"
        )
    model, tokenizer = load_causal_lm(task.model, offline=task.offline)
    verbalizer_ids(tokenizer, prompt, found.label_names)
    prepare_store(task.store)
    make_folder(task.out)
    say(
        f"{len(found.train):,} texts to train on, {len(found.validation):,} to validate, {len(found.test):,} to test; "
        f"labels {', '.join(found.label_names)}; {torch.get_num_threads()} CPU threads"
    )
    return Workload.of(task, model, encode(tokenizer, found.train[:256], prompt, task.max_length))
