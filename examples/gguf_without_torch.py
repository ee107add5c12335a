"""Train a 4-bit language model inside llama.cpp, from its forward passes, in a process that has no PyTorch.

    pip install llama-cpp-python numpy
    python examples/gguf_without_torch.py model.gguf train.csv test.csv   # columns: text, label (0 or 1)
    python examples/gguf_without_torch.py --demo                          # the files of zolightning's demo

To be read from top to bottom. First the model says which words follow texts of either label. Then the middle third of its
blocks get a vector each, which is added to the hidden states that they put out at the prompt's last token (a control vector).
Two probes, at +z and at -z, tell in which direction the loss falls, and the vectors follow it. The text before that token does
not depend on them: it is encoded once, and a probe costs a single token. `zolightning.blackbox` has the same with checkpoints,
ledger, records and a dashboard.
"""

import argparse
import csv
import ctypes
import math
import subprocess
import sys
import time

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("files", nargs="*", help="model.gguf train.csv test.csv")
parser.add_argument("--demo", action="store_true", help="the demo's files, which another process puts here")
parser.add_argument("--ending", default=" It was", help="stands behind each text")
parser.add_argument("--words", type=int, default=16, help="words that stand for a label")
parser.add_argument("--known", type=int, default=256, help="training texts that they are chosen by")
parser.add_argument("--steps", type=int, default=40)
parser.add_argument("--batch", type=int, default=16, help="texts a step")
parser.add_argument("--queries", type=int, default=16, help="directions for each text")
parser.add_argument("--lr", type=float, default=3.5e-2, help="RMS change of the vectors a step, in sizes of hidden states")
parser.add_argument("--eps", type=float, default=0.2, help="size of a probe, in sizes of hidden states")
parser.add_argument("--size", type=float, default=6.5, help="RMS of the middle blocks' hidden states, 6.5 in the demo's model")
parser.add_argument("--test", type=int, default=1000, help="texts to test on")
parser.add_argument("--seed", type=int, default=0)
options = parser.parse_args()
if not options.demo and len(options.files) != 3:
    parser.error(f"three files are needed, model.gguf train.csv test.csv, got {len(options.files)}; --demo brings its own")
try:
    import llama_cpp.llama_cpp as lib
    import numpy as np
except (ImportError, FileNotFoundError) as error:  # the second where LLAMA_CPP_LIB_PATH is missing
    sys.exit(f"llama.cpp cannot be loaded: {error}. Install it by `pip install llama-cpp-python numpy`")
DEMO = """
import csv
from zolightning.data import film_snippets
from zolightning.data.model import default_gguf
texts = film_snippets(validation=200, test=1000)
for part in "train", "test":
    with open(f"demo-{part}.csv", "w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *getattr(texts, part)])
print(default_gguf())
"""
if options.demo:
    said = subprocess.run([sys.executable, "-c", DEMO], check=True, stdout=subprocess.PIPE, text=True).stdout
    options.files = [said.split("\n")[-2], "demo-train.csv", "demo-test.csv"]
path, *tables = options.files

LENGTH = 64  # tokens of a text at most

# ---- llama.cpp -----------------------------------------------------------------------------------------------------------

silent = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda level, text, data: None)
lib.llama_log_set(silent, None)
if not lib._lib.ggml_backend_reg_count():  # a build with one library for each kind of processor
    lib._lib.ggml_backend_load_all_from_path(str(lib._base_path).encode())
lib.llama_backend_init()
model = lib.llama_model_load_from_file(path.encode(), lib.llama_model_default_params())
assert model, f"llama.cpp cannot load {path}"
vocab, blocks, width = lib.llama_model_get_vocab(model), lib.llama_model_n_layer(model), lib.llama_model_n_embd(model)
settings = lib.llama_context_default_params()
settings.n_ctx = settings.n_batch = settings.n_ubatch = LENGTH  # one text at a time keeps the memory small
settings.n_threads = settings.n_threads_batch = 1
context = lib.llama_init_from_model(model, settings)
memory, batch = lib.llama_get_memory(context), lib.llama_batch_init(LENGTH, 0, 1)


def tokens(text):
    room = (ctypes.c_int32 * LENGTH)()
    count = lib.llama_tokenize(vocab, text.encode(), len(text.encode()), room, len(room), True, False)
    assert count > 0, f"more than {len(room)} tokens: {text}"
    return room[:count]


