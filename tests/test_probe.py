"""Whatever way a module reads its weights, a probe gives what a deep copy with perturbed weights gives."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import reference
import torch
import torch.nn.functional as F
from helpers import assert_same, mlp, tiny_causal_lm, weights
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from zolightning.noise import Distribution, Gaussian, Rademacher
from zolightning.records.memory import MemoryMeter
from zolightning.space import Both, View, build_view
from zolightning.space.leaf import HEAD_BLOCK, DenseLeaf
from zolightning.types import Key, PerExampleError, Term

IDS = torch.tensor([[0, 3, 3], [5, 1, 6]])
X = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))


class Calls(nn.Module):
    """A net whose forward is a function of (self, input)."""

    def __init__(self, call: Callable[..., Tensor], input: Tensor, **children: Any) -> None:
        super().__init__()
        for name, child in children.items():
            setattr(self, name, child)
        self._call, self.input = call, input

    def forward(self) -> Tensor:
        return self._call(self, self.input)


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight.tril()


def with_custom_parametrization() -> nn.Module:
    layer = nn.Linear(8, 8)
    parametrize.register_parametrization(layer, "weight", Doubled())
    return layer


def odd_layouts() -> Calls:
    weight = nn.Parameter(torch.empty_strided((8, 6), (1, 8)).normal_())
    sliced = nn.Parameter(torch.empty_strided((8, 6), (12, 2)).normal_())
    assert not weight.is_contiguous()
    assert not sliced.is_contiguous()
    return Calls(
        lambda m, x: F.linear(x @ m.weight, m.sliced) * m.scalar + F.embedding(IDS, m.sliced).sum(), X, weight=weight,
        sliced=sliced, scalar=nn.Parameter(torch.tensor(0.7)), empty=nn.Parameter(torch.empty(0, 3)),
    )  # fmt: skip


def functional_call(module: Calls, x: Tensor) -> Tensor:
    return torch.func.functional_call(module.layer, dict(module.layer.named_parameters()), (x,))


def gpt2_conv1d() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(5, 8)


def tied_head(module: Calls, ids: Tensor) -> Tensor:
    """Only some rows of a tied head, as candidate scoring reads them."""
    return F.linear(module.embedding(ids), module.embedding.weight[torch.tensor([6, 0, -1])])


def recurrent(kind: type[nn.RNNBase]) -> Calls:
    return Calls(lambda m, x: m.rnn(x)[0], X, rnn=kind(8, 5, num_layers=2, batch_first=True, bidirectional=True))


def attention(need_weights: bool) -> Calls:
    return Calls(
        lambda m, x: m.attention(x, x, x, need_weights=need_weights)[0],
        X,
        attention=nn.MultiheadAttention(8, 2, batch_first=True),
    )


def layer(module: nn.Module, x: Tensor = X) -> Calls:
    return Calls(lambda m, x: m.layer(x), x, layer=module)


def matrix(call: Callable[..., Tensor], *shape: int, x: Tensor = X) -> Calls:
    """A function of the parameter and the input."""
    return Calls(lambda m, x: call(m.weight, x), x, weight=nn.Parameter(torch.randn(shape)))


def matrices(call: Callable[..., Any]) -> Calls:
    """A function of a list of parameters and the input."""
    return Calls(lambda m, x: call(m.weights, x), X, weights=nn.ParameterList([torch.randn(8, 3), torch.randn(8, 3)]))


def linear(call: Callable[..., Tensor]) -> Calls:
    """A function of a layer's weight and bias and the input."""
    return Calls(lambda m, x: call(m.layer.weight, m.layer.bias, x), X, layer=nn.Linear(8, 8))


