"""Soft contrastive targets and token losses against loops, ALBEF's numbers and hand cases."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from zoo.losses.momentum import clamped_temperature, momentum_soft_contrastive, token_cross_entropy
from zoo.ops.prototypes import l2_normalize
from zoo.ops.queues import enqueue, init_queue

B, D, Q = 5, 4, 6
GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "gear_reference.npz"


def unit(seed, n=B):
    return l2_normalize(jax.random.normal(jax.random.key(seed), (n, D)))


A, Z, AM, ZM = (unit(i) for i in range(4))
IDS = jnp.array([7, 3, 7, 9, 3], jnp.int32)
MASK = jnp.array([True, True, True, True, False])
QUEUE = enqueue(
    init_queue(Q, {"a": A[:1], "b": A[:1], "id": IDS[:1]}),
    {"a": unit(8, 4), "b": unit(9, 4), "id": jnp.array([9, 7, 1, 3], jnp.int32)},
)
loss = jax.jit(momentum_soft_contrastive)


def loop(a, b, am, bm, tau, soft, ids=None, mask=None, queue=None):
    """One example and one direction at a time, in float64."""
    a, b, am, bm = (np.asarray(x, np.float64) for x in (a, b, am, bm))
    n = len(a)
    mask = [True] * n if mask is None else np.asarray(mask).tolist()
    ids = list(range(n)) if ids is None else np.asarray(ids).tolist()
    out = np.zeros(n)
    for i in range(n):
        if not mask[i]:
            continue
        for rows, teacher, keys, side in ((a, am, bm, "b"), (b, bm, am, "a")):
            known = [(keys[j], ids[j]) for j in range(n) if mask[j]]
            if queue is not None:
                rest = zip(np.asarray(queue["rows"][side], np.float64), np.asarray(queue["rows"]["id"]).tolist(),
                           np.asarray(queue["filled"]).tolist(), strict=True)  # fmt: skip
                known += [(k, label) for k, label, filled in rest if filled]
            student = np.array([rows[i] @ k for k, _ in known]) / tau
            opinion = np.array([teacher[i] @ k for k, _ in known]) / tau
            hot = np.array([float(label == ids[i]) for _, label in known])
            target = (1 - soft) * hot / hot.sum() + soft * np.exp(opinion) / np.exp(opinion).sum()
            assert target.sum() == pytest.approx(1)
            logs = student - np.log(np.exp(student).sum())
            out[i] -= 0.5 * float(target @ logs)
    return out


@pytest.mark.parametrize("soft", [0.0, 0.4, 1.0])
def test_equals_the_loop(soft):
    for ids, mask, queue in ((None, None, None), (IDS, MASK, None), (IDS, MASK, QUEUE), (IDS, None, QUEUE)):
        found = loss(A, Z, AM, ZM, 0.3, soft, ids, mask, queue)
        np.testing.assert_allclose(found, loop(A, Z, AM, ZM, 0.3, soft, ids, mask, queue), rtol=1e-5, atol=1e-6)


def test_equals_albef():
    golden = np.load(GOLDEN)
    x = {
        k: jnp.asarray(golden[f"albef_{k}"])
        for k in ("image", "text", "image_m", "text_m", "image_queue", "text_queue")
    }
    queue = {
        "rows": {
            "a": x["image_queue"].T,
            "b": x["text_queue"].T,
            "id": jnp.full(x["text_queue"].shape[1], -1, jnp.int32),
        },
        "filled": jnp.ones(x["text_queue"].shape[1], bool),
    }
    ids = jnp.arange(len(x["image"]), dtype=jnp.int32)
    for n, soft in enumerate((0.0, 0.4)):
        found = loss(x["image"], x["text"], x["image_m"], x["text_m"], 0.07, soft, ids, None, queue)
        np.testing.assert_allclose(jnp.mean(found), golden["albef_loss_ita"][n], rtol=1e-5)


def test_without_opinion_it_is_the_softmax_cross_entropy_of_both_directions():
    labels = jnp.arange(B)
    ce = optax.softmax_cross_entropy_with_integer_labels
    expected = (ce(A @ ZM.T / 0.2, labels) + ce(Z @ AM.T / 0.2, labels)) / 2
    np.testing.assert_allclose(loss(A, Z, AM, ZM, 0.2, 0.0), expected, rtol=1e-5)
    same = jnp.broadcast_to(A[:1], A.shape)
    np.testing.assert_allclose(loss(same, same, same, same, 0.07, 0.4), jnp.full(B, math.log(B)), rtol=1e-5)


def test_gradients_reach_the_online_rows_and_tau_through_the_students_only():
    total = lambda *x: jnp.sum(momentum_soft_contrastive(*x, ids=IDS, queue=QUEUE))  # noqa: E731
    grads = jax.grad(total, argnums=(0, 1, 2, 3, 4))(A, Z, AM, ZM, jnp.float32(0.3))
    assert float(jnp.abs(grads[0]).min()) > 0 and float(jnp.abs(grads[1]).min()) > 0
    np.testing.assert_array_equal(grads[2], 0 * A)
    np.testing.assert_array_equal(grads[3], 0 * A)
    # with the targets frozen at tau = 0.3
    hot = (np.asarray(IDS)[:, None] == np.r_[np.asarray(IDS), [9, 7, 1, 3]][None]).astype(float)
    hot /= hot.sum(1, keepdims=True)
    rest = {k: np.asarray(v, np.float64)[:4] for k, v in QUEUE["rows"].items() if k != "id"}

    def frozen(tau):
        found = 0.0
        for rows, teacher, keys in ((A, AM, np.r_[ZM, rest["b"]]), (Z, ZM, np.r_[AM, rest["a"]])):
            opinion = np.exp(np.asarray(teacher, np.float64) @ keys.T / 0.3)
            target = 0.6 * hot + 0.4 * opinion / opinion.sum(1, keepdims=True)
            logits = np.asarray(rows, np.float64) @ keys.T / tau
            found -= 0.5 * (target * (logits - np.log(np.exp(logits).sum(1, keepdims=True)))).sum()
        return found

    slope = (frozen(0.3 + 1e-5) - frozen(0.3 - 1e-5)) / 2e-5
    np.testing.assert_allclose(grads[4], slope, rtol=1e-3)


def test_masked_rows_hold_anything():
    dirty = [x.at[4].set(jnp.nan) for x in (A, Z, AM, ZM)]
    np.testing.assert_array_equal(loss(*dirty, 0.3, 0.4, IDS, MASK), loss(A, Z, AM, ZM, 0.3, 0.4, IDS, MASK))
    grads = jax.grad(lambda a: jnp.sum(momentum_soft_contrastive(a, *dirty[1:], ids=IDS, mask=MASK)))(dirty[0])
    assert np.isfinite(grads).all() and not np.asarray(grads[4]).any()


def test_temperature_is_clipped_with_its_gradient_kept():
    for tau, kept in ((0.07, 0.07), (1e-5, 0.001), (3.0, 0.5), (-1.0, 0.001)):
        value, grad = jax.value_and_grad(clamped_temperature)(jnp.float32(tau))
        np.testing.assert_allclose(value, kept, rtol=1e-4)
        assert float(grad) == 1.0


def test_wrong_settings_are_named():
    for tau in (0.0, -0.1):
        with pytest.raises(ValueError, match="tau must be positive"):
            momentum_soft_contrastive(A, Z, AM, ZM, tau)
    for soft in (-0.1, 1.1):
        with pytest.raises(ValueError, match=r"soft must lie in \[0, 1\]"):
            momentum_soft_contrastive(A, Z, AM, ZM, soft=soft)
    for smoothing in (-0.1, 1.0):
        with pytest.raises(ValueError, match=r"label_smoothing must lie in \[0, 1\)"):
            token_cross_entropy(jnp.zeros((1, 2, 3)), jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), bool), smoothing)


def test_token_cross_entropy_is_the_mean_over_a_rows_own_tokens():
    logits = jax.random.normal(jax.random.key(0), (3, 4, 7))
    targets = jnp.array([[1, 2, 6, 0], [3, 0, -100, 99], [5, 5, 5, 5]], jnp.int32)
    mask = jnp.array([[True] * 4, [True, True, False, False], [False] * 4])
    x = np.asarray(logits, np.float64)
    for smoothing in (0.0, 0.1):
        expected = []
        for row, t, m in zip(x, np.asarray(targets), np.asarray(mask), strict=True):
            logs = row - np.log(np.exp(row).sum(-1, keepdims=True))
            goal = lambda j, t=t, s=smoothing: (1 - s) * np.eye(7)[t[j]] + s / 7  # noqa: E731
            found = [-(goal(j) * logs[j]).sum() for j in range(4) if m[j]]
            expected.append(np.mean(found) if found else 0.0)
        np.testing.assert_allclose(token_cross_entropy(logits, targets, mask, smoothing), expected, rtol=1e-5)
    other = jnp.where(mask[..., None], logits, 1e4)
    np.testing.assert_array_equal(token_cross_entropy(other, targets, mask), token_cross_entropy(logits, targets, mask))
