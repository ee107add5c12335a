"""``zolightning fit``: one task, one method; choose the step on validation, report it on test."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from ..adapt.peft import ia3, lora, prefix, prompt
from ..data import load_causal_lm, model_name
from ..methods.config import Overrides, one_of
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
from ..tasks.reader import Reader, reader_for
from ..tasks.rows import TaskSplits, load_task
from .console import make_folder, say

View = Literal["lora", "ia3", "prefix", "prompt"]
VIEWS: dict[View, Callable[[nn.Module], nn.Module]] = {"lora": lora, "ia3": ia3, "prefix": prefix, "prompt": prompt}
_OWN_VIEW: dict[str, View] = {"mezo-lora": "lora", "mezo-prefix": "prefix"}
_NOT_HERE = {
    "reft": "vectors that `zolightning.adapt.interventions.intervene` puts into the model",
    "zeroqat": "layers that `zolightning.adapt.fakequant.fake_quantize` makes",
}
_WITH_GRADIENT = ("cross_entropy", "likelihood", "soft_accuracy")
_NO_GRADIENT = ("accuracy", "f1", "exact_match")
_LEAST = {
    **{"steps": 0, "shots": 0, "demonstrations": 0, "batch_size": 1, "validations": 1, "max_length": 2},
    **{"train": 1, "validation": 1, "test": 1},
}


@dataclass(frozen=True)
class Fit:
    """Train a model on a task of MeZO's paper, or on your own file. Example: zolightning fit classify --data reviews.csv

    On a task of the paper: ``zolightning fit sst2 --model facebook/opt-1.3b --recipe mezo --lr 1e-7``.
    """

    task: str
    """sst2, rte, cb, boolq, wsc, wic, multirc, copa, record, squad or drop; or, for your own file, classify (a text and its
    label in each row) or answer (a prompt and its answer)."""
    data: str | None = None
    """A folder with train, validation and perhaps test files (.jsonl, .csv, .parquet) with the task's columns, or one file.
    Default: Hugging Face datasets."""
    columns: str | None = None
    """For classify and answer: the two columns' names, separated by a comma. Default: text,label or prompt,answer."""
    template: str | None = None
    """For classify and answer: the text that the model reads before its answer, with '{text}' or '{prompt}' in it and perhaps
    other columns. Default: the text and "Label:" on a line of its own; the prompt."""
    model: str | None = None
    """A Hugging Face id or a local folder of a causal language model. Default: SmolLM2-135M."""
    recipe: str = "default"
    """The name of a recipe of ZOStrategy, or adamw for backprop."""
    objective: str | None = None
    """cross_entropy, likelihood, accuracy, soft_accuracy, f1 or exact_match, as the task has them. Default: its loss with a
    gradient."""
    view: View | None = None
    """Train new weights on the frozen model. Default: those of mezo-lora and mezo-prefix for these recipes, and none for
    others."""
    steps: int = 1000
    """The number of optimizer steps; 0 reports the model as it is."""
    lr: float | None = None
    """The learning rate. It falls along a cosine where the recipe normalises its steps, and is constant elsewhere. Default: the
    recipe's, or 1e-3; 2e-5 for adamw."""
    eps: float | None = None
    """The perturbation scale. Default: the recipe's."""
    select: str | None = None
    """The weights to train. Default: the recipe's; all of a view's."""
    batch_size: int = 16
    """The number of examples in a step."""
    shots: int = 0
    """Train on this number of examples of each class. 0: on all examples."""
    demonstrations: int = 0
    """The number of answered training examples before each prompt; with --steps 0 the in-context baseline."""
    train: int = 1000
    """The largest number of training examples."""
    validation: int = 500
    """The largest number of validation examples. They choose the step that is reported."""
    test: int = 1000
    """The largest number of test examples. They are looked at before training, and once after it."""
    validations: int = 10
    """The number of times that the validation examples are looked at."""
    max_length: int = 512
    """The longest prompt with its answer, in tokens. A longer one loses its beginning."""
    precision: str = "32-true"
    """The precision of the Trainer."""
    offload: Literal["cpu", "disk"] | None = None
    """The place of the weights while no operation needs them: cpu for host memory, disk for the model's own files and work
    files beside the checkpoints. Only one or two matrices are in memory then. Default: in memory."""
    seed: int = 0
    """The seed of the draws, the training and the perturbations."""
    store: str = DEFAULT_STORE
    """The MLflow tracking URI of the runs: an SQLite file, or a server's http address."""
    experiment: str = "zolightning-fit"
    """The name of the MLflow experiment."""
    out: str = "zolightning-fit"
    """The folder for the checkpoints."""
    offline: bool = False
    """Download no model."""

    def __post_init__(self) -> None:
        """Refuse contradicting options before anything is read."""
        self._check_names()
        self._check_recipe()
        for name, least in _LEAST.items():
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` must be >= {least}, got {getattr(self, name)}")

    def __call__(self) -> None:
        """Train, and report the step that was best on the validation examples on the test examples."""
        strategy = self._strategy()
        pl.seed_everything(self.seed, verbose=False)
        task = _task(self.task, self.data, self.columns, self.template)
        splits = self._splits(task)
        make_folder(self.out)
        network, tokenizer = load_causal_lm(self.model, offline=self.offline, stream=self.offload == "disk")
        reader = reader_for(task, tokenizer, self.max_length)
        module = self._module(network, reader)
        del network
        data = TaskData(splits, reader, min(self.batch_size, len(splits.train)), self.seed)

        best = ModelCheckpoint(monitor=f"val/{reader.main}", mode="max", filename="{step}")
        trainer = self._trainer(strategy, best)
        say(f"{self.task}: {', '.join(f'{len(part):,} to {name}' for name, part in zip(splits._fields, splits, strict=True))}")
        say(f"{model_name(self.model)} as it is: {_scores(trainer.test(module, data, verbose=False)[0])}")
        if self.steps:
            trainer.fit(module, data)
            if self.offload == "cpu":  # it has the last step's weights; the best one's are replayed from the first
                del module
                pl.seed_everything(self.seed, verbose=False)  # a view's new weights are drawn as before
                module = self._module(load_causal_lm(self.model, offline=self.offline)[0], reader)
            chosen = Path(best.best_model_path).stem
            tested = trainer.test(module, data, ckpt_path="best", verbose=False)[0]
            say(f"after training, at the step that was best on validation ({chosen}): {_scores(tested)}")

    def _check_names(self) -> None:
        one_of("task", self.task, (*TASKS, *COLUMNS))
        one_of("recipe", self.recipe, ("adamw", *RECIPES))
        if self.objective is not None:
            one_of("objective", self.objective, (*_WITH_GRADIENT, *_NO_GRADIENT))
        if self.task in COLUMNS and self.data is None:
            raise ValueError(f"`fit {self.task}` trains on your own file; give it with `--data FILE`")
        if self.task not in COLUMNS and (self.columns or self.template):
            raise ValueError(f"`columns` and `template` are for {' and '.join(COLUMNS)}; {self.task} has its own")

    def _check_recipe(self) -> None:
        recipe, objective = self.recipe, self.objective
        if recipe in _NOT_HERE:
            raise ValueError(f"recipe {recipe!r} trains {_NOT_HERE[recipe]}; do that in Python, or choose another recipe here")
        if recipe == "adamw" and (self.eps is not None or self.select is not None):
            raise ValueError("`eps` and `select` are of ZOStrategy's recipes; leave them out with adamw")
        if recipe == "adamw" and self.offload:
            raise ValueError("`offload` streams weights through forward passes, and adamw needs a backward pass; leave one out")
        if recipe in ("adamw", "forward-gradient") and objective in _NO_GRADIENT:
            raise ValueError(
                f"{recipe} needs a gradient, and `objective={objective}` has none; choose another one, or another recipe"
            )

    @property
    def _view(self) -> View | None:
        return self.view or _OWN_VIEW.get(self.recipe)

    def _strategy(self) -> ZOStrategy | Literal["auto"]:
        if self.recipe == "adamw":
            return "auto"
        own: Overrides = {}
        if self.lr is not None:
            own["lr"] = self.lr
        if self.eps is not None:
            own["eps"] = self.eps
        if select := self.select or (self._view and "all"):
            own["select"] = select
        return ZOStrategy(self.recipe, offload=self.offload, **own)

    def _splits(self, task: TextTask) -> TaskSplits:
        """The examples of each part, with demonstrations before their prompts, and few to train on where that is asked for."""
        splits = load_task(task, self.data, train=self.train, validation=self.validation, test=self.test, seed=self.seed)
        shown = splits.train[: self.demonstrations]
        if shown:
            rest = splits._replace(train=splits.train[self.demonstrations :])
            splits = TaskSplits(*(in_context(part, shown) for part in rest))
        if self.steps and not splits.train:
            raise ValueError(
                f"`demonstrations={self.demonstrations}` leave no example to train on; show fewer, or take steps=0"
            )
        return splits._replace(train=few_shot(splits.train, self.shots, self.seed)) if self.shots else splits

    def _module(self, network: nn.Module, reader: Reader) -> TaskModule:
        """The network with the weights of the view, which is trained on the objective."""
        view = self._view
        tuned = network if view is None else VIEWS[view](network)
        decay = self.steps if self.recipe in RECIPES and RECIPES[self.recipe].normalize else 0
        return TaskModule(tuned.train(), reader, self.objective, self._optimizer, decay)

    def _optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        if self.recipe == "adamw":
            return torch.optim.AdamW(parameters, lr=2e-5 if self.lr is None else self.lr, weight_decay=0.0)
        return torch.optim.SGD(parameters, lr=(RECIPES[self.recipe].own_lr or 1e-3) if self.lr is None else self.lr)

    def _trainer(self, strategy: ZOStrategy | Literal["auto"], best: ModelCheckpoint) -> pl.Trainer:
        name = f"{self.task}-{self.recipe}-seed{self.seed}"
        logger = mlflow_logger(name, experiment=self.experiment, store=self.store, tags={"seed": self.seed}, folder=self.out)
        return pl.Trainer(
            strategy=strategy,
            max_steps=max(1, self.steps),
            precision=self.precision,  # type: ignore[arg-type]
            devices=1,
            default_root_dir=self.out,
            logger=logger,
            plugins=[] if self.recipe == "adamw" or self.offload else [LedgerCheckpointIO()],
            callbacks=[ZOMonitor(), best],
            val_check_interval=max(1, self.steps // self.validations),
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            enable_model_summary=False,
        )


def _task(name: str, data: str | None, columns: str | None, template: str | None) -> TextTask:
    if data is None or name in TASKS:
        return TASKS[name]
    names = None if columns is None else [column.strip() for column in columns.split(",")]
    return own_task("classify" if name == "classify" else "answer", data, names, template)


def _scores(tested: Mapping[str, float]) -> str:
    return ", ".join(f"{name.removeprefix('test/')} {value:.3f}" for name, value in tested.items())
