"""The loop and the step: what is trained, what is frozen, what is averaged, and what stops a run."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy

from data.stream import ArrayStream, evaluation_stream, sequential, training_stream
from trainers.errors import Diverged
from trainers.evaluation import accuracy, mean_metrics
from trainers.loop import Loop, Settings
from trainers.parallel import Parallel
from trainers.phases import Alternate, Average, Evaluate, Fit, FitResult, Stop, Train, Update
from trainers.recipe import Optimizer, Run, UserError
from trainers.record import Record
from trainers.state import begin_phase, split_params
from trainers.step import make_step
from trainers.trees import edit_optimizer, flatten, nest, unflatten
from zoo.base import Context, Loss, Objective, Shared, example_elements
from zoo.objectives import supervised

ONE = Settings(Parallel(devices=1), 1, 5, 1000)


class Net(nn.Module):
    """A tiny classifier."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, name="head")(nn.relu(nn.Dense(8, name="body")(x)))


OBJECTIVE = supervised(Net())
STREAM = training_stream(toy.arrays(), 16)


def run(*phases, settings=ONE, record=None, **rest):
    return Loop(Run(list(phases), export=None, **rest), settings, record=record)()


def by_hand(tx, steps, stream=STREAM, trainable=lambda path: True):
    """The same training, written out."""
    loop = Loop(Run([Train("t", 1, OBJECTIVE, tx, stream)], export=None), ONE)
    params = loop._first_variables(loop.run.phases[0].updates)["params"]
    opt, seen = tx.init(params), [params]
    for i in range(steps):
        batch = jax.tree.map(jnp.asarray, stream.batch(i))

        def loss(p, batch=batch):
            logits = Net().apply({"params": p}, batch["x"])
            values = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
            return jnp.sum(values * batch["mask"]) / jnp.sum(batch["mask"])

        updates, opt = tx.update(jax.grad(loss)(params), opt, params)
        params = optax.apply_updates(params, updates)
        seen.append(params)
    return seen


def close(found, expected, tolerance=1e-6):
    for path, value in flatten(expected).items():
        np.testing.assert_allclose(flatten(found)[path], value, rtol=tolerance, atol=tolerance, err_msg=path)


def test_training_equals_the_loop_written_out():
    result = run(Train("t", 9, OBJECTIVE, optax.adam(1e-2), STREAM))
    close(result.variables["params"], by_hand(optax.adam(1e-2), 9)[-1])
    assert {"t/loss", "t/accuracy", "t/gradient_norm"} <= set(result.metrics)


@pytest.mark.parametrize(("decay", "start"), [(0.9, 0), (None, 0), (None, 3), (0.5, 4)])
def test_averages_equal_their_definition(decay, start):
    result = run(Train("t", 8, OBJECTIVE, optax.sgd(0.1), STREAM, average=Average(decay, start)))
    seen = by_hand(optax.sgd(0.1), 8)
    if decay is None:  # equal weights over the parameters after each step from `start` on
        expected = jax.tree.map(lambda *p: np.mean(p, 0), *seen[start + 1 :])
    else:
        expected = seen[0] if start == 0 else seen[start]
        for after in seen[start + 1 :]:
            expected = jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, expected, after)
    close(result.chosen["params"], expected, 1e-5)
    close(result.variables["params"], seen[-1])


def test_frozen_parameters_have_no_update_and_no_moments():
    result = run(Train("t", 5, OBJECTIVE, optax.adamw(1e-1), STREAM, trainable=("head/.*",)))
    first = by_hand(optax.adam(1e-2), 0)[0]
    np.testing.assert_array_equal(result.variables["params"]["body"]["kernel"], first["body"]["kernel"])
    assert np.abs(result.variables["params"]["head"]["kernel"] - first["head"]["kernel"]).min() > 0
    assert not [p for p in flatten(result.state.optimizer) if "body" in p]
    with pytest.raises(ValueError, match="trainable pattern 'haed/.*' matches no parameter; there are body/bias"):
        split_params(first, ("haed/.*",))


