"""The measured speed of matrix products, and what is chosen by it."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

import zolightning.adapt.matmul as matmul
from zolightning.adapt.matmul import MatmulSpeed, dtype_of_products, fastest_dtype, matmul_speed
from zolightning.commands.demo.main import settle_precision
from zolightning.commands.demo.run import Task

CPU = torch.device("cpu")
AVX2 = MatmulSpeed(CPU, 2, {torch.float32: 95e9, torch.bfloat16: 16e9, torch.float16: 20e9})
AVX512_BF16 = MatmulSpeed(CPU, 2, {torch.float32: 120e9, torch.bfloat16: 400e9, torch.float16: 40e9})
GPU = MatmulSpeed(torch.device("cuda"), 2, {torch.float32: 5e13, torch.bfloat16: 7e14, torch.float16: 7e14})


def pretend(speed: MatmulSpeed, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(matmul, "_measured", lambda device, threads: speed)


def test_it_is_measured_once_and_said(caplog: pytest.LogCaptureFixture) -> None:
    matmul._measured.cache_clear()
    state = torch.get_rng_state()
    with caplog.at_level(logging.INFO):
        speed = matmul_speed(CPU)
    assert matmul_speed(CPU) is speed
    assert torch.equal(torch.get_rng_state(), state)
    assert all(flops > 0 for flops in speed.flops.values())
    assert [record.getMessage() for record in caplog.records if "GFLOP" in record.getMessage()] == [str(speed)]
    assert "GFLOP/s: float32 " in str(speed)


@pytest.mark.parametrize(
    ("speed", "fastest", "products"),
    [
        (AVX2, torch.float32, [torch.float32, torch.float32, torch.float32, torch.float64]),
        (AVX512_BF16, torch.bfloat16, [torch.bfloat16, torch.float32, torch.float32, torch.float64]),
        (GPU, torch.bfloat16, [torch.bfloat16, torch.float16, torch.float32, torch.float64]),
    ],
    ids=["avx2", "avx512-bf16", "gpu"],
)
def test_a_narrow_dtype_is_taken_where_it_pays(
    speed: MatmulSpeed, fastest: torch.dtype, products: list[torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(speed, monkeypatch)
    assert fastest_dtype() == fastest
    stored = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    assert [dtype_of_products(dtype) for dtype in stored] == products
    assert settle_precision("auto") == ("32-true" if fastest == torch.float32 else "bf16-mixed")
    assert settle_precision("bf16-true") == "bf16-true"


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [
        ("32-true", torch.float32),
        ("bf16-mixed", torch.bfloat16),
        ("bf16-true", torch.bfloat16),
        ("16-mixed", torch.float16),
        ("64-true", torch.float64),
    ],
)
def test_the_dtype_of_a_task_follows_the_trainers_precision(precision: str, dtype: torch.dtype) -> None:
    assert Task(precision=precision).dtype == dtype


@pytest.mark.parametrize("speed", [AVX2, AVX512_BF16], ids=["avx2", "avx512-bf16"])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32], ids=str)
def test_quantised_layers_multiply_in_it(speed: MatmulSpeed, stored: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes", reason="pip install 'bitsandbytes>=0.50' 'accelerate>=1.0'")
    from zolightning.adapt.quantize import quantize

    pretend(speed, monkeypatch)
    expected = torch.bfloat16 if stored == torch.bfloat16 and speed is AVX512_BF16 else torch.float32
    layer = quantize(nn.Linear(64, 32).to(stored), "nf4")
    assert layer.compute_dtype == expected
    assert quantize(nn.Linear(64, 32).to(stored), "nf4", compute_dtype=torch.float16).compute_dtype == torch.float16
    out = layer(torch.ones(2, 64, dtype=stored))
    assert (out.dtype, out.isfinite().all()) == (stored, True)
