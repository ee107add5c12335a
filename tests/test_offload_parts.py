"""Experts and embeddings come into memory by rows: with the bits of memory, and no byte of rows that nothing asks for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.optim import SGD, Adafactor, AdamW, Optimizer

from zolightning import Session, ZOConfig
from zolightning.engine.deferred import Deferred
from zolightning.engine.updates import apply_update
from zolightning.ledger import fingerprint
from zolightning.offload import DiskTier, OffloadError, Store, bind, entries_of, export, from_pretrained, rows_together, stored
from zolightning.space import Groups, LowRank, Sparse, Structure

CPU = torch.device("cpu")
SPSA = ZOConfig(estimator="spsa", structure="dense", select="all", normalize=False, eps=1e-2, lr=1e-2, seed=3)


class Mixture(nn.Module):
    """Experts in one tensor, of which some are read, by whole numbers, by tensors and several at once; a tied embedding."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(300, 40, dtype=dtype)
        self.experts = nn.Parameter(torch.randn(6, 40, 40).to(dtype) * 0.05)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + torch.tanh(F.linear(x, self.experts[1])) + F.linear(x, self.experts[torch.tensor(-2)])
        x = x + torch.einsum("bth,boh->bto", x, self.experts[ids[:, 0] % 2 * 3])
        return F.linear(x, self.embed.weight)


def in_parts(module: nn.Module, **options: Any) -> Store:
    """70 rows of the embedding together, one expert: as of models with larger ones."""
    tier = DiskTier(folder=Path("work"))
    store = Store(tier, **options)
    for name, parameter in module.named_parameters():
        entries = entries_of(name, parameter, CPU, {"embed.weight": 70, "experts": 1}[name])
        for entry, rows in zip(entries, parameter.detach().split(entries[0].shape[0]), strict=True):
            tier.keep(entry.name, rows)
            store.add(entry)
        bind(parameter, entries, store)
    return store


def trained(
    module: nn.Module, store: Store | None, make: Callable[[Any], Optimizer], structure: Structure | str = "dense"
) -> tuple[list[float], dict[str, Tensor]]:
    config = SPSA.override(structure=structure, noise="rademacher")
    apply = apply_update if store is None else Deferred(store)
    session = Session(module, make(module.parameters()), config, repeatable=False, apply=apply)
    losses: list[float] = []

    def loss(ids: Tensor) -> Tensor:
        return F.cross_entropy(module(ids).float().flatten(0, 1), ids.flatten()).double()

    if store is not None:
        store.start()
    for step in range(3):
        estimate = session.estimate(loss, torch.arange(20).view(4, 5) * 13 % 300 + step)
        losses += [] if estimate is None else estimate.losses
        session.update()
    if store is not None:
        store.flush()
    found = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    session.close()
    if store is not None:
        store.stop()
    return losses, found


@pytest.mark.parametrize(
    ("dtype", "make", "structure"),
    [
        (torch.float32, lambda p: SGD(p, lr=1e-2, weight_decay=0.1), "dense"),
        (torch.bfloat16, lambda p: SGD(p, lr=1e-2), "dense"),
        (torch.bfloat16, lambda p: AdamW(p, lr=1e-3), "dense"),
        (torch.float32, lambda p: SGD(p, lr=1e-2, momentum=0.9), Sparse(0.75)),
        (torch.bfloat16, lambda p: SGD(p, lr=1e-2), Sparse(0.75)),
        (torch.float32, lambda p: SGD(p, lr=1e-2), LowRank(2, 2)),
        (torch.bfloat16, lambda p: AdamW(p, lr=1e-3), LowRank(2, 2)),
        (torch.bfloat16, lambda p: SGD(p, lr=1e-2), Groups(sparsity=0.5)),
    ],
)
def test_rows_give_the_bits_of_memory(dtype: torch.dtype, make: Callable[[Any], Optimizer], structure: Any) -> None:
    losses, weights = trained(Mixture(dtype), None, make, structure)
    module = Mixture(dtype)
    found, streamed = trained(module, in_parts(module), make, structure)
    assert found == losses
    assert all(torch.equal(weights[name], value) for name, value in streamed.items())


