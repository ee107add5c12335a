from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from zolightning import ZOConfig, ZOStrategy
from zolightning.methods import recipes
from zolightning.methods.estimators import SPSA, PerExampleSPSA
from zolightning.methods.recipes import recipe
from zolightning.methods.shaping import Chain, Clip, Normalize
from zolightning.noise import Gaussian, Rademacher


def test_three_ways_to_say_it() -> None:
    expected = recipes.MEZO.override(lr=1e-7)
    assert ZOStrategy("mezo", lr=1e-7).config == expected
    assert ZOStrategy(expected).config == expected
    assert ZOStrategy(recipes.MEZO, lr=1e-7).config == expected
    assert ZOStrategy(eps=1e-3, num_queries=4).config == ZOConfig(eps=1e-3, num_queries=4, lr="auto")


def test_pieces() -> None:
    config = ZOConfig(estimator="spsa", eps=0.5, num_queries=3, noise="gaussian", clip=2.0, normalize_beta=0.7)
    estimator = config.build_estimator(torch.float32)
    assert isinstance(estimator, SPSA)
    assert (estimator.eps, estimator.num_queries) == (0.5, 3)
    assert isinstance(config.build_distribution(), Gaussian)
    assert repr(config.build_shaping()) == repr(Chain(Clip(2.0), Normalize(0.7)))
    assert isinstance(ZOConfig().build_estimator(torch.bfloat16), PerExampleSPSA)
    assert repr(ZOConfig(normalize=False).build_shaping()) == "Chain()"


def test_pieces_may_be_objects() -> None:
    estimator, noise = SPSA(0.1), Rademacher()
    config = ZOConfig(estimator=estimator, noise=noise)
    assert config.build_estimator(torch.float16) is estimator
    assert config.build_distribution() is noise


@pytest.mark.parametrize(
    ("dtype", "eps"), [(torch.float32, 1e-3), (torch.float64, 1e-3), (torch.bfloat16, 3e-3), (torch.float16, 3e-3)]
)
def test_eps_by_dtype(dtype: torch.dtype, eps: float) -> None:
    assert ZOConfig().build_estimator(dtype).eps == eps
    assert ZOConfig(eps=0.2).build_estimator(dtype).eps == 0.2


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_recipes_have_plain_values(name: str) -> None:
    values = recipe(name).to_dict()
    assert set(values) == set(ZOConfig.__dataclass_fields__)
    assert all(isinstance(v, (int, float, str, type(None))) for v in values.values())


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_settings_know_the_recipe_that_they_are(name: str) -> None:
    config = recipe(name)
    assert recipes.name_of(config.override()) == ZOStrategy(config).recipe_name == name
    assert ZOStrategy(config.override(lr=0.123)).recipe_name == "custom"


def test_mezo_has_the_paper_s_hyperparameters() -> None:
    assert (recipes.MEZO.eps, recipes.MEZO.lr, recipes.MEZO.noise, recipes.MEZO.select) == (1e-3, 1e-6, "gaussian", "all")


def test_objects_and_functions_become_text() -> None:
    values = ZOConfig(estimator=SPSA(0.1), select=lambda name, parameter: True).to_dict()
    assert values["estimator"] == "SPSA(eps=0.1, num_queries=1)"
    assert "lambda" in values["select"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eps": 0.0}, "eps"),
        ({"eps": -1.0}, "eps"),
        ({"eps": math.nan}, "eps"),
        ({"eps": math.inf}, "eps"),
        ({"num_queries": 0}, "num_queries"),
        ({"num_queries": 1.5}, "num_queries"),
        ({"noise": "rademaher"}, "did you mean 'rademacher'"),
        ({"noise": 3}, "`noise=3` is unknown"),
        ({"estimator": "spas"}, "did you mean 'spsa'"),
        ({"structure": "rank2"}, "did you mean 'rank1'"),
        ({"optimizer": "adm"}, "allowed: 'module', 'sgd', 'momentum', 'sign', 'adam'; did you mean 'adam'"),
        ({"optimizer": 3}, "`optimizer=3` is unknown"),
        ({"normalize": "rms"}, "allowed: 'True', 'False', 'std'"),
        ({"lr": -1.0}, "lr"),
        ({"lr": math.nan}, "lr"),
        ({"lr": math.inf}, "lr"),
        ({"clip": 0.0}, "limit"),
        ({"normalize_beta": 1.0}, "beta"),
        ({"max_skips": 0}, "max_skips"),
        ({"anchor": -0.5}, "`anchor` must be a finite number >= 0, or None, got -0.5"),
        ({"anchor": math.inf}, "anchor"),
        ({"anchor": "0.5"}, "got '0.5'"),
    ],
    ids=str,
)
def test_bad_values(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ZOStrategy(**settings)


def test_unknown_names() -> None:
    with pytest.raises(TypeError, match="`epss` is not a setting of ZOStrategy; did you mean 'eps'"):
        ZOStrategy(epss=1e-3)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="there are estimator, eps"):
        ZOStrategy(zzz=1)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="did you mean 'mezo'"):
        ZOStrategy("mezzo")