def test_alternating_updates_see_each_others_parameters():
    tx = optax.sgd(0.1)
    other = training_stream(toy.arrays(), 16, 5)
    updates = {
        "body": Update(OBJECTIVE, tx, STREAM, trainable=("body/.*",), repeats=2),
        "head": Update(OBJECTIVE, tx, other, trainable=("head/.*",)),
    }
    result = run(Alternate("a", 3, updates))
    params = by_hand(tx, 0)[0]
    for step in range(3):
        for name, stream, position in (
            ("body", STREAM, 2 * step),
            ("body", STREAM, 2 * step + 1),
            ("head", other, step),
        ):
            batch = jax.tree.map(jnp.asarray, stream.batch(position))

            def loss(p, batch=batch):
                values = optax.softmax_cross_entropy_with_integer_labels(
                    Net().apply({"params": p}, batch["x"]), batch["label"]
                )
                return jnp.sum(values * batch["mask"]) / jnp.sum(batch["mask"])

            grads = jax.grad(loss)(params)
            params = {**params, name: jax.tree.map(lambda p, g: p - 0.1 * g, params[name], grads[name])}
    close(result.variables["params"], params, 1e-5)
    assert {k: int(v) for k, v in result.state.streams.items()} == {"body": 6, "head": 3}


def test_several_named_streams_make_one_batch():
    def forward(variables, batch, context):
        a = batch["labelled"]["x"] @ variables["params"]["w"]
        b = batch["other"]["x"] @ variables["params"]["w"]
        return {"a": a, "b": b}, {}

    def loss(outputs, batch, context):
        assert "label" in batch["labelled"] and batch["other"]["index"].shape == (8,)
        return Loss(None, {"fit": jnp.mean(outputs["a"] ** 2), "agree": jnp.mean(outputs["b"])})

    objective = Objective(lambda rng, batch: {"params": {"w": jnp.ones(toy.D)}}, forward, loss, name="two streams")
    streams = {"labelled": STREAM, "other": training_stream(toy.arrays(40, 2), 8)}
    for parallel in (Parallel(devices=1), Parallel(), Parallel("pmap")):
        result = run(Train("t", 2, objective, optax.sgd(0.1), streams), settings=Settings(parallel, 1, 1, 100))
        expected = np.ones(toy.D)
        for i in range(2):
            x, y = STREAM.batch(i)["x"], streams["other"].batch(i)["x"]
            expected = expected - 0.1 * (2 * x.T @ (x @ expected) / 16 + y.mean(0))
        np.testing.assert_allclose(result.variables["params"]["w"], expected, rtol=1e-5)


def test_shared_outputs_are_not_gathered():
    def forward(variables, batch, context):
        return {
            "z": batch["x"][:, :4] * variables["params"]["scale"],
            "table": Shared(variables["params"]["table"]),
        }, {}

    def loss(outputs, batch, context):
        assert outputs["z"].shape == (16, 4) and outputs["table"].value.shape == (3, 4)
        return Loss(example_elements(jnp.sum(outputs["z"] @ outputs["table"].value.T, 1), batch))

    init = lambda rng, batch: {"params": {"scale": jnp.ones(4), "table": jnp.ones((3, 4))}}  # noqa: E731
    objective = Objective(init, forward, loss, name="shared")
    results = [
        run(Train("t", 3, objective, optax.sgd(0.1), STREAM), settings=Settings(p, 1, 1, 100)).variables
        for p in (Parallel(devices=1), Parallel("pmap"))
    ]
    close(results[1], results[0], 1e-5)


