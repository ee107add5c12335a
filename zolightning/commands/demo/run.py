"""One run of the demo: a method, a seed, its own process, so that peak memory is the run's only."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ...adapt.matmul import matmul_speed
from ...data import (
    PromptTemplate,
    Splits,
    encode,
    film_snippets,
    load_causal_lm,
    model_name,
    read_table,
    text_perplexity,
    verbalizer_ids,
)
from ...data.text import drawn
from ...records.memory import MemoryMeter
from ...records.mlflow_logger import DEFAULT_STORE, mlflow_logger
from ...records.monitor import ZOMonitor
from ...strategy._lightning import Callback, MLFlowLogger, pl
from ...strategy.onednn import keep_few_shapes
from ..bench.machine import cpu_name
from ..processes import OwnProcess, ProcessFailed, quiet_libraries
from .engine import build_engine
from .methods import Method
from .module import PromptClassifier, PromptData, intervene_at_ending
from .progress import Progress


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The settings that all runs of a demo or of a sweep share: the model, the texts, and the places of the records."""

    model: str | None = None
    """A Hugging Face id or a local folder. Default: SmolLM2-135M, 93 MB from the Python package index."""

    data: str | None = None
    """A CSV or JSONL file, or a folder with train, validation and test files. Default: film-review snippets, 2.5 MB."""

    text: str = "text"
    """The column with the texts."""

    label: str = "label"
    """The column with the labels."""

    template: str = "{text} It was"
    """The prompt; {text} stands for the text."""

    verbalizers: tuple[str, ...] = (" terrible", " great")
    """The next word for each label, with the labels in sorted order. Each must be one token."""

    max_length: int = 128
    """The longest prompt, in tokens."""

    precision: str = "32-true"
    """The precision of the Trainer, which the dtype of a frozen model follows. auto: bf16-mixed where this machine multiplies
    matrices faster in it, as measured, else 32-true."""

    store: str = DEFAULT_STORE
    """The MLflow tracking URI of the runs: an SQLite file, or a server's http address."""

    experiment: str = "zolightning-demo"
    """The name of the MLflow experiment."""

    out: str = "zolightning-demo"
    """The folder for the table and the picture."""

    offline: bool = False
    """Download nothing; use the files in the cache."""


@dataclass(frozen=True, kw_only=True)
class Task(Comparison):
    """A comparison with its evaluation."""

    validation: int = 200
    """The largest number of validation examples."""

    test: int = 1000
    """The largest number of test examples."""

    validations: int = 5
    """The number of times that a run looks at the validation examples."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the matrix products."""
        named = {"bf16": torch.bfloat16, "16": torch.float16, "64": torch.float64}
        return named.get(self.precision.partition("-")[0], torch.float32)


@dataclass(frozen=True)
class Result:
    """The result of a run."""

    method: str
    title: str
    seed: int
    accuracy: float
    loss: float
    peak_memory: int
    seconds: float
    forward_passes: int
    examples: int
    history: list[dict[str, float]]
    """``step``, ``seconds`` and ``cpu_seconds`` of training, ``loss`` and ``accuracy`` on the validation examples."""

    cpu_seconds: float = 0.0
    """Of training, by all threads of the process; a busy machine does not stretch them."""

    weights: int = 0
    """Bytes of the model that is trained."""

    process_seconds: float = 0.0
    """CPU seconds of the whole process: training, validation, test, and the loading of libraries and model."""

    perplexity: float | None = None
    """On text of other kinds, of the model with all that was trained in place; None: not measured."""

    @staticmethod
    def load(path: Path) -> Result:
        return Result(**json.loads(path.read_text()))

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1))


def splits(task: Task, seed: int = 0) -> Splits:
    """The task's texts; the same for every method and seed."""
    if task.data is None:
        return film_snippets(seed, validation=task.validation, test=task.test, offline=task.offline)
    found = read_table(task.data, text=task.text, label=task.label, seed=seed)
    return found._replace(validation=drawn(found.validation, task.validation), test=drawn(found.test, task.test))


class _History(Callback):
    """Notes each validation with the seconds of training it took to get there."""

    def __init__(self, monitor: ZOMonitor) -> None:
        self.monitor, self.rows = monitor, list[dict[str, float]]()

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        metrics = trainer.callback_metrics
        row = {"step": trainer.global_step, "seconds": self.monitor.train_seconds, "cpu_seconds": self.monitor.cpu_seconds}
        row |= {name: float(metrics[f"val/{name}"]) for name in ("loss", "accuracy")}
        self.rows.append(row)


