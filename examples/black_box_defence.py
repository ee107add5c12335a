"""Certify a model that is only served: a denoiser before it, trained from its answers.

    python examples/black_box_defence.py
    python examples/black_box_defence.py --steps 600 --seeds 0 1 2 --test 500 --out table.md

Black-box defence by zeroth-order gradients, arXiv:2203.14195, on 5,000 digits of MNIST at 14 × 14. ZO-DS trains a denoiser by
random differences of the served model's scores; ZO-AE-DS puts an encoder behind the denoiser and counts the decoder to the
served model, so that differences are taken in few dimensions. The table has what needs no query at all, the denoiser as it is
after learning to reconstruct, and what an open model's gradients would give.

The model is served over HTTP by a process of its own, whose log counts the queries of training. For the certificates, which say
what was learned, the same weights are run here.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import requests
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zolightning.blackbox.box import BlackBox
from zolightning.blackbox.certify import certify
from zolightning.data.mnist import mnist_5k

PIXELS, CODE, RADII = 196, 24, (0.0, 0.25, 0.5, 0.75)


def mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def trained(
    model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], data: tuple[Tensor, Tensor], steps: int, lr: float
) -> nn.Module:
    """The model after ``steps`` of Adam on batches of 64."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr)
    for _ in range(steps):
        rows = torch.randint(len(data[0]), (64,))
        optimizer.zero_grad()
        loss(data[0][rows], data[1][rows]).backward()
        optimizer.step()
    return model


def serve(models: dict[str, nn.Module], log: Path, port: Any) -> None:
    """Answer rows of float32 with scores until the process is ended; a request is a line of the log: who asked, how many."""
    torch.set_num_threads(1)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # connections stay open

        def do_POST(self) -> None:
            model, who = models[self.path.strip("/")], self.headers["X-Asked-By"]
            body = self.rfile.read(int(self.headers["Content-Length"]))
            rows = torch.from_numpy(np.frombuffer(body, np.float32).copy()).view(int(self.headers["X-Rows"]), -1)
            with torch.no_grad():
                answer = model(rows).numpy().tobytes()
            with log.open("a") as file:
                print(who, len(rows), file=file, sep="\t")
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *args: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        port.send(server.server_address[1])
        server.serve_forever()


class Service:
    """The models behind an address, asked by name.

    Args:
        models: name → model.
        log: file that counts queries.
    """

    def __init__(self, models: dict[str, nn.Module], log: Path) -> None:
        self.log, self.session = log, requests.Session()
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(models, log, theirs), daemon=True)
        self.process.start()
        self.url = f"http://127.0.0.1:{ours.recv()}/"

    def asked_by(self, who: str, name: str) -> Callable[[Tensor], Tensor]:
        """Rows → scores, on account of ``who``."""

        def ask(rows: Tensor) -> Tensor:
            headers = {"X-Asked-By": who, "X-Rows": str(len(rows))}
            answer = self.session.post(self.url + name, rows.contiguous().numpy().tobytes(), headers=headers, timeout=600)
            answer.raise_for_status()
            return torch.from_numpy(np.frombuffer(answer.content, np.float32).copy()).view(len(rows), -1)

        return ask

    def queries(self) -> Counter[str]:
        """How many rows each has asked for, by the server's log."""
        count: Counter[str] = Counter()
        for line in self.log.read_text().splitlines() if self.log.exists() else ():
            who, rows = line.split("\t")
            count[who] += int(rows)
        return count


@contextmanager
def served(models: dict[str, nn.Module]) -> Iterator[Service]:
    """The models in a process of their own, while the block runs."""
    with tempfile.TemporaryDirectory() as folder:
        service = Service(models, Path(folder, "queries.log"))
        try:
            yield service
        finally:
            service.process.terminate()
            service.process.join()