def test_reads_by_rows_get_those_only() -> None:
    module, resident = Mixture(), Mixture()
    store = in_parts(module, pool=0, prefetch=0)
    read: list[str] = []
    below = store.tier.read
    store.tier.read = lambda name: read.append(name) or below(name)  # type: ignore[func-returns-value,method-assign]
    for ask, names in (
        (lambda m: m.experts[4], ["experts[4:5]"]),
        (lambda m: m.experts[torch.tensor(-6)], ["experts[0:1]"]),
        (lambda m: m.experts[torch.tensor([[5, -1], [2, 5]])], ["experts[2:3]", "experts[5:6]"]),
        (lambda m: m.embed(torch.tensor([[70, 139], [70, 290]])), ["embed.weight[70:140]", "embed.weight[280:300]"]),
        (lambda m: m.embed.weight[60:75], ["embed.weight[0:70]", "embed.weight[70:140]"]),
        (lambda m: m.embed.weight[[3]], [f"embed.weight[{a}:{min(a + 70, 300)}]" for a in range(0, 300, 70)]),
    ):
        read.clear()
        with torch.no_grad():
            assert torch.equal(ask(module), ask(resident))
        assert read == names
    for wrong in (lambda m: m.experts[6], lambda m: m.experts[torch.tensor([0, 6])], lambda m: m.embed(torch.tensor([-1]))):
        with pytest.raises(IndexError):
            wrong(module)
    read.clear()
    assert fingerprint(module.named_parameters()) == fingerprint(resident.named_parameters())
    assert max(map(read.count, read)) == 1


def test_a_write_into_a_copy_of_all_rows_is_noticed() -> None:
    module = Mixture()
    store = in_parts(module)
    module.experts.data.mul_(2.0)
    with pytest.raises(OffloadError, match="'experts' was written to by something else"):
        module.embed(torch.tensor([1]))
    with pytest.raises(OffloadError, match=r"writes to 'embed.weight'"), torch.no_grad():
        module.embed.weight[3] = 0.0
    store.flush()


def test_an_optimizer_that_looks_at_the_whole_matrix_is_refused_by_name() -> None:
    module = Mixture()
    with pytest.raises(OffloadError, match="Adafactor looks at a whole matrix"):
        trained(module, in_parts(module), lambda p: Adafactor(p, lr=1e-3))


MIXTURES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"moe_intermediate_size": 272, "num_experts": 8, "num_experts_per_tok": 2, "head_dim": 64},
    "mixtral": {"intermediate_size": 272, "num_local_experts": 8},
    "olmoe": {"intermediate_size": 272, "num_experts": 8, "num_experts_per_tok": 2},
}
SHAPE = {"vocab_size": 320, "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.mark.parametrize("kind", MIXTURES)
def test_a_mixture_reads_the_experts_that_tokens_go_to(kind: str) -> None:
    """Its files hold each expert's tensors one by one, as those of the hub do."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **SHAPE, **MIXTURES[kind])
    transformers.AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained("model")
    auto = transformers.AutoModelForCausalLM
    resident = auto.from_pretrained("model", dtype=torch.bfloat16, experts_implementation="eager").eval()
    model = from_pretrained(auto, "model", dtype=torch.bfloat16)
    store = next(iter(stored(model.parameters()))).store
    assert set(rows_together(model).values()) == {1, 320}
    tier, token = store.tier, torch.tensor([[7]])

    def steps(of: Any, away: Store | None) -> list[float]:
        apply = apply_update if away is None else Deferred(away)
        session = Session(of, SGD(of.parameters(), lr=1e-4), SPSA.override(lr=1e-4, eps=1e-3), repeatable=False, apply=apply)
        losses: list[float] = []
        for _ in range(3):
            estimate = session.estimate(lambda ids: of(ids, labels=token.expand(1, 2)).loss.double(), token.expand(1, 2))
            losses += [] if estimate is None else estimate.losses
            session.update()
        session.close()
        return losses

    with torch.no_grad():
        model(token)
        store.empty()
        before = tier.read_bytes
        model(token)
    store.empty()
    others = sum(entry.nbytes for entry in store.entries if "experts" not in entry.name)
    expert = sum(entry.nbytes for entry in store.entries if "experts" in entry.name) / 8
    assert others + 2 * expert <= tier.read_bytes - before <= 1.1 * (others + 2 * expert)  # two of eight, and page boundaries
    tier.folder = Path("work")  # type: ignore[attr-defined]
    store.start()
    assert steps(model, store) == steps(resident, None)
    export(model, "exported")
    store.stop()
    for again in (model, auto.from_pretrained("exported", dtype=torch.bfloat16)):
        for name, parameter in again.named_parameters():
            assert torch.equal(parameter.detach(), resident.get_parameter(name)), name
