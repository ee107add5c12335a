"""``zolightning fit``: one task, one method; choose the step on validation, report it on test."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ..adapt.peft import ia3, lora, prefix, prompt
from ..data import load_causal_lm, model_name
from ..methods.config import one_of
from ..methods.recipes import RECIPES
from ..records.mlflow_logger import DEFAULT_STORE, mlflow_logger
from ..records.monitor import ZOMonitor
from ..strategy._lightning import ModelCheckpoint, pl
from ..strategy.ledger_io import LedgerCheckpointIO
from ..strategy.strategy import ZOStrategy
from ..tasks.item import TextTask, few_shot, in_context
from ..tasks.module import TaskData, TaskModule
from ..tasks.own import COLUMNS, own_task
from ..tasks.presets import TASKS
from ..tasks.reader import reader_for
from ..tasks.rows import load_task
from .console import make_folder, say

VIEWS: dict[str, Callable[[nn.Module], nn.Module]] = {"lora": lora, "ia3": ia3, "prefix": prefix, "prompt": prompt}
_OWN_VIEW: dict[str, Literal["lora", "prefix"]] = {"mezo-lora": "lora", "mezo-prefix": "prefix"}
_NOT_HERE = {
    "reft": "vectors that `zolightning.adapt.interventions.intervene` puts into the model",
    "zeroqat": "layers that `zolightning.adapt.fakequant.fake_quantize` makes",
}
_WITH_GRADIENT = ("cross_entropy", "likelihood", "soft_accuracy")
_NO_GRADIENT = ("accuracy", "f1", "exact_match")


def fit(
    task: str,
    data: str | None = None,
    columns: str | None = None,
    template: str | None = None,
    model: str | None = None,
    recipe: str = "default",
    objective: str | None = None,
    view: Literal["lora", "ia3", "prefix", "prompt"] | None = None,
    steps: int = 1000,
    lr: float | None = None,
    eps: float | None = None,
    select: str | None = None,
    batch_size: int = 16,
    shots: int = 0,
    demonstrations: int = 0,
    train: int = 1000,
    validation: int = 500,
    test: int = 1000,
    validations: int = 10,
    max_length: int = 512,
    precision: str = "32-true",
    offload: Literal["cpu", "disk"] | None = None,
    seed: int = 0,
    store: str = DEFAULT_STORE,
    experiment: str = "zolightning-fit",
    out: str = "zolightning-fit",
    offline: bool = False,
) -> None:
    """Train a model on a task of MeZO's paper, or on your own file. Example: zolightning fit classify --data reviews.csv

    On a task of the paper: ``zolightning fit sst2 --model facebook/opt-1.3b --recipe mezo --lr 1e-7``.

    Args:
        task: sst2, rte, cb, boolq, wsc, wic, multirc, copa, record, squad or drop; or, for your own file, classify (a text and
            its label in each row) or answer (a prompt and its answer).
        data: a folder with train, validation and perhaps test files (.jsonl, .csv, .parquet) with the task's columns, or one
            file. Default: Hugging Face datasets.
        columns: for classify and answer: the two columns' names, separated by a comma. Default: text,label or prompt,answer.
        template: for classify and answer: what the model reads before its answer, with '{text}' or '{prompt}' in it and
            perhaps other columns. Default: the text and "Label:" on a line of its own; the prompt.
        model: A Hugging Face id or a local folder of a causal language model. Default: SmolLM2-135M.
        recipe: The name of a recipe of ZOStrategy, or adamw for backprop.
        objective: cross_entropy, likelihood, accuracy, soft_accuracy, f1 or exact_match, as the task has them. Default: its
            loss with a gradient.
        view: Train new weights on the frozen model. Default: those of mezo-lora and mezo-prefix for these recipes, and none
            for others.
        steps: The number of optimizer steps; 0 reports the model as it is.
        lr: The learning rate. It falls along a cosine where the recipe normalises its steps, and is constant elsewhere.
            Default: the recipe's, or 1e-3; 2e-5 for adamw.
        eps: The perturbation scale. Default: the recipe's.
        select: The weights to train. Default: the recipe's; all of a view's.
        batch_size: The number of examples in a step.
        shots: Train on this number of examples of each class. 0: on all examples.
        demonstrations: The number of answered training examples before each prompt; with --steps 0 the in-context baseline.
        train: The largest number of training examples.
        validation: The largest number of validation examples. They choose the step that is reported.
        test: The largest number of test examples. They are looked at before training, and once after it.
        validations: The number of times that the validation examples are looked at.
        max_length: The longest prompt with its answer, in tokens. A longer one loses its beginning.
        precision: The precision of the Trainer.
        offload: The place of the weights while no operation needs them: cpu for host memory, disk for the model's own files and
            work files beside the checkpoints. Only one or two matrices are in memory then. Default: in memory.
        seed: The seed of the draws, the training and the perturbations.
        store: The MLflow tracking URI of the runs: an SQLite file, or a server's http address.
        experiment: The name of the MLflow experiment.
        out: The folder for the checkpoints.
        offline: Download no model.
    """
    _check_names(task, data, columns or template, recipe, objective, eps is not None or select is not None)
    if recipe == "adamw" and offload:
        raise ValueError("`offload` streams weights through forward passes, and adamw needs a backward pass; leave one out")
    for name, value, least in (
        ("steps", steps, 0), ("shots", shots, 0), ("demonstrations", demonstrations, 0),
        ("batch_size", batch_size, 1), ("validations", validations, 1), ("max_length", max_length, 2),
        ("train", train, 1), ("validation", validation, 1), ("test", test, 1),
    ):  # fmt: skip
        if value < least:
            raise ValueError(f"`{name}` must be >= {least}, got {value}")
    view = view or _OWN_VIEW.get(recipe)
    own = _given(lr=lr, eps=eps, select=select or (view and "all"))
    strategy = "auto" if recipe == "adamw" else ZOStrategy(recipe, offload=offload, **own)
    pl.seed_everything(seed, verbose=False)
    asked = _task(task, data, columns, template)
    splits = load_task(asked, data, train=train, validation=validation, test=test, seed=seed)
    shown = splits.train[:demonstrations]
    if shown:
        splits = type(splits)(*(in_context(part, shown) for part in (splits.train[demonstrations:], *splits[1:])))
    if steps and not splits.train:
        raise ValueError(f"`demonstrations={demonstrations}` leave no example to train on; show fewer, or take steps=0")
    if shots:
        splits = splits._replace(train=few_shot(splits.train, shots, seed))
    make_folder(out)
    network, tokenizer = load_causal_lm(model, offline=offline, stream=offload == "disk")
    reader = reader_for(asked, tokenizer, max_length)
    decay = steps if recipe in RECIPES and RECIPES[recipe].normalize else 0

    def trainable(network: nn.Module) -> TaskModule:
        tuned = network if view is None else VIEWS[view](network)
        return TaskModule(tuned.train(), reader, objective, lambda ps: _optimizer(ps, recipe, lr), decay)

    module = trainable(network)
    del network
    questions = TaskData(splits, reader, min(batch_size, len(splits.train)), seed)

    best = ModelCheckpoint(monitor=f"val/{reader.main}", mode="max", filename="{step}")
    trainer = pl.Trainer(
        strategy=strategy,
        max_steps=max(1, steps),
        precision=precision,  # type: ignore[arg-type]
        devices=1,
        default_root_dir=out,
        logger=mlflow_logger(
            f"{task}-{recipe}-seed{seed}", experiment=experiment, store=store, tags={"seed": seed}, folder=out
        ),
        plugins=[] if recipe == "adamw" or offload else [LedgerCheckpointIO()],
        callbacks=[ZOMonitor(), best],
        val_check_interval=max(1, steps // validations),
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        enable_model_summary=False,
    )
    say(f"{task}: {', '.join(f'{len(part):,} to {name}' for name, part in zip(splits._fields, splits, strict=True))}")
    say(f"{model_name(model)} as it is: {_scores(trainer.test(module, questions, verbose=False)[0])}")
    if steps:
        trainer.fit(module, questions)
        chosen = Path(best.best_model_path).stem
        if offload == "cpu":  # host memory has the weights of the last step, and the best one's are replayed from the first
            del module
            module = trainable(load_causal_lm(model, offline=offline)[0])
        tested = trainer.test(module, questions, ckpt_path="best", verbose=False)[0]
        say(f"after training, at the step that was best on validation ({chosen}): {_scores(tested)}")


def _check_names(task: str, data: str | None, own: str | None, recipe: str, objective: str | None, probing: bool) -> None:
    """Refuse what contradicts itself before anything is read; ``own``: columns or template, ``probing``: eps or select."""
    one_of("task", task, (*TASKS, *COLUMNS))
    one_of("recipe", recipe, ("adamw", *RECIPES))
    if objective is not None:
        one_of("objective", objective, (*_WITH_GRADIENT, *_NO_GRADIENT))
    if task in COLUMNS and data is None:
        raise ValueError(f"`fit {task}` trains on your own file; give it with `--data FILE`")
    if task not in COLUMNS and own:
        raise ValueError(f"`columns` and `template` are for {' and '.join(COLUMNS)}; {task} has its own")
    if recipe in _NOT_HERE:
        raise ValueError(f"recipe {recipe!r} trains {_NOT_HERE[recipe]}; do that in Python, or choose another recipe here")
    if recipe == "adamw" and probing:
        raise ValueError("`eps` and `select` are of ZOStrategy's recipes; leave them out with adamw")
    if recipe in ("adamw", "forward-gradient") and objective in _NO_GRADIENT:
        raise ValueError(
            f"{recipe} needs a gradient, and `objective={objective}` has none; choose another one, or another recipe"
        )


def _task(name: str, data: str | None, columns: str | None, template: str | None) -> TextTask:
    if data is None or name in TASKS:
        return TASKS[name]
    names = None if columns is None else [column.strip() for column in columns.split(",")]
    return own_task("classify" if name == "classify" else "answer", data, names, template)


def _optimizer(parameters: list[nn.Parameter], recipe: str, lr: float | None) -> torch.optim.Optimizer:
    if recipe == "adamw":
        return torch.optim.AdamW(parameters, lr=2e-5 if lr is None else lr, weight_decay=0.0)
    return torch.optim.SGD(parameters, lr=(RECIPES[recipe].own_lr or 1e-3) if lr is None else lr)


def _given(**settings: Any) -> Any:
    return {name: value for name, value in settings.items() if value is not None}


def _scores(tested: Any) -> str:
    return ", ".join(f"{name.removeprefix('test/')} {value:.3f}" for name, value in tested.items())