def test_select_chooses_pairs_across_the_global_batch():
    def select(batch, context):  # each example is paired with its mirror in the global batch
        return {**batch, "partner": batch["x"][::-1]}

    def forward(variables, batch, context):
        return {"s": jnp.sum(batch["x"] * batch["partner"] * variables["params"]["w"], 1)}, {}

    def loss(outputs, batch, context):
        return Loss(example_elements(outputs["s"] * jnp.arange(16), batch))

    init = lambda rng, batch: {"params": {"w": jnp.ones(toy.D)}}  # noqa: E731
    objective = Objective(init, forward, loss, select=select, name="fused pairs")
    results = [
        run(Train("t", 2, objective, optax.sgd(0.1), STREAM), settings=Settings(p, 1, 1, 100)).variables["params"]["w"]
        for p in (Parallel(devices=1), Parallel(), Parallel("pmap"))
    ]
    x = STREAM.batch(0)["x"]
    first = np.ones(toy.D) - 0.1 * np.mean(x * x[::-1] * np.arange(16)[:, None], 0)
    x = STREAM.batch(1)["x"]
    expected = first - 0.1 * np.mean(x * x[::-1] * np.arange(16)[:, None], 0)
    for found in results:
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_after_step_and_on_epoch_change_the_state():
    def after_step(variables, context):
        return {"params": jax.tree.map(lambda p: jnp.clip(p, -0.1, 0.1), variables["params"])}

    def on_epoch(variables, artefacts, rng):
        return {"epochs": {"count": variables["epochs"]["count"] + 1}}

    init = lambda rng, batch: {**OBJECTIVE.init(rng, batch), "epochs": {"count": jnp.zeros((), jnp.int32)}}  # noqa: E731
    forward = lambda v, b, c: OBJECTIVE.forward({"params": v["params"]}, b, c)  # noqa: E731
    objective = dataclasses.replace(OBJECTIVE, init=init, forward=forward)
    phase = Train("t", 9, objective, optax.sgd(0.1), STREAM, after_step=after_step, on_epoch=on_epoch)
    result = run(phase, settings=Settings(Parallel(devices=1), 3, 5, 1000))
    assert max(np.abs(p).max() for p in jax.tree.leaves(result.variables["params"])) <= 0.1 + 1e-7
    assert int(result.variables["epochs"]["count"]) == 3  # epochs of 4 steps start at steps 0, 4 and 8


def test_artefacts_flow_from_fits_into_steps_and_are_not_donated():
    def fit(variables, artefacts, rng):
        return FitResult(
            {"params": {"w": jnp.ones(toy.D)}}, {"target": np.arange(toy.D, dtype=np.float32)}, {"made": 1.0}
        )

    def forward(variables, batch, context):
        return {"d": variables["params"]["w"] - context.artefacts["target"] + 0 * batch["x"]}, {}

    objective = Objective(
        lambda rng, batch: {"params": {"w": jnp.zeros(toy.D)}},
        forward,
        lambda o, b, c: Loss(example_elements(jnp.sum(o["d"] ** 2, 1), b)),
    )
    result = run(Fit("make", fit), Train("t", 60, objective, optax.sgd(0.1), STREAM))
    np.testing.assert_allclose(result.variables["params"]["w"], np.arange(toy.D), atol=1e-4)
    np.testing.assert_array_equal(result.artefacts["target"], np.arange(toy.D))
    assert result.metrics["make/made"] == 1.0


def test_keeping_the_optimiser_continues_its_moments():
    tx = optax.adam(1e-2)
    kept = run(Train("a", 4, OBJECTIVE, tx, STREAM), Train("b", 4, OBJECTIVE, tx, STREAM, optimizer_state="keep"))
    assert int(kept.state.optimizer["main"][0].count) == 8
    fresh = run(Train("a", 4, OBJECTIVE, tx, STREAM), Train("b", 4, OBJECTIVE, tx, STREAM))
    assert int(fresh.state.optimizer["main"][0].count) == 4
    with pytest.raises(ValueError, match="keeps the optimiser of 'main', but its state no longer fits"):
        run(
            Train("a", 1, OBJECTIVE, tx, STREAM),
            Train("b", 1, OBJECTIVE, tx, STREAM, trainable=("head/.*",), optimizer_state="keep"),
        )


