"""A GGUF file in llama.cpp, through the package llama-cpp-python: tokens, and the logits that follow them."""

from __future__ import annotations

import ctypes
import hashlib
import weakref
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .engine import EngineError

Rows = npt.NDArray[np.float32]
Watch = Callable[[str, Rows], None]
_said: list[str] = []  # llama.cpp's last log lines: it reports errors there and nowhere else


@lru_cache(maxsize=1)
def library() -> Any:
    """The binding, its backends loaded.

    Raises:
        ImportError: it, or the library that it binds, is missing or of another release.
    """
    try:
        import llama_cpp.llama_cpp as binding
    except (ImportError, OSError, RuntimeError, AttributeError) as error:  # missing, or a library without some function
        raise ImportError(
            f"llama.cpp cannot be used here ({error}); run `pip install 'zolightning[llamacpp]'`, or point LLAMA_CPP_LIB_PATH "
            "to a folder with the libllama of the binding's own release"
        ) from error
    defaults = binding.llama_model_default_params()
    if (defaults.split_mode, defaults.main_gpu, bool(defaults.use_extra_bufts)) != (1, 0, True):
        raise ImportError(
            "the libllama that LLAMA_CPP_LIB_PATH names is of another release than llama-cpp-python: their structures differ. "
            "Take the release that the binding was made for"
        )
    binding.llama_log_set(_LOG, None)
    if not binding._lib.ggml_backend_reg_count():  # a build with one library for each kind of processor
        binding._lib.ggml_backend_load_all_from_path(str(binding._base_path).encode())
    binding.llama_backend_init()
    return binding


def _log(level: int, text: bytes, data: None) -> None:
    _said.append(text.decode(errors="replace").strip())
    del _said[:-5]


_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(_log)


class LlamaModel:
    """The weights and the tokens of a GGUF file, read by llama.cpp.

    Args:
        path: the file.

    Raises:
        ImportError: llama.cpp is not installed.
        FileNotFoundError, EngineError: no such file, or one that llama.cpp cannot read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"there is no GGUF file {self.path}; give the path of one")
        lib = library()
        parameters = lib.llama_model_default_params()
        parameters.n_gpu_layers = 0
        self.handle = lib.llama_model_load_from_file(str(self.path).encode(), parameters)
        if not self.handle:
            raise EngineError(f"llama.cpp cannot load {self.path}: {' '.join(_said)}")
        weakref.finalize(self, lib.llama_model_free, self.handle)
        self.vocab = lib.llama_model_get_vocab(self.handle)
        self.width: int = lib.llama_model_n_embd(self.handle)
        self.blocks: int = lib.llama_model_n_layer(self.handle)
        self.words: int = lib.llama_vocab_n_tokens(self.vocab)

    @property
    def architecture(self) -> str:
        """As the file names it, 'llama' or another."""
        room = ctypes.create_string_buffer(64)
        library().llama_model_meta_val_str(self.handle, b"general.architecture", room, len(room))
        return room.value.decode()

    @property
    def identity(self) -> str:
        """The file's name, and a hash of its size and of its first and last MiB."""
        with self.path.open("rb") as file:
            size = file.seek(0, 2)
            digest = hashlib.sha256(str(size).encode())
            for start in (0, max(0, size - (1 << 20))):
                file.seek(start)
                digest.update(file.read(1 << 20))
        return f"{self.path.name} ({digest.hexdigest()[:16]})"

    def tokens(self, text: str) -> list[int]:
        """The token ids of a text, with those that the model wants at its beginning."""
        lib, raw = library(), text.encode()
        room = (ctypes.c_int32 * (len(raw) + 8))()
        count = lib.llama_tokenize(self.vocab, raw, len(raw), room, len(room), True, False)
        return list(room[:count])

    def ends(self, token: int) -> bool:
        """Whether it says that the text is over."""
        return bool(library().llama_vocab_is_eog(self.vocab, token))

    def text(self, tokens: Sequence[int]) -> str:
        """The text of some token ids, special ones left out."""
        lib, pieces, room = library(), [], ctypes.create_string_buffer(256)
        for token in tokens:
            size = lib.llama_token_to_piece(self.vocab, token, room, len(room), 0, False)
            pieces.append(room.raw[: max(0, size)])
        return b"".join(pieces).decode(errors="replace")

    def __repr__(self) -> str:
        return f"LlamaModel({str(self.path)!r})"


