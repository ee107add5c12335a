"""``zolightning replay``: the weights of any step of a run, from its ledger, as safetensors."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..ledger import Ledger, LedgerError, base_path, load_base, read, replay
from ..ledger.format import Header
from .console import say

_COPIED = ("generation_config.json", "tokenizer*", "special_tokens_map.json", "vocab.*", "merges.txt", "chat_template.jinja")


def replay_run(
    run: str,
    step: int | None = None,
    out: str | None = None,
    base: str | None = None,
    buffers: str | None = None,
    store: str = "sqlite:///mlflow.db",
    device: str | None = None,
    verify: bool = False,
) -> None:
    """Rebuild a run's weights at any step from its ledger. Example: zolightning replay ledger.zo --step 740 --out model740

    Writes ``model.safetensors``, with ``config.json`` and the tokenizer where the run trained a Hugging Face model, so that
    ``from_pretrained`` reads the folder. A ledger has no buffers, such as BatchNorm's statistics; they come from the run's last
    checkpoint up to that step. The ledger itself is never changed.

    Args:
        run: A ledger file, a folder with ``ledger.zo`` in it, or the id of an MLflow run.
        step: The number of optimizer steps after which the weights are wanted. Default: the last step.
        out: The folder to write, which must not hold a model yet.
        base: The weights that the run started from: a safetensors file, a Lightning checkpoint, a Hugging Face folder or
            id. Default: the base file beside the ledger, else the pretrained model that the ledger names.
        buffers: a Lightning checkpoint of the run to take the buffers from. Default: in the ledger's folder the last one
            up to the step.
        store: The MLflow store in which a run id is looked up.
        device: The device to compute on. Default: the run's kind of device, where it is available.
        verify: Compare the fingerprints of the replayed weights with those of the run, and write nothing unless --out names
            a folder.
    """
    ledger = find_run(run, store)
    if out is None and not verify:
        raise ValueError("give `--out FOLDER` for the weights, or `--verify` to compare fingerprints only")
    folder = None if out is None else Path(out)
    if folder is not None and (folder / "model.safetensors").exists():
        raise ValueError(f"`--out {out}` holds a model already; give another folder")
    if ledger.torn:
        say(f"{ledger.path} ends with {ledger.torn} bytes that are no whole record (the run was cut off there): left out")
    if ledger.damage:
        say(ledger.damage)
    parameters = find_base(ledger, base, device)
    say(f"base of {len(parameters)} tensors, {sum(p.numel() for p in parameters.values()):,} weights")
    started = time.perf_counter()
    done = replay(ledger, parameters, step)
    seconds = time.perf_counter() - started
    checked = "no fingerprint on the way" if done.checked is None else f"fingerprint of step {done.checked} as the run's"
    say(f"replayed to step {done.step} in {seconds:.1f} s; {checked}")
    if verify and done.checked is None:
        raise LedgerError(f"nothing to compare: the run noted no fingerprint up to step {done.step}")
    if folder is not None:
        found = find_buffers(ledger, buffers, done.step)
        write_model(folder, ledger.header, {**parameters, **found}, source=base)
        say(f"wrote {folder}")


def find_run(run: str, store: str) -> Ledger:
    """The ledger that a person means.

    Raises:
        LedgerError: there is none; says where it was looked for.
    """
    path = Path(run)
    if path.is_dir():
        path = path / "ledger.zo"
    if path.exists():
        return read(path)
    if path.suffix or len(path.parts) > 1:
        raise LedgerError(f"there is no ledger {path}; give the path of a ledger, its folder, or the id of an MLflow run")
    return _from_mlflow(run, store)


def _from_mlflow(run: str, store: str) -> Ledger:
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    client = MlflowClient(store)
    try:
        kept = Path(client.get_run(run).data.tags.get("zo.ledger", ""))
        if kept.name and kept.exists():
            return read(kept)
        with tempfile.TemporaryDirectory() as folder:
            return read(client.download_artifacts(run, kept.name or "ledger.zo", folder))
    except (MlflowException, OSError) as error:
        raise LedgerError(
            f"{run!r} is no file or folder here, and the store {store} has no ledger of a run of that id: {error}"
        ) from error


def find_base(ledger: Ledger, given: str | None, device: str | None = None) -> dict[str, nn.Parameter]:
    """The parameters that the run started from, in its dtypes, on the device to compute on.

    Raises:
        LedgerError: nothing says where they are.
        OSError: they cannot be loaded.
    """
    header = ledger.header
    beside = base_path(ledger.path.parent, header.base)
    source = given or (str(beside) if beside.exists() else (header.pretrained or {}).get("source"))
    if not source:
        raise LedgerError(
            f"the weights that the run of {ledger.path} started from are not beside it; give them with `--base`: a safetensors "
            "file, a Lightning checkpoint, a Hugging Face folder or id (runs with LedgerCheckpointIO keep them)"
        )
    there = header.device if header.device != "cuda" or torch.cuda.is_available() else "cpu"
    found = _load(source, header)
    parameters = {}
    for name, tensor in found.items():
        dtype = getattr(torch, header.parameters[name][0]) if name in header.parameters else tensor.dtype
        parameters[name] = nn.Parameter(tensor.detach().to(device or there, dtype), requires_grad=False)
    return parameters


def _load(source: str, header: Header) -> Mapping[str, Tensor]:
    path = Path(source)
    if path.suffix == ".safetensors" and path.is_file():
        return load_base(path)
    if path.suffix in (".ckpt", ".pt") and path.is_file():
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = state.get("state_dict", state)
        return {name: state[name] for name in header.parameters if name in state}
    if header.pretrained is None:
        raise LedgerError(f"`--base {source}`: the run trained no Hugging Face model; give a safetensors file or a checkpoint")
    model = _pretrained(source, header.pretrained["class"])
    return {header.pretrained["prefix"] + name: p for name, p in model.named_parameters()}


def _pretrained(source: str, class_name: str) -> nn.Module:
    import transformers

    from ..data.model import refuse_pickled

    refuse_pickled(Path(source))
    kind: Any = getattr(transformers, class_name, None)
    if not _is_model(kind, transformers.PreTrainedModel):
        raise LedgerError(f"the run's model class {class_name!r} is not one of transformers {transformers.__version__}")
    model: nn.Module = kind.from_pretrained(source, use_safetensors=True, trust_remote_code=False)
    return model


def _is_model(kind: object, base: type) -> bool:
    return isinstance(kind, type) and issubclass(kind, base)


def find_buffers(ledger: Ledger, given: str | None, step: int) -> dict[str, Tensor]:
    """The buffers of the run's module as a checkpoint has them; {} where there is none, and then says how to do without.

    Args:
        ledger: The ledger of the run.
        given: the checkpoint. None: of those in the ledger's folder the last one up to the step.
        step: that the weights are of.

    Raises:
        LedgerError: the given file is no checkpoint of such a run.
    """
    names = ledger.header.buffers
    if not names:
        return {}
    places = [Path(given)] if given else sorted(ledger.path.parent.rglob("*.ckpt"))
    found = [(state["zolightning"]["zo_step"], path, state) for path in places if (state := _of_run(path, ledger.header))]
    if given and not found:
        raise LedgerError(f"`--buffers {given}` is no checkpoint of the run of {ledger.path}")
    until = [entry for entry in found if given or entry[0] <= step]
    if not until:
        say(
            f"not written: {len(names)} buffers ({', '.join(names[:3])} …), which a ledger does not have, and no checkpoint in "
            f"{ledger.path.parent} is of a step up to {step}; give one with `--buffers`, or load the weights into a module "
            "that has its own buffers (load_state_dict(..., strict=False))"
        )
        return {}
    at, path, state = max(until, key=lambda entry: entry[0])
    say(f"{len(names)} buffers of step {at}, from {path}")
    return {name: state["state_dict"][name] for name in names}


def _of_run(path: Path, header: Header) -> dict[str, Any] | None:
    """The checkpoint, when it is one of the run and has its buffers."""
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        same = state["zolightning"]["seed"] == header.seed and set(header.buffers) <= state["state_dict"].keys()
    except Exception:  # another kind of file, or one that is being written
        return None
    return state if same else None


def write_model(folder: Path, header: Header, parameters: Mapping[str, Tensor], source: str | None = None) -> None:
    """The weights in a folder: Hugging Face's layout where the run trained such a model.

    Args:
        folder: made when it is not there.
        header: The header of the ledger.
        parameters: and buffers, by their names in the run's module; those outside the Hugging Face model go to
            ``others.safetensors``.
        source: folder to take tokenizer and generation settings from. Default: where the pretrained model came from.
    """
    folder.mkdir(parents=True, exist_ok=True)
    known = header.pretrained
    prefix = known["prefix"] if known else ""
    inside = {n.removeprefix(prefix): p.detach().cpu().contiguous() for n, p in parameters.items() if n.startswith(prefix)}
    others = {n: p.detach().cpu().contiguous() for n, p in parameters.items() if not n.startswith(prefix)}
    if others:
        save_file(others, folder / "others.safetensors", {"format": "pt"})
    if known:
        config: dict[str, Any] = {**known["config"], "architectures": [known["class"]]}
        (folder / "config.json").write_text(json.dumps(config, indent=2, default=list) + "\n")
        template = Path(source or known["source"] or "")
        for pattern in _COPIED if template.is_dir() else ():
            for file in template.glob(pattern):
                shutil.copyfile(file, folder / file.name)
    save_file(inside, folder / "model.safetensors", {"format": "pt"})  # last: its presence says that the folder is whole
