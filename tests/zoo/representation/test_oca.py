"""OCA and the methods it is compared with, against NumPy loops and the released code's numbers."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from zoo.base import CompositionError, Context, check_fit, reduce_mean, total_loss
from zoo.hosts import metric_learning
from zoo.losses import pairs
from zoo.metrics.neighbours import cmc_curve, retrieval_metrics
from zoo.nn.basis_transformation import BasisTransformation
from zoo.nn.mlp import MLP
from zoo.representation import oca

GOLDEN = dict(np.load(Path(__file__).parents[2] / "golden" / "oca.npz"))
RNG = np.random.default_rng(0)
T = GOLDEN["ls_target"]


class Same(nn.Module):
    """An encoder that does nothing, so that its inputs are the released network's features."""

    axis_name: Any = None

    @nn.compact
    def __call__(self, x, train=False, mask=None):
        return x


def batch_of(x, labels=T):
    return {
        "x": jnp.asarray(x),
        "label": jnp.asarray(labels),
        "index": jnp.arange(len(x)),
        "mask": jnp.ones(len(x), bool),
    }


NET = oca.ExpandedEmbedding(Same(), 4, 3, 5)
BATCH = batch_of(GOLDEN["u"])
P = jnp.asarray(GOLDEN["P"])
CONTEXT = Context(rng=jax.random.key(0))


def official():
    """The released network's weights."""
    layer = {"generator": jnp.zeros((7, 7)), "bias": jnp.asarray(GOLDEN["bias"])}
    params = {"orthogonal": layer, "classifier": {"kernel": jnp.asarray(GOLDEN["W"].T)}}
    constants = {"orthogonal": {"base": jnp.asarray(GOLDEN["Q"])}, "prototypes": P}
    return {"params": params, "constants": constants}


def run(objective, variables, batch=BATCH):
    outputs, _ = objective.forward(variables, batch, CONTEXT)
    return outputs, objective.loss(outputs, batch, CONTEXT.replace(collections=variables, outputs=outputs, batch=batch))


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def loop_ce(logits, labels, s):
    values = []
    for row, t in zip(np.asarray(logits, np.float64), labels, strict=True):
        log_p = row - np.log(np.exp(row).sum())
        values.append(-(1 - s) * log_p[t] - s * log_p.mean())
    return np.array(values)


def test_the_network_is_the_released_one():
    out = NET.apply(official(), BATCH["x"])
    for name in ("h_new", "h_bct", "h_perp", "logits"):
        np.testing.assert_allclose(out[name], GOLDEN[name], atol=1e-5, err_msg=name)
    only = NET.apply(oca.feature_variables(official()), BATCH["x"], classify=False)
    np.testing.assert_allclose(only, GOLDEN["h_new"], atol=1e-6)
    assert NET.features == 7


def test_losses_and_gradients_are_the_released_ones():
    objective, variables = oca.oca(NET, P), official()
    outputs, loss = run(objective, variables)
    total, bct, ce, cosine = GOLDEN["oca_losses"]
    assert float(reduce_mean(loss.elements)) == pytest.approx(total, abs=1e-4)
    found = {k: float(loss.metrics[k]) for k in ("bct", "classification", "cosine")}
    assert found == pytest.approx({"bct": bct, "classification": ce, "cosine": cosine}, abs=1e-5)
    np.testing.assert_array_equal(outputs["embedding"], outputs["h_new"])

    def value(u, params):
        return reduce_mean(run(objective, {**variables, "params": params}, {**BATCH, "x": u})[1].elements)

    u, params = jax.grad(value, (0, 1))(BATCH["x"], variables["params"])
    np.testing.assert_allclose(u, GOLDEN["oca_grad_u"], atol=1e-5)
    np.testing.assert_allclose(params["classifier"]["kernel"].T, GOLDEN["oca_grad_W"], atol=1e-5)
    np.testing.assert_allclose(params["orthogonal"]["bias"], GOLDEN["oca_grad_b"], atol=1e-5)
    assert np.abs(np.asarray(params["orthogonal"]["generator"])).max() > 1e-3