def rows_of(options: argparse.Namespace, seed: int) -> dict[str, tuple[list[float], int]]:
    """Way → certified accuracy at each radius, and the queries that its training took."""
    torch.manual_seed(seed)
    images, labels = mnist_5k(options.offline)
    images = F.avg_pool2d(images, 2).flatten(1)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    test, train = order[: options.test], order[1000:]
    data, sigma = (images[train], labels[train]), options.sigma

    classifier = mlp(PIXELS, 128, 10)
    trained(classifier, lambda x, y: F.cross_entropy(classifier(x), y), data, 600, 1e-3).requires_grad_(False)
    denoiser, encoder, decoder = mlp(PIXELS, 256, 256, PIXELS), mlp(PIXELS, 128, CODE), mlp(CODE, 128, PIXELS)
    noisy = lambda x: x + sigma * torch.randn_like(x)  # noqa: E731
    trained(denoiser, lambda x, y: F.mse_loss(denoiser(noisy(x)), x), data, 1500, 1e-3)
    autoencoder = nn.Sequential(encoder, decoder)
    trained(autoencoder, lambda x, y: F.mse_loss(autoencoder(x), x), data, 1500, 1e-3)
    decoder.requires_grad_(False)
    behind = nn.Sequential(decoder, classifier)

    def stable(front: nn.Module, back: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
        """The class that the served model gives the clean image, from the noisy one."""
        return lambda x, y: F.cross_entropy(back(front(noisy(x))), y)

    ways: dict[str, tuple[nn.Module, nn.Module]] = {
        "nothing": (nn.Identity(), classifier),
        "denoiser, no query": (denoiser, classifier),
    }
    with served({"pixels": classifier, "code": behind}) as service:
        for name, small, estimator, queries in (
            ("ZO-DS, RGE", False, "rge", options.queries),
            ("ZO-AE-DS, RGE", True, "rge", options.queries),
            ("ZO-AE-DS, groups", True, "groups", CODE),
            ("ZO-AE-DS, CGE", True, "cge", CODE),
            ("first-order DS", False, "", 0),
            ("first-order AE-DS", True, "", 0),
        ):
            front: nn.Module = copy.deepcopy(nn.Sequential(denoiser, encoder) if small else denoiser)
            back = behind if small else classifier
            box: nn.Module = back
            own = classifier(data[0]).argmax(1)
            if estimator:
                own = service.asked_by(name, "pixels")(data[0]).argmax(1)  # one query an image, asked once
                box = BlackBox(service.asked_by(name, "code" if small else "pixels"), queries, estimator, seed=seed)  # type: ignore[arg-type]
            ways[name] = (trained(front, stable(front, box), (data[0], own), options.steps, options.lr), back)
        spent = service.queries()
    return certified(ways, spent, (images[test], labels[test]), options, seed)


def certified(
    ways: dict[str, tuple[nn.Module, nn.Module]],
    spent: Counter[str],
    test: tuple[Tensor, Tensor],
    options: argparse.Namespace,
    seed: int,
) -> dict[str, tuple[list[float], int]]:
    """Way → certified accuracy at each radius, and the queries that its training took."""
    found = {}
    for name, (front, back) in ways.items():
        certificates = certify(lambda x, f=front, b=back: b(f(x)), [test], options.sigma, samples=options.samples, seed=seed)
        found[name] = ([100 * certificates.accuracy(radius) for radius in RADII], spent[name])
        if options.pictures:
            options.pictures.mkdir(parents=True, exist_ok=True)
            certificates.picture(options.pictures / f"{name.replace(' ', '-').replace(',', '')}-seed{seed}.png")
    return found


def kept(options: argparse.Namespace, seed: int) -> dict[str, tuple[list[float], int]]:
    """The rows of a seed, from the folder where it has them."""
    file = options.keep / f"seed-{seed}.json" if options.keep else None
    if file and file.exists():
        return {name: (values, count) for name, (values, count) in json.loads(file.read_text()).items()}
    rows = rows_of(options, seed)
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(rows))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150, help="training steps of 64 images")
    parser.add_argument("--queries", type=int, default=CODE, help="directions for each image of the RGE rows")
    parser.add_argument("--lr", type=float, default=1e-4, help="of Adam")
    parser.add_argument("--sigma", type=float, default=0.5, help="standard deviation of the noise")
    parser.add_argument("--samples", type=int, default=500, help="noisy copies counted for each certificate")
    parser.add_argument("--test", type=int, default=200, help="images that are certified, at most 1000")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--keep", type=Path, help="folder for each seed's rows; those that it has are not computed again")
    parser.add_argument("--pictures", type=Path, help="folder for the curves of certified accuracy")
    parser.add_argument("--offline", action="store_true", help="fetch nothing")
    parser.add_argument("--out", type=Path, help="Markdown file of the table")
    options = parser.parse_args()
    torch.set_num_threads(1)
    runs = [kept(options, seed) for seed in options.seeds]
    lines = [
        f"Certified accuracy in %, σ {options.sigma:g}, {options.test} images, {options.steps} steps, {len(runs)} seeds:",
        "",
        "| before the served model | " + " | ".join(f"r {radius:g}" for radius in RADII) + " | queries |",
        "|---" * (len(RADII) + 2) + "|",
    ]
    for name in runs[0]:
        values = torch.tensor([run[name][0] for run in runs])
        cells = [f"{mean:.1f}" for mean in values.mean(0)]
        if len(runs) > 1:
            cells = [f"{cell} ± {deviation:.1f}" for cell, deviation in zip(cells, values.std(0), strict=True)]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {runs[0][name][1]:,} |")
    print("\n".join(lines))
    if options.out:
        options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