class LlamaContext:
    """Sequences of tokens whose keys and values llama.cpp keeps.

    Args:
        model: that runs.
        sequences: how many are kept, >= 1.
        length: tokens in each, >= 1.
        threads: of one call.
        watch: called with the name and the rows of each block's output.
    """

    def __init__(self, model: LlamaModel, sequences: int, length: int, threads: int = 1, watch: Watch | None = None) -> None:
        lib = library()
        self.model, self.capacity = model, 512  # tokens that run at once
        parameters = lib.llama_context_default_params()
        parameters.n_ctx, parameters.n_seq_max = sequences * length, sequences
        parameters.n_batch = parameters.n_ubatch = self.capacity
        parameters.n_threads = parameters.n_threads_batch = threads
        if watch is not None:
            self._callback = parameters.cb_eval = lib.ggml_backend_sched_eval_callback(_watching(lib, watch))
        self.handle = lib.llama_init_from_model(model.handle, parameters)
        if not self.handle:
            raise EngineError(f"llama.cpp has no memory for {sequences} sequences of {length} tokens: {' '.join(_said)}")
        weakref.finalize(self, lib.llama_free, self.handle)
        self._memory = lib.llama_get_memory(self.handle)
        self._batch = lib.llama_batch_init(self.capacity, 0, 1)
        weakref.finalize(self, lib.llama_batch_free, self._batch)

    def steer(self, vectors: Rows | None, first: int = 1, last: int = 1) -> None:
        """Add row i of ``vectors``, (blocks − 1, width), to the output of block i + 1, from block ``first`` to ``last``."""
        pointer, size = (None, 0) if vectors is None else (vectors.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), vectors.size)
        if library().llama_set_adapter_cvec(self.handle, pointer, size, self.model.width, first, last):
            raise EngineError(f"llama.cpp takes no control vectors for blocks {first} to {last} of {self.model}")

    def decode(self, items: Sequence[tuple[int, int, Sequence[int]]], logits: bool = False) -> Rows:
        """Go on with some sequences.

        Args:
            items: (sequence, position of the first token, tokens).
            logits: whether those behind each item's last token are wanted.

        Returns:
            (items, words), float32: the logits; without them no rows.
        """
        batch, found = self._batch, list[Rows]()
        batch.n_tokens = 0
        for sequence, start, tokens in items:
            for offset, token in enumerate(tokens):
                if batch.n_tokens == self.capacity:
                    self._flush(found)
                n = batch.n_tokens
                batch.token[n], batch.pos[n], batch.n_seq_id[n], batch.seq_id[n][0] = token, start + offset, 1, sequence
                batch.logits[n] = logits and offset == len(tokens) - 1
                batch.n_tokens += 1
        self._flush(found)
        return np.array(found, np.float32)

    def _flush(self, found: list[Rows]) -> None:
        lib, batch = library(), self._batch
        if batch.n_tokens and (code := lib.llama_decode(self.handle, batch)):
            raise EngineError(f"llama.cpp failed with code {code} on {batch.n_tokens} tokens: {' '.join(_said)}")
        for n in range(batch.n_tokens):
            if batch.logits[n]:
                row = np.ctypeslib.as_array(lib.llama_get_logits_ith(self.handle, n), (self.model.words,))
                found.append(row.copy())  # it is the context's memory
        batch.n_tokens = 0

    def forget(self, sequence: int, start: int = 0) -> None:
        """Drop a sequence's tokens from the position ``start`` on."""
        library().llama_memory_seq_rm(self._memory, sequence, start, -1)


def _watching(lib: Any, watch: Watch) -> Callable[..., bool]:
    ggml = lib._lib
    ggml.ggml_get_name.restype, ggml.ggml_nbytes.restype = ctypes.c_char_p, ctypes.c_size_t
    ggml.ggml_get_name.argtypes = ggml.ggml_nbytes.argtypes = [ctypes.c_void_p]
    ggml.ggml_backend_tensor_get.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]

    def call(tensor: int, ask: bool, data: None) -> bool:
        name = ggml.ggml_get_name(tensor).decode()
        if not ask and name.startswith("l_out-"):
            rows = np.empty(ggml.ggml_nbytes(tensor) // 4, np.float32)
            ggml.ggml_backend_tensor_get(tensor, rows.ctypes.data, 0, rows.nbytes)
            watch(name, rows)
        return not ask or name.startswith("l_out-")

    return call
