"""The GPU's rung without a GPU: Triton's interpreter runs the kernels, and the self-test that guards them on a GPU judges."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed: it comes with PyTorch's CUDA builds"
)

SCRIPT = """
import torch
from zolightning.noise.selftest import verify_triton
from zolightning.noise.triton_kernels import TritonLibrary

class Off(TritonLibrary):
    def outer_sum(self, a, b):
        return super().outer_sum(a, b) + 1e-7

cpu = torch.device("cpu")
print([verify_triton(TritonLibrary(), cpu), verify_triton(Off(), cpu)])
"""


def test_every_kernel_gives_the_bits_of_torch() -> None:
    """In a process of its own: Triton chooses between compiler and interpreter when it is imported."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['', 'the outer sum differs from the reference']"
