"""Stationary representations against the definition, with plain NumPy loops as the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from zoo.base import CompositionError, Context, Objective, reduce_mean
from zoo.nn.mlp import MLP
from zoo.ops.fingerprint import fingerprint
from zoo.ops.simplex import simplex_prototypes
from zoo.representation import stationary as st

RNG = np.random.default_rng(0)
LABELS = np.array([0, 1, 0, 2, 1, 0, 3])


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


H_NEW, H_OLD = (unit(RNG.normal(size=(7, 5))).astype(np.float32) for _ in range(2))


def loop_hoc(new, old, labels, mu=10.0, mode="zero"):
    """Equation 4, entry by entry, in float64."""
    new, old, out = new.astype(np.float64), old.astype(np.float64), []
    for i in range(len(new)):
        positive = mu * sum(old[i, k] * new[i, k] for k in range(new.shape[1]))
        terms = []
        for j in range(len(new)):
            s = mu * float(old[i] @ new[j])
            if labels[i] == labels[j]:
                if mode == "zero":
                    terms.append(0.0)
            else:
                terms.append(s)
        if mode == "neginf":
            terms.append(positive)
        out.append(-positive + np.log(sum(np.exp(t) for t in terms)))
    return np.array(out)


hoc = jax.jit(st.hoc_loss, static_argnames=("mask_mode",))


@pytest.mark.parametrize("mode", ["zero", "neginf"])
@pytest.mark.parametrize("mu", [10.0, 1.5])
def test_hoc_against_the_definition(mode, mu):
    np.testing.assert_allclose(hoc(H_NEW, H_OLD, LABELS, mu, mask_mode=mode), loop_hoc(H_NEW, H_OLD, LABELS, mu, mode),
                               atol=1e-5)  # fmt: skip


def test_old_features_are_the_rows():
    new, old = jnp.array([[1.0, 0.0], [0.0, 1.0]]), jnp.array([[1.0, 0.0], [0.6, 0.8]])
    # S = old new^T = [[1, 0], [.6, .8]]; different classes, so each row keeps its off-diagonal entry and one exp(0)
    expected = [-1 + np.log(1 + np.exp(0.0)), -0.8 + np.log(np.exp(0.6) + 1)]
    np.testing.assert_allclose(hoc(new, old, jnp.array([0, 1]), 1.0), expected, atol=1e-6)


def test_limits_of_hoc():
    np.testing.assert_allclose(hoc(H_NEW, H_OLD, LABELS, 0.0), np.log(7), atol=1e-6)
    single = hoc(H_NEW[:1], H_OLD[:1], LABELS[:1], 10.0)
    np.testing.assert_allclose(single, [-10 * H_NEW[0] @ H_OLD[0]], atol=1e-5)
    np.testing.assert_allclose(hoc(H_NEW, H_OLD, np.zeros(7, int), 10.0, mask_mode="neginf"), 0, atol=1e-5)


def test_gradients_reach_new_features_only():
    total = lambda n, o: jnp.sum(st.hoc_loss(n, o, jnp.asarray(LABELS)))  # noqa: E731
    new, old = jax.grad(total, (0, 1))(jnp.asarray(H_NEW), jnp.asarray(H_OLD))
    assert not np.asarray(old).any() and np.abs(np.asarray(new)).min() > 0
    step = 1e-3 * RNG.normal(size=H_NEW.shape).astype(np.float32)
    up, down = (loop_hoc(H_NEW + s * step, H_OLD, LABELS).sum() for s in (1, -1))
    np.testing.assert_allclose(np.sum(np.asarray(new) * step), (up - down) / 2, rtol=1e-3)


def test_rotations():
    q = np.linalg.qr(RNG.normal(size=(5, 5)))[0].astype(np.float32)
    plain = hoc(H_NEW, H_OLD, LABELS)
    np.testing.assert_allclose(hoc(H_NEW @ q, H_OLD @ q, LABELS), plain, atol=1e-4)
    assert np.abs(hoc(H_NEW @ q, H_OLD, LABELS) - plain).max() > 0.5


@pytest.mark.parametrize("mode", ["zero", "neginf"])
def test_masked_rows_count_for_nothing(mode):
    mask = np.array([True, True, False, True, False, True, True])
    new, old = H_NEW.copy(), H_OLD.copy()
    new[~mask], old[~mask] = np.nan, np.inf
    found = hoc(new, old, LABELS, 10.0, mask_mode=mode, mask=mask)
    np.testing.assert_allclose(found[mask], loop_hoc(H_NEW[mask], H_OLD[mask], LABELS[mask], 10.0, mode), atol=1e-5)
    assert not np.asarray(found)[~mask].any()
    grads = jax.grad(
        lambda n: jnp.sum(st.hoc_loss(n, jnp.asarray(old), jnp.asarray(LABELS), 10.0, mode, jnp.asarray(mask)))
    )(jnp.asarray(new))
    assert np.isfinite(np.asarray(grads)).all() and not np.asarray(grads)[~mask].any()


def test_hoc_in_half_precision_accumulates_in_float32():
    low = hoc(jnp.asarray(H_NEW, jnp.bfloat16), jnp.asarray(H_OLD, jnp.bfloat16), LABELS)
    assert low.dtype == jnp.float32
    exact = loop_hoc(*(np.asarray(jnp.asarray(h, jnp.bfloat16), np.float32) for h in (H_NEW, H_OLD)), LABELS)
    np.testing.assert_allclose(low, exact, atol=1e-4)


def test_no_buffer_is_larger_than_the_similarities():
    b, d = 64, 8
    h = jnp.zeros((b, d))
    step = jax.make_jaxpr(jax.grad(lambda n: jnp.sum(st.hoc_loss(n, h, jnp.arange(b)))))(h)

    def sizes(jaxpr):
        for equation in jaxpr.eqns:
            yield from (v.aval.size for v in equation.outvars)
            for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr")):
                if hasattr(inner, "jaxpr"):
                    yield from sizes(inner.jaxpr)

    assert b * b == max(sizes(step.jaxpr))


def test_unknown_mask_mode():
    with pytest.raises(ValueError, match="'zero' or 'neginf', got 'inf'"):
        st.hoc_loss(jnp.asarray(H_NEW), jnp.asarray(H_OLD), jnp.asarray(LABELS), mask_mode="inf")


def test_targets_and_their_checks():
    np.testing.assert_array_equal(st.reversed_targets(jnp.array([0, 1, 5]), 8), [7, 6, 2])
    st.check_labels([0, 7], 8)
    st.check_labels([0, 7], 8, "start")
    with pytest.raises(ValueError, match=r"label 8 lies at row -1 of the simplex, outside \[0, 8\)"):
        st.check_labels([3, 8], 8)
    with pytest.raises(ValueError, match=r"label -1 lies at row 8 of the simplex"):
        st.check_labels([-1], 8)
    with pytest.raises(ValueError, match="label 8 lies at row 8"):
        st.check_labels([8], 8, "start")


def test_capacity():
    st.check_capacity(5, 3, 8)
    with pytest.raises(ValueError, match="needs 9 classes but the fixed simplex has K_pre=8; choose preallocated_clas"
                                         "ses >= 9 before the first model is trained"):  # fmt: skip
        st.check_capacity(5, 4, 8)


def test_replacements_are_checked():
    st.check_replacement(7, 8)
    with pytest.raises(ValueError, match="feature size 511 differs from simplex dimension 1023"):
        st.check_replacement(511, 1024)
    with pytest.raises(ValueError, match="trained with a linear classifier"):
        st.check_replacement(7, 8, "linear")
    old = st.StationaryNetwork(MLP((4,), 4), 6)
    with pytest.raises(ValueError, match="feature size 5 differs from simplex dimension 7"):
        st.stationary(st.StationaryNetwork(MLP((4,), 4), 8), old, {"params": {}})


def test_convex_combination():
    a, b = jnp.array([1.0, 2.0]), jnp.array([5.0, -3.0])
    np.testing.assert_allclose(st.convex_combine(a, b, 0.1), [4.6, -2.5], rtol=1e-6)
    np.testing.assert_array_equal(st.convex_combine(a, b, 1.0), a)
    for lam in (-0.1, 1.5):
        with pytest.raises(ValueError, match=rf"lam must lie in \[0, 1\], got {lam}"):
            st.convex_combine(a, b, lam)


NET = st.StationaryNetwork(MLP((6,), 4), 5)
LINEAR = st.StationaryNetwork(MLP((6,), 4), 5, "linear")
BATCH = {
    "x": jnp.asarray(RNG.normal(size=(7, 3)), jnp.float32),
    "label": jnp.asarray(LABELS, jnp.int32),
    "index": jnp.arange(7),
    "mask": jnp.ones(7, bool),
}
CONTEXT = Context(rng=jax.random.key(0))


def run(objective, variables, batch=BATCH, context=CONTEXT):
    outputs, _ = objective.forward(variables, batch, context)
    return outputs, objective.loss(outputs, batch, context)


def test_the_simplex_is_no_parameter():
    variables = st.classification(NET).init(jax.random.key(0), BATCH)
    assert set(variables["params"]) == {"backbone"}  # four features are K-1 already: no head
    np.testing.assert_array_equal(variables["constants"]["classifier"]["prototypes"], simplex_prototypes(5))
    wide = st.StationaryNetwork(MLP((6,), 9), 5).init(jax.random.key(0), BATCH["x"])
    assert wide["params"]["head"]["fc"]["kernel"].shape == (9, 4) and "bias" not in wide["params"]["head"]["fc"]


@pytest.mark.parametrize("side", ["end", "start"])
def test_cross_entropy_against_the_definition(side):
    objective = st.classification(NET, side=side)
    variables = objective.init(jax.random.key(1), BATCH)
    outputs, loss = run(objective, variables)
    z = np.asarray(NET.apply(variables, BATCH["x"], classify=False), np.float64)
    w = np.asarray(simplex_prototypes(5), np.float64)
    expected, hits = [], []
    for row, label in zip(z, LABELS, strict=True):
        target = 4 - label if side == "end" else label
        y = [float(row @ p) for p in w]
        expected.append(-y[target] + np.log(sum(np.exp(v) for v in y)))
        hits.append(int(np.argmax(y)) == target)
    np.testing.assert_allclose(loss.elements.values, expected, atol=1e-5)
    assert float(loss.metrics["accuracy"]) == pytest.approx(np.mean(hits)) and float(loss.metrics["zero_features"]) == 0
    np.testing.assert_allclose(outputs["embedding"], z, atol=1e-6)


def test_padding_does_not_count_in_the_metrics():
    objective = st.classification(NET)
    variables = objective.init(jax.random.key(1), BATCH)
    padded = {**BATCH, "mask": jnp.arange(7) < 4, "label": BATCH["label"].at[4:].set(99)}
    short = {k: v[:4] for k, v in BATCH.items()}
    (_, a), (_, b) = run(objective, variables, padded), run(objective, variables, short)
    np.testing.assert_allclose(a.elements.values[:4], b.elements.values, atol=1e-6)
    assert not np.asarray(a.elements.values[4:]).any()
    assert float(a.metrics["accuracy"]) == float(b.metrics["accuracy"])


def test_dead_features_are_reported():
    objective = st.classification(NET)
    variables = objective.init(jax.random.key(1), BATCH)
    dead = {**variables, "params": jax.tree.map(jnp.zeros_like, variables["params"])}
    _, loss = run(objective, dead)
    assert float(loss.metrics["zero_features"]) == 1.0
    np.testing.assert_allclose(loss.elements.values, np.log(5), atol=1e-6)
    both = st.stationary(NET, NET, variables)
    start = {**both.init(jax.random.key(1), BATCH), "params": dead["params"]}
    value = lambda p: reduce_mean(run(both, {**start, "params": p})[1].elements)  # noqa: E731
    assert all(np.isfinite(np.asarray(g)).all() for g in jax.tree.leaves(jax.grad(value)(dead["params"])))


def test_a_learned_classifier_sees_only_the_classes_so_far():
    objective = st.classification(LINEAR)
    variables = objective.init(jax.random.key(1), BATCH)
    assert (
        variables["params"]["classifier"]["kernel"].shape == (4, 5) and "bias" not in variables["params"]["classifier"]
    )
    assert np.asarray(variables["constants"]["seen"]).all()
    seen = jnp.array([False, True, True, True, True])  # rows 4 .. 1 hold the labels 0 .. 3
    variables = {**variables, "constants": {"seen": seen}}
    outputs, loss = run(objective, variables)
    z = np.asarray(outputs["embedding"], np.float64)
    y = z @ np.asarray(variables["params"]["classifier"]["kernel"], np.float64)
    expected = [-y[i, 4 - t] + np.log(np.exp(y[i, 1:]).sum()) for i, t in enumerate(LABELS)]
    np.testing.assert_allclose(loss.elements.values, expected, atol=1e-5)
    assert np.isneginf(outputs["logits"][:, 0]).all()


def test_the_method_is_both_losses():
    old = NET.init(jax.random.key(7), BATCH["x"])
    objective = st.stationary(NET, NET, old, lam=0.3, mu=4.0)
    variables = objective.init(jax.random.key(1), BATCH)
    assert set(variables["constants"]) == {"classifier", "old"}
    outputs, loss = run(objective, variables)
    before = np.asarray(NET.apply(old, BATCH["x"], classify=False))
    np.testing.assert_allclose(outputs["old"], before, atol=1e-6)
    _, base = run(st.classification(NET), variables)
    distilled = loop_hoc(unit(np.asarray(outputs["embedding"])), unit(before), LABELS, 4.0)
    np.testing.assert_allclose(loss.elements.values, 0.3 * base.elements.values + 0.7 * distilled, atol=1e-5)
    assert float(loss.metrics["hoc"]) == pytest.approx(distilled.mean(), abs=1e-5)
    assert float(loss.metrics["classification"]) == pytest.approx(float(np.mean(base.elements.values)), abs=1e-5)
    assert objective.gathers == ("label",)


def test_lam_one_is_cross_entropy():
    old = NET.init(jax.random.key(7), BATCH["x"])
    objective = st.stationary(NET, NET, old, lam=1.0)
    variables = objective.init(jax.random.key(1), BATCH)
    np.testing.assert_array_equal(run(objective, variables)[1].elements.values,
                                  run(st.classification(NET), variables)[1].elements.values)  # fmt: skip


def test_lam_defaults_to_a_tenth_and_mu_to_ten():
    old = NET.init(jax.random.key(7), BATCH["x"])
    short = st.stationary(NET, NET, old)
    variables = short.init(jax.random.key(1), BATCH)
    full = st.stationary(NET, NET, old, 0.1, 10.0, "zero", "end")
    np.testing.assert_array_equal(run(short, variables)[1].elements.values, run(full, variables)[1].elements.values)
    other = st.stationary(NET, NET, old, mask_mode="neginf")
    assert not np.allclose(run(other, variables)[1].elements.values, run(full, variables)[1].elements.values)


def test_the_old_model_gets_no_gradient_and_stays_in_evaluation_mode():
    net = st.StationaryNetwork(MLP((6,), 4, normalise=True), 5)
    old = net.init(jax.random.key(7), BATCH["x"])
    objective = st.stationary(net, net, old)
    variables = objective.init(jax.random.key(1), BATCH)
    outputs, mutated = objective.forward(variables, BATCH, CONTEXT)
    np.testing.assert_allclose(outputs["old"], net.apply(old, BATCH["x"], False, classify=False), atol=1e-6)
    assert set(mutated) == {"batch_stats"}

    def value(constants):
        return reduce_mean(
            run(objective, {**variables, "constants": {**variables["constants"], "old": constants}})[1].elements
        )

    grads = jax.grad(value)(variables["constants"]["old"])
    assert not any(np.asarray(g).any() for g in jax.tree.leaves(grads))


def test_any_backbone_may_be_the_old_one():
    old_net = st.StationaryNetwork(MLP((3, 3), 8), 5)
    old = old_net.init(jax.random.key(7), BATCH["x"])
    objective = st.stationary(NET, old_net, old)
    outputs, _ = run(objective, objective.init(jax.random.key(1), BATCH))
    np.testing.assert_allclose(outputs["old"], old_net.apply(old, BATCH["x"], classify=False), atol=1e-6)


def test_hosts_that_do_not_fit_are_refused():
    base = st.classification(NET)
    bare = Objective(base.init, base.forward, base.loss, provides=("logits",), name="bare")
    with pytest.raises(CompositionError, match="bare has unit 'example' and provides 'logits'"):
        st.higher_order_compatibility(bare, lambda v, b: b["x"], {})
    pairs = Objective(base.init, base.forward, base.loss, unit="pair", provides=("embedding",), name="pairs")
    with pytest.raises(CompositionError, match="pairs has unit 'pair'"):
        st.higher_order_compatibility(pairs, lambda v, b: b["x"], {})
    with pytest.raises(ValueError, match="'zero' or 'neginf', got 'x'"):
        st.higher_order_compatibility(base, lambda v, b: b["x"], {}, mask_mode="x")
    with pytest.raises(ValueError, match="got 2"):
        st.higher_order_compatibility(base, lambda v, b: b["x"], {}, lam=2.0)


def test_a_hosts_terms_are_weighted_too():
    plain = st.classification(NET)
    extra = Objective(plain.init, plain.forward,
                      lambda o, b, c: plain.loss(o, b, c).replace(terms={"penalty": jnp.float32(8.0)}),
                      provides=plain.provides, gathers=plain.gathers)  # fmt: skip
    objective = st.higher_order_compatibility(extra, lambda v, b: jnp.ones((7, 4)), {}, lam=0.25)
    _, loss = run(objective, objective.init(jax.random.key(1), BATCH))
    assert float(loss.terms["penalty"]) == 2.0


def test_any_classification_loss_may_be_the_base():
    smooth = lambda y, t: optax.softmax_cross_entropy(y, optax.smooth_labels(jax.nn.one_hot(t, 5), 0.2))  # noqa: E731
    base = st.classification(NET, smooth)
    old = NET.init(jax.random.key(7), BATCH["x"])
    objective = st.higher_order_compatibility(base, lambda v, b: NET.apply(v, b["x"], classify=False), old, lam=0.5)
    variables = objective.init(jax.random.key(1), BATCH)
    outputs, loss = run(objective, variables)
    expected = 0.5 * smooth(outputs["logits"], 4 - BATCH["label"]) + 0.5 * loop_hoc(
        unit(np.asarray(outputs["embedding"])), unit(np.asarray(outputs["old"])), LABELS
    )
    np.testing.assert_allclose(loss.elements.values, expected, atol=1e-5)


def test_frames_and_towers():
    fixed = NET.init(jax.random.key(0), BATCH["x"])
    np.testing.assert_array_equal(st.frame(fixed), simplex_prototypes(5))
    learned = LINEAR.init(jax.random.key(0), BATCH["x"])
    np.testing.assert_array_equal(st.frame(learned), learned["params"]["classifier"]["kernel"])
    assert set(st.feature_variables(learned)) == {"params"} and set(st.feature_variables(learned)["params"]) == {
        "backbone"
    }
    other = NET.init(jax.random.key(1), BATCH["x"])
    np.testing.assert_array_equal(fingerprint(st.frame(fixed)), fingerprint(st.frame(other)))
