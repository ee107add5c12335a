"""Counter-based noise: the same bits on every device, chunking, thread count, rank and backend version."""

from .backends import active_backend, set_backend
from .captured_key import CapturedKey
from .constants import floats, integers
from .distributions import DISTRIBUTIONS, Distribution, Gaussian, Rademacher, permutation, scattering
from .kernels import (
    keep_large_,
    mixed_sum,
    noise_sum,
    outer_run,
    outer_sgd_,
    outer_sum,
    perturb,
    perturb_all,
    perturb_both,
    perturb_rows,
    sample,
    sgd_,
    sgd_all_,
    stochastic_round_,
)
from .reference import pieces, working_dtype

__all__ = [
    "DISTRIBUTIONS",
    "CapturedKey",
    "Distribution",
    "Gaussian",
    "Rademacher",
    "active_backend",
    "floats",
    "integers",
    "keep_large_",
    "mixed_sum",
    "noise_sum",
    "outer_run",
    "outer_sgd_",
    "outer_sum",
    "permutation",
    "perturb",
    "perturb_all",
    "perturb_both",
    "perturb_rows",
    "pieces",
    "sample",
    "scattering",
    "set_backend",
    "sgd_",
    "sgd_all_",
    "stochastic_round_",
    "working_dtype",
]
