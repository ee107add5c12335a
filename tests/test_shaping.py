from __future__ import annotations

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zolightning.methods.shaping import Chain, Clip, Normalize, Shaping, Standardize, state_from

numbers = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=8)


@given(numbers, st.floats(1e-3, 1e3))
def test_clip(values: list[float], limit: float) -> None:
    shaped, state, limited = Clip(limit)(values, {})
    assert all(abs(v) <= limit for v in shaped)
    assert [v for v in shaped if abs(v) < limit] == [v for v in values if abs(v) < limit]
    assert state == {}
    assert limited == [abs(v) > limit for v in values]


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=8), st.floats(0.1, 10.0))
def test_normalize_does_not_depend_on_the_scale_of_the_loss(values: list[float], scale: float) -> None:
    link = Normalize()
    plain, *_ = link(values, link.init())
    scaled, *_ = link([v * scale for v in values], link.init())
    assert scaled == pytest.approx(plain, rel=1e-6, abs=1e-9)


def test_first_step_has_unit_size() -> None:
    """sqrt(n)·g/rms(g): the mean of n terms c_k z_k has RMS 1, since independent directions add in quadrature."""
    link = Normalize()
    shaped, *_ = link([3.0, -4.0], link.init())
    assert math.fsum(v * v for v in shaped) / len(shaped) ** 2 == pytest.approx(1.0)


def test_normalize_is_bias_corrected() -> None:
    link, state = Normalize(0.5), Normalize(0.5).init()
    state = link([1.0], state).state
    shaped, state, _ = link([3.0], state)
    assert shaped == pytest.approx([3.0 / math.sqrt((0.25 * 1 + 0.5 * 9) / 0.75)])
    assert state["decay"] == 0.25


def test_all_ties_make_no_step_and_no_error() -> None:
    link = Normalize()
    shaped, state, _ = link([0.0, 0.0], link.init())
    assert shaped == [0.0, 0.0]
    shaped, *_ = link([1.0], state)
    assert all(map(math.isfinite, shaped))


def test_steps_of_nothing_but_ties_leave_the_size_of_the_others_alone() -> None:
    link = Normalize()
    rare, steady = link.init(), link.init()
    for _ in range(30):
        for _ in range(9):
            rare = link([0.0, 0.0], rare).state
        (wanted, steady, _), (shaped, rare, _) = link([0.0, 2.0], steady), link([0.0, 2.0], rare)
        assert shaped == wanted == pytest.approx([0.0, 2.0])


def test_floor_bounds_the_step() -> None:
    link = Normalize(floor=10.0)
    assert link([1.0], link.init()).values == pytest.approx([0.1])


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=8))
def test_standardize(values: list[float]) -> None:
    link = Standardize(1e-3)
    shaped, state, limited = link(values, link.init())
    if len(set(values)) == 1:
        assert (shaped, state) == ([0.0] * len(values), link.init())
    else:
        std = max(statistics.stdev(values), 1e-3)
        assert shaped == pytest.approx([v / std for v in values], rel=1e-6)
        assert link([3.0], state) == ([3.0 / state["std"]], {"std": pytest.approx(std, rel=1e-6)}, ())  # a last batch of one
    assert limited == ()


def test_standardize_does_not_divide_by_next_to_nothing() -> None:
    assert Standardize(1e-2)([1.0, 1.0 + 1e-9], {"std": 1.0}).values == pytest.approx([100.0, 100.0])


def test_chain_applies_in_order_with_states_apart() -> None:
    chain = Chain(Clip(1.0), Normalize(0.5), Normalize(0.9))
    shaped, state, limited = chain([5.0], chain.init())
    assert limited == [True]
    assert shaped == pytest.approx([1.0])
    assert set(state) == {"1.second_moment", "1.decay", "2.second_moment", "2.decay"}
    assert (state["1.decay"], state["2.decay"]) == (0.5, 0.9)
    assert repr(chain) == "Chain(Clip(limit=1.0), Normalize(beta=0.5, floor=0.0), Normalize(beta=0.9, floor=0.0))"


def test_state_is_not_written_to() -> None:
    chain = Chain(Normalize())
    state = chain.init()
    chain([1.0], state)
    assert state == chain.init()


@pytest.mark.parametrize("shaping", [Chain(), Chain(Clip(1.0), Normalize()), Chain(Standardize())], ids=repr)
def test_state_from_a_checkpoint(shaping: Shaping) -> None:
    state = shaping([1.0, 2.0], shaping.init()).state
    assert state_from(dict(state), shaping) == state


def test_state_of_another_recipe() -> None:
    with pytest.raises(ValueError, match="resume with the recipe that wrote it"):
        state_from({"0.decay": 1.0}, Chain(Clip(1.0)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Clip(0.0), "limit"),
        (lambda: Clip(math.nan), "limit"),
        (lambda: Standardize(0.0), "floor"),
        (lambda: Standardize()([1.0], Standardize().init()), "2 or more, got 1"),
        (lambda: Normalize(1.0), "beta"),
        (lambda: Normalize(-0.1), "beta"),
        (lambda: Normalize(0.5, -1.0), "floor"),
        (lambda: Normalize(0.5, math.nan), "floor"),
    ],
)
def test_bad_settings(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]
