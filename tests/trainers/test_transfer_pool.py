"""The pool of digits' encoders: its tasks, and that a seed makes one pool."""

import numpy as np
import pytest

from data.images import digits
from trainers.transfer_pool import POOL, Pretraining, _task, digit_pool


def test_tasks_are_what_they_say():
    x, y = digits()["train"]["x"][:400], digits()["train"]["label"][:400]
    draw = lambda *a, **k: _task(np.random.default_rng(0), Pretraining("t", *a, **k), x, y)  # noqa: E731
    np.testing.assert_array_equal(draw()[1], y)
    np.testing.assert_array_equal(draw("parity")[1], y % 2)
    np.testing.assert_array_equal(draw("high")[1], (y > 4) * 1)
    turned, turn = draw("rotation")
    for image, was, t in zip(turned[:20], x, turn, strict=False):
        np.testing.assert_array_equal(image, np.rot90(was, t))
    assert set(turn) == {0, 1, 2, 3}
    darkest = [np.argmin([q.sum() for q in (i[:4, :4], i[:4, 4:], i[4:, :4], i[4:, 4:])]) for i in x]
    np.testing.assert_array_equal(draw("quadrant")[1], darkest)
    assert 0.05 < np.mean(draw("random")[1] == y) < 0.16
    assert 0.5 < np.mean(draw(noise=0.5)[1] == y) < 0.62


@pytest.mark.slow
def test_a_seed_makes_one_pool():
    pool = digit_pool(0)
    digit_pool.cache_clear()
    again, other = digit_pool(0), digit_pool(1)
    assert [m.name for m in pool] == [p.name for p in POOL] and len(pool) >= 6
    for a, b, c in zip(pool, again, other, strict=True):
        np.testing.assert_array_equal(a.features, b.features)
        assert a.accuracy == b.accuracy and (a.features != c.features).any()
        assert a.features.shape == (200, 32) and a.general.shape == (800, 32) and a.source.shape == (200, 10)
        assert 0.75 < a.accuracy < 1
    by_name = {m.name: m for m in pool}
    assert by_name["digits"].accuracy > by_name["untrained"].accuracy
    right = {n: np.mean(m.source.argmax(1) == m.labels) for n, m in by_name.items()}
    assert right["digits"] > 0.8 > right["digits_brief"] and right["untrained"] < 0.35
