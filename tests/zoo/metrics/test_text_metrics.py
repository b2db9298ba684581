"""Text metrics against hand counts and the definition of a subsequence."""

import itertools

import numpy as np
import pytest

from zoo.metrics.text import best_of, cut, exact_match, rouge_1, rouge_l, squad_tokens, text_metrics, token_f1


def test_squad_normalisation():
    assert squad_tokens("The  Cat's, an  Apple-pie; A theatre!") == ["cats", "applepie", "theatre"]
    assert squad_tokens("the a an") == []


def test_hand_counts():
    assert exact_match([1, 2], (1, 2)) == 1 and exact_match([1, 2], [2, 1]) == 0 and exact_match([1], [1, 1]) == 0
    # two of three predicted occur, two of four targets: 2 * 2 / 7
    assert token_f1(["a", "b", "x"], ["a", "b", "c", "d"]) == pytest.approx(4 / 7)
    # counted as often as in both
    assert token_f1(["a", "a", "a"], ["a", "b"]) == pytest.approx(2 / 5)
    assert rouge_1(["b", "a"], ["a", "b"]) == 1 and rouge_l(["b", "a"], ["a", "b"]) == 0.5
    assert rouge_l(["x", "a", "y", "b", "c"], ["a", "b", "z", "c"]) == pytest.approx(2 * 3 / 9)
    for metric in (token_f1, rouge_l):
        assert metric([], []) == 1 and metric([], [1]) == 0 and metric([1], []) == 0


def test_longest_common_subsequence_by_trying_all():
    rng = np.random.default_rng(0)
    for _ in range(30):
        a, b = (rng.integers(0, 3, rng.integers(1, 6)).tolist() for _ in range(2))
        subs = lambda x: {s for n in range(len(x) + 1) for s in itertools.combinations(x, n)}  # noqa: E731
        longest = max(map(len, subs(a) & subs(b)))
        assert rouge_l(a, b) == pytest.approx(2 * longest / (len(a) + len(b)))


def test_means_references_and_the_stop():
    found = text_metrics([[1, 2], [3]], [[1, 2], [3, 4]])
    assert found["exact_match"] == 0.5 and found["f1"] == pytest.approx((1 + 2 / 3) / 2)
    assert set(found) == {"exact_match", "f1", "rouge_1", "rouge_l"}
    assert best_of(token_f1, [1], [[2], [1, 2]]) == pytest.approx(2 / 3)
    assert cut(np.array([5, 6, 2, 7, 2]), 2) == [5, 6] and cut([5], 2) == [5] and cut([2], 2) == []
    with pytest.raises(ValueError, match="at least one target"):
        best_of(token_f1, [1], [])
    for wrong in (([], []), ([[1]], [])):
        with pytest.raises(ValueError, match="one target per prediction"):
            text_metrics(*wrong)
