"""Every loss transformation on every host whose ``provides`` suffices: two steps, finite loss and gradients."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy

import zoo
from data.stream import training_stream
from trainers.loop import Loop, Settings
from trainers.parallel import Parallel
from trainers.phases import Train
from trainers.recipe import Run
from trainers.record import Record
from zoo import base
from zoo.base import CompositionError, Context, Loss, Objective
from zoo.hosts import two_views
from zoo.objectives import ema_teacher, supervised, weighted_sum
from zoo.timeseries.dbpm import dynamic_bad_pair_mining


def pairs_host():
    """A host whose elements are pairs: the squared distances of neighbours in the batch."""

    def forward(variables, batch, context):
        return {"embedding": batch["x"] @ variables["params"]["w"]}, {}

    def loss(outputs, batch, context):
        z, n = outputs["embedding"], outputs["embedding"].shape[0]
        index = jnp.stack([jnp.arange(n), (jnp.arange(n) + 1) % n], 1)
        mask = base.batch_mask(batch)[index].all(1)
        return Loss(base.elements(jnp.sum((z[index[:, 0]] - z[index[:, 1]]) ** 2, -1), index, mask, "pair"))

    init = lambda rng, batch: {"params": {"w": jax.random.normal(rng, (batch["x"].shape[1], 3))}}  # noqa: E731
    return Objective(init, forward, loss, "pair", ("embedding", "index"), name="pairs")


ARTEFACTS = {}


def hosts():
    from flax import linen as nn

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(4)(x)

    plain = supervised(Net())
    views = two_views(toy.Encoder(), toy.noisy, toy.contrast)
    agree = lambda s, t, b, c: Loss(  # noqa: E731
        base.example_elements(jnp.sum((s["logits"] - t["logits"]) ** 2 + s["logits"] ** 2, -1), b)
    )
    arrays = toy.arrays(32)
    found = {
        "supervised": (plain, arrays),
        "two views": (views, arrays),
        "memory bank": (toy.counting_objective(), arrays),
        "weighted sum": (weighted_sum({"a": (1.0, plain), "b": (0.5, plain)}), arrays),
        "ema teacher": (ema_teacher(plain, agree), arrays),
        "pairs": (pairs_host(), arrays),
    }
    for card in zoo.cards():
        own = importlib.import_module(card.recipe).example()
        for name, row in {card.name: own, **{f"{card.name}/{k}": v for k, v in own.get("also", {}).items()}}.items():
            if row["objective"] is not None:
                fields = {k: np.asarray(v) for k, v in row["batch"].items() if k not in ("index", "mask", "row")}
                found[name] = (row["objective"], {k: np.concatenate([v, v[::-1]]) for k, v in fields.items()})
                ARTEFACTS[name] = jax.tree.map(jnp.asarray, row.get("artefacts", {}))
    return found


def transformations():
    mining = dynamic_bad_pair_mining(warm_up=0, beta_np=0.5, beta_fp=0.5)
    found = {
        "identity": base.identity(),
        "examples": base.examples(),
        "dbpm": mining,
        "masked(dbpm)": base.masked(mining, lambda e, c: e.values > 0),
        "scheduled(dbpm)": base.scheduled(mining, lambda step: step / 2),
        "chain(examples, dbpm)": base.chain(base.examples(), mining),
        "remembered": toy.remembered(),
    }
    for card in zoo.cards():
        transform = importlib.import_module(card.recipe).example().get("transform")
        if transform is not None:
            found[card.name] = transform
    return found


HOSTS, TRANSFORMATIONS = hosts(), transformations()
# a method's further objectives differ little from its first: they are compiled in the slow run
BY_HOST = [pytest.param(h, marks=pytest.mark.slow if "/" in h else []) for h in HOSTS]


@pytest.mark.parametrize("host", BY_HOST)
def test_every_transformation_that_fits_takes_two_steps(host):
    """One compiled step a host: the loss of each transformation, its gradient by outputs, and by parameters."""
    objective, arrays = HOSTS[host]
    stream = training_stream(arrays, 16)
    batches = [{"row": jnp.arange(16), **jax.tree.map(jnp.asarray, stream.batch(i))} for i in range(2)]
    variables = objective.init(jax.random.key(0), batches[0])
    fitting = {n: t for n, t in TRANSFORMATIONS.items() if base.misfit(t, objective) is None}

    @jax.jit
    def step(variables, states, batch, number):
        context = Context(
            rng=jax.random.fold_in(jax.random.key(0), number), step=number, total_steps=jnp.int32(2),
            artefacts=ARTEFACTS.get(host, {}),
        )  # fmt: skip

        def loss(outputs, t, state):
            known = context.replace(outputs=outputs, batch=batch, collections=variables)
            total, new, _ = base.total_loss(objective.loss(outputs, batch, known), t, state, known, objective.reduce)
            return total, new

        forward = lambda p: objective.forward({**variables, "params": p}, batch, context)  # noqa: E731
        outputs, back, mutated = jax.vjp(forward, variables["params"], has_aux=True)
        # whole numbers among the outputs have gradients of type float0, which the way back takes
        by_outputs = jax.value_and_grad(loss, has_aux=True, allow_int=True)
        told, pulls, states = {}, [], dict(states)
        for name, t in fitting.items():
            (total, states[name]), pull = by_outputs(outputs, t, states[name])
            told[name] = total, optax.tree.norm([g for g in jax.tree.leaves(pull) if g.dtype != jax.dtypes.float0])
            pulls.append(pull)
        both = lambda *g: sum(g) if g[0].dtype != jax.dtypes.float0 else g[0]  # noqa: E731
        (grads,) = back(jax.tree.map(both, *pulls))
        params = jax.tree.map(lambda p, g: p - 0.01 * g, variables["params"], grads)
        return {**variables, **mutated, "params": params}, states, told, optax.tree.norm(grads)

    states = {n: t.init(stream.num_examples) for n, t in fitting.items()}
    for number, batch in enumerate(batches):
        variables, states, told, norm = step(variables, states, batch, jnp.int32(number))
        assert np.isfinite(norm) and norm > 0
        for name, found in told.items():
            assert np.isfinite(found).all() and found[1] > 0, f"{name} on {host}: {found}"
    # a loss that belongs to no example cannot be told to examples
    assert ({"identity"} if objective.unit == "batch" else {"identity", "examples"}) <= set(fitting)


@pytest.mark.parametrize("host", HOSTS)
def test_what_does_not_fit_is_refused_with_the_reason(host):
    objective, arrays = HOSTS[host]
    for t in TRANSFORMATIONS.values():
        if base.misfit(t, objective) is not None:
            with pytest.raises(CompositionError, match="but|requires"):
                Train("t", 2, objective, optax.sgd(0.01), training_stream(arrays, 16), t)
    with pytest.raises(CompositionError, match="requires 'moon'"):
        Train(
            "t",
            2,
            objective,
            optax.sgd(0.01),
            training_stream(arrays, 16),
            base.identity()._replace(requires=("moon",)),
        )


def test_a_composed_run_goes_through_the_trainer():
    objective, arrays = HOSTS["weighted sum"]
    record = Record()
    phase = Train("t", 2, objective, optax.sgd(0.01), training_stream(arrays, 16), TRANSFORMATIONS["scheduled(dbpm)"])
    Loop(Run([phase], export=None), Settings(Parallel(devices=1), 1, 1, 10), record=record)()
    assert [np.isfinite(line["loss"]) for line in record.history] == [True, True]


def test_units_decide_the_matrix():
    rows = {t: [h for h in HOSTS if base.misfit(TRANSFORMATIONS[t], HOSTS[h][0]) is None] for t in TRANSFORMATIONS}
    assert "pairs" not in rows["dbpm"] and "pairs" in rows["chain(examples, dbpm)"]
    assert {"supervised", "two views", "ict", "teen"} <= set(rows["dbpm"])
