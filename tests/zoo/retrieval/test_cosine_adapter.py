"""cosine_adapter against its definition and the limits its brief names."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.metrics import average_precision_score

from zoo.base import Context, total_loss
from zoo.metrics import binary
from zoo.retrieval import cosine_adapter
from zoo.retrieval.cosine_adapter import MAPPINGS, CosineAdapter, adapt, adapter_objective, score_map

FAMILIES = ("linear", "sqrt", "quadratic", "power")
GRID = jnp.linspace(-1.0, 1.0, 201)[None]


def unit(rng, *shape):
    x = rng.normal(size=shape)
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def lists(seed=0, queries=9, width=7, dimension=5):
    rng = np.random.default_rng(seed)
    real = np.arange(width) < rng.integers(1, width + 1, queries)[:, None]
    cos = np.where(real, rng.uniform(-0.4, 1, (queries, width)), -1).astype(np.float32)
    label = ((rng.random((queries, width)) < 0.4) & real).astype(np.float32)
    query = unit(rng, queries, dimension)
    return {"query": query, "cos": cos, "label": label, "real": real}


BATCH = {k: jnp.asarray(v) for k, v in lists().items()}


def shaken(mapping, seed=1, positive=True, **rest):
    """An adapter whose maps differ much between queries."""
    module = CosineAdapter(mapping, (6,), positive, **rest)
    params = module.init(jax.random.key(seed), BATCH["query"], BATCH["cos"])["params"]
    keys = jax.random.split(jax.random.key(seed + 1), len(jax.tree.leaves(params)))
    noise = jax.tree.unflatten(jax.tree.structure(params), list(keys))
    return module, jax.tree.map(lambda p, k: p + 0.7 * jax.random.normal(k, p.shape), params, noise)


def defined(mapping, a, b, k, x):
    power = {"linear": 1.0, "sqrt": 0.5, "quadratic": 2.0, "power": k}[mapping]
    return np.sign(x) * a * np.abs(x) ** power + b


@pytest.mark.parametrize("mapping", FAMILIES)
@pytest.mark.parametrize("positive", [True, False])
def test_logits_equal_a_loop_over_the_definition(mapping, positive):
    module, params = shaken(mapping, positive=positive)
    got = adapt(module, params, 3.0 * BATCH["query"], BATCH["cos"], BATCH["real"])  # the length does not matter
    p = jax.tree.map(lambda v: np.asarray(v, np.float64), params)
    for i, query in enumerate(np.asarray(BATCH["query"], np.float64)):
        hidden = np.maximum(query @ p["hidden_0"]["kernel"] + p["hidden_0"]["bias"], 0)
        raw = hidden @ p["out"]["kernel"] + p["out"]["bias"]
        a = np.log1p(np.exp(raw[0])) if positive else raw[0]
        k = 2 / (1 + np.exp(-raw[2])) if mapping == "power" else None
        for j, x in enumerate(np.asarray(BATCH["cos"], np.float64)[i]):
            want = defined(mapping, a, raw[1], k, x) if BATCH["real"][i, j] else 0.0
            np.testing.assert_allclose(got[i, j], want, rtol=1e-4, atol=1e-5)
    theta = module.apply({"params": params}, BATCH["query"], method="theta")
    assert theta.shape == (9, MAPPINGS[mapping][1])
    assert positive == bool((theta[:, 0] > 0).all()) or not positive
    if mapping == "power":
        assert ((theta[:, 2] > 0) & (theta[:, 2] < 2)).all()


def at(mapping, *theta):
    return score_map(mapping, jnp.array([theta], jnp.float32).reshape(1, -1), GRID)


def test_families_agree_where_they_meet():
    np.testing.assert_array_equal(score_map("raw", jnp.zeros((1, 0)), GRID), GRID)
    np.testing.assert_array_equal(at("linear", 1.0, 0.0), GRID)
    for k, name in ((1.0, "linear"), (2.0, "quadratic"), (0.5, "sqrt")):
        np.testing.assert_allclose(at("power", 3.0, -0.4, k), at(name, 3.0, -0.4), atol=2e-5)


@pytest.mark.parametrize("mapping", FAMILIES)
def test_maps_rise_and_are_odd_about_b(mapping):
    theta = (2.5, -0.7, 0.3)[: MAPPINGS[mapping][1]]
    y = np.asarray(at(mapping, *theta))[0]
    np.testing.assert_allclose(y[::-1] + 0.7, -(y + 0.7), atol=1e-5)
    assert (np.diff(y) > 0).all() and y[100] == np.float32(-0.7)
    falling = np.asarray(at(mapping, -2.5, *theta[1:]))[0]
    np.testing.assert_allclose(falling + 0.7, -(y + 0.7), atol=1e-5)


def test_powers_are_continuous_and_differentiable_at_zero():
    x = jnp.array([[-1e-6, -5e-7, 0.0, 5e-7, 1e-6]])
    y = np.asarray(score_map("sqrt", jnp.array([[1.0, 0.0]]), x))[0]
    np.testing.assert_allclose(y, [-1e-3, -5e-4, 0.0, 5e-4, 1e-3], rtol=1e-4, atol=1e-9)
    for mapping in FAMILIES:
        theta = jnp.array([[2.0, 0.1, 0.3]])[:, : MAPPINGS[mapping][1]]
        for zero in (0.0, -0.0, 1e-30):
            grads = jax.grad(lambda t, z, m=mapping: score_map(m, t, z).sum(), (0, 1))(theta, jnp.array([[zero]]))
            assert all(np.isfinite(g).all() for g in grads)
    # away from 0 the derivative by k is a |x|^k log|x|
    theta = jnp.array([[2.0, 0.1, 0.3]])
    slope = jax.grad(lambda t: score_map("power", t, jnp.array([[-0.5]])).sum())(theta)
    np.testing.assert_allclose(slope[0], [-(0.5**0.3), 1.0, -2 * 0.5**0.3 * np.log(0.5)], rtol=1e-5)


@pytest.mark.parametrize("mapping", FAMILIES)
def test_the_order_within_a_query_never_changes(mapping):
    module, params = shaken(mapping)
    cos = jnp.asarray(np.random.default_rng(4).uniform(-1, 1, (9, 20)), jnp.float32)
    scores = adapt(module, params, BATCH["query"], cos)
    np.testing.assert_array_equal(np.argsort(scores, 1), np.argsort(cos, 1))


@pytest.mark.parametrize("mapping", FAMILIES)
def test_one_map_for_all_queries_leaves_pr_auc_exactly(mapping):
    module, params = shaken(mapping)
    raw = binary.average_precision(BATCH["cos"], BATCH["label"], BATCH["real"])
    auc = lambda p: binary.average_precision(  # noqa: E731
        adapt(module, p, BATCH["query"], BATCH["cos"], BATCH["real"]), BATCH["label"], BATCH["real"]
    )
    assert auc(cosine_adapter.global_map(params)) == raw
    assert auc(params) != raw
    scores = np.asarray(adapt(module, params, BATCH["query"], BATCH["cos"], BATCH["real"]))
    real = np.asarray(BATCH["real"])
    np.testing.assert_allclose(
        auc(params), average_precision_score(np.asarray(BATCH["label"])[real], scores[real]), atol=1e-6
    )


def test_untrained_adapters_are_the_global_start():
    module = CosineAdapter("power", (6,), slope=1.0, mean_cosine=0.3)
    params = module.init(jax.random.key(0), BATCH["query"], BATCH["cos"])["params"]
    theta = module.apply({"params": params}, BATCH["query"], method="theta")
    np.testing.assert_allclose(theta, np.tile([1.0, -0.3, 1.0], (9, 1)), atol=0.1)
    assert 0 < np.std(params["out"]["kernel"]) < 0.03
    free = CosineAdapter("linear", (6,), False, slope=4.0, mean_cosine=0.3)
    params = free.init(jax.random.key(0), BATCH["query"], BATCH["cos"])["params"]
    np.testing.assert_allclose(params["out"]["bias"], [4.0, -1.2], rtol=1e-5)
    deep = CosineAdapter("linear", (6, 4)).init(jax.random.key(0), BATCH["query"], BATCH["cos"])["params"]
    assert deep["hidden_1"]["kernel"].shape == (6, 4)
    flat = CosineAdapter("sqrt", ()).init(jax.random.key(0), BATCH["query"], BATCH["cos"])["params"]
    assert set(flat) == {"out"} and flat["out"]["kernel"].shape == (5, 2)


# --- the objective ----------------------------------------------------------------------------------------------------


def loss_of(module, params, batch, **rest):
    objective = adapter_objective(module, **rest)
    context = Context(jax.random.key(0))
    outputs, _ = objective.forward({"params": params}, batch, context)
    loss = objective.loss(outputs, batch, context)
    return total_loss(loss, None, (), context)[0], loss


def test_loss_is_the_mean_over_real_pairs_of_all_queries():
    module, params = shaken("power")
    graded = {**BATCH, "label": BATCH["label"] * 0.7}
    for batch, weight in ((BATCH, 1.0), (graded, 1.0), (BATCH, 3.0)):
        total, loss = loss_of(module, params, batch, positive_weight=weight)
        z = np.asarray(adapt(module, params, BATCH["query"], BATCH["cos"], BATCH["real"]), np.float64)
        want = []
        for i, j in np.argwhere(np.asarray(BATCH["real"])):
            p, y = 1 / (1 + np.exp(-z[i, j])), float(batch["label"][i, j])
            want.append(-weight * y * np.log(p) - (1 - y) * np.log(1 - p))
        np.testing.assert_allclose(total, np.mean(want), rtol=1e-5)
    assert loss.elements.unit == "token" and loss.elements.index.shape == (63, 2)
    np.testing.assert_array_equal(loss.elements.index[8], [1, 1])
    real = np.asarray(BATCH["real"])
    right = (z > 0) == (np.asarray(BATCH["label"]) > 0.5)
    np.testing.assert_allclose(loss.metrics["accuracy"], right[real].mean(), rtol=1e-6)


def test_loss_is_log_two_at_logit_zero():
    module = CosineAdapter("linear", (), slope=4.0)
    params = module.init(jax.random.key(0), BATCH["query"], BATCH["cos"])["params"]
    params = {"out": {"kernel": jnp.zeros((5, 2)), "bias": jnp.array([-1e4, 0.0])}}  # softplus(-1e4) = 0
    np.testing.assert_allclose(loss_of(module, params, BATCH)[0], np.log(2), rtol=1e-6)


@pytest.mark.parametrize("mapping", FAMILIES)
def test_gradients_are_finite_at_zero_and_ignore_padding(mapping):
    module, params = shaken(mapping)
    batch = {**BATCH, "cos": BATCH["cos"].at[:, 0].set(0.0)}
    poisoned = {
        **batch,
        "cos": jnp.where(batch["real"], batch["cos"], jnp.nan),
        "label": jnp.where(batch["real"], batch["label"], 9.0),
    }
    grad = jax.jit(jax.grad(lambda p, b: loss_of(module, p, b)[0]))
    clean, dirty = grad(params, batch), grad(params, poisoned)
    for a, b in zip(jax.tree.leaves(clean), jax.tree.leaves(dirty), strict=True):
        assert np.isfinite(a).all() and np.abs(a).sum() > 0
        np.testing.assert_array_equal(a, b)


def test_gradients_reach_the_adapter_only():
    module, params = shaken("power")

    def value(query, cos):
        return loss_of(module, params, {**BATCH, "query": query, "cos": cos})[0]

    for g in jax.grad(value, (0, 1))(BATCH["query"], BATCH["cos"]):
        assert (g == 0).all()


def test_encoders_are_bit_identical_after_training():
    rng = np.random.default_rng(2)
    encoder = {"w": jnp.asarray(rng.normal(size=(4, 5)), jnp.float32)}
    batch = {**BATCH, "text": jnp.asarray(rng.normal(size=(9, 4)), jnp.float32)}
    batch["items"] = jnp.asarray(unit(rng, 9, 7, 5))
    del batch["query"], batch["cos"]

    def encode(encoder, batch):
        query = batch["text"] @ encoder["w"]
        query = query / jnp.linalg.norm(query, axis=-1, keepdims=True)
        return query, jnp.einsum("bd,bkd->bk", query, batch["items"])

    objective = adapter_objective(CosineAdapter("linear", (6,)), encode=encode, encoder=encoder)
    variables = objective.init(jax.random.key(0), batch)
    before = jax.tree.map(jnp.array, variables)
    context = Context(jax.random.key(0))

    @jax.jit
    def scalar(variables):
        outputs, mutated = objective.forward(variables, batch, context)
        assert mutated == {}
        return total_loss(objective.loss(outputs, batch, context), None, (), context)[0]

    tx = optax.adam(0.1)
    state = tx.init(variables)  # even an optimiser that is handed everything cannot move them
    first = scalar(variables)
    for _ in range(5):
        grads = jax.grad(scalar)(variables)
        assert (grads["constants"]["encoder"]["w"] == 0).all()
        updates, state = tx.update(grads, state, variables)
        variables = optax.apply_updates(variables, updates)
    assert cosine_adapter.identical(variables["constants"], before["constants"])
    assert not cosine_adapter.identical(variables["params"], before["params"])
    np.testing.assert_array_equal(variables["constants"]["encoder"]["w"], encoder["w"])
    assert scalar(variables) < first


# --- the filter -------------------------------------------------------------------------------------------------------


def test_filter_keeps_the_recall_and_belongs_to_its_adapter():
    module, params = shaken("power")
    args = (BATCH["query"], BATCH["cos"])
    fitted = cosine_adapter.fit_filter(module, params, *args, BATCH["label"], BATCH["real"], 0.8)
    kept = np.asarray(cosine_adapter.apply_filter(fitted, module, params, *args, BATCH["real"]))
    scores, label, real = (
        np.asarray(x) for x in (adapt(module, params, *args, BATCH["real"]), BATCH["label"], BATCH["real"])
    )
    best = max(t for t in scores[real] if label[real & (scores >= t)].sum() >= 0.8 * label.sum())
    assert fitted.threshold == best
    np.testing.assert_array_equal(kept, real & (scores >= best))
    assert 0 < kept.sum() < real.sum()
    cosine_adapter.check_filter(fitted, params)
    with pytest.raises(ValueError, match="chosen for another adapter's logits"):
        cosine_adapter.check_filter(fitted, jax.tree.map(lambda p: p + 1e-3, params))
    again = cosine_adapter.RelevanceFilter(**cosine_adapter.to_arrays(fitted))
    cosine_adapter.check_filter(again, params)


def test_nothing_of_queries_by_candidates_by_dimensions_exists():
    module = CosineAdapter("power", (64,))
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((64, 256), (64, 500))]
    params = jax.eval_shape(lambda q, c: module.init(jax.random.key(0), q, c)["params"], *shapes)
    text = jax.jit(lambda p, q, c: adapt(module, p, q, c)).lower(params, *shapes)
    assert text.compile().memory_analysis().temp_size_in_bytes < 4 * 64 * 500 * 256 / 8


# --- bad input --------------------------------------------------------------------------------------------------------


def test_an_unknown_mapping_lists_the_five():
    with pytest.raises(ValueError, match="must be one of raw, linear, sqrt, quadratic, power; got 'cubic'"):
        score_map("cubic", jnp.zeros((1, 2)), GRID)
    with pytest.raises(ValueError, match="must be one of raw, linear, sqrt, quadratic, power; got 'cubic'"):
        CosineAdapter("cubic").init(jax.random.key(0), BATCH["query"], BATCH["cos"])
    raw = CosineAdapter("raw")
    np.testing.assert_array_equal(raw.apply({}, BATCH["query"], BATCH["cos"]), BATCH["cos"])


def test_a_weight_that_is_not_positive_is_refused():
    with pytest.raises(ValueError, match="positive_weight must be positive, got 0"):
        adapter_objective(CosineAdapter(), 0.0)


@pytest.mark.parametrize("hidden", [(6,), ()])
def test_another_embedding_dimension_is_refused(hidden):
    params = CosineAdapter("linear", hidden).init(jax.random.key(0), BATCH["query"], BATCH["cos"])["params"]
    cosine_adapter.check_adapter(params, BATCH["query"])
    with pytest.raises(ValueError, match="reads embeddings of 5 dimensions, these have 4"):
        cosine_adapter.check_adapter(params, BATCH["query"][:, :4])


q, c, y, m = (lists()[k] for k in ("query", "cos", "label", "real"))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((q, 37.2 * np.ones_like(c)), "expects cosine similarities; got max 37.2: normalise embeddings"),
        ((q, np.where(c == c.max(), -1.001, c)), "got min -1.001: normalise"),
        ((q, c[:4]), "need cosines"),
        ((q, c, y[:, :3]), r"labels \(9, 3\) and cosines \(9, 7\) must have one shape"),
        ((q, c, y, m[:, :3]), r"mask \(9, 3\) and cosines"),
        ((q, c, y, m & (np.arange(9) != 4)[:, None]), "query 4 has no candidate"),
        ((q, c, y + 0.5, m), r"labels must lie in \[0, 1\]; they run from 0.5 to 1.5"),
        ((q, c, y - 0.5, m), r"labels must lie in \[0, 1\]; they run from -0.5 to 0.5"),
        ((np.where(q == q.max(), np.nan, q), c), "embeddings and cosines must be finite"),
        ((q, np.where(m & (c == c.max()), np.inf, c), y, m), "embeddings and cosines must be finite"),
        ((q, c, 0 * y, m, 0.95), "no threshold has recall 0.95: labels are all 0"),
        ((q, c, 0 * y + 1, m, 0.95), "no threshold has recall 0.95: labels are all 1"),
        ((q, c, y, m, 1.5), r"target recall must be in \(0, 1\], got 1.5"),
        ((q, c, y, m, 0.0), r"target recall must be in \(0, 1\], got 0"),
    ],
)
def test_bad_candidates_are_refused(args, message):
    with pytest.raises(ValueError, match=message):
        cosine_adapter.check_candidates(*args)


def test_good_candidates_pass():
    cosine_adapter.check_candidates(q, np.where(m, c, np.nan), y * 0.5, m)
    cosine_adapter.check_candidates(q, np.where(m, c, 40.0), np.where(m, y, 7), m, 1.0)
    cosine_adapter.check_candidates(q, np.clip(c, -1, 1) * 1.00005)
