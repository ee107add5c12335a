"""LightningCLI: the strategy by class path, its settings as options, and their documentation."""

from __future__ import annotations

from typing import Any, get_type_hints

import pytest
from helpers import Task, batches, loader, mlp
from lightning.pytorch.cli import LightningCLI
from torch.optim import SGD

from zolightning import Sparse, ZOConfig, ZOStrategy
from zolightning.methods import recipes
from zolightning.methods.config import Overrides


class CliTask(Task):
    def __init__(self, lr: float = 1e-2) -> None:
        super().__init__(mlp(), optimizer=lambda p: SGD(p, lr=lr))

    def train_dataloader(self) -> Any:
        return loader(batches(3))


QUIET = [
    f"--trainer.{name}={value}"
    for name, value in {
        "logger": "false", "enable_checkpointing": "false", "enable_progress_bar": "false", "enable_model_summary": "false",
        "accelerator": "cpu", "max_epochs": "1",
    }.items()
]  # fmt: skip


def run(*options: str, command: str | None = "fit") -> ZOStrategy:
    args = [*([command] if command else []), *QUIET, *options]
    cli = LightningCLI(CliTask, args=args, save_config_callback=None, seed_everything_default=1)
    assert isinstance(cli.trainer.strategy, ZOStrategy)
    return cli.trainer.strategy


@pytest.mark.parametrize("option", ["strategy", "strategy.class_path"])
def test_by_class_path(option: str) -> None:
    strategy = run(f"--trainer.{option}=zolightning.ZOStrategy")
    assert strategy.config == recipes.DEFAULT
    assert strategy.zo_step == 3


def test_by_name() -> None:
    assert run("--trainer.strategy=zo").zo_step == 3


def test_settings() -> None:
    strategy = run(
        "--trainer.strategy=zolightning.ZOStrategy",
        "--trainer.strategy.init_args.recipe=mezo",
        "--trainer.strategy.init_args.eps=0.01",
        "--trainer.strategy.init_args.num_queries=4",
        "--trainer.strategy.init_args.select=re:weight",
        "--trainer.strategy.init_args.lr=null",
    )
    assert strategy.config == recipes.MEZO.override(eps=0.01, num_queries=4, select="re:weight", lr=None)
    assert len(strategy.last_record.terms) == 4  # type: ignore[union-attr]


def test_recipe_as_a_config() -> None:
    strategy = run(
        "--trainer.strategy=zolightning.ZOStrategy",
        '--trainer.strategy.init_args.recipe={"estimator": "spsa", "eps": 0.5, "normalize": false}',
    )
    assert strategy.config == ZOConfig(estimator="spsa", eps=0.5, normalize=False)


def test_estimator_by_class_path() -> None:
    strategy = run(
        "--trainer.strategy=zolightning.ZOStrategy",
        '--trainer.strategy.init_args.estimator={"class_path": "zolightning.methods.estimators.SPSA", '
        '"init_args": {"eps": 0.25}}',
    )
    assert repr(strategy.estimator) == "SPSA(eps=0.25, num_queries=1)"


def test_structure_and_cycle() -> None:
    strategy = run(
        "--trainer.strategy=zolightning.ZOStrategy",
        "--trainer.strategy.init_args.recipe=mezo",
        '--trainer.strategy.init_args.structure={"class_path": "zolightning.Sparse", "init_args": {"sparsity": 0.8}}',
    )
    assert strategy.config == recipes.MEZO.override(structure=Sparse(0.8))
    with pytest.raises(ValueError, match=r"cycle=Cycle\(blocks=2, .* needs selected parameters in at least two blocks"):
        run(
            "--trainer.strategy=zolightning.ZOStrategy",
            "--trainer.strategy.init_args.structure=lowrank",
            "--trainer.strategy.init_args.cycle.blocks=2",
        )


@pytest.mark.parametrize("option", ["eps=much", "num_queries=0", "noise=pink", "epss=1"])
def test_bad_settings_are_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((SystemExit, ValueError)) as caught:
        run("--trainer.strategy=zolightning.ZOStrategy", f"--trainer.strategy.init_args.{option}")
    assert option.split("=")[0] in capsys.readouterr().err + str(caught.value)


def test_help_documents_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("--trainer.strategy.help=zolightning.ZOStrategy")
    shown = " ".join(capsys.readouterr().out.split())
    for name in ZOConfig.__dataclass_fields__:
        assert f".{name} " in shown
    assert "Perturbation scale, > 0" in shown


def test_overrides_are_the_fields_of_the_config() -> None:
    assert get_type_hints(Overrides) == get_type_hints(ZOConfig)
