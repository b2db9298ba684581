"""The bare update against the trainer: equal parameters, collections and memories after the same batches."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from data.stream import training_stream
from trainers.bare_update import bare_update, carry, rows_of, scan_updates
from trainers.phases import Train
from trainers.recipe import Run
from trainers.run import train_in_memory
from trainers.step import phase_key
from zoo import hosts
from zoo.base import Context
from zoo.nn.mlp import MLP
from zoo.timeseries.dbpm import dynamic_bad_pair_mining

RNG = np.random.default_rng(2)
ARRAYS = {"x": RNG.normal(size=(20, 5)).astype(np.float32), "label": np.arange(20, dtype=np.int32) % 3}
STEPS = 7


def shifted(key, x):
    return x, x + 0.3 * jax.random.normal(key, x.shape)


def cases():
    mined = dynamic_bad_pair_mining(warm_up=1)
    return {
        "moco": (hosts.moco(MLP((), 3), shifted, queue=16), None),
        "simclr": (hosts.simclr(MLP((), 3), shifted), mined),
    }


@pytest.mark.parametrize("name", cases())
def test_what_the_trainer_computes(name):
    host, transform = cases()[name]
    tx = optax.adam(1e-2)
    stream = training_stream(ARRAYS, 8, 3)
    batch = jax.tree.map(jnp.asarray, stream.batch(0))
    init = lambda rng: host.init(jax.random.key(5), batch)  # noqa: E731
    run = Run([Train("t", STEPS, host, tx, stream, transform)], export=None, init=init)
    want = train_in_memory(run, 1, 0, devices=1)

    update = jax.jit(bare_update(host, tx, transform))
    now = carry(init(None), tx, transform, stream.num_examples)
    for i in range(STEPS):
        context = Context(phase_key(jnp.uint32(0), "t/main/0", i), i, STEPS, stream.steps_per_epoch)
        now = update(now, stream.batch(i), context)
    for found, known in (
        (now.variables["params"], want.variables["params"]),
        ({c: v for c, v in now.variables.items() if c != "params"}, dict(want.state.collections)),
        (now.memory, want.state.loss["main"]),
    ):
        assert jax.tree.structure(found) == jax.tree.structure(known)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found, known)


def test_a_scan_is_the_loop():
    host, transform = cases()["simclr"]
    tx, stream, key = optax.sgd(0.1), training_stream(ARRAYS, 8, 3), jax.random.key(1)
    rows, real = rows_of(stream, STEPS)
    assert rows.shape == (STEPS, 8)
    assert not bool(real.all())  # the short last batch of an epoch is padded
    update = bare_update(host, tx, transform)
    batch = jax.tree.map(jnp.asarray, stream.batch(0))
    start = carry(host.init(jax.random.key(5), batch), tx, transform, stream.num_examples)
    scanned = jax.jit(lambda s: scan_updates(update, s, jax.tree.map(jnp.asarray, ARRAYS), rows, real, key))(start)
    now, step = start, jax.jit(update)
    for i in range(STEPS):
        batch = {k: v for k, v in stream.batch(i).items() if k in (*ARRAYS, "index", "mask")}
        now = step(now, batch, Context(jax.random.fold_in(key, i), i, STEPS))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), scanned, now)


def test_pairs_that_the_trainer_selects_are_refused():
    host = dataclasses.replace(cases()["simclr"][0], select=lambda batch, context: batch)
    with pytest.raises(ValueError, match="'simclr' selects pairs from the batch; train it by a run"):
        bare_update(host, optax.sgd(0.1))
