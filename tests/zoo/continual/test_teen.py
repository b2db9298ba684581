"""teen against its definition, the released code, and the limits its brief names."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data.fewshot import prototype_mixtures
from trainers.recipes.continual import teen as recipe
from zoo.base import Context
from zoo.continual import teen
from zoo.metrics.continual import (
    confusion_matrix,
    continual_summary,
    harmonic_mean,
    performance_drop,
    session_metrics,
    task_matrix,
)
from zoo.nn.mlp import MLP
from zoo.ops.prototypes import class_means, cosine_logits, l2_normalize

GOLDEN = np.load(Path(__file__).resolve().parents[2] / "golden" / "teen_official.npz")


def unit(x):
    return x / np.sqrt(np.sum(x * x))


def reference(base, new, shift, tau):
    """The definition, one class and one prototype at a time, in float64."""
    rows = []
    for raw in np.asarray(new, np.float64):
        c = unit(raw)
        similarity = [tau * float(np.dot(c, unit(b))) for b in np.asarray(base, np.float64)]
        top = max(similarity)
        weights = [np.exp(s - top) for s in similarity]
        total = sum(weights)
        direction = np.zeros_like(c)
        for w, b in zip(weights, np.asarray(base, np.float64), strict=True):
            direction += w / total * unit(b)
        rows.append((1 - shift) * c + shift * unit(direction))
    return np.array(rows)


@pytest.fixture(scope="module")
def protos():
    rng = np.random.default_rng(3)
    return rng.normal(size=(7, 5)).astype(np.float32) * 3, rng.normal(size=(4, 5)).astype(np.float32) * 2


@pytest.mark.parametrize(("shift", "tau"), [(0.5, 16.0), (0.1, 4.0), (0.9, 0.5)])
def test_calibration_equals_the_definition(protos, shift, tau):
    base, new = protos
    found = teen.calibrate_prototypes(jnp.asarray(base), jnp.asarray(new), shift, tau)
    np.testing.assert_allclose(found, reference(base, new, shift, tau), atol=1e-5)


def test_the_hand_computed_case():
    base, new = jnp.array([[1.0, 0.0], [0.0, 1.0]]), jnp.array([[1.0, 0.0]])
    direction = teen.calibration_direction(base, new, float(np.log(3)))
    np.testing.assert_allclose(direction, [[0.9487, 0.3162]], atol=1e-4)
    found = teen.calibrate_prototypes(base, new, 0.5, float(np.log(3)))
    np.testing.assert_allclose(found, [[0.9743, 0.1581]], atol=1e-4)


def test_released_code_gives_the_same_classifier():
    capacity = 16
    bank = teen.base_bank(jnp.asarray(GOLDEN["base"]), jnp.arange(10), 10, capacity)
    for s in (1, 2):
        features, labels = jnp.asarray(GOLDEN[f"features{s}"]), jnp.asarray(GOLDEN[f"labels{s}"])
        bank = teen.add_session(bank, features, labels, float(GOLDEN["shift_weight"]), float(GOLDEN["softmax_t"]))
        np.testing.assert_allclose(bank.weights[: 10 + 3 * s], GOLDEN[f"weights{s}"], atol=1e-5)
        np.testing.assert_array_equal(bank.weights[10 + 3 * s :], 0)
    logits = cosine_logits(jnp.asarray(GOLDEN["queries"]), bank.weights, 16.0)
    np.testing.assert_allclose(logits, GOLDEN["logits"], atol=2e-5)
    np.testing.assert_array_equal(teen.classify(bank, jnp.asarray(GOLDEN["queries"])), GOLDEN["logits"].argmax(1))


def test_limits(protos):
    base, new = map(jnp.asarray, protos)
    np.testing.assert_allclose(teen.calibrate_prototypes(base, new, 0.0, 16.0), l2_normalize(new), atol=1e-6)
    direction = teen.calibration_direction(base, new, 16.0)
    np.testing.assert_allclose(teen.calibrate_prototypes(base, new, 1.0, 16.0), direction, atol=1e-6)
    np.testing.assert_allclose(jnp.linalg.norm(direction, axis=1), 1.0, atol=1e-5)
    # one base class: its direction, whatever tau
    for tau in (0.0, 5.0):
        alone = teen.calibration_direction(base[:1], new, tau)
        np.testing.assert_allclose(alone, np.tile(l2_normalize(base[:1]), (4, 1)), atol=1e-5)
    # tau = 0: the same mean direction for all; tau large: the nearest base prototype
    mean = l2_normalize(l2_normalize(base).sum(0)[None])
    np.testing.assert_allclose(teen.calibration_direction(base, new, 0.0), np.tile(mean, (4, 1)), atol=1e-5)
    nearest = jnp.argmax(l2_normalize(new) @ l2_normalize(base).T, axis=1)
    np.testing.assert_allclose(teen.calibration_direction(base, new, 1e4), l2_normalize(base)[nearest], atol=1e-4)


def test_rows_are_independent_scale_free_and_rotate_with_the_space(protos):
    base, new = map(jnp.asarray, protos)
    whole = teen.calibrate_prototypes(base, new)
    for i in range(len(new)):
        np.testing.assert_allclose(teen.calibrate_prototypes(base, new[i : i + 1])[0], whole[i], atol=1e-6)
    scaled = teen.calibrate_prototypes(base * jnp.arange(1, 8)[:, None], new * 0.01)
    np.testing.assert_allclose(scaled, whole, atol=1e-5)
    q, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(5, 5)))
    turn = jnp.asarray(q, jnp.float32)
    np.testing.assert_allclose(teen.calibrate_prototypes(base @ turn, new @ turn), whole @ turn, atol=1e-5)


def test_masked_base_rows_have_no_influence(protos):
    base, new = map(jnp.asarray, protos)
    mask = jnp.arange(7) < 4
    masked = teen.calibrate_prototypes(base, new, 0.5, 3.0, mask)
    np.testing.assert_allclose(masked, teen.calibrate_prototypes(base[:4], new, 0.5, 3.0), atol=1e-6)


def test_calibration_is_differentiable_and_vmaps(protos):
    base, new = map(jnp.asarray, protos)
    grad = jax.grad(lambda s: teen.calibration_direction(base, new, s)[0, 0])(2.0)
    eps = 1e-2
    lower, upper = (teen.calibration_direction(base, new, 2.0 + e)[0, 0] for e in (-eps, eps))
    assert float(grad) == pytest.approx(float(upper - lower) / (2 * eps), rel=2e-2)
    many = jax.vmap(lambda t: teen.calibrate_prototypes(base, new, 0.5, t))(jnp.array([0.0, 16.0]))
    np.testing.assert_allclose(many[1], teen.calibrate_prototypes(base, new, 0.5, 16.0), atol=1e-6)


def test_class_means_are_means_of_real_unnormalised_rows():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(9, 3)).astype(np.float32), np.array([0, 1, 1, 4, 0, 9, -1, 1, 4], np.int32)
    valid = np.array([1, 1, 1, 1, 1, 1, 1, 0, 1], bool)
    means, counts = class_means(jnp.asarray(x), jnp.asarray(y), 5, jnp.asarray(valid))
    for c in range(5):
        rows = [x[i] for i in range(9) if y[i] == c and valid[i]]
        assert int(counts[c]) == len(rows)
        np.testing.assert_allclose(means[c], np.mean(rows, 0) if rows else np.zeros(3), atol=1e-6)


def test_l2_normalize_is_safe_at_zero():
    assert np.all(np.isfinite(jax.grad(lambda x: l2_normalize(x).sum())(jnp.zeros((2, 3)))))
    np.testing.assert_allclose(l2_normalize(jnp.array([[3.0, 4.0]])), [[0.6, 0.8]], atol=1e-6)


def test_sessions_write_novel_rows_once_and_never_touch_base_rows():
    rng = np.random.default_rng(2)
    features = jnp.asarray(rng.normal(size=(12, 6)), jnp.float32)
    labels = jnp.asarray(np.tile(np.arange(3), 4), jnp.int32)
    bank = teen.base_bank(features, labels, 3, 8)
    means, _ = class_means(features, labels, 3)
    np.testing.assert_allclose(bank.weights[:3], means, atol=1e-6)
    assert bank.is_base.tolist() == [True] * 3 + [False] * 5 == bank.is_seen.tolist()
    shots, their = jnp.asarray(rng.normal(size=(4, 6)), jnp.float32), jnp.array([3, 3, 4, 4])
    one = teen.add_session(bank, shots, their, 0.5, 8.0)
    np.testing.assert_array_equal(one.weights[:3], bank.weights[:3])
    expected = reference(bank.weights[:3], [shots[:2].mean(0), shots[2:].mean(0)], 0.5, 8.0)
    np.testing.assert_allclose(one.weights[3:5], expected, atol=1e-5)
    assert one.is_seen.tolist() == [True] * 5 + [False] * 3
    assert one.is_base.tolist() == bank.is_base.tolist()
    # a later session neither changes earlier novel rows nor is changed by them
    later, labels5 = jnp.asarray(rng.normal(size=(2, 6)), jnp.float32), jnp.array([5, 3])
    two = teen.add_session(one, later, labels5, 0.5, 8.0)
    np.testing.assert_array_equal(two.weights[:5], one.weights[:5])
    np.testing.assert_allclose(two.weights[5], reference(bank.weights[:3], later[:1], 0.5, 8.0)[0], atol=1e-5)
    # padding does not count
    padded = teen.add_session(
        bank, jnp.concatenate([shots, 100 + shots]), jnp.concatenate([their, their]), 0.5, 8.0, jnp.arange(8) < 4
    )
    np.testing.assert_allclose(padded.weights, one.weights, atol=1e-6)


def test_sessions_share_one_compiled_function():
    add = jax.jit(lambda bank, x, y: teen.add_session(bank, x, y, 0.5, 16.0))
    bank = teen.base_bank(jnp.eye(4), jnp.arange(4) % 2, 2, 6)
    for classes in ([2, 3], [4, 5]):
        bank = add(bank, jnp.eye(4)[:2] + 0.1, jnp.array(classes))
    assert add._cache_size() == 1
    assert bank.is_seen.all()


def test_unseen_classes_are_never_predicted():
    bank = teen.base_bank(jnp.eye(4)[:2], jnp.arange(2), 2, 4)
    bank = bank.replace(weights=bank.weights.at[3].set(jnp.array([0.0, 0.0, 0.0, 1.0])))
    assert teen.classify(bank, jnp.eye(4)[3:] + 0.01 * jnp.eye(4)[1:2]).tolist() == [1]


def small_network(base=3, capacity=5):
    network = teen.CosineNetwork(MLP((8,), 6), capacity, 7.0)
    rng = np.random.default_rng(4)
    batch = {
        "x": jnp.asarray(rng.normal(size=(6, 4)), jnp.float32),
        "label": jnp.array([0, 1, 2, 0, 1, 4]),
        "index": jnp.arange(6),
        "mask": jnp.arange(6) < 5,
    }
    objective = teen.base_session(network, base)
    return objective, objective.init(jax.random.key(0), batch), batch


def test_base_session_is_softmax_over_base_columns_of_scaled_cosines():
    objective, variables, batch = small_network()
    context = Context(rng=jax.random.key(1))

    def loss(params):
        outputs, _ = objective.forward({"params": params}, batch, context)
        return objective.loss(outputs, batch, context)

    found = loss(variables["params"])
    p = jax.tree.map(np.asarray, variables["params"])
    layers = p["features"]
    hidden = np.maximum(np.asarray(batch["x"]) @ layers["hidden1"]["kernel"] + layers["hidden1"]["bias"], 0)
    features = hidden @ layers["out"]["kernel"] + layers["out"]["bias"]
    for i in range(5):
        logits = [7.0 * unit(features[i]) @ unit(p["prototypes"][k]) for k in range(3)]
        expected = np.log(np.sum(np.exp(logits))) - logits[int(batch["label"][i])]
        assert float(found.elements.values[i]) == pytest.approx(expected, rel=1e-5)
    assert float(found.elements.values[5]) == 0 and not bool(found.elements.mask[5])
    grads = jax.grad(lambda q: loss(q).elements.values.sum())(variables["params"])
    np.testing.assert_array_equal(grads["prototypes"][3:], 0)  # classes of later sessions get no gradient
    assert np.abs(grads["prototypes"][:3]).min() > 0
    correct = np.mean([np.argmax([unit(features[i]) @ unit(p["prototypes"][k]) for k in range(3)])
                       == int(batch["label"][i]) for i in range(5)])  # fmt: skip
    assert float(found.metrics["accuracy"]) == pytest.approx(correct)


def loops_metrics(predicted, labels, base, seen):
    """The metrics by loops over examples."""
    rows = [(p, y) for p, y in zip(predicted, labels, strict=True) if y < seen]
    accuracy = sum(p == y for p, y in rows) / len(rows)
    by_class = {c: [p == y for p, y in rows if y == c] for c in range(seen)}
    mean = lambda cs: float(np.mean([np.mean(by_class[c]) for c in cs if by_class[c]]))  # noqa: E731
    s, u = mean(range(base)), mean(range(base, seen))
    lost = [p < base for p, y in rows if y >= base]
    taken = [p >= base for p, y in rows if y < base]
    return accuracy, s, u, 2 * s * u / (s + u + 1e-12), np.mean(lost), np.mean(taken)


def test_session_metrics_equal_loops():
    rng = np.random.default_rng(5)
    labels, predicted = rng.integers(0, 8, 300), rng.integers(0, 6, 300)
    predicted = np.where(rng.random(300) < 0.5, np.minimum(labels, 5), predicted)
    labels[labels == 2] = 3  # a base class without test examples
    found = session_metrics(confusion_matrix(predicted, labels, 8), 4, 6)
    names = ("accuracy", "seen", "unseen", "harmonic", "novel_as_base", "base_as_novel")
    np.testing.assert_allclose([found[n] for n in names], loops_metrics(predicted, labels, 4, 6), rtol=1e-9)
    first = session_metrics(confusion_matrix(predicted, labels, 8), 4, 4)
    assert first["unseen"] == first["harmonic"] == first["novel_as_base"] == 0
    with pytest.raises(ValueError, match="no test example"):
        session_metrics(np.zeros((3, 3)), 1, 2)


def test_task_matrix_summary_by_hand():
    matrix = task_matrix({(0, 0): 0.9, (1, 0): 0.7, (1, 1): 0.8, (2, 0): 0.6, (2, 1): 0.75, (2, 2): 0.5}, 3)
    found = continual_summary(matrix)
    assert found["final"] == pytest.approx((0.6 + 0.75 + 0.5) / 3)
    assert found["incremental"] == pytest.approx((0.9 + 0.75 + (0.6 + 0.75 + 0.5) / 3) / 3)
    assert found["forgetting"] == pytest.approx(((0.9 - 0.6) + (0.8 - 0.75)) / 2)
    assert found["backward_transfer"] == pytest.approx(((0.6 - 0.9) + (0.75 - 0.8)) / 2)
    assert performance_drop(np.array([0.9, 0.75, 0.6])) == pytest.approx(0.3)
    assert harmonic_mean(0.0, 0.0) == 0
    assert harmonic_mean(0.5, 0.25) == pytest.approx(1 / 3)
    improved = task_matrix({(0, 0): 0.5, (1, 0): 0.8, (1, 1): 0.6}, 2)  # a task that got better was not forgotten
    assert continual_summary(improved)["forgetting"] == pytest.approx(-0.3)
    assert continual_summary(improved)["backward_transfer"] == pytest.approx(0.3)
    matrix[1, 0] = np.nan
    with pytest.raises(ValueError, match=r"R\[1, 0\]"):
        continual_summary(matrix)


@pytest.mark.parametrize("shift", [0.1, 0.3, 0.5])
def test_calibration_helps_where_novel_classes_mix_base_ones(shift):
    better, errors, drops = [], [], []
    for seed in range(5):
        data = prototype_mixtures(seed)
        true = jnp.asarray(data.info["prototypes"])
        bank = teen.base_bank(true[:60], jnp.arange(60), 60, 65)
        rows = {}
        for weight in (0.0, shift):
            after = teen.add_session(bank, jnp.asarray(data["shots"]["x"]), jnp.asarray(data["shots"]["label"]), weight)
            predicted = np.asarray(teen.classify(after, jnp.asarray(data["test"]["x"])))
            metrics = session_metrics(confusion_matrix(predicted, data["test"]["label"], 65), 60, 65)
            error = 1 - np.mean(np.sum(np.asarray(l2_normalize(after.weights[60:])) * np.asarray(true[60:]), 1))
            rows[weight] = (metrics["harmonic"], error, metrics["seen"])
        better.append(rows[shift][0] - rows[0.0][0])
        errors.append(rows[0.0][1] - rows[shift][1])
        drops.append(rows[0.0][2] - rows[shift][2])
    assert np.mean(better) > 0 and min(errors) > 0 and np.mean(drops) < 0.01


BANK = teen.base_bank(jnp.eye(4), jnp.arange(4) % 2, 2, 5)
SHOTS = np.eye(4, dtype=np.float32)


@pytest.mark.parametrize(
    ("features", "labels", "classes", "message"),
    [
        (SHOTS[:2], [2, 2], [2, 3], "class 3 has no shots"),
        (SHOTS[:2], [1, 2], [1, 2], "class 1 was learnt in an earlier session"),
        (SHOTS[:2], [2, 7], [2], "label 7 is outside the bank's capacity of 5"),
        (SHOTS[:2, :3], [2, 3], [2, 3], "3 dimensions, the bank 4"),
        (SHOTS[:2] * np.nan, [2, 3], [2, 3], "2 of 2 feature rows are not finite"),
    ],
)
def test_wrong_sessions_are_named(features, labels, classes, message):
    with pytest.raises(ValueError, match=message):
        teen.check_session(BANK, features, np.array(labels), classes)
    teen.check_session(BANK, SHOTS[:2], np.array([2, 3]), [2, 3])


def test_wrong_settings_are_named(protos):
    base, new = map(jnp.asarray, protos)
    with pytest.raises(ValueError, match=r"shift_weight must lie in \[0, 1\], got 1.5"):
        teen.calibrate_prototypes(base, new, 1.5)
    with pytest.raises(ValueError, match=r"shift_weight must lie in \[0, 1\], got -0.1"):
        teen.calibrate_prototypes(base, new, -0.1)
    with pytest.raises(ValueError, match="base prototypes have 5 features, new ones 4"):
        teen.calibrate_prototypes(base, new[:, :4])
    empty = BANK.replace(is_base=jnp.zeros(5, bool))
    with pytest.raises(ValueError, match="run the base session"):
        teen.check_session(empty, SHOTS[:2], np.array([2, 3]), [2, 3])
    with pytest.raises(ValueError, match=r"num_base must be in \[1, 5\]"):
        teen.base_session(teen.CosineNetwork(MLP((8,), 6), 5), 6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base": 9}, "--base 9 leaves no session of --way 2 among the 10 classes"),
        ({"shift_weight": 2.0}, "--shift-weight: shift_weight must lie in"),
        ({"tau": -1.0}, "--tau must not be negative"),
        ({"shot": 0}, "--shot 0"),
    ],
)
def test_recipe_refuses_impossible_settings(change, message):
    with pytest.raises(recipe.UserError, match=message):
        recipe.Recipe(**change).build()


def test_recipe_names_its_phases_and_measures_both_banks():
    run = recipe.Recipe(epochs=1).build()
    names = [p.name for p in run.phases]
    assert names == ["base", "prototypes", "after0", "session1", "after1", "session2", "after2"]
    evaluation = run.phases[4]
    seen = {"calibrated": np.zeros((10, 10), np.int32), "raw": np.zeros((10, 10), np.int32)}
    for true, raw, calibrated, count in ((0, 0, 0, 8), (6, 0, 6, 3), (7, 6, 1, 2), (9, 9, 9, 5)):
        seen["calibrated"][true, calibrated] += count
        seen["raw"][true, raw] += count
    found = evaluation.compute({k: v.ravel() for k, v in seen.items()})
    assert found["accuracy"] == pytest.approx(11 / 13)
    assert found["raw_accuracy"] == pytest.approx(8 / 13)
    assert found["task0"] == 1.0
    assert found["task1"] == pytest.approx(3 / 5)


def test_recipe_evaluation_counts_real_rows_only():
    run = recipe.Recipe(epochs=1).build()
    evaluation = run.phases[2]
    batch = jax.tree.map(jnp.asarray, evaluation.stream.batch(evaluation.stream.steps_per_epoch - 1))
    assert 0 < int(batch["mask"].sum()) < batch["mask"].shape[0]
    variables = run.phases[0].updates["main"].objective.init(jax.random.key(0), batch)
    bank = {"weights": jnp.eye(10, 64), "is_base": jnp.arange(10) < 6, "is_seen": jnp.arange(10) < 6}
    context = Context(rng=jax.random.key(0), train=False)
    blank = jax.tree.map(jnp.asarray, evaluation.init())
    seen, _ = evaluation.update(blank, {**variables, "bank": bank, "raw_bank": bank}, batch, context)
    assert int(seen["calibrated"].sum()) == int(seen["raw"].sum()) == int(batch["mask"].sum())
    rows = np.asarray(seen["raw"]).reshape(10, 10).sum(1)
    np.testing.assert_array_equal(
        rows, np.bincount(np.asarray(batch["label"])[np.asarray(batch["mask"])], minlength=10)
    )
