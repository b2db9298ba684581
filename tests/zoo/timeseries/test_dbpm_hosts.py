"""Dynamic Bad Pair Mining on hosts that are no series: a classifier with wrong labels, two towers, and misfits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.base import CompositionError, Context, Loss, Objective, check_fit, example_elements, total_loss
from zoo.losses.contrastive import info_nce_per_example, nt_xent_per_example
from zoo.timeseries.dbpm import dynamic_bad_pair_mining


def train(objective, transform, arrays, steps, batch=50, rate=0.3, number=200):
    """Plain gradient descent over shuffled epochs; returns parameters and the transformation's state."""
    per_epoch = number // batch
    params = objective.init(jax.random.key(0), arrays)["params"]
    state = transform.init(number)

    @jax.jit
    def step(params, state, index, n):
        fields = {**{k: v[index] for k, v in arrays.items()}, "index": index}
        context = Context(jax.random.key(1), n, steps, per_epoch, batch=fields)

        def scalar(p):
            outputs, _ = objective.forward({"params": p}, fields, context)
            return total_loss(objective.loss(outputs, fields, context), transform, state, context)[:2]

        grads, state_ = jax.grad(scalar, has_aux=True)(params)
        return jax.tree.map(lambda p, g: p - rate * g, params, grads), state_

    rng = np.random.default_rng(0)
    for n in range(steps):
        if n % per_epoch == 0:
            order = rng.permutation(number).astype(np.int32)
        params, state = step(params, state, jnp.asarray(order[batch * (n % per_epoch) :][:batch]), n)
    return params, state


def host_of(loss, provides=("index",)):
    """A linear host: ``loss(params, batch) -> [B]``."""
    return Objective(
        init=lambda rng, batch: {"params": {"w": 0.1 * jax.random.normal(rng, (batch["x"].shape[1], 4))}},
        forward=lambda variables, batch, context: ({"h": batch["x"] @ variables["params"]["w"]}, {}),
        loss=lambda outputs, batch, context: Loss(example_elements(loss(outputs["h"], batch), batch)),
        provides=provides,
        name="linear",
    )


def test_on_a_classifier_it_finds_the_wrong_labels():
    rng = np.random.default_rng(3)
    truth = rng.integers(0, 4, 200)
    x = 1.5 * np.eye(4)[truth] + 0.4 * rng.normal(size=(200, 4))
    label = truth.copy()
    label[:20] = (truth[:20] + 1) % 4
    arrays = {"x": jnp.asarray(x, jnp.float32), "label": jnp.asarray(label, jnp.int32)}

    def loss(h, batch):
        return -jnp.take_along_axis(jax.nn.log_softmax(h), batch["label"][:, None], 1)[:, 0]

    t = dynamic_bad_pair_mining(5, 12, beta_np=50.0, beta_fp=1.5)
    _, state = train(host_of(loss), check_fit(t, host_of(loss)), arrays, steps=48)
    flagged = np.asarray(state.stats.faulty)
    assert flagged[:20].mean() > 0.5
    assert flagged[:20].sum() / flagged.sum() > 0.7  # the brief's bar


@pytest.mark.parametrize("contrast", [nt_xent_per_example, info_nce_per_example])
def test_on_two_towers_it_finds_the_wrong_captions(contrast):
    rng = np.random.default_rng(4)
    meaning = rng.normal(size=(200, 4))
    image, text = (meaning + 0.1 * rng.normal(size=(200, 4)) for _ in range(2))
    text[:20] = rng.normal(size=(20, 4))
    arrays = {"x": jnp.asarray(image, jnp.float32), "text": jnp.asarray(text, jnp.float32)}
    host = host_of(lambda h, batch: contrast(h, batch["text"], 0.2))
    t = dynamic_bad_pair_mining(3, 8, beta_np=50.0, beta_fp=1.5)
    _, state = train(host, t, arrays, steps=32)
    flagged = np.asarray(state.stats.faulty)
    assert flagged[:20].mean() > 0.5
    assert flagged[:20].sum() / flagged.sum() > 0.7  # the brief's bar


def test_it_refuses_hosts_without_index_or_examples():
    t = dynamic_bad_pair_mining(1)
    assert t.units == ("example",)
    with pytest.raises(CompositionError, match="requires 'index', which linear does not provide"):
        check_fit(t, host_of(None, provides=("label",)))
    batch = {"mask": jnp.ones(2, bool)}
    e, state = example_elements(jnp.ones(2), batch), t.init(4)
    with pytest.raises(ValueError, match="needs 'index' in the batch"):
        t.update(e, state, Context(None, batch=batch))
