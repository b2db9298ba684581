"""TCM against hand values, loops and pytorch-metric-learning's numbers."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo import base, hosts
from zoo.base import Context
from zoo.losses import pairs, proxies
from zoo.losses.contrastive import unit_rows
from zoo.nn.mlp import MLP
from zoo.representation import tcm

GOLD = np.load(Path(__file__).resolve().parents[2] / "golden" / "tcm_metric_learning.npz")
FOUR = jnp.asarray([(0, 1), (0.43, 0.90), (1, 0), (0.5, 0.5)])
LABELS = jnp.asarray([0, 0, 1, 1])


def cosines(z):
    z = unit_rows(jnp.asarray(z, jnp.float32))
    return jnp.matmul(z, z.T, precision="highest")


def of(z, y, **settings):
    return tcm.tcm_loss(cosines(z), *pairs.pair_masks(jnp.asarray(y)), **settings)


def loop(z, y, m_pos, m_neg, l_pos, l_neg):
    """The definition, over unordered pairs."""
    z = np.asarray(z, float)
    z = z / np.linalg.norm(z, axis=1, keepdims=True)
    near, far = [], []
    for i in range(len(z)):
        for j in range(i):
            s = z[i] @ z[j]
            if y[i] == y[j] and s <= m_pos:
                near.append(m_pos - s)
            if y[i] != y[j] and s >= m_neg:
                far.append(s - m_neg)
    return l_pos * (np.mean(near) if near else 0) + l_neg * (np.mean(far) if far else 0)


def test_the_published_example():
    assert float(of(FOUR, LABELS)) == pytest.approx(0.5179, abs=2e-4)
    found = tcm.hard_pairs(cosines(FOUR), *pairs.pair_masks(LABELS))
    # ordered pairs: one hard positive and two hard negatives, each twice
    assert [int(found.positive_count), int(found.negative_count), int(found.positives)] == [2, 4, 4]
    assert float(found.positive_sum) == pytest.approx(2 * 0.19289, abs=1e-4)
    assert float(found.negative_sum) == pytest.approx(2 * (0.20711 + 0.4429), abs=2e-4)
    assert float(of(FOUR, LABELS, positive_margin=1.02, negative_margin=1.01)) > 0
    assert float(of(FOUR, LABELS, positive_margin=-1.01, negative_margin=-1.02, negative_weight=0.0)) == 0


def test_margins_out_of_reach_cost_nothing_and_equal_embeddings_half():
    s, (p, n) = cosines(FOUR), pairs.pair_masks(LABELS)
    assert float(tcm.tcm_from(tcm.hard_pairs(s, p, n, -1.01, 1.01))) == 0
    found = tcm.hard_pairs(jnp.ones((4, 4)), p, n)
    assert float(tcm.tcm_from(found)) == 0.5 and float(found.positive_sum) == 0


def test_pairs_at_the_margin_count_and_add_nothing():
    s, one = jnp.asarray([[0.9, 0.4, 0.5, 0.7]]), jnp.ones((1, 4), bool)
    p, n = one.at[0, 2:].set(False), one.at[0, :2].set(False)
    found = tcm.hard_pairs(s, p, n)
    assert int(found.positive_count) == 2 and int(found.negative_count) == 2
    assert float(tcm.tcm_from(found)) == pytest.approx(0.25 + 0.1, abs=1e-6)


@pytest.mark.parametrize("settings", [(0.9, 0.5, 1.0, 1.0), (0.7, -0.2, 0.5, 3.0), (0.2, 0.1, 2.0, 0.0)])
def test_values_and_gradients_are_those_of_the_definition(settings):
    rng = np.random.default_rng(0)
    z, y = rng.normal(size=(11, 3)), rng.integers(0, 3, 11)
    names = ("positive_margin", "negative_margin", "positive_weight", "negative_weight")
    kwargs = dict(zip(names, settings, strict=True))
    assert float(of(z, y, **kwargs)) == pytest.approx(loop(z, y, *settings), abs=1e-5)
    grad = np.asarray(jax.grad(lambda v: of(v, y, **kwargs))(jnp.asarray(z, jnp.float32)))
    for i, j in ((0, 1), (4, 0), (10, 2)):
        up, down = z.copy(), z.copy()
        up[i, j] += 1e-5
        down[i, j] -= 1e-5
        assert grad[i, j] == pytest.approx((loop(up, y, *settings) - loop(down, y, *settings)) / 2e-5, abs=1e-3)
    # by the similarity itself: -lambda+ / n+ for a hard positive, 0 for a pair that is not hard
    s, masks = cosines(z), pairs.pair_masks(jnp.asarray(y))
    by_pair = np.asarray(jax.grad(lambda v: tcm.tcm_loss(v, *masks, **kwargs))(s))
    found = tcm.hard_pairs(s, *masks, *settings[:2])
    hard = np.asarray(masks[0] & (s <= settings[0]))
    np.testing.assert_allclose(by_pair[hard], -settings[2] / int(found.positive_count), rtol=1e-5)
    far = np.asarray(masks[1] & (s >= settings[1]))
    np.testing.assert_allclose(by_pair[far], settings[3] / max(1, int(found.negative_count)), rtol=1e-5)
    assert (by_pair[~hard & ~far] == 0).all()


def test_rotation_and_rescaling_change_nothing():
    rng = np.random.default_rng(1)
    z, y = rng.normal(size=(9, 4)), rng.integers(0, 3, 9)
    q = np.linalg.qr(rng.normal(size=(4, 4)))[0]
    scale = rng.uniform(0.1, 9, (9, 1))
    assert float(of(scale * (z @ q), y)) == pytest.approx(float(of(z, y)), abs=1e-5)


@pytest.mark.parametrize(("name", "settings"), [("tcm", (0.9, 0.5, 1, 1)), ("tcm_other", (0.7, 0.2, 2.0, 0.5))])
def test_equals_pytorch_metric_learning(name, settings):
    value, grad = jax.value_and_grad(
        lambda z: tcm.tcm_loss(cosines(z), *pairs.pair_masks(jnp.asarray(GOLD["y"])), *settings)
    )(jnp.asarray(GOLD["z"]))
    assert float(value) == pytest.approx(float(GOLD[f"{name}_value"]), abs=1e-6)
    np.testing.assert_allclose(grad, GOLD[f"{name}_grad"], atol=1e-6)


def golden_base(name):
    """Our counterpart of a golden base loss, as a function of z."""
    y = jnp.asarray(GOLD["y"])
    p, n = pairs.pair_masks(y)
    unit = lambda v: v / np.linalg.norm(v, axis=1, keepdims=True)  # noqa: E731

    def per_pair(z):
        s = cosines(z)
        near, far = jnp.where(p, jax.nn.relu(1 - s), 0), jnp.where(n, jax.nn.relu(s - 0.5), 0)
        return jnp.sum(near) / jnp.sum(near > 0) + jnp.sum(far) / jnp.sum(far > 0)

    def triplets(z):
        values = pairs.triplet(cosines(z), p, n, 0.2)
        return jnp.sum(values) / jnp.sum(values > 0)

    def margins(head, w):
        return lambda z: (
            -jnp.mean(jax.nn.log_softmax(head(unit_rows(z) @ unit(w.T).T, y, scale=16.0))[jnp.arange(24), y])
        )

    return {
        "supcon": lambda z: jnp.mean(pairs.supervised_contrastive(cosines(z), p, n, 0.1)),
        "ms": lambda z: jnp.mean(pairs.multi_similarity(cosines(z), p, n)),
        "pa": lambda z: jnp.sum(proxies.proxy_anchor(unit_rows(z) @ unit(GOLD["pa_proxies"]).T, y)),
        "arc": margins(proxies.arcface_logits, GOLD["arc_w"]),
        "cos": margins(proxies.cosface_logits, GOLD["cos_w"]),
        "contrastive": per_pair,
        "triplet": triplets,
    }[name]


@pytest.mark.parametrize("name", ["supcon", "ms", "pa", "arc", "cos", "contrastive", "triplet"])
def test_base_losses_equal_pytorch_metric_learning(name):
    value, grad = jax.value_and_grad(golden_base(name))(jnp.asarray(GOLD["z"]))
    assert float(value) == pytest.approx(float(GOLD[f"{name}_value"]), rel=2e-5)
    np.testing.assert_allclose(grad, GOLD[f"{name}_grad"], atol=2e-4 * max(1, np.abs(GOLD[f"{name}_grad"]).max()))


def test_contrastive_pairs_of_balanced_classes_is_the_pairwise_mean():
    p, n = pairs.pair_masks(jnp.asarray(GOLD["y"]))
    s = np.asarray(cosines(GOLD["z"]))
    got = float(jnp.mean(pairs.contrastive_pairs(jnp.asarray(s), p, n)))
    want = np.maximum(1 - s, 0)[np.asarray(p)].mean() + np.maximum(s - 0.5, 0)[np.asarray(n)].mean()
    assert got == pytest.approx(want, abs=1e-6)


def test_the_streamed_form_is_the_same_loss():
    rng = np.random.default_rng(2)
    z, y = jnp.asarray(rng.normal(size=(13, 4)), jnp.float32), jnp.asarray(rng.integers(0, 3, 13))
    mask = jnp.arange(13) < 11
    settings = {"positive_margin": 0.8, "negative_margin": 0.1, "positive_weight": 2.0, "negative_weight": 0.5}

    def whole(v):
        u = unit_rows(v, mask)
        return tcm.tcm_loss(u @ u.T, *pairs.pair_masks(y, mask=mask), **settings)

    def tiles(v):
        return tcm.streamed_tcm(v, y, mask=mask, tile=4, **settings)

    assert float(tiles(z)) == pytest.approx(float(whole(z)), abs=1e-6)
    np.testing.assert_allclose(jax.grad(tiles)(z), jax.grad(whole)(z), atol=1e-5)
    big, labels = jnp.ones((2048, 8)), jnp.zeros(2048, jnp.int32)
    grad = jax.jit(jax.grad(lambda v: tcm.streamed_tcm(v, labels, tile=64)))
    assert grad.lower(big).compile().memory_analysis().temp_size_in_bytes < 2048 * 2048 * 2


def test_devices_add_sums_and_counts_before_they_divide():
    s, (p, n) = cosines(GOLD["z"]), pairs.pair_masks(jnp.asarray(GOLD["y"]))
    split = lambda x: x.reshape(4, 6, 24)  # noqa: E731
    each = jax.vmap(lambda *a: tcm.tcm_from(tcm.hard_pairs(*a), 2.0, 0.5, axis_name="d"), axis_name="d")
    got = each(split(s), split(p), split(n))
    np.testing.assert_allclose(got, float(tcm.tcm_loss(s, p, n, 0.9, 0.5, 2.0, 0.5)), rtol=1e-5)


def test_a_base_loss_with_it():
    s, (p, n) = cosines(GOLD["z"]), pairs.pair_masks(jnp.asarray(GOLD["y"]))
    loss = tcm.regularised(pairs.contrastive_pairs, 0.25, positive_margin=0.8)
    want = float(jnp.mean(pairs.contrastive_pairs(s, p, n))) + 0.25 * float(tcm.tcm_loss(s, p, n, 0.8))
    assert float(loss(s, p, n)) == pytest.approx(want, rel=1e-6)


BATCH = {
    "x": jnp.asarray(np.random.default_rng(3).normal(size=(8, 5)), jnp.float32),
    "label": jnp.asarray([0, 0, 1, 1, 2, 2, 3, 3]),
    "index": jnp.arange(8),
    "mask": jnp.arange(8) < 7,
    "row": jnp.arange(8),
}
CONTEXT = Context(rng=jax.random.key(0))


def transformed(host, transform, batch=BATCH):
    variables = host.init(jax.random.key(1), batch)
    outputs, _ = host.forward(variables, batch, CONTEXT)
    loss = host.loss(outputs, batch, CONTEXT)
    return (
        outputs,
        loss,
        transform.update(loss.elements, transform.init(8), CONTEXT.replace(outputs=outputs, batch=batch)),
    )


@pytest.mark.parametrize("tile", [None, 3])
def test_the_transformation_adds_a_term_over_real_rows(tile):
    host = hosts.metric_learning(MLP((), 3), pairs.contrastive_pairs)
    transform = tcm.threshold_consistent_margin(0.8, 0.1, 2.0, 0.5, tile=tile)
    outputs, loss, (e, state) = transformed(host, transform)
    np.testing.assert_array_equal(e.values, loss.elements.values)
    want = loop(outputs["embedding"][:7], BATCH["label"][:7], 0.8, 0.1, 2.0, 0.5)
    assert float(e.terms["tcm"]) == pytest.approx(want, abs=1e-5)
    assert int(state["without_positives"]) == 0


def test_padding_may_hold_anything():
    transform = tcm.threshold_consistent_margin(0.8, 0.1)
    z = jax.random.normal(jax.random.key(2), (8, 3))

    def added(z):
        known = CONTEXT.replace(outputs={"embedding": z}, batch=BATCH)
        e = base.example_elements(jnp.zeros(8), BATCH)
        return transform.update(e, transform.init(8), known)[0].terms["tcm"]

    clean, grad = jax.value_and_grad(added)(z)
    dirty, their = jax.value_and_grad(added)(z.at[7].set(jnp.nan))
    assert float(dirty) == float(clean)
    np.testing.assert_array_equal(their[:7], grad[:7])


def test_both_views_count():
    def two(key, x):
        return x, x + 1

    host = hosts.supervised_contrast(MLP((), 3), two)
    outputs, _, (e, _) = transformed(host, tcm.threshold_consistent_margin(0.8, 0.1))
    z = np.concatenate([outputs["z1"][:7], outputs["z2"][:7]])
    assert float(e.terms["tcm"]) == pytest.approx(loop(z, np.tile(BATCH["label"][:7], 2), 0.8, 0.1, 1, 1), abs=1e-5)


def test_batches_without_a_positive_pair_are_counted():
    host = hosts.metric_learning(MLP((), 3), pairs.contrastive_pairs)
    transform = tcm.threshold_consistent_margin()
    lonely = {**BATCH, "label": jnp.asarray([0, 1, 2, 3, 4, 5, 6, 6])}  # the second 6 is padding
    _, _, (e, state) = transformed(host, transform, lonely)
    assert int(state["without_positives"]) == 1 and np.isfinite(float(e.terms["tcm"]))


def test_it_needs_labels_and_says_so():
    host = hosts.simclr(MLP((), 3), lambda key, x: (x, x))
    assert "tcm requires 'label', which simclr does not provide" in base.misfit(tcm.threshold_consistent_margin(), host)
    assert base.misfit(tcm.threshold_consistent_margin(), hosts.proxies(MLP((), 3), 4)) is None


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="negative margin must be below positive margin, got 0.9 and 0.9"):
        tcm.threshold_consistent_margin(0.9, 0.9)
    with pytest.raises(ValueError, match="negative margin must be below positive margin"):
        of(FOUR, LABELS, positive_margin=0.1)
    with pytest.raises(ValueError, match="weights must not be negative, got -1 and 1"):
        tcm.threshold_consistent_margin(positive_weight=-1)
