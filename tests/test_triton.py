"""The GPU's backend without a GPU: the compiler takes every kernel, the interpreter runs them, the self-test judges."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed: it comes with PyTorch's CUDA builds"
)

INTERPRET = """
import torch
from triton_rounding import nearest
from zolightning.noise import triton_kernels
from zolightning.noise.selftest import verify_triton
from zolightning.noise.triton_backend import TritonBackend

triton_kernels._nearest = nearest

class Off(TritonBackend):
    def outer_sgd_(self, target, *others):
        super().outer_sgd_(target, *others)
        target[0, 0] = 0

cpu = torch.device("cpu")
print([verify_triton(library, cpu, kind) for library, kind in [*((TritonBackend(), k) for k in (0, 1, None)), (Off(), None)]])
"""

COMPILE = """
import inspect, itertools
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from zolightning.noise import triton_kernels

POINTERS = {"terms": "*i64", "rows": "*i64", "starts": "*i64", "queries": "*i64", "table": "*i64"}
NARROW = {"out": "narrow_out", "plus": "narrow_out", "minus": "narrow_out", "source": "narrow_in", "stored": "narrow_in"}
SIZES = {"size": 1024, "tall": 16, "wide": 256}
SCALARS = {"count", "leaf", "start", "width", "length", "k0", "k1", "query", "height", "columns"}

def compile(kernel, constants):
    signature = {}
    for name in inspect.signature(kernel.fn).parameters:
        if name in constants:
            signature[name] = "constexpr"
        elif name in SCALARS:
            signature[name] = "i64"
        elif name in POINTERS:
            signature[name] = POINTERS[name]
        else:
            narrow = constants.get(NARROW.get(name, ""), name == "target")
            signature[name] = "*i16" if narrow else "*fp32"
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": False})

compiled = 0
for name, kernel in vars(triton_kernels).items():
    own = isinstance(kernel, triton.JITFunction) and kernel.fn.__module__ == triton_kernels.__name__
    if not own or name.startswith("_"):  # parts of kernels
        continue
    parameters = inspect.signature(kernel.fn).parameters
    flags = [n for n, p in parameters.items() if "constexpr" in str(p.annotation) and n not in SIZES]
    for values in itertools.product(*[(0, 1) if f == "kind" else (False, True) for f in flags]):
        sizes = {n: size for n, size in SIZES.items() if n in parameters}
        compile(kernel, {**dict(zip(flags, values)), **sizes})
        compiled += 1
print(compiled)
"""


def run(script: str, **environment: str) -> str:
    """In a process of its own: Triton chooses between compiler and interpreter when it is imported."""
    paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    variables = {**os.environ, **environment, "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", script], env=variables, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_every_kernel_gives_the_bits_of_torch() -> None:
    assert run(INTERPRET, TRITON_INTERPRET="1") == "['', '', '', 'the update by outer products differs from the reference']"


def test_every_kernel_compiles() -> None:
    """In each form, for a Hopper GPU: no GPU is needed for that."""
    assert int(run(COMPILE)) >= 60