class Experts(nn.Module):
    """Fused experts as mixtures keep them: read by an index, by a batched product, and by a gather of each token's own."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(3, 8, 10)), nn.Parameter(torch.randn(3, 10, 8))
        self.router = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, 8)
        chosen = self.router(flat).softmax(-1)
        every = torch.bmm(torch.bmm(flat.expand(3, -1, -1), self.up).tanh(), self.down)
        one = torch.einsum("td,tdh->th", flat, self.up[chosen.argmax(-1)])
        loop = sum(F.linear(one, self.down[i].T) for i in range(3))
        return torch.einsum("te,etd->td", chosen, every) + loop


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(6, 4, 3, padding=1), nn.ConvTranspose1d(4, 6, 2, groups=2), nn.Conv1d(6, 6, 1, groups=3), nn.PReLU(6)
    )


READS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: layer(mlp(8)),
    "odd layouts": odd_layouts,
    "channels last": lambda: layer(nn.Conv2d(1, 3, 2).to(memory_format=torch.channels_last), X[:, None]),
    "convolutions": lambda: layer(convolutions()),
    "fused experts": lambda: layer(Experts()),
    "spectral norm": lambda: layer(parametrizations.spectral_norm(nn.Linear(8, 4)).eval()),
    "attention": lambda: attention(True),
    "fused attention": lambda: attention(False),
    "encoder layer": lambda: layer(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)),
    "encoder layer, eval": lambda: layer(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()),
    "lstm": lambda: recurrent(nn.LSTM),
    "gru": lambda: recurrent(nn.GRU),
    "weight norm": lambda: layer(parametrizations.weight_norm(nn.Linear(8, 4))),
    "orthogonal": lambda: layer(parametrizations.orthogonal(nn.Linear(8, 8))),
    "own parametrization": lambda: layer(with_custom_parametrization()),
    "tied head": lambda: Calls(tied_head, IDS, embedding=nn.Embedding(7, 8)),
    "transposed": lambda: matrix(lambda w, x: x[..., :5] @ w.T + w.t().sum(), 4, 5),
    "parameter list": lambda: matrices(lambda ws, x: sum(x @ w for w in ws)),
    "stacked": lambda: matrices(lambda ws, x: x @ torch.stack(list(ws)).sum(0)),
    "conv1d of gpt2": lambda: layer(gpt2_conv1d()),
    "padding index": lambda: layer(nn.Embedding(7, 4, padding_idx=3), IDS),
    "max norm of a copy": lambda: matrix(lambda w, x: F.embedding(x, w.clone(), max_norm=1.0), 7, 4, x=IDS),
    "embedding bag": lambda: layer(nn.EmbeddingBag(7, 4, mode="mean"), IDS),
    "rows, int32": lambda: matrix(lambda w, x: F.embedding(x.int(), w), 7, 4, x=IDS),
    "no rows": lambda: matrix(lambda w, x: w[x[:, :0]].sum(), 7, 4, x=IDS),
    "rows of a cube": lambda: matrix(lambda w, x: w[x], 7, 4, 2, x=IDS),
    "one row": lambda: matrix(lambda w, x: w[2] * w[-1, 1:3].sum(), 7, 4),
    "functional call": lambda: Calls(functional_call, X, layer=nn.Linear(8, 3)),
    "vmap": lambda: Calls(lambda m, x: torch.vmap(m.layer)(x), X, layer=nn.Linear(8, 3)),
    "vector weight": lambda: matrix(lambda w, x: F.linear(x, w), 8),
    "empty linear": lambda: layer(nn.Linear(8, 0)),
    "bias as input": lambda: linear(lambda w, b, x: F.linear(b, w, b)),
    "keywords": lambda: linear(lambda w, b, x: F.linear(input=x, weight=w, bias=b)),
    "detached": lambda: matrix(lambda w, x: x @ w.detach() + w.data.norm(), 8, 3),
    "layer, group, batch norm": lambda: layer(nn.Sequential(nn.LayerNorm(8), nn.GroupNorm(2, 6), nn.BatchNorm1d(6))),
    "bilinear": lambda: Calls(lambda m, x: m.layer(x, x), X, layer=nn.Bilinear(8, 8, 3)),
}


def probed(net: nn.Module, view: View, key: Key, offset: float) -> Tensor:
    with torch.no_grad(), view.along(key, offset):
        return net()


@pytest.mark.parametrize("noise", [Rademacher(), Gaussian()], ids=repr)
@pytest.mark.parametrize("name", READS)
def test_reads(name: str, noise: Distribution) -> None:
    torch.manual_seed(4)
    net = READS[name]()
    view = build_view(net, net.parameters(), noise)
    before, key = weights(net), Key(5, 6, 7)
    plain = copy.deepcopy(net)
    zs = reference.directions(net, key, noise)
    for offset in (0.1, -0.1):
        results: list[Tensor] = []
        reference.loss_at(net, lambda twin, results=results: results.append(twin()) or torch.zeros(()), zs, offset)  # type: ignore[func-returns-value]
        torch.testing.assert_close(probed(net, view, key, offset), results[0], rtol=1e-6, atol=1e-6)
    assert results[0].numel() == 0 or name == "no rows" or not torch.equal(results[0], plain())
    assert_same(weights(net), before)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_autocast_rounds_the_perturbed_weight_once(kind: str) -> None:
    model, noise, key = tiny_causal_lm(kind), Gaussian(), Key(1, 2, 3)
    view = build_view(model, model.parameters(), noise)

    def logits(m: nn.Module) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return m(input_ids=IDS).logits

    results: list[Tensor] = []
    zs = reference.directions(model, key, noise)
    reference.loss_at(model, lambda twin: results.append(logits(twin)) or torch.zeros(()), zs, 0.05)  # type: ignore[func-returns-value]
    with torch.no_grad(), view.along(key, 0.05):
        assert torch.equal(logits(model), results[0])


@pytest.mark.parametrize("bias", [True, False])
def test_large_head_goes_in_row_blocks(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    net = Calls(lambda m, x: m.layer(x), X, layer=nn.Linear(8, 37, bias=bias))
    view, key = build_view(net, net.parameters(), Rademacher()), Key(1, 2)
    whole = probed(net, view, key, 0.1)
    monkeypatch.setattr("zolightning.space.leaf.HEAD_BLOCK", 50)
    torch.testing.assert_close(probed(net, view, key, 0.1), whole, rtol=1e-6, atol=1e-6)
    assert HEAD_BLOCK > 50


def test_strided_input_does_not_copy_the_weight() -> None:
    """F.linear of a slice, with a weight that needs no gradient, is a batched product over copies of that weight."""
    net = nn.Linear(1024, 1024)
    view, hidden = build_view(net, net.parameters(), Rademacher()), torch.randn(64, 2, 1024)
    meter = MemoryMeter(net, torch.device("cpu"))
    before = meter.peak()
    with torch.no_grad(), view.along(Key(1, 2), 1e-2):
        net(hidden[:, -1:])
    assert meter.peak() - before < 16 * 1024 * 1024 * 4


def test_embedding_reads_only_the_rows_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """nn.Embedding passes all of F.embedding's arguments by position."""
    net = Calls(lambda m, x: m.layer(x), IDS, layer=nn.Embedding(7, 4, padding_idx=0))
    view = build_view(net, net.parameters(), Rademacher())

    def whole(*_: Any) -> Any:
        raise AssertionError("the whole embedding was perturbed")

    expected = probed(net, view, Key(1, 2), 0.1)
    monkeypatch.setattr(DenseLeaf, "perturbed", whole)
    assert torch.equal(probed(net, view, Key(1, 2), 0.1), expected)