def test_an_edit_of_the_parameters_edits_the_moments_alike():
    params = {"a": {"w": jnp.arange(6.0).reshape(3, 2)}, "b": jnp.ones(2)}
    state = optax.adam(1e-2).init(params)
    grow = lambda t: {**t, "a": {"w": jnp.concatenate([t["a"]["w"], jnp.zeros((1, 2))])}}  # noqa: E731
    edited = edit_optimizer(state, params, grow)
    assert edited[0].mu["a"]["w"].shape == edited[0].nu["a"]["w"].shape == (4, 2)
    assert edited[0].mu["b"].shape == (2,) and int(edited[0].count) == 0

    def widen(variables, artefacts, rng):
        head = variables["params"]["head"]
        wider = {"kernel": jnp.pad(head["kernel"], ((0, 0), (0, 1))), "bias": jnp.pad(head["bias"], (0, 1))}
        new = {**variables["params"], "head": wider}
        pad = lambda t: {**t, "head": {"kernel": jnp.pad(t["head"]["kernel"], ((0, 0), (0, 1))),  # noqa: E731
                                       "bias": jnp.pad(t["head"]["bias"], (0, 1))}}  # fmt: skip
        return FitResult({"params": new}, edit=lambda o: edit_optimizer(o, variables["params"], pad))

    class Wider(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(5, name="head")(nn.relu(nn.Dense(8, name="body")(x)))

    tx = optax.adam(1e-2)
    phases = [
        Train("a", 3, OBJECTIVE, tx, STREAM),
        Fit("widen", widen),
        Train("b", 3, supervised(Wider()), tx, STREAM, optimizer_state="keep"),
    ]
    result = run(*phases)
    assert result.variables["params"]["head"]["kernel"].shape == (8, 5)
    assert int(result.state.optimizer["main"][0].count) == 6


def test_evaluation_is_exact_over_a_padded_stream():
    held = evaluation_stream(toy.arrays(37, 3), 8)
    result = run(
        Train("t", 6, OBJECTIVE, optax.sgd(0.1), STREAM, evaluate=(accuracy("held", held, OBJECTIVE.forward),))
    )
    data = toy.arrays(37, 3)
    logits = Net().apply({"params": result.variables["params"]}, data["x"])
    assert result.metrics["held/accuracy"] == pytest.approx(np.mean(np.argmax(logits, 1) == data["label"]))


def test_early_stopping_counts_evaluations_without_improvement():
    values = iter([0.1, 0.5, 0.4, 0.45, 0.9, 0.9])
    held = evaluation_stream(toy.arrays(8, 3), 8)
    evaluation = dataclasses.replace(
        accuracy("held", held, OBJECTIVE.forward), compute=lambda seen: {"accuracy": next(values)}
    )
    phase = Train("t", 60, OBJECTIVE, optax.sgd(0.1), STREAM, evaluate=(evaluation,), eval_every=10,
                  stop=Stop("held/accuracy", 2))  # fmt: skip
    result = run(phase)
    assert int(result.state.step) == 40
    assert float(result.state.monitor["best"]) == 0.5
    assert int(result.state.monitor["evaluations"]) == 4
    with pytest.raises(UserError, match="early stopping watches 'held/f1'; there are held/accuracy"):
        run(dataclasses.replace(phase, stop=Stop("held/f1", 2), evaluate=(accuracy("held", held, OBJECTIVE.forward),)))


def test_prequential_evaluation_predicts_before_it_learns():
    stream = ArrayStream(toy.arrays(), 16, sequential(toy.N))

    def update(seen, variables, batch, context):
        logits = Net().apply({"params": variables["params"]}, batch["x"])
        hit = jnp.sum((jnp.argmax(logits, -1) == batch["label"]) & batch["mask"])
        return {"hit": seen["hit"] + hit, "count": seen["count"] + jnp.sum(batch["mask"])}, {}

    blank = lambda: {"hit": jnp.zeros((), jnp.int32), "count": jnp.zeros((), jnp.int32)}  # noqa: E731
    evaluation = Evaluate("stream", stream, blank, update, lambda s: {"accuracy": s["hit"] / s["count"]})
    results = [
        run(Train("t", 4, OBJECTIVE, optax.sgd(0.5), stream, prequential=evaluation), settings=Settings(p, 1, 2, 100))
        for p in (Parallel(devices=1), Parallel("pmap"))
    ]
    params = by_hand(optax.sgd(0.5), 4, stream)
    hits = 0
    for i in range(4):
        batch = stream.batch(i)
        logits = Net().apply({"params": params[i]}, batch["x"])
        hits += int(np.sum((np.argmax(logits, -1) == batch["label"]) & batch["mask"]))
    for result in results:
        assert result.metrics["stream/accuracy"] == pytest.approx(hits / toy.N)


@pytest.mark.parametrize("calls", [1, 4])
def test_a_nan_stops_the_run_with_step_phase_metric_and_batch(tmp_path, calls):
    arrays = toy.arrays()
    arrays["x"][37, 3] = np.nan
    stream = training_stream(arrays, 16)
    at = next(i for i in range(4) if 37 in stream.batch(i)["index"])
    loop = Loop(Run([Train("t", 30, OBJECTIVE, optax.sgd(0.1), stream)], export=None),
                Settings(Parallel(devices=1), calls, 3, 1), folder=tmp_path)  # fmt: skip
    with pytest.raises(Diverged, match=f"loss is not finite at step {at} of phase 't'.*fault-t-{at}.npz"):
        loop()
    replay = np.load(tmp_path / f"fault-t-{at}.npz")
    np.testing.assert_array_equal(replay["index"], stream.batch(at)["index"])
    assert np.isnan(replay["x"]).any()


def test_a_diverged_run_keeps_its_last_good_checkpoint(tmp_path):
    from checkpoints.store import Store

    blow_up = optax.chain(optax.sgd(0.1), optax.stateless(lambda u, p: u))
    calls = optax.inject_hyperparams(optax.sgd)(learning_rate=lambda c: jnp.where(c == 13, jnp.nan, 0.1))
    del blow_up
    store = Store(tmp_path / "checkpoints")
    phase = Train("t", 30, OBJECTIVE, calls, STREAM)
    loop = Loop(Run([phase], export=None), Settings(Parallel(devices=1), 1, 3, 5), store=store, folder=tmp_path)
    with pytest.raises(Diverged, match="at step 14"):
        loop()
    steps = Store(tmp_path / "checkpoints").steps()
    assert steps[-1] == 10
    assert all(np.isfinite(v).all() for v in Store(tmp_path / "checkpoints").read(10).values() if v.dtype.kind == "f"
               and v.ndim)  # fmt: skip


def test_each_phase_compiles_once(monkeypatch):
    loop = Loop(Run([Train("t", 23, OBJECTIVE, optax.sgd(0.1), STREAM)], export=None),
                Settings(Parallel(devices=1), 5, 3, 4))  # fmt: skip
    compile_step, made = loop.place.compile, []

    def count(*args):
        made.append(compile_step(*args))
        return made[-1]

    monkeypatch.setattr(loop.place, "compile", count)
    result = loop()
    assert len(made) == 1 and int(result.state.step) == 23
    # compiled ahead of time: another shape is an error, not a second compilation
    state = loop.place.put_state(begin_phase(result.variables, loop.run.phases[0], 0))
    odd = training_stream(toy.arrays(), 8)
    with pytest.raises(TypeError):
        made[0](state, loop.place.put_batches({"main": jax.tree.map(lambda x: np.stack([x[None]] * 5), odd.batch(0))}),
                {}, loop.place.put_count(1))  # fmt: skip


def test_the_step_donates_its_state():
    loop = Loop(Run([Train("t", 2, OBJECTIVE, optax.adam(0.1), STREAM)], export=None), ONE)
    compile_step, states = loop.place.compile, []

    def watch(*args):
        compiled = compile_step(*args)

        def call(state, *rest):
            states.append(state)
            return compiled(state, *rest)

        return call

    loop.place.compile = watch
    loop()
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(states[0].params))


