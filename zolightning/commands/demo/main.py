"""``zolightning demo``: every method on one task, each in its own process, into one MLflow store."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

import torch

from ...adapt.matmul import matmul_speed
from ...data import SMOLLM2, VADER, PromptTemplate, encode, fetch, general_text, load_causal_lm, verbalizer_ids
from ...records.mlflow_logger import prepare_store
from ..console import make_folder, say
from .engine import missing
from .expected import Workload
from .methods import PROFILES, Method, select_methods
from .report import text_table, write
from .run import Comparison, Result, Task, machine, run_alone, settings, splits

logger = logging.getLogger(__name__)

_FIGURES = (
    "Train seconds leave out validation; CPU seconds are the same on all threads. Peak memory is the run's own process "
    "beyond the Python libraries. Learning rates were chosen on validation examples; the test examples were looked at once."
)


@dataclass(frozen=True, kw_only=True)
class Demo(Comparison):
    """Fine-tune one model by ZO and by backprop, and compare them. Example: zolightning demo --profile quick --threads 2

    Your own data: ``zolightning demo --model Qwen/Qwen2.5-0.5B --data reviews.csv --verbalizers '[" bad", " good"]'``.
    """

    profile: Literal["quick", "full"] = "quick"
    """'quick' takes about a quarter of an hour on two cores; 'full' makes the README's table."""

    methods: list[str] | str | None = None
    """Names separated by commas: zero-shot, zo, reft, gguf, spsa, mezo, adamw, checkpointed, lora, qlora, vectors, probe.
    Default: all; gguf only where llama.cpp is installed."""

    seeds: int | None = None
    """The number of runs of each method that trains. Default: the profile's number; 'full' runs ZO and ReFT three times."""

    precision: str = "auto"
    """The precision of the Trainer, which the dtype of a frozen model follows. auto: bf16-mixed where this machine multiplies
    matrices faster in it, as measured, else 32-true."""

    threads: int | None = None
    """The number of CPU threads. Default: PyTorch's number."""

    forgetting: bool = False
    """Add a column: the perplexity on text of other kinds, scikit-learn's descriptions of its data sets; it should not rise."""

    def __call__(self) -> None:
        """Run every method, one after another, and report them."""
        if self.threads:
            torch.set_num_threads(self.threads)
        chosen = select_methods(PROFILES[self.profile], self.methods)
        runs = plan(possible(chosen, self.model, named=bool(self.methods)), self.seeds)
        task = self._task()
        general = general_text() if self.forgetting else []
        workload = prepare(task, max((method.batch_size for method, _ in runs if method.steps), default=1), general)
        expected = workload.seconds([method for method, _ in runs], matmul_speed().flops[task.dtype])
        count = "1 run" if len(runs) == 1 else f"{len(runs)} runs"
        say(f"{count}, about {max(1, round(expected / 60))} min on this machine, as busy as it is now")
        results = []
        for i, (method, seed) in enumerate(runs):
            steps = f": {method.steps} steps" if method.steps else ""
            say(f"[{i + 1}/{len(runs)}] {method.title}, seed {seed}{steps}")
            results.append(self._run(task, method, seed, general))
        image = write(results, Path(self.out), settings(task) | {"machine": machine()})
        say("\n" + text_table(results) + "\n\n" + _FIGURES)
        say(f"\npicture: {image}\ncompare the runs: zolightning dash --store {self.store}")

    def _task(self) -> Task:
        """The comparison with the profile's evaluation, and its precision settled."""
        shared = {field.name: getattr(self, field.name) for field in fields(Comparison)}
        profile = PROFILES[self.profile]
        task = Task(**shared, validation=profile.validation, test=profile.test, validations=profile.validations)
        return replace(task, precision=settle_precision(self.precision))

    def _run(self, task: Task, method: Method, seed: int, general: Sequence[str]) -> Result:
        done = run_alone(task, method, seed, self.threads, general)
        spent = f"{done.process_seconds:.0f} CPU seconds in all"
        say(f"      test accuracy {100 * done.accuracy:.1f} %, loss {done.loss:.3f}; {spent}")
        return done


def possible(methods: Sequence[Method], model: str | None, named: bool) -> list[Method]:
    """The methods that can run here; a method that is left out is logged, and is an error where it was asked for by name.

    Raises:
        ImportError, ValueError: llama.cpp is not there; or a model other than the demo's.
    """
    why = missing(model) if any(method.engine for method in methods) else ""
    if why and named:
        raise (ValueError if model is not None else ImportError)(f"the method 'gguf' cannot run: {why}")
    if why:
        say(f"the row 'gguf' is left out: {why}")
    return [method for method in methods if not (method.engine and why)]


def plan(methods: Sequence[Method], seeds: int | None = None) -> list[tuple[Method, int]]:
    """The runs of each method; ``seeds`` replaces the number of runs of those that train."""
    if seeds is not None and seeds < 1:
        raise ValueError(f"`seeds` must be >= 1, got {seeds}")
    return [(m, s) for m in methods for s in range(seeds if seeds and m.steps else m.seeds)]


def settle_precision(asked: str) -> str:
    """Trainer(precision=...) for 'auto': bf16-mixed where bfloat16 products are much faster here, else 32-true, and said."""
    if asked != "auto":
        return asked
    settled = "bf16-mixed" if matmul_speed().fastest == torch.bfloat16 else "32-true"
    say(f"precision {settled}, the faster one here; --precision sets another")
    return settled


def prepare(task: Task, batch_size: int = 1, general: Sequence[str] = ()) -> Workload:
    """Fetch and check everything before the first run, so that errors show now.

    Args:
        task: The settings that all runs share.
        batch_size: The largest number of examples that a run takes in a step.
        general: Texts of other kinds, on which each run's model is looked at.

    Returns:
        The settings from which the duration of runs follows.

    Raises:
        ValueError: texts, labels, prompt and verbalizers do not fit each other, or there are too few texts.
    """
    prompt = PromptTemplate(task.template, task.verbalizers)
    if task.model is None and task.data is None:
        size = f"{SMOLLM2.filename} ({SMOLLM2.size / 1e6:.0f} MB) and {VADER.filename} ({VADER.size / 1e6:.1f} MB)"
        say(f"the first run downloads {size}")
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
    return Workload.of(task, model, encode(tokenizer, found.train[:256], prompt, task.max_length), general)