@pytest.mark.parametrize("bad", [-1, 7])
def test_token_out_of_range(bad: int) -> None:
    net = Calls(lambda m, x: m.layer(x), torch.tensor([0, bad]), layer=nn.Embedding(7, 4))
    with pytest.raises(IndexError, match="out of range"):
        probed(net, build_view(net, net.parameters(), Rademacher()), Key(1, 2), 0.1)


def test_enable_grad_inside_a_probe() -> None:
    """A step that differentiates by its input (a physics residual) gets the gradient at the perturbed weights."""

    def residual(module: Calls, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.clone().requires_grad_()
            return torch.autograd.grad(module.net(x).square().sum(), x)[0]

    net, key, noise = Calls(residual, X, net=mlp(8)), Key(3, 4), Gaussian()
    results: list[Tensor] = []
    zs = reference.directions(net, key, noise)
    reference.loss_at(net, lambda twin: results.append(twin()) or torch.zeros(()), zs, 0.1)  # type: ignore[func-returns-value]
    assert torch.equal(probed(net, build_view(net, net.parameters(), noise), key, 0.1), results[0])


def test_metadata_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking a weight for its shape or dtype builds nothing."""
    net = mlp()
    view = build_view(net, net.parameters(), Rademacher())
    monkeypatch.setattr(DenseLeaf, "perturbed", lambda *_: pytest.fail("a perturbed weight was built"))
    with view.along(Key(0, 0), 1.0):
        w = net[0].weight
        assert (tuple(w.shape), w.dtype, w.device.type, w.numel(), w.size(0), w.dim(), len(w)) == (
            (8, 4),
            torch.float32,
            "cpu",
            32,
            8,
            2,
            8,
        )
        assert w.requires_grad
        assert w.grad is None
        assert w.is_floating_point()
        assert w.is_contiguous()
        assert isinstance(hash(w), int)


def add_in_place(w: Tensor) -> Any:
    return w.__iadd__(1.0)


def set_item(w: Tensor) -> None:
    w[0] = 0.0


def set_data(w: Tensor) -> None:
    w.data = torch.zeros_like(w)


WRITES: dict[str, Callable[[Tensor], Any]] = {
    "mul_": lambda w: w.mul_(2),
    "copy_": lambda w: w.copy_(torch.zeros_like(w)),
    "setitem": set_item,
    "iadd": add_in_place,
    "data": set_data,
    "init": lambda w: nn.init.normal_(w),
    "foreach": lambda w: torch._foreach_mul_([w], 2.0),
    "out": lambda w: torch.add(w, 1.0, out=w),
}


@pytest.mark.parametrize("write", WRITES)
def test_writing_to_a_weight_is_refused(write: str) -> None:
    net = mlp()
    view, before = build_view(net, net.parameters(), Rademacher()), weights(net)
    with (
        torch.no_grad(),
        view.along(Key(0, 0), 0.1),
        pytest.raises(RuntimeError, match=r"writes to the trained parameter '0.weight'"),
    ):
        WRITES[write](net[0].weight)
    assert_same(weights(net), before)


def test_gradient_bookkeeping_is_not_a_write() -> None:
    net = mlp()
    before = weights(net)
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    with build_view(net, net.parameters(), Rademacher()).along(Key(0, 0), 0.1):
        net[0].weight.grad = None
        net[0].weight.requires_grad_(True)
        net[0].weight.requires_grad = True
        net[2].bias.requires_grad_(False)
        net.zero_grad()
    assert [name for name, p in net.named_parameters() if p.grad is not None or not p.requires_grad] == ["2.bias"]
    assert_same(weights(net), before)


def test_only_selected_weights_are_perturbed() -> None:
    net = mlp()
    view, stored = build_view(net, net[2].parameters(), Rademacher()), weights(net)
    with torch.no_grad(), view.along(Key(0, 0), 0.1):
        assert torch.equal(net[0].weight + 0, stored["0.weight"])
        torch.testing.assert_close((net[2].weight - stored["2.weight"]).abs(), torch.full((3, 8), 0.1))


@pytest.mark.parametrize("kind", ["dense", "rank1"])
def test_noise_does_not_depend_on_what_else_is_trained(kind: Any) -> None:
    net = mlp()
    every = build_view(net, net.parameters(), Gaussian(), structure=kind)
    last = build_view(net, net[2].parameters(), Gaussian(), structure=kind)
    terms = [Term(Key(3, 4, 5), 1.0)]
    whole = {leaf.name: leaf.gradient(terms) for leaf in every.leaves}
    assert torch.equal(last.leaves[0].gradient(terms), whole["2.weight"])
    assert len({tuple(z.flatten()[:12].tolist()) for z in whole.values() if z.numel() >= 12}) == sum(
        z.numel() >= 12 for z in whole.values()
    )


def test_repeated_probes_use_the_scratch_safely() -> None:
    """Two linear layers share one scratch buffer, and outputs live on after it is used again."""
    net = Calls(lambda m, x: m.b(m.a(x)), X, a=nn.Linear(8, 16), b=nn.Linear(16, 2))
    view = build_view(net, net.parameters(), Rademacher())
    first = probed(net, view, Key(0, 0), 0.1)
    kept = first.clone()
    probed(net, view, Key(0, 1), 0.1)
    assert torch.equal(first, kept)
    view.release()
    assert torch.equal(probed(net, view, Key(0, 0), 0.1), kept)


def both_sides(
    net: nn.Module, view: View, forward: Callable[[], Tensor], halves: list[Callable[[], Tensor]]
) -> tuple[Tensor, Tensor]:
    """The output with both sides in one batch, and that of each side by itself."""
    key = Key(3, 1, 2)
    with torch.no_grad():
        with view.at(Both(Term(key, 0.1), 6)):
            together = forward()
        apart = []
        for half, offset in zip(halves, (0.1, -0.1), strict=True):
            with view.along(key, offset):
                apart.append(half())
    return together, torch.cat(apart)


class Layers(nn.Module):
    """An embedding with a tied head, vectors in products and sums, norms, a convolution, linear layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.norm, self.rms = nn.Embedding(9, 8), nn.LayerNorm(8), nn.RMSNorm(8)
        self.conv, self.linear, self.plain = nn.Conv1d(8, 8, 3, padding=1), nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        self.places = nn.Embedding(5, 8)
        self.scale, self.shift = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(8))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.embedding(ids) + self.places(torch.arange(5)[None])) * self.scale + self.shift
        x = x + self.conv(x.transpose(1, 2)).transpose(1, 2)
        x = self.rms(self.plain(F.relu(self.linear(x))))
        return F.linear(x, self.embedding.weight)


