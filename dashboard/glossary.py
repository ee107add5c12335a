"""The meaning of well-known metrics, for somebody who sees them for the first time."""

from __future__ import annotations

_MEANINGS = {
    "train/loss": "How wrong the model is on the examples it trains on. It should fall.",
    "val/loss": "How wrong the model is on examples it does not train on. If it rises while train/loss falls, it overfits.",
    "val/accuracy": "Share of right answers on examples it does not train on.",
    "test/accuracy": "Share of right answers on examples that were used for nothing else.",
    "test/loss": "How wrong the model is on examples that were used for nothing else.",
    "zo/projected_grad": "The loss's slope along a random direction: all that a zeroth-order step knows. It swings around 0.",
    "zo/clip_rate": "Share of slopes that were cut because they were too large.",
    "zo/tie_rate": "Share of probes whose two losses were equal, so that the step learned nothing from them.",
    "zo/skipped_steps": "Steps that changed nothing because a loss was not finite.",
    "zo/update_rms": "How far a step moves a weight, as root mean square over the weights.",
    "zo/lost_update_share": "Share of weights whose update was too small for their number format.",
    "zo/offload/read_bytes": "Bytes of offloaded weights that were read so far.",
    "zo/offload/write_bytes": "Bytes of offloaded weights that were written so far.",
    "zo/offload/wait_seconds": "Seconds so far in which a step stood still until offloaded weights were there.",
    "zo/offload/pool_bytes": "The most memory that offloaded weights take at once.",
    "zo/ranks/size": "How many processes train together.",
    "zo/ranks/bytes": "Bytes that the first rank has sent to the others so far.",
    "zo/ranks/exchange_seconds": "Seconds so far that exchanges took, waiting for the slowest rank included.",
    "zo/clients/bytes_up": "Bytes that clients have sent so far: of all of them in the server's run, of one in its own.",
    "zo/clients/bytes_down": "Bytes that the server has sent to clients so far.",
    "zo/clients/asked": "Clients that the round asked.",
    "zo/clients/joined": "Clients whose replies counted in the round; in a client's own run its rounds so far.",
    "zo/clients/refused": "Replies so far that did not come, or that the server refused.",
    "forgetting/drift": "How far the trained weights are from those that the fit began with, as a share of their size.",
    "forgetting/perplexity": "How surprised the model is by a token of text of other kinds. It should not rise.",
    "memory/peak": "The most memory that training has needed so far, without the libraries.",
    "memory/rss": "Memory of the whole process now, libraries included.",
    "memory/weights": "Memory of the model's weights.",
    "memory/gradients": "Memory of gradients. Zeroth-order training has none.",
    "memory/optimizer_state": "Memory of the optimizer, such as Adam's two moments.",
    "memory/activations": "The rest of the peak: activations and scratch.",
    "speed/steps_per_second": "Optimizer steps a second since the start, validation not counted.",
    "speed/train_seconds": "Seconds of training so far, validation not counted.",
    "examples_seen": "Training examples so far.",
    "tokens_seen": "Tokens of training so far.",
    "forward_passes": "Forward passes of training so far. A backprop step counts as one and costs about three.",
}


def meaning(key: str) -> str:
    """One sentence about the metric; "" when it is not one of ours."""
    return _MEANINGS.get(key, "")
