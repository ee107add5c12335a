"""Compiled products are kept for the last few shapes alone, in a process of its own: the caches are read once."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from zolightning.strategy.onednn import SHAPES

GROWTH = """
import psutil, torch
import zolightning
weight = torch.ones(576, 576, dtype=torch.bfloat16)
for n in (1, 2):
    torch.nn.functional.linear(torch.ones(n, 576, dtype=torch.bfloat16), weight)
before = psutil.Process().memory_info().rss
for n in range(100, 400):
    torch.nn.functional.linear(torch.ones(n, 576, dtype=torch.bfloat16), weight)
print(psutil.Process().memory_info().rss - before)
"""
SETTINGS = "import os, zolightning; print(os.environ['ONEDNN_PRIMITIVE_CACHE_CAPACITY'], os.environ['LRU_CACHE_CAPACITY'])"


def run(script: str, **environment: str) -> str:
    others = {k: v for k, v in os.environ.items() if k not in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")}
    done = subprocess.run(
        [sys.executable, "-c", script], env={**others, **environment}, capture_output=True, text=True, check=True, timeout=300
    )
    return done.stdout.strip()


def test_capacities_are_bounded_where_nobody_chose_them() -> None:
    assert run(SETTINGS) == f"{SHAPES} {SHAPES}"
    assert run(SETTINGS, LRU_CACHE_CAPACITY="7") == f"{SHAPES} 7"


def test_products_of_many_shapes_take_little_memory() -> None:
    unbounded = int(run(GROWTH, ONEDNN_PRIMITIVE_CACHE_CAPACITY="1024", LRU_CACHE_CAPACITY="1024"))
    if unbounded < 60e6:
        pytest.skip(f"this machine keeps {unbounded / 1e6:.0f} MB for 300 shapes: it does not compile bfloat16 products")
    assert int(run(GROWTH)) < unbounded / 2
