"""Elements, reducers and loss transformations: hand-computed values, masks, gradients, composition errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo import base
from zoo.base import CompositionError, Context, Elements, Loss, LossTransformation, Objective

BATCH = {"index": jnp.arange(4), "mask": jnp.array([True, True, True, False])}
CONTEXT = Context(rng=jax.random.key(0), batch=BATCH)
PAIRS = base.elements(
    jnp.array([1.0, 3.0, 5.0, 7.0]),
    jnp.array([[0, 1], [0, 2], [2, 1], [1, 0]]),
    jnp.array([True, True, True, False]),
    "pair",
)


def doubled(units=("example",), requires=(), emits=None, name="doubled"):
    """Doubles values and counts its calls."""
    update = lambda e, s, c: (e.replace(values=2 * e.values), s + 1)  # noqa: E731
    return LossTransformation(lambda n: jnp.zeros((), jnp.int32), update, units, requires, emits, name)


def host(unit="example", provides=("index",), name="host"):
    """An objective of which only the contract matters."""
    return Objective(lambda r, b: {}, lambda v, b, c: ({}, {}), lambda o, b, c: Loss(None), unit, provides, name=name)


def test_example_elements_hold_zero_in_padded_rows():
    e = base.example_elements(jnp.array([1.0, 2.0, 3.0, jnp.nan]), BATCH)
    assert e.values.tolist() == [1, 2, 3, 0] and e.mask.tolist() == [True, True, True, False]
    assert e.index.tolist() == [[0], [1], [2], [3]] and e.unit == "example"


@pytest.mark.parametrize(("reduce", "expected"), [("mean", 3.0), ("sum", 9.0), ("nonzero_mean", 3.0)])
def test_reducers_ignore_padding(reduce, expected):
    assert float(base.REDUCERS[reduce](PAIRS)) == expected
    assert float(base.REDUCERS[reduce](PAIRS.replace(mask=jnp.zeros(4, bool)))) == 0.0


def test_nonzero_mean_divides_by_active_elements():
    e = PAIRS.replace(values=jnp.array([0.0, 3.0, 5.0, 7.0]))
    assert float(base.reduce_nonzero_mean(e)) == 4.0
    assert float(base.reduce_mean(e)) == pytest.approx(8 / 3)


@pytest.mark.parametrize(("how", "expected"), [("mean", [2.0, 0.0, 5.0, 0.0]), ("sum", [4.0, 0.0, 5.0, 0.0])])
def test_pairs_reduce_to_their_anchors(how, expected):
    e = base.to_examples(PAIRS, 4, how)
    assert e.values.tolist() == expected
    assert e.mask.tolist() == [True, False, True, False] and e.unit == "example"
    with pytest.raises(ValueError, match="how must be 'mean' or 'sum', got 'max'"):
        base.to_examples(PAIRS, 4, "max")


def test_elements_check_unit_and_shapes():
    with pytest.raises(ValueError, match="unit must be one of example, pair, triplet, token, batch; got 'quad'"):
        base.elements(jnp.ones(2), jnp.zeros((2, 4), int), jnp.ones(2, bool), "quad")
    with pytest.raises(ValueError, match=r"index \[n, 3\]"):
        base.elements(jnp.ones(2), jnp.zeros((2, 2), int), jnp.ones(2, bool), "triplet")


def test_chain_applies_in_order_and_keeps_every_state():
    plus = LossTransformation(lambda n: (), lambda e, s, c: (e.replace(values=e.values + 1), s), name="plus")
    both = base.chain(plus, doubled())
    e = base.example_elements(jnp.array([1.0, 2.0, 3.0, 4.0]), BATCH)
    out, state = both.update(e, both.init(4), CONTEXT)
    assert out.values[:3].tolist() == [4, 6, 8] and int(state[1]) == 1
    out, _ = base.chain(doubled(), plus).update(e, (jnp.int32(0), ()), CONTEXT)
    assert out.values[:3].tolist() == [3, 5, 7]


def test_chain_follows_units_and_requirements():
    t = base.chain(base.examples(), doubled(requires=("label",)))
    assert t.units == ("example", "pair", "triplet", "token") and t.emits == "example" and t.requires == ("label",)
    out, _ = t.update(PAIRS, t.init(4), CONTEXT)
    assert out.unit == "example" and out.values.tolist() == [4, 0, 10, 0]
    with pytest.raises(CompositionError, match="no unit is accepted by all of a, b"):
        base.chain(doubled(("pair",), name="a"), doubled(("token",), name="b"))
    with pytest.raises(CompositionError, match="b takes 'pair', but the chain hands it unit 'example'"):
        base.chain(base.examples(), doubled(("pair",), name="b"))


def test_masked_touches_chosen_elements_only():
    t = base.masked(doubled(), lambda e, c: e.values > 1.5)
    e = base.example_elements(jnp.array([1.0, 2.0, 3.0, 9.0]), BATCH)
    out, _ = t.update(e, t.init(4), CONTEXT)
    assert out.values.tolist() == [1, 4, 6, 0] and out.mask.tolist() == e.mask.tolist()
    with pytest.raises(
        CompositionError, match="masked\\(\\) needs a transformation that keeps the unit; examples emits"
    ):
        base.masked(base.examples(), lambda e, c: e.mask)


@pytest.mark.parametrize(("s", "factor"), [(0.0, 1.0), (0.25, 1.25), (1.0, 2.0)])
def test_scheduled_blends_and_always_updates_state(s, factor):
    t = base.scheduled(doubled(), lambda step: s)
    e = base.example_elements(jnp.array([1.0, 2.0, 3.0, 9.0]), BATCH)
    out, state = t.update(e, t.init(4), CONTEXT)
    np.testing.assert_allclose(out.values, factor * np.array([1, 2, 3, 0]))
    assert int(state) == 1
    with pytest.raises(CompositionError, match="scheduled"):
        base.scheduled(base.examples(), lambda step: 1.0)


def test_misfits_name_what_would_fit():
    assert base.misfit(doubled(), host()) is None
    pairwise = host("pair", name="triples")
    with pytest.raises(CompositionError, match=r"doubled acts on 'example', but triples yields elements of unit 'pair'"
                       r"; reduce first: chain\(examples\(\), doubled\); it fits host"):  # fmt: skip
        base.check_fit(doubled(), pairwise, [host(), pairwise])
    with pytest.raises(
        CompositionError, match="requires 'views', which host does not provide \\(it provides 'index'\\)"
    ):
        base.check_fit(doubled(requires=("views",)), host())
    assert base.check_fit(base.chain(base.examples(), doubled()), pairwise)


def test_total_loss_adds_terms_and_logs_the_untransformed_loss():
    e = base.example_elements(jnp.array([1.0, 2.0, 3.0, 9.0]), BATCH)
    loss = Loss(e, {"extra": jnp.float32(0.5)}, {"seen": jnp.float32(7)})
    total, state, metrics = base.total_loss(loss, doubled(), jnp.int32(0), CONTEXT)
    assert float(total) == 4.5 and int(state) == 1
    assert list(metrics) == ["loss", "loss_before", "extra", "seen"]
    assert [float(v) for v in metrics.values()] == [4.5, 2.0, 0.5, 7.0]
    total, _, metrics = base.total_loss(Loss(None, {"a": jnp.float32(2)}), None, (), CONTEXT)
    assert float(total) == 2.0


def test_no_gradient_enters_a_transformations_state():
    t = LossTransformation(lambda n: jnp.zeros(4), lambda e, s, c: (e, s + e.values), name="keeps")

    def scalar(x):
        _, state, _ = base.total_loss(Loss(base.example_elements(x, BATCH)), t, jnp.zeros(4), CONTEXT)
        return jnp.sum(state)

    assert jax.grad(scalar)(jnp.ones(4)).tolist() == [0, 0, 0, 0]


def test_example_keys_depend_on_the_global_row_only():
    context = Context(rng=jax.random.key(3))
    whole = jax.random.key_data(context.example_keys({"row": jnp.arange(8)}, "noise"))
    shard = jax.random.key_data(context.example_keys({"row": jnp.arange(4, 8)}, "noise"))
    np.testing.assert_array_equal(whole[4:], shard)
    assert len({tuple(k) for k in np.asarray(whole)}) == 8
    other = jax.random.key_data(context.example_keys({"row": jnp.arange(8)}, "views"))
    assert not (np.asarray(other) == np.asarray(whole)).all(1).any()
    np.testing.assert_array_equal(jax.random.key_data(context.example_keys({"index": jnp.arange(8)}, "noise")), whole)


def test_named_keys_are_stable_across_processes():
    a, b = base.named_key(jax.random.key(0), "a"), base.named_key(jax.random.key(0), "b")
    assert jax.random.key_data(a).tolist() != jax.random.key_data(b).tolist()
    # pinned: a change would silently break resumed runs
    pinned = jax.random.fold_in(jax.random.key(0), 0xE40C292C)
    assert jax.random.key_data(a).tolist() == jax.random.key_data(pinned).tolist()


def test_epochs_are_counted_from_steps():
    for step, epoch, start in ((0, 0, True), (4, 0, False), (5, 1, True), (11, 2, False)):
        c = Context(rng=jax.random.key(0), step=step, steps_per_epoch=5)
        assert int(c.epoch) == epoch and bool(c.epoch_start) is start


def test_objectives_refuse_unknown_units_and_reducers():
    with pytest.raises(ValueError, match="got 'quad'"):
        host("quad")
    with pytest.raises(ValueError, match="reduce must be one of"):
        Objective(lambda r, b: {}, lambda v, b, c: ({}, {}), lambda o, b, c: Loss(None), reduce="median")


def test_elements_survive_jax_transformations():
    doubled_values = jax.jit(lambda e: e.replace(values=e.values * 2))(PAIRS)
    assert isinstance(doubled_values, Elements) and doubled_values.unit == "pair"
    assert jax.tree.map(lambda x: None, PAIRS).unit == "pair"
    batched = jax.vmap(lambda s: base.reduce_mean(PAIRS.replace(values=s * PAIRS.values)))(jnp.arange(3.0))
    assert batched.tolist() == [0, 3, 6]


def test_unknown_names_get_the_nearest():
    assert base.suggest("dbmp", ["dbpm", "teen"], "method") == "unknown method 'dbmp'; did you mean 'dbpm'?"
    assert base.suggest("zzz", ["dbpm", "teen"], "method") == "unknown method 'zzz'; known: dbpm, teen"