def build(task: Task, method: Method, seed: int) -> tuple[PromptClassifier, PromptData]:
    """The model, made ready for the method, and the task's encoded texts; seeds everything."""
    keep_few_shapes()  # for backprop too, so that peaks compare methods
    pl.seed_everything(seed, verbose=False)
    texts, prompt = splits(task), PromptTemplate(task.template, task.verbalizers)
    if method.engine:
        return build_engine(method, texts, prompt, task.max_length, seed, task.offline)
    model, tokenizer = load_causal_lm(task.model, offline=task.offline)
    candidates = verbalizer_ids(tokenizer, prompt, texts.label_names)
    train, validation, test = (encode(tokenizer, part, prompt, task.max_length) for part in texts[:3])
    data = PromptData(train, validation, test, tokenizer.pad_token_id, method.batch_size, seed)
    model = method.prepare(model, task.dtype)
    if method.interventions:
        intervene_at_ending(model, train, tokenizer.pad_token_id)
    decay = method.steps if method.decay else 0
    module = method.module_type(model, candidates, method.make_optimizer(), decay)
    module.perplexity = partial(text_perplexity, tokenizer=tokenizer)
    return module, data


def start_record(task: Task, method: Method, seed: int, run_name: str) -> MLFlowLogger:
    """The run in the task's store, with its settings."""
    tags = {"seed": seed} | ({"zo.recipe": "published"} if method.published else {})  # zeroth-order without our strategy
    logger = mlflow_logger(run_name, experiment=task.experiment, store=task.store, tags=tags, folder=task.out)
    logger.log_hyperparams({k: v for k, v in asdict(method).items() if v is not None} | {"seed": seed})
    logger.log_hyperparams({"model": model_name(task.model), "precision": task.precision})
    return logger


@quiet_libraries()
def run(task: Task, method: Method, seed: int, general: Sequence[str] = ()) -> Result:
    """Fine-tune and test, and measure the perplexity on ``general`` texts; everything is logged to the task's store."""
    module, data = build(task, method, seed)
    logger = start_record(task, method, seed, f"{method.name}-seed{seed}")
    monitor = ZOMonitor(method.title)
    history = _History(monitor)
    trainer = pl.Trainer(
        strategy=method.strategy(),
        max_steps=max(1, method.steps),
        default_root_dir=task.out,
        precision=method.trainer_precision(task.precision),  # type: ignore[arg-type]
        devices=1,
        logger=logger,
        callbacks=[monitor, history, Progress()],
        val_check_interval=max(1, method.steps // task.validations),
        check_val_every_n_epoch=None,
        num_sanity_val_steps=-1,  # the first point of every curve
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        log_every_n_steps=1,
    )
    if method.steps:
        trainer.fit(module, data)
        assert monitor.meter is not None
        meter, peak = monitor.meter, monitor.meter.peak()
        module.model = method.finish(module.model)
    else:
        trainer.validate(module, data, verbose=False)  # libraries load their parts before memory is measured
        meter = MemoryMeter(module, trainer.strategy.root_device)
    tested = trainer.test(module, data, verbose=False)[0]
    if not method.steps:
        peak = meter.peak()
    result = Result(
        method=method.name,
        title=method.title,
        seed=seed,
        accuracy=tested["test/accuracy"],
        loss=tested["test/loss"],
        peak_memory=peak + module.outside,
        seconds=monitor.train_seconds,
        forward_passes=monitor.forward_passes,
        examples=monitor.examples_seen,
        history=history.rows,
        cpu_seconds=monitor.cpu_seconds,
        weights=meter.weights + module.outside,
        process_seconds=time.process_time(),
        perplexity=module.perplexity(module.model, texts=general) if general and module.perplexity else None,
    )
    summary = {"peak_memory": result.peak_memory, "train_seconds": result.seconds, "perplexity": result.perplexity}
    logger.log_metrics({f"summary/{name}": value for name, value in summary.items() if value is not None}, step=method.steps)
    logger.finalize("success")
    return result


def run_alone(task: Task, method: Method, seed: int, threads: int | None = None, general: Sequence[str] = ()) -> Result:
    """:func:`run` in a process of its own; its result is kept in the task's folder.

    Raises:
        SystemExit: the process did not come to its end.
    """
    path = Path(task.out, "runs", f"{method.name}-{seed}.json")
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        result = OwnProcess(threads).call(run, task, method, seed, general)
    except ProcessFailed as error:
        raise SystemExit(f"{method.title} failed ({error}); the runs before it are in {task.store}") from None
    result.save(path)
    return result


def settings(task: Task) -> dict[str, Any]:
    """The settings on which the results depend, for the report."""
    return {k: v for k, v in asdict(task).items() if k not in ("store", "out")}


def machine() -> dict[str, Any]:
    """The machine on which their times depend."""
    speed = matmul_speed()
    gflops = {str(dtype).removeprefix("torch."): round(flops / 1e9) for dtype, flops in speed.flops.items()}
    found = {"cpu": cpu_name(), "instructions": torch.backends.cpu.get_cpu_capability(), "threads": speed.threads}
    return found | {"device": str(speed.device), "gflops": gflops}
