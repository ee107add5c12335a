"""Two processes over loopback: equal weights after each step, the bits of one process, a few bytes a step, and faults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import PerExampleTask, batches, loader, mlp, per_example_mse, quiet_trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from rank_cases import CONFIGS, DEFAULT, SIZE, STEPS, TIMEOUT, examples, trained
from rank_trainer import config_of, module_of
from ranks import Found, Group, run_groups
from torch import nn
from torch.utils.data import DataLoader

from zolightning import ZOConfig, ZOStrategy
from zolightning.ledger import fingerprint, read, replay
from zolightning.parallel import Layout, Parallel, RanksError
from zolightning.parallel.greeting import Greeting, refuse_strangers
from zolightning.types import Key

pytestmark = pytest.mark.integration

SPREAD = [
    ("sign", "spsa"),
    ("sign", "two directions"),
    ("query", "two directions"),
    ("query", "per example"),
    ("query", "population"),
    ("query", "one-sided"),
    ("query", "forward gradient"),
]
LONG = [("data", "spsa"), ("sign", "spsa"), ("query", "two directions"), ("data", "default")]
DATA = ["per example", "population", "one-sided", "forward gradient", "conservative", "momentum", "anchored"]
MODULES = [
    ("spsa", "plain"),
    ("per example", "plain"),
    ("spsa", "manual"),
    ("per example", "prepared"),
    ("spsa", "compiled"),
    ("scales", "scales"),
]
LOOPS = [
    *(["loop", mode, config, 200] for mode, config in LONG),
    *(["loop", "data", config, STEPS] for config in DATA),
    *(["loop", mode, config, STEPS] for mode, config in SPREAD),
]
ALIKE = [
    *LOOPS,
    *(["trainer", config, kind, 4] for config, kind in MODULES),
    ["uneven", True],
    ["uneven", False],
    ["plateau"],
    ["skips", "spsa"],
    ["skips", "default"],
    ["kept"],
    ["resumed"],
    ["tracked"],
    *(["offloaded", tier] for tier in (None, "disk", "cpu")),
    ["large", 8],
    ["large", 512],
]
OTHERS = [["whole", "data"], ["whole", "sign"], ["refused", "query", "spsa"], ["late"]]
FAULTS = ["dies", "hangs", "flips", "stranger"]
FOUR = [
    ["loop", "data+sign", "spsa", 200],
    ["loop", "data+sign", "per example", STEPS],
    ["loop", "data", "per example", STEPS],
    ["loop", "query", "population", STEPS],
]
LAUNCHED = {
    "slurm": ["launched", 2, 1],
    "slurm, two nodes": ["launched", 1, 2],
    "torchrun, two nodes": ["launched", 1, 2],
    "lightning, two nodes": ["launched", 1, 2],
    "torchrun": ["launched", 2, 1],
    "fork": ["launched", 2, 1, "fork"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def groups(folder: Path) -> dict[str, Found]:
    """Groups of processes by name: start-up is the cost, so all are forks of one."""
    wanted = {
        "two": Group([*ALIKE, *OTHERS]),
        **{kind: Group([["fault", kind]]) for kind in FAULTS},
        "four": Group(FOUR, size=4),
        **{launcher: Group([case], 1 if launcher == "fork" else 2, launcher) for launcher, case in LAUNCHED.items()},
        "visited": Group([["visited"]], 3, "stranger"),
    }
    return dict(zip(wanted, run_groups(list(wanted.values()), folder), strict=True))


@pytest.fixture(scope="module")
def ranks(groups: dict[str, Found]) -> Found:
    return groups["two"]


@pytest.mark.parametrize("case", ALIKE, ids=str)
def test_ranks_have_equal_weights_after_each_step(case: list[Any], ranks: Found) -> None:
    first, second = (rank[str(case)] for rank in ranks)
    assert first == second
    if case[0] == "loop" and case[2] != "conservative":  # which may stay where it is
        assert len(set(first["prints"])) == case[-1]


@pytest.mark.parametrize(("mode", "config"), [("data", "per example"), *SPREAD])
def test_one_process_on_all_examples_has_the_same_bits(mode: str, config: str, ranks: Found) -> None:
    _, _, prints = trained(CONFIGS[config].override(one_batch=False), batches(STEPS, size=SIZE))
    assert ranks[0][str(["loop", mode, config, STEPS])]["prints"] == prints


@pytest.mark.parametrize(("config", "kind"), MODULES)
def test_the_trainer_deals_examples_out_as_one_process_reads_them(config: str, kind: str, ranks: Found) -> None:
    """To the rounding of the losses of four examples in place of eight, over the difference of two probes."""
    module, items = module_of(kind), examples(SIZE * 4, 64 if kind == "scales" else 4)
    quiet_trainer(ZOStrategy(config_of(config, kind), one_batch=False)).fit(module, DataLoader(items, batch_size=SIZE))  # type: ignore[arg-type]
    got = ranks[0][str(["trainer", config, kind, 4])]
    assert got["steps"] == 4
    assert got["prepared"] == getattr(module, "prepared", 0)
    for mine, theirs in zip(module.net.parameters(), got["weights"], strict=True):
        torch.testing.assert_close(mine.detach(), torch.tensor(theirs, dtype=mine.dtype), rtol=0, atol=1e-4)


def test_four_ranks_on_any_number_of_cores_have_equal_weights(groups: dict[str, Found]) -> None:
    first, *others = groups["four"]
    assert first.keys() == {str(case) for case in FOUR}
    assert all(other == first for other in others)
    assert len(set(first[str(FOUR[0])]["prints"])) == 200
    for _, mode, config, steps in FOUR[1:]:
        _, _, prints = trained(CONFIGS[config].override(one_batch=False), batches(steps, size=SIZE))
        assert first[str(["loop", mode, config, steps])]["prints"] == prints, mode


@pytest.mark.parametrize("case", LOOPS, ids=str)
def test_payload_is_eight_bytes_a_coefficient_and_64_or_72_a_step(case: list[Any], ranks: Found) -> None:
    steps, found = case[-1], ranks[0][str(case)]
    begin = 2 * (8 + 4) + 3 * (72 + 8 * found["terms"])  # the greeting, and messages for which there was no room yet
    trials = 36 * steps if case[2] == "conservative" else 0
    own = 64 if CONFIGS[case[2]].lr != "auto" else 72  # a step at which the size is searched brings four losses
    assert found["sent"] <= begin + steps * (8 * found["terms"] + own) + trials


def test_payload_does_not_depend_on_the_model(ranks: Found) -> None:
    assert ranks[0]["['large', 8]"] == ranks[0]["['large', 512]"]


@pytest.mark.parametrize("mode", ["data", "sign"])
def test_a_trainer_sees_one_run(mode: str, ranks: Found) -> None:
    """Weights, buffers after validation, metrics, learning rates and predictions are those of all ranks."""
    first, second = (rank[str(["whole", mode])] for rank in ranks)
    assert first["shared"] == second["shared"]
    assert first["shared"]["metrics"]["rank"] == 0.5
    assert first["shared"]["predicted"] == pytest.approx(sorted(first["shared"]["wanted"] * (1 + (mode == "sign"))), abs=1e-6)
    assert first["shared"]["tested"][0] == pytest.approx(first["shared"]["tested"][1], abs=1e-6)
    assert (first["seen"] == second["seen"]) == (mode == "sign")  # samplers deal out to groups of ranks
    assert (first["masks"] == second["masks"]) == (mode == "sign")
    traffic = first["traffic"]
    assert traffic["ranks/size"] == 2 and traffic["ranks/bytes"] > 0 and traffic["ranks/exchange_seconds"] > 0


def test_the_trainer_takes_as_many_steps_as_the_longest_loader(ranks: Found) -> None:
    assert ranks[0]["['uneven', True]"] == ranks[0]["['uneven', False]"]
    assert ranks[0]["['uneven', True]"]["steps"] == 2 * 5


def test_a_skipping_or_broken_rank_keeps_the_others_going(ranks: Found) -> None:
    """Step 0 and 1 go on without a rank; a NaN ends step 2 on both."""
    prints = ranks[0]["['skips', 'spsa']"]["prints"]
    assert len(set(prints)) == 4
    assert prints[1] == prints[2]


def test_one_process_goes_on_from_two(folder: Path, ranks: Found) -> None:
    """From their checkpoint, to the rounding of its batches; and their ledger gives their weights."""
    end = ranks[0]["['kept']"]["print"]
    assert ranks[0]["['resumed']"] == {"print": end, "steps": 6}
    ledger = read(folder / "kept.zo")
    start = {name: nn.Parameter(p.detach().clone()) for name, p in PerExampleTask(mlp(), per_example_mse).named_parameters()}
    assert replay(ledger, start).step == 6
    assert fingerprint((name.removeprefix("net."), p) for name, p in start.items()) == end
    module = PerExampleTask(mlp(), per_example_mse)
    trainer = quiet_trainer(ZOStrategy(DEFAULT))
    trainer.fit(module, loader(batches(6)[3:]), ckpt_path=folder / "kept" / "step=3.ckpt")
    assert trainer.global_step == 6


def test_a_mode_that_cannot_spread_a_method_says_so(ranks: Found) -> None:
    assert "raise num_queries" in ranks[1]["['refused', 'query', 'spsa']"]["refused"]


def test_a_rank_at_another_step_is_refused(ranks: Found) -> None:
    for rank in ranks:
        assert rank["['late']"]["step"] == 2
        assert "different steps, [1, 2]" in rank["['late']"]["refused"]


@pytest.mark.parametrize("tier", ["disk", "cpu"])
def test_offloaded_ranks_have_the_bits_of_resident_ones(tier: str, ranks: Found) -> None:
    assert ranks[0][str(["offloaded", tier])] == ranks[0]["['offloaded', None]"]
    assert len(set(ranks[0]["['offloaded', None]"].values())) == 1, "the resumed run ends as the whole one"


def test_two_ranks_make_one_run_and_say_each_thing_once(folder: Path, ranks: Found) -> None:
    assert ranks[0]["['tracked']"]["runs"] == 1
    assert ranks[0]["['tracked']"]["examples"] == 2 * 4 * 5
    assert len(ranks[0]["['tracked']"]["losses"]) == 4
    texts = [(folder / f"rank-{rank}.txt").read_text() for rank in range(2)]
    lines = [text[text.index("tracked\n") : text.index("/tracked")].splitlines()[1:] for text in texts]
    said = [[line for line in of_rank if "mlflow.store" not in line] for of_rank in lines]  # says the one that makes the store
    assert sum(line.startswith("ZO: ") for line in said[0]) == 1
    assert len(set(said[0])) == len(said[0])
    assert not said[1], "the second rank has nothing to say"
    assert ["those of rank 0 are the run's" in text for text in texts] == [True, False], "said by the first rank only"


@pytest.mark.parametrize("launcher", LAUNCHED)
def test_each_launcher_starts_the_same_run(launcher: str, groups: dict[str, Found]) -> None:
    found = [rank[str(LAUNCHED[launcher])] for rank in groups[launcher]]
    assert {rank["print"] for rank in found} == {groups["torchrun"][0]["['launched', 2, 1]"]["print"]}
    if launcher != "fork":  # the process that started the ranks is none
        assert [(rank["rank"], rank["told"], rank["steps"]) for rank in found] == [([0, 2], 0, 4), ([1, 2], 1, 4)]


def test_a_process_that_comes_late_is_refused_and_the_run_goes_on(groups: dict[str, Found]) -> None:
    first, second, stranger = (rank["['visited']"] for rank in groups["visited"])
    assert "has a rank 1 already" in stranger["error"]
    assert first == second
    assert "print" in first


@pytest.mark.parametrize("kind", ["dies", "hangs"])
def test_a_rank_that_is_gone_ends_the_others(kind: str, groups: dict[str, Found]) -> None:
    found = groups[kind][0][str(["fault", kind])]
    assert "another rank has ended, or did not answer" in found["error"]
    assert "at optimizer step 3" in found["error"]
    assert found["seconds"] < TIMEOUT + 5


def test_a_flipped_bit_is_found_and_its_tensor_named(groups: dict[str, Found]) -> None:
    for rank in groups["flips"]:
        assert "before step 4: '2.weight' on rank 1" in rank["['fault', 'flips']"]["error"]


def test_a_stranger_is_refused_before_the_first_step(groups: dict[str, Found]) -> None:
    for rank in groups["stranger"]:
        assert "rank 1 does not belong to this run: 'eps' of its settings is 0.002" in rank["['fault', 'stranger']"]["error"]


def test_mixed_devices_need_noise_that_is_the_same_everywhere() -> None:
    here = Greeting.of({"w": torch.zeros(2)}, "data", ZOConfig().build_distribution(), {})
    refuse_strangers([here, here._replace(device="cuda")])
    gaussian = Greeting.of({"w": torch.zeros(2)}, "data", ZOConfig(noise="gaussian").build_distribution(), {})
    with pytest.raises(RanksError, match="use noise='rademacher'"):
        refuse_strangers([gaussian, gaussian._replace(device="cuda")])


@pytest.mark.parametrize("mode", ["query", "sign"])
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("members", [2, 3, 4])
def test_every_point_runs_once(mode: str, config: str, members: int) -> None:
    points = CONFIGS[config].build_estimator(torch.float32).ask(Key(0, 0), 4)
    shares = Layout(0, members, members, whole=mode == "query").shares(points)
    assert sorted(place for share in shares for place in share) == list(range(len(points)))


@pytest.mark.parametrize(
    ("settings", "match"),
    [({"mode": "dat"}, "did you mean"), ({"timeout": 0}, "must be > 0"), ({"check_every": 0}, "must be >= 1")],
)
def test_options_out_of_range_are_refused(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Parallel(**settings)


def test_pairs_need_an_even_number_of_ranks() -> None:
    with pytest.raises(ValueError, match="an even number of them, got 3"):
        Parallel("data+sign").layout(0, 3)
    assert [Parallel("data+sign").layout(rank, 4)[1:] for rank in range(2)] == [(4, 2, False)] * 2
    assert [Parallel("data+sign").layout(rank, 4).group for rank in range(4)] == [0, 0, 1, 1]


def test_recorded_graphs_on_several_ranks_are_refused() -> None:
    strategy = ZOStrategy(cuda_graphs=True)
    quiet_trainer(strategy, devices=2)
    with pytest.raises(MisconfigurationException, match="on several ranks"):
        strategy.refuse_ranks()