def test_losses_against_the_definition():
    variables = official()
    _, loss = run(oca.oca(NET, P, (2.0, 3.0, 7.0), 0.2), variables)
    u, p = GOLDEN["u"].astype(np.float64), GOLDEN["P"].astype(np.float64)
    h = unit(u)
    logits = (h @ GOLDEN["Q"].T + GOLDEN["bias"]) @ GOLDEN["W"].T
    hbar = unit(h[:, :4])
    cosine = [1 - float(a @ b) / np.linalg.norm(b) for a, b in zip(hbar, p[T], strict=True)]
    expected = 2 * loop_ce(logits, T, 0.2) + 3 * loop_ce(hbar @ p.T, T, 0.2) + 7 * np.array(cosine)
    np.testing.assert_allclose(loss.elements.values, expected, atol=2e-5)
    assert float(loss.metrics["accuracy"]) == pytest.approx(np.mean(logits.argmax(1) == T))


def test_the_layer_is_an_isometry_and_a_translation():
    variables = official()
    variables["params"]["orthogonal"]["generator"] = jnp.asarray(RNG.normal(size=(7, 7)), jnp.float32)
    out = {k: np.asarray(v) for k, v in NET.apply(variables, BATCH["x"]).items()}
    turned = out["h_perp"] - GOLDEN["bias"]
    np.testing.assert_allclose(np.linalg.norm(turned, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(unit(turned) @ unit(turned).T, out["h_new"] @ out["h_new"].T, atol=1e-5)
    assert np.abs(turned - out["h_new"]).max() > 0.1
    plain, folded = oca.fold(NET, {**variables, "batch_stats": {"m": 1}})
    np.testing.assert_allclose(plain.apply(folded, BATCH["x"])["logits"], out["logits"], atol=1e-5)
    np.testing.assert_allclose(plain.apply(folded, BATCH["x"])["h_new"], out["h_new"], atol=1e-6)
    assert set(folded) == {"params", "batch_stats"} and "orthogonal" not in folded["params"]
    bare = oca.ExpandedEmbedding(Same(), 4, 3, 5, use_bias=False)
    own = bare.init(jax.random.key(0), BATCH["x"])
    assert set(own["params"]["orthogonal"]) == {"generator"}
    plain, folded = oca.fold(bare, own)
    np.testing.assert_allclose(
        plain.apply(folded, BATCH["x"])["logits"], bare.apply(own, BATCH["x"])["logits"], atol=1e-5
    )


def test_alignment_leaves_the_extra_coordinates_alone():
    objective, variables = oca.oca(NET, P, (0.0, 10.0, 5.0)), official()
    grad = jax.grad(lambda u: reduce_mean(run(objective, variables, {**BATCH, "x": u})[1].elements))(BATCH["x"])
    np.testing.assert_allclose(grad[:, 4:], 0, atol=1e-6)  # before normalisation
    assert np.abs(np.asarray(grad[:, :4])).max() > 0.1

    def after(h):
        outputs = {"h_bct": h[:, :4], "h_new": h, "logits": jnp.zeros((6, 5))}
        known = CONTEXT.replace(collections=variables)
        return reduce_mean(objective.loss(outputs, BATCH, known).elements)

    after_grad = np.asarray(jax.grad(after)(jnp.asarray(GOLDEN["h_new"])))
    assert not after_grad[:, 4:].any() and after_grad[:, :4].any()


def test_prototypes_are_constants():
    objective = oca.oca(NET, P)
    variables = objective.init(jax.random.key(0), BATCH)
    np.testing.assert_array_equal(variables["constants"]["prototypes"], P)
    assert "prototypes" not in variables["params"]
    value = lambda c: reduce_mean(  # noqa: E731
        run(objective, {**variables, "constants": {**variables["constants"], "prototypes": c}})[1].elements
    )
    assert not np.asarray(jax.grad(value)(P)).any()


@pytest.mark.parametrize("which", ["oca", "bct"])
def test_padding_changes_nothing(which):
    if which == "oca":
        objective = oca.oca(NET, P)
    else:
        objective = oca.bct(oca.PlainEmbedding(Same(), 7, 5), jnp.ones((5, 7)).at[2, 1].set(3.0))
    variables = objective.init(jax.random.key(0), BATCH)
    padded = {**BATCH, "mask": jnp.arange(6) < 4, "label": BATCH["label"].at[4:].set(99)}
    (_, long), (_, short) = (
        run(objective, variables, padded),
        run(objective, variables, batch_of(GOLDEN["u"][:4], T[:4])),
    )
    np.testing.assert_allclose(long.elements.values[:4], short.elements.values, atol=1e-5)
    assert not np.asarray(long.elements.values[4:]).any()
    for name, value in short.metrics.items():
        assert float(long.metrics[name]) == pytest.approx(float(value), abs=1e-5), name


def test_bct_is_two_cross_entropies_on_one_embedding():
    net = oca.PlainEmbedding(Same(), 7, 5)
    p = jnp.asarray(RNG.normal(size=(5, 7)), jnp.float32)
    objective = oca.bct(net, p)
    variables = objective.init(jax.random.key(0), BATCH)
    assert set(variables["params"]) == {"classifier"} and "bias" not in variables["params"]["classifier"]
    _, loss = run(objective, variables)
    h, w = unit(GOLDEN["u"].astype(np.float64)), np.asarray(variables["params"]["classifier"]["kernel"], np.float64)
    expected = loop_ce(h @ w, T, 0.1) + 10 * loop_ce(h @ np.asarray(p, np.float64).T, T, 0.1)
    np.testing.assert_allclose(loss.elements.values, expected, atol=2e-5)
    _, weak = run(oca.bct(net, p, alpha=0.5, smoothing=0.0), variables)
    expected = loop_ce(h @ w, T, 0.0) + 0.5 * loop_ce(h @ np.asarray(p, np.float64).T, T, 0.0)
    np.testing.assert_allclose(weak.elements.values, expected, atol=2e-5)


def test_an_independent_model_is_smoothed_cross_entropy():
    net = oca.PlainEmbedding(MLP((6,), 9), 4, 5)
    objective = oca.classification(net)
    variables = objective.init(jax.random.key(0), BATCH)
    assert variables["params"]["head"]["fc"]["kernel"].shape == (9, 4)
    outputs, loss = run(objective, variables)
    np.testing.assert_allclose(np.linalg.norm(outputs["embedding"], axis=1), 1, atol=1e-6)
    logits = np.asarray(outputs["embedding"], np.float64) @ np.asarray(variables["params"]["classifier"]["kernel"])
    np.testing.assert_allclose(loss.elements.values, loop_ce(logits, T, 0.1), atol=1e-5)
    np.testing.assert_array_equal(oca.frame(variables), variables["params"]["classifier"]["kernel"])


MIXED = BasisTransformation(Same(), 4, 5, 3, 5)


class Fixed(nn.Module):
    """A model whose features are given."""

    name_of: str = ""

    @nn.compact
    def __call__(self, x, classify=True):
        return self.variable("params", "features", lambda: None).value


def mixed_variables():
    g = {k[4:]: jnp.asarray(v) for k, v in GOLDEN.items() if k.startswith("bt2_")}
    params = {
        "old_branch": {"kernel": g["fc3"].T, "bias": g["fc3_bias"]},
        "orthogonal": {"generator": jnp.zeros((5, 5))},
        "orthogonal_old": {"generator": jnp.zeros((4, 4))},
        "classifier": {"kernel": g["W"].T},
    }
    constants = {"orthogonal": {"base": g["Qp"]}, "orthogonal_old": {"base": g["Qo"]}, "prototypes": P}
    teachers = {k: {"params": {"features": 3 * g[k]}} for k in ("old", "new")}
    return g, {"params": params, "constants": {**constants, **teachers}}


def test_bt2_is_the_released_one():
    g, variables = mixed_variables()
    objective = oca.bt2(MIXED, P, Fixed(), variables["constants"]["old"], Fixed(), variables["constants"]["new"])
    batch = batch_of(GOLDEN["bt2_u"])
    outputs, loss = run(objective, variables, batch)
    for name in ("h_new", "h_bct", "h_free", "logits"):
        np.testing.assert_allclose(outputs[name], g[name], atol=1e-5, err_msg=name)
    assert float(reduce_mean(loss.elements)) == pytest.approx(float(GOLDEN["bt2_loss"]), abs=1e-4)
    value = lambda u: reduce_mean(run(objective, variables, {**batch, "x": u})[1].elements)  # noqa: E731
    np.testing.assert_allclose(jax.grad(value)(batch["x"]), GOLDEN["bt2_grad_u"], atol=2e-5)
    kept = oca.feature_variables(variables)
    assert set(kept["constants"]) == {"orthogonal", "orthogonal_old"} and "classifier" not in kept["params"]
    np.testing.assert_allclose(MIXED.apply(kept, batch["x"], classify=False), g["h_new"], atol=1e-5)


def test_bt2_sizes():
    for extra, features in ((5, 5), (0, 5), (1, 2)):
        with pytest.raises(ValueError, match=rf"extra must lie in 1..4 and features \+ extra reach it, got {extra}"):
            BasisTransformation(Same(), 4, features, extra, 5).init(jax.random.key(0), jnp.ones((1, features + 4)))


def test_truncation_is_the_whole_interface():
    q, g, labels = (jnp.asarray(GOLDEN[k]) for k in ("query", "gallery", "labels"))
    cut, kept = oca.truncate_to_common_dim(q, g)
    assert cut.shape == kept.shape == (40, 4)
    np.testing.assert_allclose(1 - cut @ kept.T, GOLDEN["distance"], atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(cut, axis=1), 1, atol=1e-6)
    other, same = oca.truncate_to_common_dim(g, q)
    np.testing.assert_array_equal(other, kept)
    np.testing.assert_array_equal(same, cut)
    curve = cmc_curve(cut, labels, kept, labels, most=5, same_items=True)
    np.testing.assert_allclose(curve, GOLDEN["cmc"], atol=1e-6)
    found = retrieval_metrics(cut, labels, kept, labels, ks=(1, 5), same_items=True)
    assert float(found["map"]) == pytest.approx(float(GOLDEN["map"]), abs=1e-5)
    assert float(found["recall@5"]) == pytest.approx(float(GOLDEN["cmc"][4]), abs=1e-6)


def test_galleries_end_where_a_block_ends():
    for features in (128, 160, 200):
        oca.check_gallery(features, (128, 160), "v1")
    with pytest.raises(ValueError, match="the gallery made by v1 holds 140-d vectors, but the query model's compatible "
                                         "blocks end at 128, 160; extract it again"):  # fmt: skip
        oca.check_gallery(140, (128, 160), "v1")
    with pytest.raises(ValueError, match="made by its model holds 64-d"):
        oca.check_gallery(64, (128, 160))


def test_old_models_of_another_size():
    oca.check_old_features(128, 128)
    with pytest.raises(ValueError, match="old model yields 64-d features, expected 128"):
        oca.check_old_features(64, 128)
    with pytest.raises(ValueError, match="old model yields 3-d features, expected 4"):
        oca.oca(NET, jnp.ones((5, 3)))
    with pytest.raises(ValueError, match="old model yields 4-d features, expected 7"):
        oca.bct(oca.PlainEmbedding(Same(), 7, 5), P)
    with pytest.raises(ValueError, match="4 prototypes for 5 classes of the new training set"):
        oca.oca(NET, P[:4])
    with pytest.raises(ValueError, match="old model yields 3-d features, expected 4"):
        oca.bt2(MIXED, jnp.ones((5, 3)), Fixed(), {}, Fixed(), {})


def test_the_plug_in_adds_alignment_to_any_host():
    net = oca.ExpandedEmbedding(Same(), 4, 3, 5)
    host, plug = oca.classification(net), oca.prototype_alignment(P, weight=5.0)
    check_fit(plug, host)
    variables = official()
    outputs, loss = run(host, variables)
    known = CONTEXT.replace(outputs=outputs, batch=BATCH, collections=variables)
    state = plug.init(6)
    found, kept, _ = total_loss(loss, plug, state, known, host.reduce)
    assert float(found) == pytest.approx(float(GOLDEN["oca_losses"][0]), abs=1e-4)
    np.testing.assert_array_equal(kept, P)
    padded = {**BATCH, "mask": jnp.arange(6) < 4, "label": BATCH["label"].at[4:].set(99)}
    e, _ = plug.update(run(host, variables, padded)[1].elements, state, known.replace(batch=padded))
    assert not np.asarray(e.values[4:]).any() and np.isfinite(np.asarray(e.values)).all()
    wide = oca.prototype_alignment(jnp.ones((5, 8)))
    with pytest.raises(ValueError, match=r"old model yields 8-d features, the host's embedding has shape \[6, 7\]"):
        wide.update(loss.elements, wide.init(6), known)


def test_the_plug_in_refuses_hosts_that_do_not_classify():
    with pytest.raises(CompositionError, match="'logits'"):
        check_fit(oca.prototype_alignment(P), metric_learning(MLP((), 4), pairs.triplet))
    bare = oca.classification(NET)
    other = type(bare)(bare.init, bare.forward, bare.loss, provides=("logits", "label"), name="bare")
    with pytest.raises(CompositionError, match="embedding"):
        check_fit(oca.prototype_alignment(P), other)
