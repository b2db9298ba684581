"""A frozen index as a step input: searched, gathered and normalised over inside the step, the same on any devices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from data.stream import evaluation_stream, training_stream
from trainers.loop import Loop, Settings
from trainers.parallel import Parallel, Placement
from trainers.phases import Evaluate, Fit, FitResult, Train
from trainers.recipe import Run
from zoo.base import Loss, Objective, example_elements
from zoo.losses.retrieval import full_corpus_softmax
from zoo.ops.rows import Rows, as_rows

N, D = 37, 4


def objective():
    def forward(variables, batch, context):
        return {"query": batch["x"] @ variables["params"]["w"]}, {}

    def loss(outputs, batch, context):
        rows, query = as_rows(context.artefacts["index"]), outputs["query"]
        found = rows.mips_topk(jax.lax.stop_gradient(query), 5)[1]
        near = jnp.einsum("bkd,bd->b", rows.take(found), query)
        values = full_corpus_softmax(query, rows, batch["target"], None, 3) + 0.01 * near
        return Loss(example_elements(values, batch), metrics={"found": jnp.sum(found * (1 + batch["target"])[:, None])})

    init = lambda rng, batch: {"params": {"w": jax.random.normal(rng, (D, D))}}  # noqa: E731
    return Objective(init, forward, loss)


def run(parallel, steps=6, evaluate=False):
    rng = np.random.default_rng(0)
    arrays = {"x": rng.normal(size=(48, D)).astype(np.float32), "target": rng.integers(0, N, 48).astype(np.int32)}
    index = rng.normal(size=(N, D)).astype(np.float32)
    host = objective()

    def update(seen, variables, batch, context):
        assert isinstance(context.artefacts["index"], Rows)
        out, _ = host.forward(variables, batch, context)
        ids = context.artefacts["index"].mips_topk(out["query"], 1)[1][:, 0]
        return seen + jnp.sum((ids == batch["target"]) & batch["mask"]), {}

    measure = Evaluate(
        "hits",
        evaluation_stream(arrays, 16),
        lambda: np.zeros((), np.int32),
        update,
        lambda n: {"n": n},
        sharded=("index",),
    )
    init = lambda rng: {"params": {"w": jax.random.normal(rng, (D, D))}}  # noqa: E731
    phases = [
        Fit("encode", lambda v, a, k: FitResult({}, {"index": index})),
        Train("train", steps, host, optax.sgd(0.05), training_stream(arrays, 16), sharded=("index",)),
        measure,
    ]
    return Loop(Run(phases, export=None, init=init), Settings(parallel))()


@pytest.fixture(scope="module")
def alone():
    return run(Parallel(devices=1))


@pytest.mark.parametrize(
    "parallel",
    [Parallel(devices=8), Parallel(devices=8, fsdp=2, tensor=2), Parallel("pmap", 8)],
    ids=["jit8", "mesh222", "pmap8"],
)
def test_any_devices_learn_the_same(alone, parallel):
    found = run(parallel)
    np.testing.assert_allclose(found.variables["params"]["w"], alone.variables["params"]["w"], atol=1e-5)
    assert found.metrics["train/found"] == alone.metrics["train/found"]
    assert found.metrics["hits/n"] == alone.metrics["hits/n"]
    assert found.artefacts["index"].shape == (N, D)  # kept whole, without what fills the last shard


def test_each_device_holds_its_rows_only():
    place = Placement(Parallel(devices=8))
    index = np.arange(N * D, dtype=np.float32).reshape(N, D)
    placed = place.put_artefacts({"index": index, "small": np.ones(3)}, ("index",))
    assert {s.data.shape for s in placed["index"].values.addressable_shards} == {(5, D)}
    assert placed["index"].count == N and placed["small"].sharding.is_fully_replicated
    placed = Placement(Parallel("pmap", 8)).put_artefacts({"index": index}, ("index",))
    assert placed["index"].values.shape == (8, 5, D)


def test_names_that_are_no_artefacts_are_refused():
    place = Placement(Parallel(devices=8))
    with pytest.raises(ValueError, match="artefact 'indx' is to be sharded by rows, but none; there are"):
        place.put_artefacts({"index": np.ones((4, 2))}, ("indx",))
    with pytest.raises(ValueError, match="'index' is to be sharded by rows, but it is not an array"):
        place.put_artefacts({"index": {"a": np.ones((4, 2))}}, ("index",))
