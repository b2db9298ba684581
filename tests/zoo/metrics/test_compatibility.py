"""Cross-model identification and compatibility figures against plain loops."""

import jax.numpy as jnp
import numpy as np
import pytest

from zoo.metrics import compatibility as c


def loop_templates(features, labels, k):
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    rows = [unit[labels == n].mean(0) for n in range(k)]
    return np.stack([r / np.linalg.norm(r) for r in rows])


def loop_top1(queries, labels, templates):
    hits = [int(np.argmax([q @ t for t in templates]) == label) for q, label in zip(queries, labels, strict=True)]
    return np.mean(hits)


@pytest.fixture(scope="module")
def models():
    rng = np.random.default_rng(0)
    labels = {"q": np.arange(30) % 4, "g": np.arange(20) % 4}
    means = rng.normal(size=(3, 4, 5))
    features = {
        s: [(means[m][y] + 0.8 * rng.normal(size=(len(y), 5))).astype(np.float32) for m in range(3)]
        for s, y in labels.items()
    }
    return features["q"], features["g"], labels["q"], labels["g"]


def test_templates_are_means_of_directions():
    features = np.array([[10.0, 0.0], [0.0, 1.0], [3.0, 4.0]], np.float32)
    labels = np.array([0, 0, 2])
    found = c.class_templates(jnp.asarray(features), jnp.asarray(labels), 3)
    np.testing.assert_allclose(found, [[2**-0.5, 2**-0.5], [0, 0], [0.6, 0.8]], atol=1e-6)
    masked = c.class_templates(jnp.asarray(features), jnp.asarray(labels), 3, jnp.array([True, False, True]))
    np.testing.assert_allclose(masked[0], [1, 0], atol=1e-6)


def test_identification_by_hand():
    templates = jnp.array([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]])
    queries = jnp.array([[5.0, 1.0], [-1.0, -2.0], [0.1, 0.2], [0.0, 0.0], [0.0, -3.0]])
    labels = jnp.array([0, 0, 0, 0, 1])
    # found: 0, 0 (less negative), 2, nothing for zeros, and never the identity without a gallery
    assert float(c.identification_top1(queries, labels, templates)) == pytest.approx(2 / 5)
    valid = jnp.array([True, False, True, False, False])
    assert float(c.identification_top1(queries, labels, templates, valid)) == 0.5


def test_dead_features_are_counted():
    assert int(c.zero_features(jnp.array([[0.0, 0.0], [1e-9, 0.0], [0.0, 1.0]]))) == 2


def test_identification_in_blocks(models, monkeypatch):
    q, g, ql, gl = models
    whole = c.identification_top1(
        jnp.asarray(q[0]), jnp.asarray(ql), c.class_templates(jnp.asarray(g[0]), jnp.asarray(gl), 4)
    )
    monkeypatch.setattr(c, "BLOCK", 7)
    parts = c.identification_top1(
        jnp.asarray(q[0]), jnp.asarray(ql), c.class_templates(jnp.asarray(g[0]), jnp.asarray(gl), 4)
    )
    assert float(whole) == float(parts)


def test_matrix_against_loops(models):
    q, g, ql, gl = models
    lower, full = c.compatibility_matrix(q, g, ql, gl, 4), c.compatibility_matrix(q, g, ql, gl, 4, full=True)
    for i in range(3):
        for j in range(3):
            expected = loop_top1(q[i], ql, loop_templates(g[j], gl, 4))
            assert full[i, j] == pytest.approx(expected, abs=1e-6)
            assert np.isnan(lower[i, j]) if j > i else lower[i, j] == full[i, j]
    assert full[0, 0] > full[1, 0] + 0.2


def test_models_of_different_size_need_alignment(models):
    q, g, ql, gl = models
    wide = [np.concatenate([q[0], 9 * np.ones((30, 2), np.float32)], 1)]
    with pytest.raises(ValueError, match="model 1 yields 7-d features, the gallery of model 0 holds 5-d ones"):
        c.compatibility_matrix([q[0], wide[0]], [g[0], g[0]], ql, gl, 4)
    cut = lambda a, b: (a[:, : min(a.shape[1], b.shape[1])], b[:, : min(a.shape[1], b.shape[1])])  # noqa: E731
    found = c.compatibility_matrix([q[0], wide[0]], [g[0], g[0]], ql, gl, 4, align=cut)
    assert found[1, 0] == found[0, 0]
    with pytest.raises(ValueError, match="got 2 and 1"):
        c.compatibility_matrix(q[:2], g[:1], ql, gl, 4)


def test_average_compatibility_by_hand():
    m = np.array([[0.5, 9, 9], [0.6, 0.7, 9], [0.5, 0.9, 0.8]])
    np.testing.assert_array_equal(c.compatible(m), [[False, False, False], [True, False, False], [False, True, False]])
    assert c.average_compatibility(m) == pytest.approx(2 / 3)
    assert c.average_compatibility(np.array([[0.3]])) == 1.0


def test_limits_of_average_compatibility():
    rising = np.tril(np.arange(1.0, 5)[:, None] * np.ones((4, 4)))
    assert c.average_compatibility(rising) == 1.0
    assert c.average_compatibility(np.ones((4, 4))) == 0.0


def test_average_accuracy_by_hand():
    m = np.array([[0.4, np.nan], [0.0, 0.8]])
    assert c.average_accuracy(m) == pytest.approx(0.4)  # a true zero counts
    assert c.average_accuracy(m, np.array([[True, False], [False, True]])) == pytest.approx(0.6)
    with pytest.raises(ValueError, match=r"lacks M\[0, 1\]"):
        c.average_accuracy(m, np.ones((2, 2), bool))
    with pytest.raises(ValueError, match="must choose entries of the 2 x 2 matrix"):
        c.average_accuracy(m, np.zeros((2, 2), bool))
    with pytest.raises(ValueError, match=r"square, got shape \[2, 3\]"):
        c.average_compatibility(np.ones((2, 3)))


def test_formal_constraints_against_loops():
    rng = np.random.default_rng(1)
    new, old = rng.normal(size=(2, 11, 4)).astype(np.float32)
    labels = np.array([0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1])
    unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)  # noqa: E731
    n, o = unit(new.astype(np.float64)), unit(old.astype(np.float64))
    same, apart = [], []
    for i in range(11):
        for j in range(11):
            across, before = np.linalg.norm(n[i] - o[j]), np.linalg.norm(o[i] - o[j])
            if i != j and labels[i] == labels[j]:
                same.append(across <= before)
            if labels[i] != labels[j]:
                apart.append(across >= before)
    for block in (4, 512):
        found = c.satisfied_constraints(jnp.asarray(new), jnp.asarray(old), jnp.asarray(labels), block)
        np.testing.assert_allclose(found, [np.mean(same), np.mean(apart)], atol=1e-6)
    assert 0 < np.mean(same) < 1 and np.mean(same) != np.mean(apart)


def test_a_model_satisfies_the_constraints_with_itself():
    x = jnp.asarray(np.random.default_rng(2).normal(size=(6, 3)), jnp.float32)
    np.testing.assert_array_equal(c.satisfied_constraints(x, x, jnp.array([0, 0, 0, 1, 1, 1])), [1, 1])
    np.testing.assert_array_equal(c.satisfied_constraints(x, -x, jnp.arange(6))[0], 1)
