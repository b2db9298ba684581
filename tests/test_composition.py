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
from zoo.base import CompositionError, Loss, Objective
from zoo.objectives import ema_teacher, supervised, two_views, weighted_sum
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
        row = importlib.import_module(card.recipe).example()
        if row["objective"] is not None:
            fields = {k: np.asarray(v) for k, v in row["batch"].items() if k not in ("index", "mask", "row")}
            found[card.name] = (row["objective"], {k: np.concatenate([v, v[::-1]]) for k, v in fields.items()})
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


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("transformation", TRANSFORMATIONS)
def test_what_fits_runs_and_what_does_not_says_why(transformation, host):
    (objective, arrays), t = HOSTS[host], TRANSFORMATIONS[transformation]
    stream = training_stream(arrays, 16)
    if base.misfit(t, objective) is not None:
        with pytest.raises(CompositionError, match="but|requires"):
            Train("t", 2, objective, optax.sgd(0.01), stream, t)
        return
    record = Record()
    phase = Train("t", 2, objective, optax.sgd(0.01), stream, t)
    result = Loop(Run([phase], export=None), Settings(Parallel(devices=1), 1, 1, 10), record=record)()
    assert len(record.history) == 2
    for line in record.history:
        assert np.isfinite(line["loss"]) and np.isfinite(line["gradient_norm"]) and line["gradient_norm"] > 0
    assert all(np.isfinite(p).all() for p in jax.tree.leaves(result.variables["params"]) if p.dtype.kind == "f")


def test_units_decide_the_matrix():
    rows = {t: [h for h in HOSTS if base.misfit(TRANSFORMATIONS[t], HOSTS[h][0]) is None] for t in TRANSFORMATIONS}
    assert "pairs" not in rows["dbpm"] and "pairs" in rows["chain(examples, dbpm)"]
    assert {"supervised", "two views", "ict", "teen"} <= set(rows["dbpm"])
