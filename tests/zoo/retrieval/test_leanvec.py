"""leanvec against its definition, the released learner's numbers, and the limits its brief names."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data.vectors import shifted_queries
from zoo.ops.fingerprint import fingerprint
from zoo.ops.moments import leading_directions
from zoo.ops.scalar_quantisation import lvq_decode
from zoo.ops.search import mips_topk
from zoo.retrieval import leanvec
from zoo.retrieval.leanvec import LeanVecConfig, ProjectionMaps

GOLDEN = np.load(Path(__file__).resolve().parents[2] / "golden" / "leanvec_official.npz")
X, Q = jnp.asarray(GOLDEN["X"]), jnp.asarray(GOLDEN["Q"])
K_X, K_Q = leanvec.moment(X), leanvec.moment(Q)
D, d = 12, 4
A, B = (jnp.asarray(GOLDEN[k], jnp.float32) for k in "AB")
learn = jax.jit(leanvec.frank_wolfe, static_argnums=(2, 3, 4, 5))


def full_loss(a, b, queries=GOLDEN["Q"], vectors=GOLDEN["X"]):
    """The loss by its definition, with all inner products, in float64."""
    q, x = np.asarray(queries, np.float64), np.asarray(vectors, np.float64)
    return float(np.sum((q @ np.asarray(a, np.float64) @ np.asarray(b, np.float64).T @ x.T - q @ x.T) ** 2))


ENERGY = full_loss(np.zeros((D, d)), np.zeros((D, d)))


# --- the loss, its gradients, the polar factor


def test_the_loss_equals_all_inner_products():
    np.testing.assert_allclose(leanvec.loss(K_Q, K_X, A, B), full_loss(A, B), rtol=1e-5)
    np.testing.assert_allclose(leanvec.relative_loss(K_Q, K_X, A, B), full_loss(A, B) / ENERGY, rtol=1e-5)
    np.testing.assert_allclose(leanvec.relative_loss(3 * K_Q, 7 * K_X, A, B), full_loss(A, B) / ENERGY, rtol=1e-5)
    np.testing.assert_allclose(GOLDEN["loss"], full_loss(A, B), rtol=1e-5)


def test_gradients_equal_the_derivatives_and_the_released_ones():
    found = leanvec.loss_gradients(K_Q, K_X, A, B)
    expected = jax.grad(leanvec.loss, (2, 3))(K_Q, K_X, A, B)
    for mine, theirs, name in zip(found, expected, ("grad_A", "grad_B"), strict=True):
        scale = np.abs(GOLDEN[name]).max()
        np.testing.assert_allclose(mine, theirs, atol=1e-5 * scale)
        np.testing.assert_allclose(mine, GOLDEN[name], atol=1e-5 * scale)


def test_polar_factors_have_unit_singular_values_and_maximise():
    m = jax.random.normal(jax.random.key(0), (9, 4))
    s = np.asarray(leanvec.polar(m))
    np.testing.assert_allclose(np.linalg.svd(s, compute_uv=False), 1, atol=1e-5)
    np.testing.assert_allclose(np.sum(s * m), np.linalg.svd(m, compute_uv=False).sum(), rtol=1e-5)
    # symmetric positive: m = s p with p = s^T m
    p = s.T @ np.asarray(m)
    np.testing.assert_allclose(p, p.T, atol=1e-5)
    assert np.linalg.eigvalsh(p).min() > 0


def test_all_dimensions_lose_nothing():
    turned = leanvec.polar(jax.random.normal(jax.random.key(1), (D, D)))
    assert abs(float(leanvec.relative_loss(K_Q, K_X, turned, turned))) < 1e-5
    assert float(leanvec.relative_loss(K_Q, K_X, turned, turned[:, ::-1])) > 0.1
    maps = leanvec.pca(X, D)
    short = leanvec.project_queries(maps, Q) @ leanvec.project_vectors(maps, X).T
    constant = Q @ jnp.mean(X, 0)
    np.testing.assert_allclose(short + constant[:, None], Q @ X.T, atol=1e-4)


# --- learners


def by_hand(steps, tol=0.0, exponent=0.999, start=None):
    """Frank-Wolfe from the definition: SVDs and full gradients in float64."""
    kq, kx = (np.asarray(k, np.float64) for k in (GOLDEN["Q"], GOLDEN["X"]))
    kq, kx = kq.T @ kq, kx.T @ kx
    a = b = np.zeros((D, d)) if start is None else np.asarray(start, np.float64)
    values = []
    for t in range(steps):
        rate = 1 / (t + 1 + (start is not None)) ** exponent
        u, _, vt = np.linalg.svd(-(2 * kq @ a @ b.T @ kx @ b - 2 * kq @ kx @ b), full_matrices=False)
        a = (1 - rate) * a + rate * (np.eye(D, d) if start is None and t == 0 else u @ vt)
        u, _, vt = np.linalg.svd(-(2 * kx @ b @ a.T @ kq @ a - 2 * kx @ kq @ a), full_matrices=False)
        b = (1 - rate) * b + rate * u @ vt
        values.append(full_loss(a, b))
        if t > 1 and abs(values[-1] - values[-2]) < tol * values[-2]:
            break
    return a, b, np.array(values) / ENERGY


@pytest.mark.parametrize("case", ["five", "stopped"])
def test_released_learner_gives_the_same_maps(case):
    steps, tol = {"five": (5, 0.0), "stopped": (500, 1e-3)}[case]
    losses = GOLDEN[f"loss_{case}"] / ENERGY
    assert len(losses) == {"five": 5, "stopped": 60}[case]
    # equal steps: 60 in float32 against 60 in float64
    found = learn(K_Q, K_X, d, len(losses), 0.999, 0.0)
    np.testing.assert_allclose(found.losses, losses, rtol=1e-4)
    loose = 1e-5 if case == "five" else 1e-4
    np.testing.assert_allclose(found.query, GOLDEN[f"A_{case}"], atol=loose)
    np.testing.assert_allclose(found.data, GOLDEN[f"B_{case}"], atol=loose)
    # the stop test compares losses 3e-5 apart: float32 may need a step more or less
    found = learn(K_Q, K_X, d, steps, 0.999, tol)
    taken = int(found.steps)
    assert abs(taken - len(losses)) <= (case == "stopped")
    assert np.isfinite(found.losses[:taken]).all() and np.isnan(found.losses[taken:]).all()


def test_in_float64_the_released_maps_are_met_to_the_last_step():
    with jax.enable_x64(True):
        moments = [jnp.asarray(GOLDEN[k].astype(np.float64)).T @ GOLDEN[k].astype(np.float64) for k in ("Q", "X")]
        found = leanvec.frank_wolfe(*moments, d, 500, 0.999, 1e-3)
        assert found.query.dtype == jnp.float64 and int(found.steps) == 60
        np.testing.assert_allclose(found.query, GOLDEN["A_stopped"], atol=1e-6)
        np.testing.assert_allclose(found.data, GOLDEN["B_stopped"], atol=1e-6)
        np.testing.assert_allclose(found.losses[:60], GOLDEN["loss_stopped"] / ENERGY, rtol=1e-6)


@pytest.mark.parametrize("started", [False, True])
def test_frank_wolfe_equals_its_definition(started):
    start = leading_directions(K_X / 80 + K_Q / 40, d) if started else None
    a, b, values = by_hand(6, exponent=0.7, start=start)
    found = learn(K_Q, K_X, d, 6, 0.7, 0.0, start)
    np.testing.assert_allclose(found.query, a, atol=6e-4)  # twelve singular value decompositions in float32
    np.testing.assert_allclose(found.data, b, atol=6e-4)
    np.testing.assert_allclose(found.losses, values, rtol=1e-3)
    for matrix in (found.query, found.data):
        assert np.linalg.norm(matrix, 2) <= 1 + 1e-6 * 10
    if not started:
        # the first step forgets the start: A is eye, B the polar factor of what A sees
        one = learn(K_Q, K_X, d, 1, 0.7, 0.0)
        np.testing.assert_allclose(one.query, np.eye(D, d), atol=1e-6)
        np.testing.assert_allclose(one.data, leanvec.polar((K_X @ K_Q)[:, :d] / 1e4), atol=1e-3)


def test_a_map_whose_gradient_is_zero_stays():
    # at eigenvectors of K_X the loss is flat in A: a step would follow rounding errors alone
    start = leading_directions(K_X, d)
    gradient = leanvec.loss_gradients(K_Q, K_X, start, start)
    assert np.linalg.norm(gradient[0]) < 1e-4 * np.linalg.norm(gradient[1])
    one = learn(K_Q, K_X, d, 1, 0.999, 0.0, start)
    np.testing.assert_allclose(one.query, start, atol=1e-6)
    rate = 0.5**0.999
    np.testing.assert_allclose(one.data, (1 - rate) * start + rate * leanvec.polar(-gradient[1]), atol=1e-3)


def test_moments_of_another_scale_learn_the_same():
    one, other = learn(K_Q, K_X, d, 5, 0.999, 0.0), learn(1e-6 * K_Q, 1e9 * K_X, d, 5, 0.999, 0.0)
    np.testing.assert_allclose(one.query, other.query, atol=1e-4)
    np.testing.assert_allclose(one.losses, other.losses, rtol=1e-3)


def test_eigen_search():
    m, n = Q.shape[0], X.shape[0]
    found, beta, value = jax.jit(leanvec.eigen_search, static_argnums=(2, 3, 4, 5, 6))(K_Q, K_X, m, n, d, 21, 12)
    kq, kx = np.asarray(K_Q, np.float64), np.asarray(K_X, np.float64)

    def at(x):
        _, vectors = np.linalg.eigh((1 - x) / m * kq + x / n * kx)
        p = vectors[:, -d:]
        return full_loss(p, p) / ENERGY, p @ p.T

    fine = np.linspace(0, 1, 2001)
    best = min(at(x)[0] for x in fine)
    np.testing.assert_allclose(value, best, rtol=1e-3)
    np.testing.assert_allclose([at(float(beta))[0], full_loss(found, found) / ENERGY], value, rtol=1e-3)
    np.testing.assert_allclose(found @ found.T, at(float(beta))[1], atol=1e-3)
    # the counts weigh the sides: other counts, another mixture at the same beta
    assert abs(float(leanvec.eigen_search(K_Q, K_X, 10 * m, n, d, 5, 0)[2]) - at(0.5)[0]) < 1
    half = leanvec.eigen_search(K_Q, K_X, 1, 1, d, 2, 0)
    ends = [at(0.0)[0], at(1.0)[0]]
    np.testing.assert_allclose(half[2], min(ends), rtol=1e-3)
    assert float(half[1]) == np.argmin(ends)


def test_queries_like_data_leave_beta_free():
    k = leanvec.moment(X)
    losses = [float(leanvec.eigen_search(k, k, 80, 80, d, points, 3)[2]) for points in (2, 5)]
    uncentred = leading_directions(k, d)
    np.testing.assert_allclose(losses, full_loss(uncentred, uncentred, X, X) / full_loss(A * 0, B, X, X), rtol=1e-3)


def test_pca_maps():
    maps = leanvec.pca(X, d)
    centred = np.asarray(X, np.float64) - np.asarray(X, np.float64).mean(0)
    _, _, vt = np.linalg.svd(centred, full_matrices=False)
    for j in range(d):
        row = vt[j] * np.sign(vt[j][np.argmax(np.abs(vt[j]))])
        np.testing.assert_allclose(maps.query[:, j], row, atol=1e-3)
    np.testing.assert_array_equal(maps.query, maps.data)
    np.testing.assert_allclose(maps.mean, np.asarray(X).mean(0), atol=1e-6)
    assert maps.centred


def test_fit_maps_runs_each_learner():
    fit = jax.jit(leanvec.fit_maps, static_argnums=(2, 3, 4))
    np.testing.assert_allclose(fit(X, Q, d, "frank_wolfe", 5).query, learn(K_Q, K_X, d, 5).query, atol=1e-3)
    single = leanvec.eigen_search(K_Q, K_X, 40, 80, d)[0]
    eigen = fit(X, Q, d, "eigen", 5)
    of = lambda a, b: float(leanvec.relative_loss(K_Q, K_X, a, b))  # noqa: E731
    assert of(eigen.query, eigen.data) == pytest.approx(of(single, single), rel=1e-3)  # beta has a flat valley
    np.testing.assert_array_equal(eigen.query, eigen.data)
    both = fit(X, Q, d, "eigen_frank_wolfe", 5)
    # from the eigenvectors gradients nearly vanish, and a rounding turns their polar factors: the losses must agree
    once = learn(K_Q, K_X, d, 5, 0.999, 1e-3, single)
    assert of(both.query, both.data) == pytest.approx(of(once.query, once.data), rel=2e-2)
    assert not eigen.centred and not np.asarray(eigen.mean).any()
    np.testing.assert_array_equal(fit(X, None, d, "pca", 5).query, leanvec.pca(X, d).query)


# --- the index and the search

BASE, ASKED = X + 0.5, Q[:7]
MAPS = ProjectionMaps(A / 4, B / 4, jnp.zeros(D))
PCA = leanvec.pca(BASE, d)
build = jax.jit(leanvec.build_index, static_argnums=(2, 3, 4, 5))
find = jax.jit(leanvec.leanvec_search, static_argnums=(2, 3, 4))


def order(scores):
    return np.argsort(-scores, 1, kind="stable")


@pytest.mark.parametrize("encodings", [("float32", "float32"), ("lvq8", "lvq8"), ("lvq4x4", "float16")])
@pytest.mark.parametrize(("maps", "metric"), [(MAPS, "ip"), (PCA, "ip"), (PCA, "l2")], ids=["ood", "pca", "pca l2"])
def test_search_equals_its_parts(encodings, maps, metric):
    index = build(maps, BASE, *encodings, metric, 32)
    q, x = np.asarray(ASKED, np.float64), np.asarray(BASE, np.float64)
    a, b, mean = (np.asarray(v, np.float64) for v in (maps.query, maps.data, maps.mean))
    projected = (q - mean) @ a if metric == "l2" else q @ a

    def kept(rows, middle, encoding):
        return np.asarray(lvq_decode(rows) if encoding.startswith("lvq") else rows, np.float64) + np.asarray(middle)

    short = kept(index.primary, index.primary_mean, encodings[0])
    full = kept(index.secondary, index.secondary_mean, encodings[1])
    loose = {"float32": 1e-4, "lvq8": 0.05, "lvq4x4": 0.1}[encodings[0]]
    np.testing.assert_allclose(short, (x - mean) @ b, atol=loose)
    np.testing.assert_allclose(full, x, atol=max(loose / 2, 1e-3))

    def scores(queries, rows):
        return queries @ rows.T if metric == "ip" else -((queries[:, None] - rows) ** 2).sum(-1)

    first, second = scores(projected, short), scores(q, full)
    values, ids = leanvec.candidates(index, ASKED, 9, 32)
    np.testing.assert_array_equal(ids, order(first)[:, :9])
    np.testing.assert_allclose(values, np.take_along_axis(first, order(first)[:, :9], 1), atol=1e-3)
    found = find(index, ASKED, 4, 9, 32)
    for i in range(7):
        chosen = order(first)[i, :9]
        best = chosen[np.argsort(-second[i, chosen], kind="stable")[:4]]
        np.testing.assert_array_equal(found.ids[i], best)
        np.testing.assert_allclose(found.scores[i], second[i, best], rtol=1e-4, atol=1e-3)
    np.testing.assert_array_equal(found.scorer_calls, 9)


def test_re_ranking_everything_is_exact_search():
    index = build(MAPS, BASE, "lvq4", "float32", "ip", 4096)
    found = find(index, ASKED, 5, 80, 4096)
    values, ids = mips_topk(ASKED, BASE, 5)
    np.testing.assert_array_equal(found.ids, ids)
    np.testing.assert_allclose(found.scores, values, atol=1e-4)
    masked = leanvec.leanvec_search(index, ASKED, 5, 80, mask=jnp.arange(80) % 2 == 1)
    assert (np.asarray(masked.ids) % 2 == 1).all() and (np.asarray(masked.scorer_calls) == 40).all()
    nearest = find(build(PCA, BASE, "lvq4", "float32", "l2", 4096), BASE[:6], 1, 80, 4096)
    np.testing.assert_array_equal(nearest.ids[:, 0], np.arange(6))


@pytest.mark.parametrize("rows", [80, 77])
def test_search_on_eight_devices_finds_the_same(rows):
    # small integers: scores are exact, and tie often
    rng = np.random.default_rng(2)
    whole = lambda *s: jnp.asarray(rng.integers(-1, 2, s), jnp.float32)  # noqa: E731
    maps, base, asked = ProjectionMaps(whole(D, d), whole(D, d), jnp.zeros(D)), whole(rows, D), whole(5, D)
    ties = build(maps, base, "float32", "float32", "ip", 4096)
    ties = ties.replace(
        primary=base @ maps.data, primary_mean=jnp.zeros(d), secondary=base, secondary_mean=jnp.zeros(D)
    )
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    run = jax.jit(lambda i, q: leanvec.leanvec_search(i, q, 6, 14, 7, mesh=mesh))
    for index, queries in ((ties, asked), (build(PCA, BASE[:rows], "lvq8", "lvq4x8", "l2", 4096), ASKED)):
        if rows % 8 == 0:
            spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
            put = lambda t, spread=spread: jax.tree.map(lambda x: jax.device_put(x, spread), t)  # noqa: E731
            index = index.replace(primary=put(index.primary), secondary=put(index.secondary))
        one, eight = find(index, queries, 6, 14, 4096), run(index, queries)
        np.testing.assert_array_equal(eight.ids, one.ids)
        np.testing.assert_allclose(eight.scores, one.scores, rtol=1e-5)
        np.testing.assert_array_equal(eight.scorer_calls, 14)
    assert (np.diff(np.asarray(find(ties, asked, 6, 14, 4096).scores), axis=1) == 0).any()
    text = run.lower(index, queries).compile().as_text()
    gathered = [line for line in text.splitlines() if "all-gather(" in line]
    assert gathered and all(f"[{rows}," not in line and "u8[" not in line for line in gathered)


def test_two_halves_of_different_fits_refuse_to_meet():
    index = build(MAPS, BASE, "lvq8", "lvq8", "ip", 4096)
    leanvec.check_maps(index, MAPS)
    for maps in (PCA, MAPS.replace(query=MAPS.data), MAPS.replace(mean=MAPS.mean + 1)):
        with pytest.raises(ValueError, match=r"different ProjectionMaps \(index [0-9a-f]{16}, queries [0-9a-f]{16}\)"):
            leanvec.check_maps(index, maps)
    np.testing.assert_array_equal(jax.jit(fingerprint)(MAPS), index.fingerprint)


@pytest.mark.parametrize("encodings", [("lvq4x8", "bfloat16"), ("float16", "lvq8")])
def test_an_index_survives_plain_arrays(encodings):
    index = build(PCA, BASE, *encodings, "l2", 4096)
    config = LeanVecConfig(D, d, True, *encodings, "l2")
    again = leanvec.index_from_arrays(config, jax.tree.map(np.asarray, leanvec.to_arrays(index)))
    assert jax.tree.structure(again) == jax.tree.structure(index)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(index), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


def test_nothing_of_all_pairs_is_formed():
    m, n, wide = 512, 4096, 16
    q, x = jnp.zeros((m, wide)), jnp.zeros((n, wide))
    compiled = jax.jit(lambda x, q: leanvec.fit_maps(x, q, 4, steps=3)).lower(x, q).compile()
    # all inner products would take 8 MB
    assert compiled.memory_analysis().temp_size_in_bytes < 2e6
    maps = ProjectionMaps(jnp.zeros((wide, 4)), jnp.zeros((wide, 4)), jnp.zeros(wide))
    index = build(maps, jnp.zeros((65_536, wide)), "lvq8", "lvq8", "ip", 4096)
    search = jax.jit(leanvec.leanvec_search, static_argnums=(2, 3, 4))
    size = search.lower(index, q[:8], 5, 20, 1024).compile().memory_analysis().temp_size_in_bytes
    # the database decoded would take 4 MB
    assert size < 1e6


# --- the stand-in


@pytest.fixture(scope="module")
def standin():
    """Held-out relative loss, recall in 10, in 50, and after re-ranking, of PCA and Frank-Wolfe; three seeds."""
    fit = jax.jit(leanvec.fit_maps, static_argnums=(2, 3))
    found = {}
    for shifted in (True, False):
        for seed in range(3):
            data = shifted_queries(seed, shifted=shifted)
            x, q, asked = (jnp.asarray(data[s]["x"]) for s in ("base", "learn", "queries"))
            truth = np.asarray(mips_topk(asked, x, 10)[1])
            for method in ("pca", "frank_wolfe"):
                maps = fit(x, q, 16, method)
                index = build(maps, x, "lvq8", "lvq8", "ip", 4096)
                ids = np.asarray(leanvec.candidates(index, asked, 50)[1])
                again = np.asarray(find(index, asked, 10, 50, 4096).ids)
                share = lambda i, truth=truth: float((truth[:, :, None] == i[:, None]).any(-1).mean())  # noqa: E731
                k_q, k_x = leanvec.moment(asked), leanvec.moment(x - maps.mean)
                lost = float(leanvec.relative_loss(k_q, k_x, maps.query, maps.data))
                row = found.setdefault((shifted, method), [])
                row.append((lost, share(ids[:, :10]), share(ids), share(again)))
    return {k: np.array(v) for k, v in found.items()}


def test_shifted_queries_need_maps_that_saw_queries(standin):
    pca, learned = standin[True, "pca"], standin[True, "frank_wolfe"]
    assert (learned[:, 1] > pca[:, 1] + 0.015).all()
    assert learned[:, 0].mean() < 0.8 * pca[:, 0].mean()
    assert (learned[:, 2] > pca[:, 2]).all() and min(learned[:, 3].min(), pca[:, 3].min()) >= 0.98
    # the brief's own measurements
    assert ((pca[:, 1] > 0.74) & (pca[:, 1] < 0.79)).all() and ((pca[:, 0] > 0.03) & (pca[:, 0] < 0.037)).all()


def test_queries_like_the_data_need_none(standin):
    pca, learned = standin[False, "pca"], standin[False, "frank_wolfe"]
    assert (np.abs(learned[:, 1] - pca[:, 1]) < 0.01).all() and learned[:, 1].mean() <= pca[:, 1].mean()
    assert (learned[:, 0] > pca[:, 0]).all() and (learned[:, 0] < 0.003).all()


# --- bad input


def test_wrong_input_is_named():
    for bad in (0, 13):
        message = rf"d must be in \[1, 12\], the dimension of a vector; got {bad}"
        with pytest.raises(ValueError, match=message):
            leanvec.pca(X, bad)
        with pytest.raises(ValueError, match=message):
            leanvec.frank_wolfe(K_Q, K_X, bad)
        with pytest.raises(ValueError, match=message):
            LeanVecConfig(12, bad)
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        leanvec.frank_wolfe(K_Q, K_X, d, 0)
    with pytest.raises(ValueError, match="num_beta must be at least 2 and refine at least 0; got 1 and 12"):
        leanvec.eigen_search(K_Q, K_X, 1, 1, d, 1)
    with pytest.raises(ValueError, match="method must be one of pca, .*; got 'opq'"):
        leanvec.fit_maps(X, Q, d, "opq")
    with pytest.raises(ValueError, match="method 'eigen' learns from queries; pass some, or use 'pca'"):
        leanvec.fit_maps(X, None, d, "eigen")
    with pytest.raises(ValueError, match="queries have D=11, database D=12"):
        leanvec.fit_maps(X, Q[:, :11], d)
    index = build(MAPS, BASE, "lvq8", "lvq8", "ip", 4096)
    with pytest.raises(ValueError, match="queries have D=11, database D=12"):
        leanvec.leanvec_search(index, Q[:, :11])
    with pytest.raises(ValueError, match="queries have D=13, database D=12"):
        leanvec.candidates(index, jnp.zeros((2, 13)), 3)
    with pytest.raises(ValueError, match="vectors have D=11, maps D=12"):
        leanvec.build_index(MAPS, X[:, :11])
    with pytest.raises(ValueError, match="need 1 <= k <= num_candidates <= 80 documents; got k 5, num_candidates 4"):
        leanvec.leanvec_search(index, ASKED, 5, 4)
    with pytest.raises(ValueError, match="encoding must be one of float32, .*; got 'lvq6'"):
        leanvec.build_index(MAPS, X, "lvq6")
    with pytest.raises(ValueError, match="encoding must be one of float32, .*; got 'lvq6'"):
        LeanVecConfig(12, 4, secondary="lvq6")
    for metric, message in (
        ("l2", "OOD maps approximate inner products; normalise vectors or use PCA"),
        ("cosine", "cosine is the inner product of unit vectors: normalise"),
        ("dot", "metric must be 'ip' or 'l2', got 'dot'"),
    ):
        with pytest.raises(ValueError, match=message):
            leanvec.build_index(MAPS, X, metric=metric)
        with pytest.raises(ValueError, match=message):
            LeanVecConfig(12, 4, metric=metric)
    leanvec.check_metric("l2", True)
