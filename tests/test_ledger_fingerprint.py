"""The fingerprint of weights: one number for their bits and names, wherever and however they lie in memory."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import blake2b

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from zolightning.ledger import fingerprint
from zolightning.noise import reference, set_backend

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int8, torch.uint8, torch.bool]
WORD = (1 << 64) - 1

shapes = st.lists(st.integers(0, 7), max_size=3).map(tuple)
dtypes = st.sampled_from(DTYPES)
quick = settings(max_examples=60)


@pytest.fixture(params=["native", "torch"], autouse=True, scope="module")
def _backend(request: pytest.FixtureRequest) -> Iterator[None]:
    set_backend(request.param)
    yield
    set_backend("auto")


def random(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Any bits, NaN and infinities among them."""
    out = torch.empty(shape, dtype=dtype)
    if dtype == torch.bool:
        return out.copy_(random(shape, torch.uint8, seed))
    data = np.random.default_rng(seed).integers(0, 256, out.nbytes, dtype=np.uint8)
    out.view(-1).view(torch.uint8).copy_(torch.from_numpy(data))
    return out


def raw(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def twin(tensors: dict[str, Tensor]) -> str:
    """The definition, in Python's whole numbers: splitmix64's multipliers on each word, mixed with its place."""
    digest = blake2b(digest_size=16)
    for name in sorted(tensors):
        data = raw(tensors[name])
        total = 0
        for place in range(len(data) // 8 + 1):
            word = int.from_bytes(data[8 * place : 8 * place + 8], "little")
            word = ((word ^ place * 0x9E3779B97F4A7C15) & WORD) * 0xBF58476D1CE4E5B9 & WORD
            word = (word ^ word >> 29) * 0x94D049BB133111EB & WORD
            total += word ^ word >> 32
        dtype, shape = str(tensors[name].dtype).split(".")[1], ",".join(map(str, tensors[name].shape))
        digest.update(f"{name}\0{dtype}\0{shape}\0{total & WORD}\n".encode())
    return digest.hexdigest()


@quick
@given(shape=shapes, dtype=dtypes, seed=st.integers(0, 99))
def test_is_its_definition(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> None:
    tensors = {"b": random(shape, dtype, seed), "a": random((3, 5), torch.float32, seed), "ä": torch.tensor(2.5)}
    assert fingerprint(tensors.items()) == twin(tensors)


def test_known_value() -> None:
    """So that a ledger of today is accepted tomorrow."""
    tensors = {"w": torch.arange(24, dtype=torch.float32).view(4, 6), "b": torch.ones(3, dtype=torch.bfloat16)}
    assert fingerprint(tensors.items()) == twin(tensors) == "cc663235edc15657d9133ccb19150712"


@quick
@given(shape=st.lists(st.integers(1, 6), min_size=2, max_size=3).map(tuple), dtype=dtypes, seed=st.integers(0, 99))
def test_does_not_depend_on_layout(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> None:
    plain = random(shape, dtype, seed)
    expected = fingerprint([("w", plain)])
    reversed_axes = list(reversed(range(plain.dim())))
    laid_out = plain.permute(reversed_axes).contiguous().permute(reversed_axes)
    every_second = torch.stack((plain, plain), dim=-1).flatten(-2)[..., ::2]
    assert torch.equal(raw_tensor(laid_out), raw_tensor(plain))
    for same in (plain.clone(), laid_out, every_second, nn.Parameter(plain, requires_grad=False)):
        assert fingerprint([("w", same)]) == expected


def raw_tensor(tensor: Tensor) -> Tensor:
    return torch.frombuffer(bytearray(raw(tensor)), dtype=torch.uint8)


@quick
@given(dtype=dtypes, offset=st.integers(0, 17), length=st.integers(0, 40))
def test_does_not_depend_on_the_place_in_memory(dtype: torch.dtype, offset: int, length: int) -> None:
    whole = random((64,), dtype)
    view = whole[offset : offset + length]
    assert fingerprint([("w", view)]) == fingerprint([("w", view.clone())])


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_does_not_depend_on_chunks_threads_or_backend(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = random((301, 1001), torch.float32)  # more than a thread's share
    expected = twin({"w": tensor})
    torch.set_num_threads(threads)
    for chunk in (1 << 18, 1 << 12, 999):
        monkeypatch.setattr(reference, "CHUNK", chunk)
        assert fingerprint([("w", tensor)]) == expected


@quick
@given(st.data())
def test_changes_with_any_bit(data: st.DataObject) -> None:
    shape = data.draw(shapes.filter(lambda shape: 0 not in shape))
    dtype = data.draw(st.sampled_from([d for d in DTYPES if d != torch.bool]))
    tensor = random(shape, dtype)
    expected = fingerprint([("w", tensor)])
    bytes_of_it = tensor.view(-1).view(torch.uint8)
    place = data.draw(st.integers(0, bytes_of_it.numel() - 1))
    bytes_of_it[place] ^= 1 << data.draw(st.integers(0, 7))
    assert fingerprint([("w", tensor)]) != expected


def test_tells_apart_what_compares_equal() -> None:
    zeros = fingerprint([("w", torch.zeros(4))])
    assert fingerprint([("w", -torch.zeros(4))]) != zeros
    nan = torch.full((4,), float("nan"))
    assert fingerprint([("w", nan)]) == fingerprint([("w", nan.clone())])


def test_changes_with_name_dtype_shape_and_place() -> None:
    weight = torch.arange(6, dtype=torch.float32)
    different = [
        [("w", weight)],
        [("v", weight)],
        [("w", weight.view(2, 3))],
        [("w", weight.view(3, 2))],
        [("w", weight.view(6, 1))],
        [("w", weight.view(torch.int32))],
        [("w", weight.to(torch.bfloat16))],
        [("w", weight.flip(0))],
        [("w", weight.roll(2))],
        [("w", weight[:5])],
        [("w", torch.cat((weight, torch.zeros(1))))],
        [("w", torch.cat((weight, torch.zeros(2))))],
        [("w", weight), ("v", weight)],
        [("w", weight[:0])],
        [],
    ]
    assert len({fingerprint(tensors) for tensors in different}) == len(different)


def test_order_of_the_tensors_does_not_matter_and_their_names_do() -> None:
    a, b = random((5,), torch.float32, 1), random((5,), torch.float32, 2)
    assert fingerprint([("a", a), ("b", b)]) == fingerprint([("b", b), ("a", a)]) != fingerprint([("a", b), ("b", a)])


def test_empty_tensors_of_any_stride() -> None:
    empty = torch.from_numpy(np.empty(0, dtype=np.float32))
    assert fingerprint([("w", empty)]) == fingerprint([("w", torch.empty(0))]) == twin({"w": torch.empty(0)})


def test_leaves_no_trace_and_takes_weights_that_need_gradients() -> None:
    weight = nn.Parameter(torch.randn(9))
    before = weight.detach().clone()
    assert fingerprint([("w", weight)]) == fingerprint([("w", before)])
    assert weight.grad_fn is None and torch.equal(weight, before)