def decode(start, ids):
    """Go on with the text that is kept; the logits behind its last token."""
    batch.n_tokens = len(ids)
    for n, token in enumerate(ids):
        batch.token[n], batch.pos[n], batch.n_seq_id[n], batch.seq_id[n][0] = token, start + n, 1, 0
        batch.logits[n] = n == len(ids) - 1
    assert lib.llama_decode(context, batch) == 0, "llama.cpp failed"
    return np.ctypeslib.as_array(lib.llama_get_logits_ith(context, -1), (lib.llama_vocab_n_tokens(vocab),))


def encode(ids):
    """Keep a text without vectors."""
    lib.llama_set_adapter_cvec(context, None, 0, width, 0, 0)
    lib.llama_memory_clear(memory, True)
    return decode(0, ids)


def margin(ids, label, vectors):
    """How far the label's words are above the others behind the kept text, at some vectors, (layers, width)."""
    rows[layers - 1] = vectors * options.size
    lib.llama_set_adapter_cvec(context, rows.ctypes.data_as(FLOATS), rows.size, width, layers[0], layers[-1])
    lib.llama_memory_seq_rm(memory, 0, len(ids) - 1, -1)
    scores = decode(len(ids) - 1, ids[-1:])[words].mean(1)
    return scores[label] - scores[1 - label]


def loss(*at):
    """Cross-entropy of the two scores."""
    return math.log1p(math.exp(-margin(*at)))


# ---- the task ------------------------------------------------------------------------------------------------------------


def read(name, most):
    with open(name, newline="") as file:
        rows = [row for _, row in zip(range(most), csv.DictReader(file), strict=False)]
    return [(tokens(row["text"] + options.ending), int(row["label"])) for row in rows]


def accuracy(examples):
    right = 0
    for ids, label in examples:
        encode(ids[:-1])
        right += margin(ids, label, vectors) > 0
    return right / len(examples)


train, test = read(tables[0], max(options.known, options.steps * options.batch)), read(tables[1], options.test)
began = time.process_time()

# ---- the words: those whose chance differs most between the labels, by Student's t, among 2,000 likely ones --------------

moments, count = np.zeros((2, 2, lib.llama_vocab_n_tokens(vocab))), np.zeros(2)  # sums of log p and of its square, by label
for ids, label in train[: options.known]:
    logits = encode(ids).astype(np.float64)
    chances = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
    moments[:, label] += chances, chances**2
    count[label] += 1
mean, square = moments / count[:, None]
t = (mean[1] - mean[0]) / np.sqrt(np.maximum((square - mean**2).mean(0), 1e-12))
likely = np.argsort(-mean.sum(0))[:2000]
order = likely[np.argsort(t[likely])]
words = np.stack((order[: options.words], order[-options.words :]))

# ---- training ------------------------------------------------------------------------------------------------------------

FLOATS, rows = ctypes.POINTER(ctypes.c_float), np.zeros((blocks - 1, width), np.float32)  # of the blocks from 1 on
layers = np.arange(max(1, blocks // 3), blocks - blocks // 3)
vectors = np.zeros((len(layers), width), np.float32)
took = time.process_time() - began
print(f"before: {100 * accuracy(test):.1f} % of {len(test)} test texts", flush=True)
noise, square, weight = np.random.default_rng(options.seed), 0.0, 0.0
began = time.process_time()
for step in range(options.steps):
    some = train[step * options.batch :][: options.batch]
    estimate, slopes = np.zeros_like(vectors), []
    for ids, label in some:
        encode(ids[:-1])
        for _ in range(options.queries):  # directions of its own
            z = noise.choice(np.array([-1, 1], np.float32), vectors.shape)
            up, down = (loss(ids, label, vectors + side * options.eps * z) for side in (1, -1))
            slopes.append((up - down) / (2 * options.eps))
            estimate += slopes[-1] * z
    square, weight = 0.9 * square + 0.1 * np.square(slopes).mean(), 0.9 * weight + 0.1
    rate = options.lr * (1 + math.cos(math.pi * step / options.steps)) / 2
    vectors -= rate * estimate / math.sqrt(len(slopes) * square / weight)  # n slopes of random sign add up to sqrt(n) RMS
took += time.process_time() - began
print(f"after {options.steps} steps of {len(some)} texts: {100 * accuracy(test):.1f} %, training took {took:.0f} CPU seconds")
with open("/proc/self/status") as file:  # Linux
    peak = next(line for line in file if line.startswith("VmHWM")).split()[1]
print(f"peak memory of the whole process: {int(peak) / 1024:.0f} MiB")
assert "torch" not in sys.modules
