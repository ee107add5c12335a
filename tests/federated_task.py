"""The task of the Flower tests: a small module, and a loader for each client."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from zolightning import ZOConfig, ZOMixin


class Net(ZOMixin, nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(8, 3)

    def zo_objective(self, batch: list[Tensor]) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net(x), y)


def module() -> nn.Module:
    torch.manual_seed(0)
    return Net()


def batches(partition: int, partitions: int) -> DataLoader[tuple[Tensor, ...]]:
    x = torch.randn(60, 8, generator=torch.Generator().manual_seed(partition))
    return DataLoader(TensorDataset(x, x[:, :3].argmax(1)), batch_size=20, shuffle=True)


method = ZOConfig("spsa", select="all", structure="dense", lr=0.01, num_queries=4)


def evaluate(net: Net) -> float:
    """Accuracy on all clients' examples."""
    pairs = [batch for partition in range(3) for batch in batches(partition, 3)]
    return sum(float((net.net(x).argmax(1) == y).sum()) for x, y in pairs) / sum(len(y) for _, y in pairs)
