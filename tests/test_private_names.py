"""Each private name of another library that we lean on, with the version that it was seen in: an upgrade shows here first."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import SequentialLR, StepLR

import zolightning

ROOT = Path(zolightning.__file__).parent


class Private(NamedTuple):
    """A name without a promise.

    Args:
        library: the package on PyPI.
        seen: its version that has the name and means by it what we read.
        owner: where the name is looked up: a module or class by its path, or a function that makes an object with it.
        use: why no public name will do.
    """

    library: str
    seen: str
    owner: str | Callable[[], Any]
    use: str


def _scheduler() -> SequentialLR:
    optimizer = SGD(nn.Linear(1, 1).parameters(), lr=1.0)
    return SequentialLR(optimizer, [StepLR(optimizer, 1), StepLR(optimizer, 1)], [1])


def _loop() -> Any:
    from helpers import quiet_trainer

    return quiet_trainer(max_epochs=1).fit_loop.epoch_loop


def _logger() -> Any:
    from lightning.pytorch.loggers import MLFlowLogger

    return MLFlowLogger(tracking_uri="sqlite:///unused.db")


def _compiled() -> Any:
    from helpers import Task, mlp
    from lightning.pytorch.utilities.compile import from_compiled

    return from_compiled(torch.compile(Task(mlp())))  # type: ignore[arg-type]


def _stepped() -> Any:
    scheduler = _scheduler()
    scheduler.optimizer.step()
    return scheduler.optimizer


def _layer() -> nn.Module:
    return nn.Linear(1, 1)


def _storage() -> Any:
    return torch.zeros(1).untyped_storage()


def _aten() -> Any:
    return torch.ops.aten


def _parser() -> Any:
    from jsonargparse import ArgumentParser

    return ArgumentParser()


LLAMA_CPP = ("llama-cpp-python", "0.3.34")
LIGHTNING, TORCH, MODULE = ("lightning", "2.6.6"), ("torch", "2.13.0"), "torch.nn:Module"
NAMES = {
    "_cdata": Private(*TORCH, _storage, "the address by which a storage is known while weak references are held"),
    "_ResultCollection": Private(
        *LIGHTNING, "lightning.pytorch.trainer.connectors.logger_connector.result", "its log() is silent in further probes"
    ),
    "_results": Private(*LIGHTNING, _loop, "the loop's collection, swapped while a probe runs: logs count once a step"),
    "_WrappingCheckpointIO": Private(
        *LIGHTNING, "lightning.pytorch.plugins.io.wrapper", "to find LedgerCheckpointIO inside another plugin"
    ),
    "_convert_params": Private(*LIGHTNING, "lightning.fabric.utilities.logger", "parameters as MLFlowLogger sends them"),
    "_flatten_dict": Private(*LIGHTNING, "lightning.fabric.utilities.logger", "parameters as MLFlowLogger sends them"),
    "_MultiProcessingLauncher": Private(
        *LIGHTNING, "lightning.pytorch.strategies.launchers", "starts the ranks of a notebook, as under DDP"
    ),
    "_SubprocessScriptLauncher": Private(
        *LIGHTNING, "lightning.pytorch.strategies.launchers", "starts the ranks of a script, as under DDP"
    ),
    "_sync_ddp_if_available": Private(
        *LIGHTNING, "lightning.fabric.utilities.distributed", "reduces a metric over ranks, as under DDP"
    ),
    "_initialized": Private(*LIGHTNING, _logger, "whether MLFlowLogger has made its run, without making it"),
    "_after_closure": Private(
        *LIGHTNING, "lightning.pytorch.plugins.precision:Precision", "gradient clipping and its hooks, on projected gradients"
    ),
    "_compiler_ctx": Private(*LIGHTNING, _compiled, "whether a LightningModule was compiled"),
    "_C": Private(*TORCH, "torch", "DisableTorchFunction: reads that the probe is not to see"),
    "_dynamo": Private(*TORCH, "torch", "OptimizedModule: a compiled module, whose weights are swapped"),
    "_compiled_call_impl": Private(*TORCH, MODULE, "module.compile() leaves the compiled call there"),
    "_buffers": Private(*TORCH, _layer, "buffers that are None, and to put one back in its place"),
    "_non_persistent_buffers_set": Private(*TORCH, _layer, "what a state_dict leaves out"),
    "_modules": Private(*TORCH, _layer, "whether a child has a name"),
    "_forward_hooks": Private(*TORCH, _layer, "a hooked block must run again in each probe"),
    "_forward_pre_hooks": Private(*TORCH, _layer, "a hooked block must run again in each probe"),
    "_load_state_dict_pre_hooks": Private(
        *TORCH, _layer, "Lightning's precision plugin would quantise a loaded state once more"
    ),
    "_apply": Private(*TORCH, MODULE, "a quantised layer's scales follow module.to()"),
    "_load_from_state_dict": Private(*TORCH, MODULE, "a quantised layer's scales in a state_dict"),
    "_save_to_state_dict": Private(*TORCH, MODULE, "a quantised layer's scales in a state_dict"),
    "_opt_called": Private(*TORCH, _stepped, "schedulers warn unless the optimizer's step() was called"),
    "_last_lr": Private(*TORCH, _scheduler, "a schedule that is scaled"),
    "_schedulers": Private(*TORCH, _scheduler, "the schedules inside SequentialLR and ChainedScheduler"),
    "_scaled_dot_product_flash_attention_for_cpu": Private(*TORCH, _aten, "the bench counts its operations"),
    "_scaled_dot_product_flash_attention_for_cpu_backward": Private(*TORCH, _aten, "the bench counts its operations"),
    "_make_subclass": Private(*TORCH, "torch:Tensor", "a Parameter of another class over the same memory"),
    "_nn": Private(*TORCH, "torch:_C", "where _parse_to is"),
    "_parse_to": Private(*TORCH, lambda: torch._C._nn, "reads the arguments of Tensor.to()"),
    "_option_string_actions": Private("jsonargparse", "4.53.0", _parser, "the options of a verb, to say which one was meant"),
    "_lib": Private(*LLAMA_CPP, "llama_cpp.llama_cpp", "the library behind the binding, for ggml's own functions"),
    "_base_path": Private(*LLAMA_CPP, "llama_cpp.llama_cpp", "the folder of its backends, which a build loads one by one"),
    "_convert_weight_packed_for_cpu_inverse": Private(
        "bitsandbytes", "0.50.2", "bitsandbytes.functional", "undoes the packing that an eval-mode forward does for good"
    ),
    "_from_config": Private(
        "transformers", "5.23.0", "transformers:PreTrainedModel", "a model of a class that is no Auto class"
    ),
    "_attn_implementation": Private(
        "transformers",
        "5.23.0",
        "transformers:PreTrainedConfig",
        "which attention a model has, to add the beginning of prompts",
    ),
    "_init_weights": Private("transformers", "5.23.0", "transformers:PreTrainedModel", "first weights of a new head"),
    "_keep_in_fp32_modules": Private(
        "transformers", "5.23.0", "transformers:PreTrainedModel", "layers that transformers will not quantise"
    ),
}

OURS_TOO = {"_asdict", "_fields", "_replace"}
"""Documented parts of namedtuples."""


@pytest.mark.parametrize("name", NAMES)
def test_it_is_there(name: str) -> None:
    library, seen, owner, use = NAMES[name]
    try:
        installed = version(library)
    except PackageNotFoundError:
        pytest.skip(f"{library} is not installed")
    if isinstance(owner, str):
        module, _, attribute = owner.partition(":")
        found = import_module(module)
        found = getattr(found, attribute) if attribute else found
    else:
        found = owner()
    assert hasattr(found, name), f"{library} {installed} has no {name}, which {seen} had; it is used for this: {use}"


def private(path: Path) -> tuple[set[str], set[str]]:
    """(names with one underscore that a file gives, those that it takes from an object or a module, or has in a string)."""
    given, taken = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            given.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            given.add(node.id)
        elif isinstance(node, ast.Attribute):
            own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            (given if own and isinstance(node.ctx, ast.Store) else taken).add(node.attr)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            taken.update(alias.name for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
            taken.add(node.value)
    return _underscored(given), _underscored(taken)


def _underscored(names: set[str]) -> set[str]:
    return {name for name in names if name.startswith("_") and not name.startswith("__") and name != "_"}


def _files() -> Iterator[Path]:
    yield from ROOT.rglob("*.py")
    yield from (ROOT.parent / "dashboard").rglob("*.py")


def test_no_other_is_used() -> None:
    given, taken = (set().union(*names) for names in zip(*map(private, _files()), strict=True))
    assert taken - given - OURS_TOO <= NAMES.keys(), "list it in NAMES, or better: use a public name"
    assert NAMES.keys() <= taken | given, "NAMES lists what nobody uses any more"
