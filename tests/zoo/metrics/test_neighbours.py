"""Neighbour metrics against loops over the whole ranking."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.metrics import neighbours

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(23, 4)).astype(np.float32), RNG.integers(0, 5, 23)
Y[7] = 9  # a class of one
G, GY = RNG.normal(size=(17, 4)).astype(np.float32), RNG.integers(0, 5, 17)


def loop(queries, labels, gallery, gallery_labels, own, compare):
    """Rank of the first match, AP, AP@R and R-precision of each query that has a match."""
    rows = []
    for i, (x, y) in enumerate(zip(queries.astype(float), labels, strict=True)):
        g = gallery.astype(float)
        if compare == "cosine":
            s = g @ x / np.linalg.norm(g, axis=1) / np.linalg.norm(x)
        else:
            s = -((g - x) ** 2).sum(1)
        order = [j for j in np.argsort(-s, kind="stable") if not (own and j == i)]
        hit = [gallery_labels[j] == y for j in order]
        r = sum(hit)
        if not r:
            continue
        precision = [sum(hit[: n + 1]) / (n + 1) for n in range(len(hit))]
        ap = sum(p for p, h in zip(precision, hit, strict=True) if h) / r
        at_r = sum(p for p, h in zip(precision[:r], hit[:r], strict=True) if h) / r
        rows.append((hit.index(True) + 1, ap, at_r, sum(hit[:r]) / r))
    return np.array(rows)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("compare", ["cosine", "euclidean"])
def test_the_whole_ranking(own, compare):
    gallery, gallery_labels = (X, Y) if own else (G, GY)
    want = loop(X, Y, gallery, gallery_labels, own, compare)
    rest = () if own else (jnp.asarray(G), jnp.asarray(GY))
    got = neighbours.retrieval_metrics(jnp.asarray(X), jnp.asarray(Y), *rest, ks=(1, 3), compare=compare, block=5)
    assert int(got["queries"]) == len(want) == 22
    means = want.mean(0)
    for key, value in {
        "recall@1": (want[:, 0] <= 1).mean(), "recall@3": (want[:, 0] <= 3).mean(), "map": means[1],
        "map@r": means[2], "r_precision": means[3], "mrr": (1 / want[:, 0]).mean(),
    }.items():  # fmt: skip
        assert float(got[key]) == pytest.approx(value, abs=1e-5), key
    curve = neighbours.cmc_curve(jnp.asarray(X), jnp.asarray(Y), *rest, most=6, compare=compare, block=23)
    np.testing.assert_allclose(curve, [(want[:, 0] <= k).mean() for k in range(1, 7)], atol=1e-6)


def test_the_same_items_seen_by_two_models():
    other = RNG.normal(size=(23, 4)).astype(np.float32)
    want = loop(X, Y, other, Y, True, "cosine")
    args = (jnp.asarray(X), jnp.asarray(Y), jnp.asarray(other), jnp.asarray(Y))
    got = neighbours.retrieval_metrics(*args, ks=(1, 3), block=5, same_items=True)
    assert int(got["queries"]) == len(want) == 22
    assert float(got["recall@3"]) == pytest.approx((want[:, 0] <= 3).mean())
    assert float(got["map"]) == pytest.approx(want[:, 1].mean(), abs=1e-5)
    assert float(got["map"]) != pytest.approx(float(neighbours.retrieval_metrics(*args)["map"]), abs=1e-4)
    curve = neighbours.cmc_curve(*args, most=4, same_items=True)
    np.testing.assert_allclose(curve, [(want[:, 0] <= k).mean() for k in range(1, 5)], atol=1e-6)
    with pytest.raises(ValueError, match="same_items needs as many gallery rows as queries, got 17, 23"):
        neighbours.retrieval_metrics(*args[:2], jnp.asarray(G), jnp.asarray(GY), same_items=True)


def test_ties_go_to_the_lower_row_and_a_query_never_finds_itself():
    x, y = jnp.ones((4, 2)), jnp.asarray([0, 1, 0, 1])
    _, ids = neighbours.nearest(x, k=3)
    assert ids.tolist() == [[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]]
    got = neighbours.retrieval_metrics(x, y, ks=(1, 2))
    assert float(got["recall@1"]) == 0.25 and float(got["recall@2"]) == pytest.approx(0.75)


def test_misuse_is_refused():
    with pytest.raises(ValueError, match="k must lie between 1 and the 22 gallery rows that a query may find, got 23"):
        neighbours.nearest(jnp.asarray(X), k=23)
    with pytest.raises(ValueError, match="give both or neither"):
        neighbours.retrieval_metrics(jnp.asarray(X), jnp.asarray(Y), jnp.asarray(G))
    with pytest.raises(ValueError, match="queries have 4 dimensions, the gallery 3"):
        neighbours.nearest(jnp.asarray(X), jnp.ones((5, 3)))


def test_knn_votes_with_exponential_weights():
    got = neighbours.knn_classify(jnp.asarray(G), jnp.asarray(GY), jnp.asarray(X), 5, k=6, temperature=0.3, block=7)
    unit = lambda v: v / np.linalg.norm(v, axis=1, keepdims=True)  # noqa: E731
    s = unit(X) @ unit(G).T
    for i in range(23):
        votes = np.zeros(5)
        for j in np.argsort(-s[i])[:6]:
            votes[GY[j]] += np.exp(s[i, j] / 0.3)
        assert int(got[i]) == votes.argmax()
    # more neighbours than there are features means all of them
    assert neighbours.knn_classify(jnp.asarray(G), jnp.asarray(GY), jnp.asarray(X), 5, k=200).shape == (23,)


def test_memory_is_that_of_a_block():
    n, d = 3000, 8
    f = jax.jit(lambda x, y: neighbours.retrieval_metrics(x, y, block=64))
    used = f.lower(jnp.ones((n, d)), jnp.zeros(n, jnp.int32)).compile().memory_analysis().temp_size_in_bytes
    assert used < n * n * 4 / 3, used
