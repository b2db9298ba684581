"""One row a method: every recipe's ``example()`` goes through the same tests, so a new method gets them for nothing.

A row is a tiny objective with a batch of 16, an optimiser and perhaps a loss transformation; ``artefacts`` are what
earlier phases would have left, ``sharded`` those that enter the step by rows; ``also`` holds further rows of the same
method by name.  A method that trains nothing gives pure functions instead.  What each test asks is in its name.
"""

import dataclasses
import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import zoo
from checkpoints.store import Store
from data.stream import training_stream
from trainers.errors import Diverged, Interrupted
from trainers.loop import Loop, Settings
from trainers.parallel import Parallel
from trainers.phases import Average, Fit, FitResult, Train
from trainers.recipe import Run
from trainers.trees import flatten, to_host
from zoo.base import Context, reduce_mean, total_loss

STEPS = 20


def rows():
    """Every method's rows: ``name`` and, where it has several objectives, ``name/other``."""
    found = {}
    for card in zoo.cards():
        own = importlib.import_module(card.recipe).example()
        found |= {card.name: own, **{f"{card.name}/{other}": more for other, more in own.get("also", {}).items()}}
    return found


ROWS = rows()
METHODS = list(ROWS)
# what holds for a method's first row seldom fails for its others: they get the costlier half in the slow run
FIRST = [pytest.param(n, marks=pytest.mark.slow if "/" in n else []) for n in METHODS]


def row(name):
    return ROWS[name]


def trained(name):
    found = row(name)
    if found["objective"] is None:
        pytest.skip(f"{name} trains nothing")
    return found


def batch_of(name):
    found = jax.tree.map(jnp.asarray, dict(trained(name)["batch"]))
    return {"row": jnp.arange(16, dtype=jnp.int32), **found}


@functools.cache
def start(name):
    found = trained(name)
    return found["objective"].init(jax.random.key(0), batch_of(name))


@functools.cache
def scalar(name):
    """``(params, batch, rng) -> (loss, gradients)`` of one step, transformation included."""
    return jax.value_and_grad(value_of(name))


@functools.cache
def value_of(name):
    """``(params, batch, rng) -> loss``."""
    found = trained(name)
    objective, transform = found["objective"], found["transform"]

    def value(params, batch, rng):
        context = Context(
            rng=rng, step=jnp.int32(3), total_steps=jnp.int32(STEPS), steps_per_epoch=jnp.int32(2),
            artefacts=jax.tree.map(jnp.asarray, found.get("artefacts", {})),
        )  # fmt: skip
        variables = {**start(name), "params": params}
        outputs, _ = objective.forward(variables, batch, context)
        known = context.replace(outputs=outputs, batch=batch, collections=variables)
        loss = objective.loss(outputs, batch, known)
        state = transform.init(found["num_examples"]) if transform else ()
        return total_loss(loss, transform, state, known, objective.reduce)[0]

    return value


@functools.cache
def compiled(name):
    return jax.jit(scalar(name))


def stream_of(name):
    """32 examples: the row's batch and its mirror."""
    fields = {k: np.asarray(v) for k, v in trained(name)["batch"].items() if k not in ("index", "mask", "row")}
    return training_stream({k: np.concatenate([v, v[::-1]]) for k, v in fields.items()}, 16)


def phase_of(name, steps=STEPS, stream=None):
    found = trained(name)
    return Train("t", steps, found["objective"], found["optimizer"], stream or stream_of(name), found["transform"],
                 average=Average(0.9), sharded=found.get("sharded", ()))  # fmt: skip


def run_of(name, phase, init=None):
    artefacts = row(name).get("artefacts", {})
    before = [Fit("made", lambda variables, _, rng: FitResult({}, artefacts))] if artefacts else []
    if artefacts and init is None:  # a run that begins with a fit cannot ask its first update for variables
        init = lambda rng: row(name)["objective"].init(rng, batch_of(name))  # noqa: E731
    return Run([*before, phase], export=None, init=init)


