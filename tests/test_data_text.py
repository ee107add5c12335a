import pytest

from zolightning.data.text import Example, distinct, split_classes


def test_distinct_ignores_spacing_and_case() -> None:
    texts = ["A film", "another", "a  FILM ", "Another one"]
    assert distinct(texts, str) == ["A film", "another", "Another one"]


@pytest.mark.parametrize("seed", [0, 1])
def test_split_classes(seed: int) -> None:
    by_class = [[Example(f"{label} {i}", label) for i in range(6)] for label in (0, 1)]
    splits = split_classes(by_class, [(1, 2), (2, 1)], ("no", "yes"), seed)
    assert [sum(e.label == 0 for e in part) for part in splits[:3]] == [3, 1, 2]
    assert [sum(e.label == 1 for e in part) for part in splits[:3]] == [3, 2, 1]
    assert sorted(e for part in splits[:3] for e in part) == sorted(by_class[0] + by_class[1])
    assert splits == split_classes(by_class, [(1, 2), (2, 1)], ("no", "yes"), seed)
