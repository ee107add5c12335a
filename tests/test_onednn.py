"""Compiled products are kept for the last few shapes only, in a process of its own: the caches are read once."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest
import torch
from helpers import Task, fit
from torch import nn

from zolightning.strategy.onednn import SHAPES

pytestmark = pytest.mark.integration

CAPACITIES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")

GROWTH = """
import psutil, torch
from zolightning.strategy.onednn import keep_few_shapes
keep_few_shapes()
weight = torch.ones(64, 64, 3)  # a convolution, for which oneDNN compiles float32 code too
for n in (800, 801):
    torch.nn.functional.conv1d(torch.ones(1, 64, n), weight)
before = psutil.Process().memory_info().rss
for n in range(100, 700):
    torch.nn.functional.conv1d(torch.ones(1, 64, n), weight)
print(psutil.Process().memory_info().rss - before)
"""


def run(script: str, **environment: str) -> int:
    others = {k: v for k, v in os.environ.items() if k not in CAPACITIES}
    done = subprocess.run(
        [sys.executable, "-c", script], env={**others, **environment}, capture_output=True, text=True, check=True, timeout=300
    )
    return int(done.stdout)


@pytest.mark.parametrize("chosen", [(), CAPACITIES[1:], CAPACITIES])
def test_a_fit_bounds_the_capacities_that_nobody_chose_and_says_so(
    chosen: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in CAPACITIES:
        monkeypatch.setenv(name, "7")
        if name not in chosen:
            monkeypatch.delenv(name)
    with caplog.at_level(logging.INFO):
        fit(Task(nn.Linear(2, 1)), [(torch.ones(1, 2), torch.ones(1, 1))])
    assert [os.environ[name] for name in CAPACITIES] == ["7" if name in chosen else str(SHAPES) for name in CAPACITIES]
    said = [record.message for record in caplog.records if "oneDNN" in record.message]
    assert len(said) == (len(chosen) < 2)
    assert all(name in said[0] for name in CAPACITIES if said and name not in chosen)


def test_products_of_many_shapes_take_little_memory() -> None:
    unbounded = run(GROWTH, **dict.fromkeys(CAPACITIES, "1024"))
    if unbounded < 30e6:
        pytest.skip(f"this machine keeps {unbounded / 1e6:.0f} MB for 600 shapes: it compiles little code for them")
    assert run(GROWTH) < unbounded / 2
