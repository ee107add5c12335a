"""Two processes over loopback: equal weights after each step, the bits of one process, and a few bytes a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from helpers import PerExampleTask, batches, mlp, per_example_mse, quiet_trainer
from rank_worker import CONFIGS, SIZE, STEPS, examples, trained
from ranks import run_cases
from torch.utils.data import DataLoader

from zolightning import ZOStrategy

SPREAD = [("sign", "spsa"), ("sign", "two directions"), ("query", "two directions"), ("query", "per example")]
CASES = [
    ["loop", "data", "spsa", 200],
    ["loop", "data", "default", STEPS],
    ["loop", "data", "per example", STEPS],
    *(["loop", mode, config, STEPS] for mode, config in SPREAD),
    ["loop", "sign", "spsa", 200],
    ["loop", "query", "two directions", 200],
    ["trainer", "spsa", 4],
    ["trainer", "per example", 4],
]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Sequence[Mapping[str, Any]]:
    found = run_cases(CASES, tmp_path_factory.mktemp("ranks"))
    errors = [result["error"] for rank in found for result in rank.values() if "error" in result]
    assert not errors, errors[0]
    return found


@pytest.mark.parametrize("case", CASES, ids=str)
def test_ranks_have_equal_weights_after_each_step(case: list[Any], ranks: Sequence[Mapping[str, Any]]) -> None:
    first, second = (rank[str(case)] for rank in ranks)
    assert first == second
    assert len(set(first.get("prints", []))) == len(first.get("prints", []))  # every step moved them


@pytest.mark.parametrize(("mode", "config"), [("data", "per example"), *SPREAD])
def test_one_process_on_all_examples_has_the_same_bits(mode: str, config: str, ranks: Sequence[Mapping[str, Any]]) -> None:
    _, _, prints = trained(CONFIGS[config].override(one_batch=False), batches(STEPS, size=SIZE))
    assert ranks[0][str(["loop", mode, config, STEPS])]["prints"] == prints


@pytest.mark.parametrize("config", ["spsa", "per example"])
def test_the_trainer_deals_examples_out_as_one_process_reads_them(config: str, ranks: Sequence[Mapping[str, Any]]) -> None:
    """To the rounding of products of four rows in place of eight, of which 1e-3 is the smallest difference of two probes."""
    module = PerExampleTask(mlp(), per_example_mse)
    quiet_trainer(ZOStrategy(CONFIGS[config], one_batch=False)).fit(module, DataLoader(examples(SIZE * 4), batch_size=SIZE))
    got = ranks[0][str(["trainer", config, 4])]
    assert got["steps"] == 4
    for mine, theirs in zip(module.net.parameters(), got["weights"], strict=True):
        torch.testing.assert_close(mine.detach(), torch.tensor(theirs), rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", [case for case in CASES if case[0] == "loop"], ids=str)
def test_payload_is_eight_bytes_a_coefficient_and_64_a_step(case: list[Any], ranks: Sequence[Mapping[str, Any]]) -> None:
    steps, found = case[-1], ranks[0][str(case)]
    begin = 16 + 4 + 2 * 200  # the ranks' greeting, and messages that found too little room
    assert found["sent"] <= begin + steps * (8 * found["terms"] + 64)