def test_a_save_before_the_next_step_is_not_changed_by_it(tmp_path):
    from checkpoints.store import Store

    store = Store(tmp_path)
    state = {"x": jnp.arange(1000.0)}
    step = jax.jit(lambda s: {"x": s["x"] * -1}, donate_argnums=0)
    store.save(1, state, {})
    state = step(state)
    store.close()
    np.testing.assert_array_equal(Store(tmp_path).read(1)["x"], np.arange(1000.0))


def test_the_transfer_guard_catches_an_implicit_transfer():
    loop = Loop(Run([Train("t", 1, OBJECTIVE, optax.sgd(0.1), STREAM)], export=None), ONE)
    with pytest.raises(Exception, match="[Dd]isallowed host-to-device"), loop.place.guard():
        jnp.ones(3) + np.ones(3)


def test_keys_depend_on_seed_phase_update_and_step_only():
    seen = []

    def forward(variables, batch, context):
        key = jax.random.key_data(context.key("noise")).astype(jnp.uint32)
        return {"z": batch["x"][:, 0] * variables["params"]["w"], "key": Shared(key)}, {}

    def loss(outputs, batch, context):
        low = outputs["key"].value.astype(jnp.float32)
        return Loss(example_elements(outputs["z"], batch), {}, {"k0": low[0], "k1": low[1]})

    objective = Objective(lambda rng, batch: {"params": {"w": jnp.ones(())}}, forward, loss)

    def keys(name, seed):
        record = Record()
        Loop(Run([Train(name, 4, objective, optax.sgd(0.1), STREAM)], export=None),
             Settings(Parallel(devices=1), 1, 1, 100), seed, record)()  # fmt: skip
        return [(h["k0"], h["k1"]) for h in record.history]

    seen = [keys("t", 0), keys("t", 0), keys("t", 1), keys("u", 0)]
    assert seen[0] == seen[1]
    assert len({k for row in seen[1:] for k in row}) == 12


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd", "momentum", "nesterov", "radam", "lamb"])
def test_every_named_optimiser_lowers_the_loss(name):
    record = Record()
    decay = 0.0 if name in ("adam", "radam") else 1e-4
    tx = Optimizer(name, 0.01, "cosine", warmup_steps=2, clip_norm=1.0, weight_decay=decay).build(40)
    Loop(Run([Train("t", 40, OBJECTIVE, tx, STREAM)], export=None), ONE, record=record)()
    assert record.history[-1]["loss"] < record.history[0]["loss"]


