"""Dynamic subspace learners against hand cases, loops written from the definition and the released code's numbers."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.base import Context, total_loss
from zoo.nn.resnet import ResNet, ResNetConfig
from zoo.representation import dynamic_subspace as ds

GOLD = np.load(Path(__file__).resolve().parents[2] / "golden" / "dynamic_subspace_official.npz")
OWNER = jnp.asarray([0, 0, 0, 1, 1, 1, 1, 2])


def test_each_group_has_unit_length_and_one_group_is_plain_l2():
    x = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)
    got = np.asarray(ds.grouped_l2_normalize(jnp.asarray(x), OWNER, 3))
    for g in range(3):
        own = np.asarray(OWNER) == g
        want = x[:, own] / np.linalg.norm(x[:, own], axis=1, keepdims=True)
        np.testing.assert_allclose(got[:, own], want, rtol=1e-5)
    whole = ds.grouped_l2_normalize(jnp.asarray(x), jnp.zeros(8, jnp.int32))
    np.testing.assert_allclose(whole, x / np.linalg.norm(x, axis=1, keepdims=True), rtol=1e-5)
    grad = jax.grad(lambda v: jnp.sum(ds.grouped_l2_normalize(v, OWNER)))(jnp.zeros((2, 8)))
    assert np.isfinite(grad).all()


def test_the_active_slice():
    x = jnp.arange(1.0, 9.0)[None, :]
    one = np.asarray(ds.active_slice(x, OWNER, jnp.int32(1)))[0]
    np.testing.assert_allclose(one, np.array([0, 0, 0, 4, 5, 6, 7, 0]) / np.sqrt(126), rtol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(ds.active_slice(x, OWNER, jnp.int32(-1))), 1.0, rtol=1e-6)
    assert (np.asarray(ds.active_slice(x, OWNER, jnp.int32(-1))) > 0).all()


@pytest.mark.parametrize(("features", "learners", "sizes"), [(32, 4, [8] * 4), (10, 4, [3, 3, 3, 1]), (7, 1, [7])])
def test_equal_slices_are_rounded_up_and_the_last_is_shorter(features, learners, sizes):
    assert np.bincount(np.asarray(ds.equal_slices(features, learners))).tolist() == sizes


@pytest.mark.parametrize(("features", "learners"), [(4, 5), (8, 0), (10, 6)])
def test_slices_without_neurons_are_refused(features, learners):
    with pytest.raises(ValueError, match="cannot make"):
        ds.equal_slices(features, learners)


def state_of(owner, importance, count):
    state = ds.init_state(jnp.asarray(owner))
    return {**state, "importance": jnp.asarray(importance, jnp.float32), "count": jnp.float32(count)}


def test_importance_is_summed_over_batches_and_scored_as_released():
    owner = jnp.asarray([0] * 3 + [1] * 9)
    state, mask = ds.init_state(owner), jnp.ones(8, bool)
    assert int(state["learners"]) == 2
    act, grad = GOLD["act"], GOLD["grad"]
    state = ds.taylor_importance(state, jnp.asarray(act[:8]), jnp.asarray(grad[:8]), mask)
    padded = np.concatenate([act[8:], 9 * np.ones((2, 12), np.float32)])
    more = np.concatenate([grad[8:], np.ones((2, 12), np.float32)])
    state = ds.taylor_importance(state, jnp.asarray(padded), jnp.asarray(more), jnp.arange(14) < 12)
    assert float(state["count"]) == 20
    np.testing.assert_allclose(ds.importance_scores(state), GOLD["scores"], atol=1e-5)
    scores = np.asarray(ds.importance_scores(state_of([0, 1, 1, 1], [9.0, -4.0, 2.0, 1.0], 2)))
    np.testing.assert_allclose(scores, [0, 1, 1 / 3, 0], atol=1e-6)


def test_equal_importances_split_nothing():
    scores = ds.importance_scores(state_of([0] * 12, [2.0] * 12, 4))
    assert (np.asarray(scores) == 0).all()
    params = {"kernel": jnp.ones((3, 12)), "bias": jnp.zeros(12)}
    split = ds.split_last_learner(params, jnp.zeros(12, jnp.int32), scores, jax.random.key(0))
    assert not bool(split.happened) and (np.asarray(split.params["kernel"]) == 1).all()
    assert (np.asarray(split.owner) == 0).all() and not np.asarray(split.reset).any()


def golden_split(in_place):
    params = {"kernel": jnp.asarray(GOLD["split_w"].T), "bias": jnp.asarray(GOLD["split_b"])}
    owner = jnp.asarray([0] * 4 + [1] * 12)
    scores = np.zeros(16, np.float32)
    scores[GOLD["split_new"]] = [1.0, 0.9, 0.8, 0.7, 0.6, 0.55]
    return params, ds.split_last_learner(params, owner, jnp.asarray(scores), jax.random.key(3), in_place=in_place)


def test_a_split_gathers_before_it_writes():
    params, split = golden_split(False)
    new = GOLD["split_new"]
    assert bool(split.happened)
    np.testing.assert_array_equal(split.params["kernel"][:, 4:10], params["kernel"][:, new])
    np.testing.assert_array_equal(split.params["bias"][4:10], params["bias"][new])
    np.testing.assert_array_equal(split.params["kernel"][:, :4], params["kernel"][:, :4])
    np.testing.assert_array_equal(split.owner, [0] * 4 + [1] * 6 + [2] * 6)
    np.testing.assert_array_equal(split.reset, [False] * 10 + [True] * 6)
    assert int((np.asarray(split.owner) == 1).sum()) == len(new)
    fresh = np.asarray(split.params["kernel"][:, 10:])
    assert (fresh != np.asarray(params["kernel"][:, 10:])).all()
    # drawn for a layer of as many outputs as the new learner has, not of those that the old one had
    drawn = ds.draw_neurons(jax.random.key(3), len(fresh), jnp.full(16, 6))
    np.testing.assert_allclose(fresh, drawn["kernel"][:, 10:], rtol=1e-6)
    np.testing.assert_allclose(split.params["bias"][10:], drawn["bias"][10:], rtol=1e-6)
    # moments move with their weights, new neurons have none
    moments = jnp.arange(32.0).reshape(2, 16)
    moved = np.asarray(ds.split_moments(moments, split))
    np.testing.assert_array_equal(moved[1], np.concatenate([np.arange(16, 20), 16 + new, np.zeros(6)]))


def test_the_released_copy_loop_overwrites_its_sources():
    _, split = golden_split(True)
    np.testing.assert_array_equal(split.params["kernel"][:, :10].T, GOLD["split_after_w"][:10])
    np.testing.assert_array_equal(split.params["bias"][:10], GOLD["split_after_b"][:10])
    np.testing.assert_array_equal(np.flatnonzero(split.owner == 1), GOLD["split_keep"])
    np.testing.assert_array_equal(np.flatnonzero(split.reset), GOLD["split_reset"])
    assert not np.array_equal(split.params["kernel"], golden_split(False)[1].params["kernel"])


@pytest.mark.parametrize(
    ("pool", "above", "threshold", "happens"),
    [(11, 5, 0.5, True), (10, 5, 0.5, False), (11, 4, 0.5, False), (11, 5, 0.9, False)],
)
def test_when_a_learner_is_split(pool, above, threshold, happens):
    owner = jnp.asarray([0] * (16 - pool) + [1] * pool)
    scores = np.zeros(16, np.float32)
    scores[16 - above :] = np.linspace(1, 0.6, above)
    scores[0] = 1.0  # another learner's
    scores[16 - above - 1] = 0.5  # at the threshold: not above it
    params = {"kernel": jnp.ones((3, 16)), "bias": jnp.zeros(16)}
    split = ds.split_last_learner(params, owner, jnp.asarray(scores), jax.random.key(0), threshold)
    assert bool(split.happened) == happens
    assert int((np.asarray(split.owner) == 1).sum()) == (above if happens else pool)
    assert int(np.asarray(split.reset).sum()) == (pool - above if happens else 0)


def test_new_neurons_are_xavier_normal_for_their_slice():
    drawn = ds.draw_neurons(jax.random.key(0), 400, jnp.asarray([8] * 50 + [100] * 50))
    kernel, bias = np.asarray(drawn["kernel"]), np.asarray(drawn["bias"])
    assert kernel[:, :50].std() == pytest.approx(np.sqrt(2 / 408), rel=0.03)
    assert kernel[:, 50:].std() == pytest.approx(np.sqrt(2 / 500), rel=0.03)
    assert np.abs(bias).max() <= 0.05 and np.abs(bias).max() > 0.045 and bias.min() < -0.03


def test_matching_restores_relabelled_clusters():
    rng = np.random.default_rng(0)
    previous = jnp.asarray(rng.integers(0, 4, 50))
    renamed = jnp.asarray([2, 0, 3, 1])[previous]
    np.testing.assert_array_equal(ds.match_clusters(previous, renamed, 4), previous)
    # points in no cluster stay so, and do not count
    gone = renamed.at[:5].set(-1)
    got = np.asarray(ds.match_clusters(previous.at[10:12].set(-1), gone, 4))
    assert (got[:5] == -1).all() and (got[5:] == np.asarray(previous)[5:]).all()
    # a cluster more than before: the new name is the unused one
    split = jnp.asarray([0, 0, 0, 1, 1, 2, 2, 2])
    np.testing.assert_array_equal(
        ds.match_clusters(jnp.asarray([1, 1, 1, 0, 0, 0, 0, 0]), split, 3), [1, 1, 1, 2, 2, 0, 0, 0]
    )


def test_three_clusters_in_a_cycle_where_the_released_code_applies_the_inverse():
    got = np.asarray(ds.match_clusters(jnp.asarray(GOLD["prev"]), jnp.asarray(GOLD["cur"]), 3))
    assert (got == GOLD["prev"]).mean() > 0.85
    assert (GOLD["reassigned"] == GOLD["prev"]).mean() < 0.2
    two = ds.match_clusters(jnp.asarray(GOLD["prev2"]), jnp.asarray(GOLD["cur2"]), 2)
    np.testing.assert_array_equal(two, GOLD["reassigned2"])


def test_single_members_of_a_class_leave_their_cluster():
    clusters = jnp.asarray([0, 0, 0, 1, 1, -1, 1])
    labels = jnp.asarray([2, 2, 1, 2, 0, 0, 0])
    np.testing.assert_array_equal(ds.drop_singletons(clusters, labels, 2, 3), [0, 0, -1, -1, 1, -1, 1])


def test_decisions_after_epochs():
    state = ds.init_state(jnp.zeros(4, jnp.int32))
    when = []
    for metric in (0.3, 0.5, 0.5, 0.4, 0.2, 0.6):
        state = ds.after_epoch(state, metric)
        when.append(bool(ds.should_split(state, patience=2, end=5)))
        state = ds.next_epoch(state)
    # best at epoch 1 (an equal value later is not better); tried at 3 and 4; epoch 5 has ended it, and is a new best
    assert when == [False, False, False, True, True, False]
    assert int(state["best_epoch"]) == 5 and float(state["best"]) == pytest.approx(0.6) and int(state["epoch"]) == 6
    assert not bool(ds.should_split({**ds.init_state(jnp.zeros(4, jnp.int32)), "best_epoch": jnp.int32(-5)}, 2, 9))


def test_a_split_stops_exploring_until_the_metric_improves():
    params, owner = {"kernel": jnp.ones((3, 12)), "bias": jnp.zeros(12)}, jnp.zeros(12, jnp.int32)
    state = {**ds.init_state(owner), "epoch": jnp.int32(9), "best": jnp.float32(0.5), "best_epoch": jnp.int32(2)}
    state = {**state, "importance": jnp.ones(12), "count": jnp.float32(3), "without_negatives": jnp.int32(2)}
    split = ds.split_last_learner(params, owner, jnp.linspace(0, 1, 12), jax.random.key(0))
    after = ds.next_epoch(state, split)
    assert int(after["learners"]) == 2 and not bool(after["explore"]) and int(after["epoch"]) == 10
    assert float(after["count"]) == 0 and (np.asarray(after["importance"]) == 0).all()
    assert int(after["without_negatives"]) == 2 and int(np.asarray(after["owner"]).sum()) == 6
    assert not bool(ds.should_split(ds.after_epoch(after, 0.4), 2, 50))
    assert bool(ds.after_epoch(after, 0.7)["explore"])
    none = ds.next_epoch(state, split._replace(happened=jnp.asarray(False), owner=owner))
    assert int(none["learners"]) == 1 and bool(none["explore"])


ENCODER = ds.SubspaceEncoder(ds.ConvTrunk((4, 8)), 8)
HOST = ds.subspace_learning(ENCODER, 2, 4, cutoff=0.1)
BATCH = {
    "x": jnp.asarray(np.random.default_rng(3).normal(size=(8, 8, 8, 3)), jnp.float32),
    "label": jnp.asarray([0, 0, 0, 0, 1, 1, 1, 1]),
    "learner": jnp.ones(8, jnp.int32),
    "index": jnp.arange(8),
    "mask": jnp.ones(8, bool),
    "row": jnp.arange(8),
}
CONTEXT = Context(rng=jax.random.key(0))


def value(variables, batch, params=None):
    outputs, _ = HOST.forward({**variables, "params": params or variables["params"]}, batch, CONTEXT)
    known = CONTEXT.replace(collections=variables)
    return total_loss(HOST.loss(outputs, batch, known), None, (), known, HOST.reduce)[0], outputs


def test_only_the_active_learner_is_trained_and_only_its_importance_grows():
    variables = HOST.init(jax.random.key(1), BATCH)
    step = jax.jit(lambda b: jax.grad(lambda p: value(variables, b, p)[0])(variables["params"]))
    after = jax.jit(lambda b: HOST.after_step(variables, value(variables, b)[1], b, CONTEXT)["subspace"])
    for learner, quiet in ((1, slice(0, 4)), (0, slice(4, 8))):
        batch = {**BATCH, "learner": jnp.full(8, learner)}
        grads, state = step(batch), after(batch)
        assert (np.asarray(grads["embedding"]["kernel"])[:, quiet] == 0).all()
        assert float(jnp.abs(grads["embedding"]["kernel"]).max()) > 0
        assert float(jnp.abs(grads["attention"]["conv1"]["kernel"]).max()) > 0
        assert (np.asarray(state["importance"])[quiet] == 0).all() and float(state["count"]) == 8
        assert float(jnp.abs(state["importance"]).max()) > 0
    whole = step({**BATCH, "learner": jnp.full(8, -1)})
    assert (np.abs(np.asarray(whole["embedding"]["kernel"])).max(0) > 0).all()
    # padding: the learner is that of the real rows, and a batch of one class teaches nothing but is counted
    one = {**BATCH, "mask": jnp.arange(8) < 4, "learner": jnp.asarray([0] * 4 + [1] * 4)}
    assert float(value(variables, one)[0]) == 0
    assert all(float(jnp.abs(g).max()) == 0 for g in jax.tree.leaves(step(one)))
    state = after(one)
    assert int(state["without_negatives"]) == 1 and float(state["count"]) == 4


def test_a_padded_row_does_not_choose_the_learner():
    variables = HOST.init(jax.random.key(1), BATCH)
    batch = {**BATCH, "mask": jnp.arange(8) < 7, "learner": jnp.zeros(8, jnp.int32)}
    padded = {**batch, "learner": jnp.asarray([0] * 7 + [1])}
    other = {**batch, "learner": jnp.ones(8, jnp.int32)}
    found = [float(value(variables, b)[0]) for b in (batch, padded, other)]
    assert found[0] == found[1] != found[2]


def test_the_importance_is_activation_times_gradient_of_the_loss():
    variables = HOST.init(jax.random.key(1), BATCH)
    loss, outputs = value(variables, BATCH)
    x = np.asarray(outputs["embedding"], np.float64)

    def of(x):
        known = CONTEXT.replace(collections=variables)
        found = HOST.loss({"embedding": jnp.asarray(x, jnp.float32)}, BATCH, known)
        return float(total_loss(found, None, (), known, HOST.reduce)[0])

    assert of(x) == pytest.approx(float(loss), rel=1e-5) and of(x) > 0
    got = np.asarray(HOST.after_step(variables, outputs, BATCH, CONTEXT)["subspace"]["importance"])
    for j in (4, 6):
        want = 0.0
        for i in range(8):
            up, down = x.copy(), x.copy()
            up[i, j] += 1e-2
            down[i, j] -= 1e-2
            want += x[i, j] * (of(up) - of(down)) / 2e-2
        assert got[j] == pytest.approx(want, abs=2e-3)


def test_evaluation_gives_normalised_outputs_and_the_export_is_the_same_embedding():
    variables = HOST.init(jax.random.key(1), BATCH)
    out, mutated = HOST.forward(variables, {"x": BATCH["x"]}, CONTEXT.replace(train=False))
    assert not mutated and out["map"].shape == (8, 2, 2, 1)
    np.testing.assert_allclose(jnp.linalg.norm(out["pooled"], axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(jnp.linalg.norm(out["embedding"][:, 4:], axis=1), 1, rtol=1e-5)
    exported = ENCODER.clone(owner=(0, 0, 0, 0, 1, 1, 1, 1))
    np.testing.assert_allclose(exported.apply({"params": variables["params"]}, BATCH["x"]), out["embedding"], atol=1e-6)
    plain = ds.SubspaceEncoder(ds.ConvTrunk((4, 8)), 8, attention=False, only="pooled")
    made = plain.init(jax.random.key(0), BATCH["x"])
    assert set(made["params"]) == {"trunk"} and plain.apply(made, BATCH["x"]).shape == (8, 8)


def test_dropout_acts_in_training_only():
    encoder = ds.SubspaceEncoder(ds.ConvTrunk((4, 8)), 8, dropout=0.5)
    variables = encoder.init(jax.random.key(0), BATCH["x"])
    keys = jax.random.split(jax.random.key(1), 8)
    quiet, loud = encoder.apply(variables, BATCH["x"]), encoder.apply(variables, BATCH["x"], keys)
    np.testing.assert_array_equal(quiet["pooled"], loud["pooled"])
    assert not np.allclose(quiet["embedding"], loud["embedding"])


def test_batch_statistics_of_a_residual_trunk_are_frozen():
    trunk = ResNet(ResNetConfig((1,), (4,), stem_width=4))
    host = ds.subspace_learning(ds.SubspaceEncoder(trunk, 8), 1, 4)
    variables = host.init(jax.random.key(0), BATCH)
    _, mutated = host.forward(variables, BATCH, CONTEXT)
    for a, b in zip(jax.tree.leaves(mutated), jax.tree.leaves(variables["batch_stats"]), strict=True):
        np.testing.assert_array_equal(a, b)


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="per_class must be at least 2, got 1: an anchor needs a positive"):
        ds.subspace_learning(ENCODER, 1, 1)
    with pytest.raises(ValueError, match="8 neurons cannot make 9 slices"):
        ds.subspace_learning(ENCODER, 9)