@pytest.mark.parametrize("structure", ["dense", "rank1", "lowrank", "sparse"])
@pytest.mark.parametrize("noise", [Rademacher(), Gaussian()], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("block", [HEAD_BLOCK, 24])
def test_both_sides_in_one_batch(
    structure: str, noise: Distribution, dtype: torch.dtype, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each half of the examples is computed as in a probe of its own, to the bit where the products have its shapes."""
    monkeypatch.setattr("zolightning.space.leaf.HEAD_BLOCK", block)
    net = Layers().to(dtype)
    before = weights(net)
    view = build_view(net, net.parameters(), noise, select_spec="all", structure=structure)
    ids = torch.randint(0, 9, (6, 5), generator=torch.Generator().manual_seed(1))
    together, apart = both_sides(net, view, lambda: net(ids), [lambda: net(ids[:3]), lambda: net(ids[3:])])
    if block == HEAD_BLOCK:
        assert torch.equal(together, apart)
    torch.testing.assert_close(together, apart)  # products of narrower blocks may sum in another order
    assert not torch.equal(together[:3], net(ids)[:3])
    assert_same(weights(net), before)


@pytest.mark.parametrize(
    "call",
    [lambda m, x: x @ m.linear.weight, lambda m, x: x.sum() * m.linear.weight, lambda m, x: m.linear(x[:5])],
    ids=["matmul", "no examples", "odd number"],
)
def test_both_sides_need_examples_where_a_weight_is_read(call: Callable[..., Tensor]) -> None:
    net = Calls(call, torch.randn(6, 8), linear=nn.Linear(8, 8))
    view = build_view(net, net.parameters(), Rademacher(), select_spec="all", structure="dense")
    before = weights(net)
    with pytest.raises(PerExampleError, match="one_batch=False"), view.at(Both(Term(Key(0, 0), 0.1), 6)):
        net()
    assert_same(weights(net), before)