def test_accumulation_averages_gradients_before_clipping_and_stepping():
    result = run(Train("t", 4, OBJECTIVE, Optimizer("sgd", 0.1, accumulate=2).build(4), STREAM))
    params = by_hand(optax.sgd(0.1), 0)[0]
    for i in (0, 2):
        grads = []
        for j in (i, i + 1):
            batch = jax.tree.map(jnp.asarray, STREAM.batch(j))

            def loss(p, batch=batch):
                logits = Net().apply({"params": p}, batch["x"])
                values = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
                return jnp.sum(values * batch["mask"]) / jnp.sum(batch["mask"])

            grads.append(jax.grad(loss)(params))
        params = jax.tree.map(lambda p, a, b: p - 0.1 * (a + b) / 2, params, *grads)
    close(result.variables["params"], params, 1e-5)
    with pytest.raises(UserError, match="--optimizer.learning-rate must be positive, got 0"):
        Optimizer(learning_rate=0.0).build(1)


def test_wrong_runs_are_refused():
    with pytest.raises(ValueError, match="different names"):
        Loop(Run([Train("t", 1, OBJECTIVE, optax.sgd(0.1), STREAM)] * 2, export=None))
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        Train("t", 0, OBJECTIVE, optax.sgd(0.1), STREAM)


def test_trees_flatten_and_come_back():
    tree = {"a": {"b": np.ones(2), "c": (np.zeros(1), [np.arange(3)])}, "d": np.float32(1)}
    flat = flatten(tree)
    assert list(flat) == ["a/b", "a/c/0", "a/c/1/0", "d"]
    assert jax.tree.structure(unflatten(flat, tree)) == jax.tree.structure(tree)
    assert nest({"x/a/b": 1, "x/c": 2, "y/a": 3}, "x") == {"a": {"b": 1}, "c": 2}


def test_the_step_is_pure():
    phase = Train("t", 4, OBJECTIVE, optax.adam(0.1), STREAM)
    step = jax.jit(make_step(phase, {"main": 4}))
    batch = {"main": jax.tree.map(lambda x: jnp.asarray(x)[None, None], STREAM.batch(0))}
    state = begin_phase(by_variables(), phase, 3)
    one, two = step(state, batch, {}, 1), step(state, batch, {}, 1)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_array_equal(a, b)


def by_variables():
    return OBJECTIVE.init(jax.random.key(0), jax.tree.map(jnp.asarray, STREAM.batch(0)))


def test_mean_metrics_average_real_rows():
    held = evaluation_stream({"x": np.arange(10, dtype=np.float32)}, 4)
    evaluation = mean_metrics("m", held, ("x",), lambda v, b, c: {"x": b["x"]})
    seen = jax.tree.map(jnp.asarray, evaluation.init())
    for i in range(3):
        seen, _ = evaluation.update(seen, {}, jax.tree.map(jnp.asarray, held.batch(i)), Context(rng=jax.random.key(0)))
    assert evaluation.compute(jax.tree.map(np.asarray, seen))["x"] == pytest.approx(4.5)