def loop_of(name, parallel, steps=STEPS, calls=4, **rest):
    return Loop(run_of(name, phase_of(name, steps)), Settings(parallel, calls, 5, 5), **rest)


@functools.cache
def single(name):
    """The state after 20 steps on one device."""
    return flatten(to_host(loop_of(name, Parallel(devices=1))().state))


@pytest.mark.slow  # op by op, every operation of every shape is compiled by itself
@pytest.mark.parametrize("name", METHODS)
def test_jit_changes_nothing(name):
    args = start(name)["params"], batch_of(name), jax.random.key(1)
    np.testing.assert_allclose(compiled(name)(*args)[0], value_of(name)(*args), rtol=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_gradients_are_finite_and_not_all_zero(name):
    loss, grads = compiled(name)(start(name)["params"], batch_of(name), jax.random.key(1))
    assert np.isfinite(loss)
    flat = flatten(grads)
    assert all(np.isfinite(g).all() for g in flat.values()), [k for k, g in flat.items() if not np.isfinite(g).all()]
    assert float(optax.tree.norm(grads)) > 0


@pytest.mark.parametrize("name", FIRST)
def test_vmap_over_keys_equals_a_loop(name):
    keys = jax.random.split(jax.random.key(2), 2)
    params, batch = start(name)["params"], batch_of(name)
    both = jax.jit(jax.vmap(lambda k: scalar(name)(params, batch, k)[0]))(keys)
    np.testing.assert_allclose(both, [compiled(name)(params, batch, k)[0] for k in keys], rtol=1e-4)


@pytest.mark.parametrize("name", FIRST)
def test_bfloat16_parameters_give_nearly_the_same_loss(name):
    params, batch = start(name)["params"], batch_of(name)
    low = jax.tree.map(lambda p: p.astype(jnp.bfloat16) if p.dtype == jnp.float32 else p, params)
    loss, grads = jax.jit(scalar(name))(low, batch, jax.random.key(1))
    assert loss.dtype == jnp.float32
    assert all(np.isfinite(np.asarray(g, np.float32)).all() for g in jax.tree.leaves(grads))
    np.testing.assert_allclose(loss, compiled(name)(params, batch, jax.random.key(1))[0], rtol=0.04)


@pytest.mark.parametrize("name", METHODS)
def test_padded_rows_change_nothing(name):
    batch = batch_of(name)
    mask = jnp.arange(16) < 11
    batch = {**batch, "mask": mask, "index": jnp.where(mask, batch["index"], trained(name)["num_examples"])}

    def scrambled(value):
        keep = mask.reshape(-1, *[1] * (value.ndim - 1))
        other = 7 * jnp.ones_like(value) if jnp.issubdtype(value.dtype, jnp.floating) else jnp.zeros_like(value)
        return jnp.where(keep, value, other)

    dirty = {k: v if k in ("mask", "index", "row") else scrambled(v) for k, v in batch.items()}
    params, key = start(name)["params"], jax.random.key(1)
    clean, grads = compiled(name)(params, batch, key)
    found, their = compiled(name)(params, dirty, key)
    np.testing.assert_allclose(found, clean, rtol=1e-5)
    for path, g in flatten(grads).items():
        np.testing.assert_allclose(flatten(their)[path], g, rtol=1e-4, atol=1e-6, err_msg=path)


# compiling is the suite's time: pmap is where a method can go wrong by itself, 2 x 4 where the partitioner has most to
# do; the rest of the table is compiled in the slow run
QUICK = {"pmap 8": METHODS, "jit 2 x 4": [n for n in METHODS if "/" not in n], "jit 8": []}
WAYS = [
    pytest.param(name, way, marks=[] if name in QUICK[way] else pytest.mark.slow) for name in METHODS for way in QUICK
]


@pytest.mark.parametrize(("name", "way"), WAYS)
def test_twenty_steps_are_the_same_under_every_parallelism(name, way):
    parallel = {"jit 8": Parallel(), "jit 2 x 4": Parallel(fsdp=4, fsdp_minimum=1), "pmap 8": Parallel("pmap")}[way]
    alone = single(name) if trained(name) else None
    state = flatten(to_host(loop_of(name, parallel)().state))
    assert state.keys() == alone.keys()
    for path, value in alone.items():
        if np.asarray(value).dtype.kind == "f":
            scale = 1e-5 * max(1.0, np.abs(value[np.isfinite(value)]).max(initial=0))
            np.testing.assert_allclose(state[path], value, rtol=1e-5, atol=scale, err_msg=path)
        else:  # masks, counts, flags: bit-equal
            np.testing.assert_array_equal(state[path], value, err_msg=path)


@pytest.mark.parametrize("name", FIRST)
def test_one_compilation_and_an_exact_resumption(name, tmp_path):
    alone = single(name) if trained(name) else None
    loop = loop_of(name, Parallel(devices=1), store=Store(tmp_path / "checkpoints"), folder=tmp_path)
    save = loop._save

    def stop(state, phase, step):
        save(state, phase, step)
        if step == 10:
            raise Interrupted("stopped")

    loop._save = stop
    with pytest.raises(Interrupted):
        loop()
    again = loop_of(name, Parallel(devices=1), store=Store(tmp_path / "checkpoints"), folder=tmp_path)
    made, compile_step = [], again.place.compile
    again.place.compile = lambda *args: made.append(1) or compile_step(*args)
    state = flatten(to_host(again().state))
    assert len(made) == 1
    for path, value in alone.items():
        np.testing.assert_array_equal(state[path], value, err_msg=path)


@pytest.mark.parametrize("name", METHODS)
def test_a_nan_is_caught_where_it_enters(name):
    fields = {k: np.asarray(v).copy() for k, v in trained(name)["batch"].items() if k not in ("index", "mask", "row")}
    floats = [k for k, v in fields.items() if v.dtype.kind == "f"]
    if not floats:
        poisoned = jax.tree.map(lambda p: p * np.nan, start(name)["params"])
        run = run_of(name, phase_of(name), lambda rng: {**start(name), "params": poisoned})
    else:
        arrays = {k: np.concatenate([v, v]) for k, v in fields.items()}
        arrays[floats[0]][5] = np.nan
        run = run_of(name, phase_of(name, stream=training_stream(arrays, 16)))
    with pytest.raises(Diverged, match="is not finite at step [01] of phase 't'"):
        Loop(run, Settings(Parallel(devices=1), 4, 5, 5))()


@pytest.mark.parametrize("name", METHODS)
def test_pure_functions_of_methods_that_train_nothing(name):
    found = row(name)
    if found["objective"] is not None:
        pytest.skip(f"{name} is an objective")
    function, args = found["function"], jax.tree.map(jnp.asarray, found["args"])
    plain, compiled = function(*args), jax.jit(function)
    for a, b in zip(jax.tree.leaves(compiled(*args)), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=1e-5, atol=1e-5)
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), args)
    for a, b in zip(jax.tree.leaves(jax.vmap(function)(*stacked)), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(np.asarray(a[1], np.float32), np.asarray(b, np.float32), rtol=1e-5, atol=1e-5)
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32) if x.dtype == jnp.float32 else x, args)
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in jax.tree.leaves(compiled(*low)))


def test_the_table_is_read_from_the_recipes():
    assert {"dbpm", "dsl", "ict", "muvera", "teen"} <= set(METHODS)
    for name in METHODS:
        if row(name)["objective"] is not None:
            assert {"objective", "batch", "optimizer", "transform", "num_examples"} <= set(row(name))
            assert dataclasses.is_dataclass(row(name)["objective"])
    assert reduce_mean is not None
