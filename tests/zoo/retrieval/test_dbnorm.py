"""dbnorm against its definition, the released code's numbers, and the limits its brief names."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.ops.search import mips_topk
from zoo.retrieval import dbnorm

GOLDEN = np.load(Path(__file__).resolve().parents[2] / "golden" / "dbnorm_official.npz")
RNG = np.random.default_rng(5)


def unit(*shape, towards=0.0):
    x = RNG.normal(size=shape) + towards
    return jnp.asarray(x / np.linalg.norm(x, axis=-1, keepdims=True), jnp.float32)


QUERIES, GALLERY = unit(12, 6, towards=0.4), unit(17, 6, towards=0.5)
BANK_Q, BANK_G = unit(9, 6, towards=0.4), unit(11, 6, towards=0.5)
S, TQ, TG = (np.asarray(x @ GALLERY.T, np.float64) for x in (QUERIES, BANK_Q, BANK_G))
BETAS = (20.0, 5.0)
apply = jax.jit(dbnorm.apply, static_argnums=2)


def softmax_factor(s, t, beta):
    """One inverted softmax by the definition, an entry at a time, in log space."""
    out = np.zeros_like(s)
    for i in range(len(s)):
        for j in range(s.shape[1]):
            out[i, j] = np.log(np.exp(beta * s[i, j]) / sum(np.exp(beta * t[b, j]) for b in range(len(t))))
    return out


def active(t, k):
    return {int(j) for row in t for j in np.argsort(-row, kind="stable")[:k]}


def defined(mode, s, tq, tg, betas=BETAS, k=1, neighbours=4, steps=3):
    """Scores of one mode from the definition."""
    if mode == "identity":
        return s
    if mode in ("is", "dis", "dualis", "dualdis"):
        total = 0
        for t, beta in list(zip((tq, tg), betas, strict=True))[: 2 if "dual" in mode else 1]:
            factor = softmax_factor(s, t, beta)
            for i, row in enumerate(s):
                if "dis" in mode.replace("dualis", "") and int(np.argmax(row)) not in active(t, k):
                    factor[i] = beta * row
            total = total + factor
        return total
    if mode == "csls":
        near = [np.mean(sorted(c)[-neighbours:]) for c in tq.T]
        return np.array(
            [[2 * x - near[j] - np.mean(sorted(row)[-neighbours:]) for j, x in enumerate(row)] for row in s]
        )
    if mode == "gc":
        return np.array([[-sum(t > x for t in tq[:, j]) + 0.5 * x / (1 + abs(x)) for j, x in enumerate(r)] for r in s])
    plan = np.exp(betas[0] * np.concatenate([tq, tg]))
    columns = np.ones(s.shape[1])
    for _ in range(steps):
        rows = (plan / columns).sum(1)
        columns = (plan / rows[:, None]).sum(0)
    return betas[0] * s - np.log(columns)


def fitted(mode, how, k=1):
    rest = {"beta1": BETAS[0], "beta2": BETAS[1], "k": k, "neighbours": 4, "steps": 3}
    if how == "vectors":
        return dbnorm.fit(BANK_Q, BANK_G, GALLERY, mode, chunk=4, block=5, **rest)
    return dbnorm.from_similarities(
        jnp.asarray(TQ, jnp.float32), jnp.asarray(TG, jnp.float32), mode, gallery=GALLERY, **rest
    )


@pytest.mark.parametrize("how", ["vectors", "matrices"])
@pytest.mark.parametrize("mode", dbnorm.MODES)
def test_every_mode_equals_its_definition(mode, how):
    for k in (1, 3) if "dis" in mode else (1,):
        calibrator = fitted(mode, how, k)
        got = apply(calibrator, jnp.asarray(S, jnp.float32))
        np.testing.assert_allclose(got, defined(mode, S, TQ, TG, k=k), rtol=1e-5, atol=2e-5)
        dbnorm.check_gallery(calibrator, GALLERY)


def test_the_case_has_gates_of_both_kinds():
    for t in (TQ, TG):
        passed = [int(np.argmax(row)) in active(t, 1) for row in S]
        assert 0 < sum(passed) < len(passed)
    assert [int(np.argmax(r)) in active(TQ, 1) for r in S] != [int(np.argmax(r)) in active(TG, 1) for r in S]


@pytest.mark.parametrize(
    "name", ["is", "qb_norm_1", "qb_norm_2", "dual_is", "dual_is_default", "dual_dis_1", "dual_dis_2"]
)
def test_released_code(name):
    s, tq, tg = (jnp.asarray(GOLDEN[x], jnp.float32) for x in ("S", "S_bq", "S_bg"))
    mode = {"is": "is", "qb": "dis"}.get(name.split("_")[0]) or name[:8].rstrip("_").replace("_", "")
    betas = (1 / 1.99, 3.0) if name.endswith("default") else (20.0, 5.0)
    k = 2 if name.endswith("2") else 1
    before = np.asarray(s).copy()
    calibrator = dbnorm.from_similarities(tq, tg, mode, *betas, k=k)
    dbnorm.check_exponent(s, *betas)
    got = dbnorm.apply(calibrator, s, "similarity")
    np.testing.assert_allclose(got, GOLDEN[name], rtol=2e-5)
    np.testing.assert_array_equal(s, before)
    # logarithms rank each query's items alike, and a single factor's are the same for the gated mode too
    if "dis" not in mode or mode == "dis":
        order = lambda x: np.argsort(-np.asarray(x), 1, kind="stable")  # noqa: E731
        np.testing.assert_array_equal(order(dbnorm.apply(calibrator, s)), order(GOLDEN[name]))
    if mode in ("is", "dualis"):
        np.testing.assert_allclose(dbnorm.apply(calibrator, s), np.log(GOLDEN[name]), rtol=1e-5, atol=1e-5)


# --- the brief's limits and identities --------------------------------------------------------------------------------


def order(x):
    return np.argsort(-np.asarray(x), 1, kind="stable")


def matrices(s, tq, tg=None, mode="is", betas=BETAS, **rest):
    bank = None if tg is None else jnp.asarray(tg, jnp.float32)
    calibrator = dbnorm.from_similarities(jnp.asarray(tq, jnp.float32), bank, mode, *betas, **rest)
    return np.asarray(dbnorm.apply(calibrator, jnp.asarray(s, jnp.float32)))


def test_a_bank_of_one_row_subtracts_it():
    np.testing.assert_allclose(matrices(S, TQ[:1]), 20 * (S - TQ[0]), atol=1e-5)


def test_constants_on_the_bank_or_on_a_column_leave_rankings():
    plain = matrices(S, TQ, TG, "dualis")
    np.testing.assert_array_equal(order(matrices(S, TQ + 0.3, TG - 0.2, "dualis")), order(plain))
    moved, shift = TQ.copy(), np.zeros(17)
    shift[4] = 0.7
    np.testing.assert_allclose(matrices(S + shift, TQ + shift, TG + shift, "dualis"), plain, atol=2e-5)
    moved[:, 4] += 0.7
    assert (order(matrices(S, moved, TG, "dualis")) != order(plain)).any()


def test_small_beta_subtracts_the_mean_response():
    beta = 1e-2
    got = matrices(S, TQ, betas=(beta, 1.0)) / beta
    np.testing.assert_allclose(got - got.mean(), (S - TQ.mean(0)) - (S - TQ.mean(0)).mean(), atol=5e-3)


def test_empty_and_full_gates():
    calibrator = fitted("dis", "matrices")
    scores = lambda gate: np.asarray(  # noqa: E731
        dbnorm.apply(calibrator.replace(active_q=jnp.full(17, gate)), jnp.asarray(S, jnp.float32))
    )
    np.testing.assert_allclose(scores(False), 20 * S, rtol=1e-5)
    np.testing.assert_array_equal(order(scores(False)), order(S))
    np.testing.assert_allclose(scores(True), matrices(S, TQ), rtol=1e-5, atol=1e-5)


def test_a_constant_gallery_bank_is_a_sharper_query_bank_and_not_is():
    got = matrices(S, TQ, np.full((3, 17), 0.25), "dualis")
    norm = np.log(np.exp(20 * TQ).sum(0))
    np.testing.assert_array_equal(order(got), order(25 * S - norm))
    assert (order(got) != order(matrices(S, TQ))).any()
    np.testing.assert_array_equal(
        order(matrices(S, TQ, np.full((3, 17), 0.25), "dualis", betas=(20.0, 1e-6))), order(matrices(S, TQ))
    )


def test_two_banks_are_a_product_and_no_longer_bank():
    one = matrices(S, np.concatenate([TQ, TG]), betas=(20.0, 20.0))
    assert (order(one) != order(matrices(S, TQ, TG, "dualis", betas=(20.0, 20.0)))).any()


def test_logits_near_100_stay_finite():
    got = matrices(100 * S, 100 * TQ, 100 * TG, "dualis", betas=(20.0, 20.0))
    assert np.isfinite(got).all()
    scaled = matrices(S, TQ, TG, "dualis", betas=(2000.0, 2000.0))
    np.testing.assert_allclose(got, scaled, rtol=1e-4, atol=1e-2)
    with pytest.raises(ValueError, match=r"beta x max\|S\| is 2000, above 80: use log mode or lower beta"):
        dbnorm.check_exponent(np.array([[3.0, -100.0]]), 20.0, 5.0)
    dbnorm.check_exponent(np.array([[3.0, -4.0]]), 20.0, 5.0)


@pytest.mark.parametrize("mode", [m for m in dbnorm.MODES if m != "gc"])
def test_folded_search_finds_the_same(mode):
    calibrator = fitted(mode, "vectors")
    values, ids = jax.jit(dbnorm.calibrated_topk, static_argnums=(3, 4))(calibrator, QUERIES, GALLERY, 5, 6)
    scores = np.asarray(apply(calibrator, jnp.asarray(S, jnp.float32)))
    if mode == "csls":
        scores = scores + np.array([np.mean(sorted(row)[-4:]) for row in S])[:, None]
    np.testing.assert_array_equal(ids, order(scores)[:, :5])
    np.testing.assert_allclose(values, np.take_along_axis(scores, order(scores)[:, :5], 1), rtol=1e-5, atol=2e-5)
    width = {"dualdis": 8}.get(mode, 7)
    assert dbnorm.fold_gallery(calibrator, GALLERY).shape == (17, width)


def test_static_fold_is_the_briefs_coordinate():
    calibrator = fitted("dualis", "vectors")
    folded = dbnorm.fold_gallery(calibrator, GALLERY), dbnorm.fold_queries(calibrator, QUERIES)
    np.testing.assert_array_equal(folded[0][:, :6], GALLERY)
    np.testing.assert_allclose(folded[0][:, 6], -(calibrator.log_norm_q + calibrator.log_norm_g), rtol=1e-6)
    np.testing.assert_allclose(folded[1][:, :6], 25 * QUERIES, rtol=1e-6)
    assert (folded[1][:, 6] == 1).all()
    with pytest.raises(ValueError, match="'dis' gates each query by its best raw match"):
        dbnorm.fold_queries(fitted("dis", "vectors"), QUERIES)
    with pytest.raises(ValueError, match="'gc' ranks among bank responses"):
        dbnorm.fold_gallery(fitted("gc", "vectors"), GALLERY)


def test_the_opposite_direction_is_the_transpose_with_banks_exchanged():
    backwards = dbnorm.fit(BANK_G, BANK_Q, QUERIES, "dualis", *BETAS)
    tq, tg = np.asarray(BANK_G @ QUERIES.T, np.float64), np.asarray(BANK_Q @ QUERIES.T, np.float64)
    got = dbnorm.apply(backwards, jnp.asarray(S.T, jnp.float32))
    np.testing.assert_allclose(got, defined("dualis", S.T, tq, tg), rtol=1e-5, atol=2e-5)


def test_gc_breaks_ties_by_similarity_at_any_scale():
    s = np.array([[90.0, 95.0, 5.0]])
    got = matrices(s, np.array([[100.0, 100.0, 1.0], [80.0, 80.0, 2.0]]), mode="gc")
    np.testing.assert_array_equal(order(got), [[2, 1, 0]])
    # a bank sample that answers equally is not above
    assert matrices(np.array([[1.0]]), np.array([[1.0]]), mode="gc")[0, 0] == pytest.approx(0.25)


def test_dynamic_gate_reads_the_first_of_tied_best_matches():
    s = jnp.array([[0.2, 0.9, 0.9], [0.9, 0.1, 0.0]])
    assert dbnorm.dynamic_gate(s, jnp.array([False, True, False])).tolist() == [True, False]


def test_betas_are_traced_and_vmap_over_them():
    fits = jax.jit(jax.vmap(lambda b: dbnorm.from_similarities(jnp.asarray(TQ, jnp.float32), None, "is", b)))
    calibrators = fits(jnp.array([1.0, 20.0]))
    got = jax.vmap(dbnorm.apply, (0, None))(calibrators, jnp.asarray(S, jnp.float32))
    np.testing.assert_allclose(got[1], matrices(S, TQ), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got[0], matrices(S, TQ, betas=(1.0, 1.0)), rtol=1e-5, atol=1e-5)


def test_arrays_come_back():
    for mode in dbnorm.MODES:
        calibrator = fitted(mode, "vectors")
        again = dbnorm.calibrator_from_arrays(dbnorm.CalibratorConfig(mode, 17, 4), dbnorm.to_arrays(calibrator))
        assert jax.tree.structure(again) == jax.tree.structure(calibrator)
        jax.tree.map(np.testing.assert_array_equal, again, calibrator)


# --- the stand-in: what the paper says --------------------------------------------------------------------------------


def test_banks_help_and_lower_the_skewness_on_generated_hubs():
    from data.retrieval_pairs import hub_pairs

    @jax.jit
    def measure(q, g, bq, bg):
        s = q @ g.T
        rows = {}
        for mode, beta2 in (("identity", 5.0), ("is", 5.0), ("dis", 5.0), ("dualis", 10.0)):
            scores = dbnorm.apply(dbnorm.fit(bq, bg, g, mode, 20.0, beta2), s)
            hit = jnp.mean(jnp.argmax(scores, 1) == jnp.arange(len(s)))
            counts = dbnorm.k_occurrence(jax.lax.top_k(scores, 10)[1], len(g))
            rows[mode] = jnp.stack([hit, dbnorm.hubness_skewness(counts)])
        return rows

    found = []
    for seed in range(10):
        splits = hub_pairs(seed).splits
        arrays = (splits[s]["emb"] for s in ("queries", "gallery", "query_bank", "gallery_bank"))
        found.append(jax.device_get(measure(*map(jnp.asarray, arrays))))
    mean = {mode: np.mean([f[mode] for f in found], 0) for mode in found[0]}
    assert mean["is"][0] >= mean["identity"][0] + 0.03 and mean["dis"][0] >= mean["identity"][0] + 0.03
    assert mean["identity"][1] > mean["is"][1] + 0.3 > mean["dualis"][1] + 0.3


# --- bad input --------------------------------------------------------------------------------------------------------


def test_another_gallery_is_refused():
    calibrator = fitted("dualis", "vectors")
    with pytest.raises(ValueError, match="query bank was scored against 17 items, gallery has 12"):
        dbnorm.apply(calibrator, jnp.asarray(S[:, :12], jnp.float32))
    with pytest.raises(ValueError, match="query bank was scored against 17 items, gallery has 12"):
        dbnorm.calibrated_topk(calibrator, QUERIES, GALLERY[:12], 3)
    with pytest.raises(ValueError, match="fitted to another gallery of 17 items"):
        dbnorm.check_gallery(calibrator, GALLERY.at[3, 1].add(1e-3))
    with pytest.raises(ValueError, match="fitted without a gallery"):
        dbnorm.check_gallery(dbnorm.from_similarities(jnp.asarray(TQ, jnp.float32), None, "is"), GALLERY)
    with pytest.raises(ValueError, match="query bank was scored against 17 items, gallery bank against 5"):
        dbnorm.from_similarities(jnp.ones((2, 17)), jnp.ones((2, 5)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("dual", 20.0, 5.0, 1, 17), "mode must be one of identity, is, dualis, csls, sinkhorn, dis, dualdis, gc; got"),
        (("is", 0.0, 5.0, 1, 17), "beta1 must be a positive number, got 0"),
        (("is", 20.0, -5.0, 1, 17), "beta2 must be a positive number, got -5"),
        (("is", float("inf"), 5.0, 1, 17), "beta1 must be a positive number, got inf"),
        (("dis", 20.0, 5.0, 18, 17), r"k must be in \[1, 17\], the items of the gallery; got 18"),
        (("dis", 20.0, 5.0, 0, 17), r"k must be in \[1, 17\]"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        dbnorm.check_settings(*settings)
    dbnorm.check_settings("dualdis", 20.0, 5.0, 17, 17)


def test_a_missing_bank_and_an_unknown_raw_factor_are_refused():
    for fit in (lambda m: dbnorm.fit(BANK_Q, None, GALLERY, m), lambda m: dbnorm.from_similarities(BANK_Q, None, m)):
        with pytest.raises(ValueError, match="mode 'dualdis' needs a gallery bank as well"):
            fit("dualdis")
        with pytest.raises(ValueError, match="mode must be one of"):
            fit("softmax")
    with pytest.raises(ValueError, match="raw_factor must be 'exponential' or 'similarity', got 'raw'"):
        dbnorm.apply(fitted("dis", "vectors"), jnp.asarray(S, jnp.float32), "raw")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({1: np.ones((4, 9))}, "query bank was scored against 9 items, gallery has 17"),
        ({2: np.ones((4, 9))}, "gallery bank was scored against 9 items, gallery has 17"),
        ({1: np.ones((0, 17))}, "the query bank is empty"),
        ({2: np.ones((0, 17))}, "the gallery bank is empty"),
        ({0: np.where(np.eye(12, 17), np.nan, 0)}, "similarities: 12 values are not finite, the first in row 0"),
        ({2: np.full((3, 17), np.inf)}, "gallery bank: 51 values are not finite"),
    ],
)
def test_matrices_that_do_not_fit_are_refused(change, message):
    arrays = [change.get(i, x) for i, x in enumerate((S, TQ, TG))]
    with pytest.raises(ValueError, match=message):
        dbnorm.check_similarities(*arrays)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({2: np.ones((4, 5))}, "query bank: vectors have 5 dimensions, the gallery's 6"),
        ({0: np.ones((4, 5))}, "queries: vectors have 5 dimensions, the gallery's 6"),
        ({3: np.ones((0, 6))}, "the gallery bank is empty"),
        ({1: np.ones((0, 6))}, "the gallery is empty"),
        ({3: np.full((3, 6), np.nan)}, "gallery bank: 18 values are not finite"),
    ],
)
def test_vectors_that_do_not_fit_are_refused(change, message):
    arrays = [change.get(i, x) for i, x in enumerate((QUERIES, GALLERY, BANK_Q, BANK_G))]
    with pytest.raises(ValueError, match=message):
        dbnorm.check_vectors(*arrays)


def test_a_bank_of_test_queries_is_warned_of():
    with pytest.warns(UserWarning, match="2 of 11 query bank samples are test queries themselves"):
        dbnorm.check_vectors(QUERIES, GALLERY, jnp.concatenate([BANK_Q, QUERIES[3:5]]))
    with pytest.warns(UserWarning, match="1 of 10 query bank samples"):
        dbnorm.check_similarities(S, np.concatenate([TQ, S[7:8]]), TG)


@pytest.mark.filterwarnings("error")
def test_good_input_passes_without_a_warning():
    dbnorm.check_vectors(QUERIES, GALLERY, BANK_Q, BANK_G)
    dbnorm.check_similarities(S, TQ, TG)
    values, _ = mips_topk(QUERIES, GALLERY, 1)
    assert np.isfinite(values).all()
