"""Modules that name their axes: the trainer spreads them without rules of its own, and finds them again."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy
from flax import linen as nn
from jax.sharding import PartitionSpec as P

from checkpoints.store import Store
from data.stream import training_stream
from trainers.loop import Loop, Settings
from trainers.parallel import Parallel, Placement
from trainers.phases import Train
from trainers.recipe import Run
from trainers.record import FileRecord
from trainers.trees import flatten, to_host
from zoo.nn.attention import MultiHeadAttention
from zoo.nn.partitioning import EMBED, HEADS, MLP, VOCAB, Dense, partition_spec
from zoo.objectives import supervised


class Network(nn.Module):
    """A transformer block on four tokens of three numbers, and a head."""

    @nn.compact
    def __call__(self, x):
        x = Dense(16, (None, EMBED), name="inputs")(x.reshape(-1, 4, 3))
        x = x + MultiHeadAttention(2, name="attention")(x)
        x = x + Dense(16, (MLP, EMBED), name="down")(nn.gelu(Dense(32, (EMBED, MLP), name="up")(x)))
        return Dense(4, (EMBED, None), name="head")(x.mean(1))


def loop(parallel, folder=None, steps=12):
    stream = training_stream(toy.arrays(), 16)
    # not Adam: the bias of the keys has no gradient but rounding, which Adam would make as large as any other
    phase = Train("train", steps, supervised(Network()), optax.sgd(1e-1, momentum=0.9), stream)
    settings = Settings(parallel, 1, log_every=4, save_every=4)
    run = Run([phase], export=None)
    if folder is None:
        return Loop(run, settings)
    folder.mkdir(exist_ok=True)
    record = FileRecord(folder, progress=False)
    return Loop(run, settings, 0, record, Store(folder / "checkpoints"), folder)


SPREAD = Parallel(fsdp=2, tensor=2, fsdp_minimum=1)


@pytest.fixture(scope="module")
def single():
    return flatten(to_host(loop(Parallel(devices=1))().state))


def test_training_over_fsdp_and_tensor_equals_one_device(single):
    spread = loop(SPREAD)
    result = spread()
    for path, value in flatten(to_host(result.state)).items():
        np.testing.assert_allclose(value, single[path], rtol=1e-5, atol=1e-5, err_msg=path)
    kernels = {
        "params/attention/query/kernel": P("fsdp", "tensor"), "params/attention/out/kernel": P("tensor", "fsdp"),
        "params/up/kernel": P("fsdp", "tensor"), "params/up/bias": P("tensor"), "params/head/kernel": P("fsdp", None),
    }  # fmt: skip
    moments = {p: s for p, s in flatten(result.state).items() if p.startswith("optimizer/")}
    for path, spec in kernels.items():
        assert flatten(result.state)[path].sharding.spec == spec, path
        (moment,) = [x for p, x in moments.items() if p.endswith(path.removeprefix("params"))]
        assert moment.sharding.spec == spec, path


def test_a_resumed_run_is_spread_as_before_and_ends_bitwise_the_same(tmp_path):
    whole = to_host(loop(SPREAD, tmp_path / "whole")().state)
    first = loop(SPREAD, tmp_path / "cut")
    compiled = first.record.log

    class Stop(Exception):
        """Ends the run as a kill would."""

    def stop(phase, step, values):
        compiled(phase, step, values)
        if step >= 8:
            raise Stop

    first.record.log = stop
    with pytest.raises(Stop):
        first()
    again = loop(SPREAD, tmp_path / "cut")
    state = again().state
    assert again.place.names["attention/query/kernel"] == (EMBED, HEADS)
    assert flatten(state)["params/up/kernel"].sharding.spec == P("fsdp", "tensor")
    jax.tree.map(np.testing.assert_array_equal, to_host(state), whole)


def test_names_lead_to_mesh_axes_once_and_only_where_they_divide():
    mesh = Placement(Parallel(fsdp=2, tensor=2)).mesh
    assert partition_spec((EMBED, VOCAB), (4, 6), mesh) == P("fsdp", "tensor")
    assert partition_spec((EMBED, EMBED), (4, 6), mesh) == P("fsdp", None)
    assert partition_spec((HEADS, MLP), (4, 6), mesh) == P("tensor", None)
    assert partition_spec((EMBED, MLP), (3, 6), mesh) == P(None, "tensor")
    assert partition_spec((None, "other"), (4, 6), mesh) == P(None, None)
    lone = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    assert partition_spec((EMBED, MLP), (8, 8), lone) == P(None, None)


def test_parameters_without_names_are_spread_by_their_largest_axis():
    place = Placement(Parallel(fsdp=4, tensor=2, fsdp_minimum=1))
    place.names = {"body/kernel": (None, MLP), "odd/kernel": (EMBED, None)}
    assert place.leaf_sharding("params/body/kernel", (8, 8)).spec == P(None, "tensor")
    assert place.leaf_sharding("params/odd/kernel", (3, 8)).spec == P(None, "fsdp")
    assert place.leaf_sharding("params/plain/kernel", (4, 8)).spec == P(None, "fsdp")
    assert place.leaf_sharding("collections/memory/body/kernel", (8, 8)).spec == P()


def test_attention_is_softmax_of_scaled_scores():
    from zoo.nn.attention import attention, padding_to_mask

    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(2, 3, 4, 5)), rng.normal(size=(2, 6, 2, 5)), rng.normal(size=(2, 6, 2, 5))
    bias = rng.normal(size=(1, 4, 3, 6))
    real = np.arange(6) < np.array([4, 6])[:, None]
    for causal, window, scale in ((False, None, None), (True, None, 0.3), (True, 2, None)):
        out = np.zeros((2, 3, 4, 5))
        for b in range(2):
            for n in range(4):
                for t in range(3):
                    scores = np.full(6, -np.inf)
                    for s in range(6):
                        seen = real[b, s] and not (causal and s > t) and not (window and s <= t - window)
                        if seen:
                            factor = 5**-0.5 if scale is None else scale
                            scores[s] = factor * q[b, t, n] @ k[b, s, n // 2] + bias[0, n, t, s]
                    weights = np.exp(scores - scores.max())
                    out[b, t, n] = (weights / weights.sum()) @ v[b, :, n // 2]
        arrays = [jnp.asarray(a, jnp.float32) for a in (q, k, v)]
        mask = padding_to_mask(jnp.asarray(real))
        found = attention(*arrays, mask, jnp.asarray(bias, jnp.float32), causal, scale, window)
        np.testing.assert_allclose(found, out, rtol=1e-4, atol=1e-5)
    assert padding_to_mask(None) is None


def test_multi_head_attention_is_projections_around_attention():
    module = MultiHeadAttention(2, head_dim=3, features=5, use_bias=False)
    x, context = jax.random.normal(jax.random.key(0), (2, 4, 6)), jax.random.normal(jax.random.key(1), (2, 7, 8))
    variables = nn.meta.unbox(module.init(jax.random.key(2), x, context))
    p = jax.tree.map(np.asarray, variables["params"])
    assert {n: v["kernel"].shape for n, v in p.items()} == {
        "query": (6, 6),
        "key": (8, 6),
        "value": (8, 6),
        "out": (6, 5),
    }
    assert "bias" in p["out"] and "bias" not in p["query"]
    out = []
    for b in range(2):
        q, k, v = x[b] @ p["query"]["kernel"], context[b] @ p["key"]["kernel"], context[b] @ p["value"]["kernel"]
        heads = []
        for h in range(2):
            at = slice(3 * h, 3 * h + 3)
            heads.append(jax.nn.softmax(q[:, at] @ k[:, at].T / 3**0.5) @ v[:, at])
        out.append(np.concatenate(heads, -1) @ p["out"]["kernel"] + p["out"]["bias"])
    np.testing.assert_allclose(module.apply(variables, x, context), np.stack(out), rtol=1e-4, atol=1e-5)
    keys = jax.random.split(jax.random.key(3), 2)
    dropped = module.clone(attention_dropout=0.5)
    one = dropped.apply(variables, x, context, keys=keys)
    assert not np.allclose(one, np.stack(out), atol=1e-3)
    np.testing.assert_allclose(
        dropped.apply(variables, x[1:], context[1:], keys=keys[1:]), one[1:], rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(dropped.apply(variables, x, context), np.stack(out), rtol=1e-4, atol=1e-5)


def test_every_option_of_multi_head_attention_counts():
    module = MultiHeadAttention(2, head_dim=5, scale=0.7, out_bias=False)
    x = jax.random.normal(jax.random.key(0), (2, 4, 6))
    variables = nn.meta.unbox(module.init(jax.random.key(1), x))
    p = jax.tree.map(lambda a: np.asarray(a) + 0.1, variables["params"])
    assert {n: v["kernel"].shape for n, v in p.items()} == {
        "query": (6, 10), "key": (6, 10), "value": (6, 10), "out": (10, 6)
    }  # fmt: skip
    assert "bias" in p["query"] and "bias" not in p["out"]
    real = np.arange(4) < np.array([4, 3])[:, None]
    bias = np.asarray(jax.random.normal(jax.random.key(2), (1, 2, 4, 4)))
    out = []
    for b in range(2):
        q, k, v = (np.asarray(x[b]) @ p[n]["kernel"] + p[n]["bias"] for n in ("query", "key", "value"))
        seen = np.tril(np.ones((4, 4), bool)) & real[b]
        heads = []
        for h in range(2):
            at = slice(5 * h, 5 * h + 5)
            heads.append(jax.nn.softmax(np.where(seen, 0.7 * q[:, at] @ k[:, at].T + bias[0, h], -np.inf)) @ v[:, at])
        out.append(np.concatenate(heads, -1) @ p["out"]["kernel"])
    found = module.apply({"params": p}, x, mask=jnp.asarray(real)[:, None, None], bias=jnp.asarray(bias), causal=True)
    np.testing.assert_allclose(found, np.stack(out), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="num_heads = 4 does not divide the width 6; give head_dim"):
        MultiHeadAttention(4).init(jax.random.key(0), x)


def test_names_are_learned_without_their_collection_and_boxes_come_off():
    place = Placement(Parallel(fsdp=2, tensor=2, fsdp_minimum=64))
    boxed = Network().init(jax.random.key(0), jnp.zeros((1, 12)))
    plain = place.name_axes(boxed)
    assert all(isinstance(x, jax.Array) for x in flatten(plain).values())
    assert place.names["attention/out/kernel"] == (HEADS, EMBED) and place.names["up/bias"] == (MLP,)
    assert place.leaf_sharding("params/up/kernel", (16, 32)).spec == P("fsdp", "tensor")
    assert place.leaf_sharding("optimizer/0/trace/up/kernel", (16, 32)).spec == P("fsdp", "tensor")
    assert place.leaf_sharding("params/up/bias", (32,)).spec == P()  # too small to be worth it
    assert place.leaf_sharding("params/up/kernel", (4, 16, 32)).spec == P(None, None, "fsdp")  # another array's name


def test_an_axis_of_size_one_leaves_a_parameter_to_its_largest_axis():
    place = Placement(Parallel(fsdp=8, fsdp_minimum=1))
    place.names = {"body/kernel": (None, MLP)}
    assert place.leaf_sharding("params/body/kernel", (16, 8)).spec == P("fsdp")


def test_leaves_without_names_are_replicated():
    from zoo.nn.norm import BatchNorm
    from zoo.nn.partitioning import abstract_variables, shardings

    class Both(nn.Module):
        @nn.compact
        def __call__(self, x):
            return BatchNorm(name="norm")(Dense(8, (EMBED, MLP), name="dense")(x))

        def example_inputs(self, batch=1):
            return {"x": jax.ShapeDtypeStruct((batch, 4), jnp.float32)}

    found = shardings(abstract_variables(Both()), Placement(Parallel(fsdp=2, tensor=2)).mesh)
    assert {p: s.spec for p, s in found.items()} == {
        "batch_stats/norm/mean": P(), "batch_stats/norm/var": P(), "params/norm/scale": P(), "params/norm/bias": P(),
        "params/dense/kernel": P("fsdp", "tensor"), "params/dense/bias": P("tensor"),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("dtype", "shape", "biased", "capability", "used"),
    [
        (jnp.bfloat16, (2, 5, 2, 64), False, "9.0", "cudnn"),
        (jnp.float16, (2, 4, 2, 128), True, "8.0", "cudnn"),
        (jnp.bfloat16, (2, 5, 2, 64), True, "9.0", "xla"),  # no gradient at odd lengths
        (jnp.float32, (2, 4, 2, 64), False, "9.0", "xla"),
        (jnp.bfloat16, (2, 4, 2, 60), False, "9.0", "xla"),
        (jnp.bfloat16, (2, 4, 2, 136), False, "9.0", "xla"),
        (jnp.bfloat16, (2, 4, 2, 64), False, "7.5", "xla"),
        (jnp.bfloat16, (2, 4, 2, 64), False, "gfx90a", "xla"),
    ],
)
def test_the_fused_kernel_is_used_only_where_it_exists(monkeypatch, dtype, shape, biased, capability, used):
    from zoo.nn.attention import attention

    class Gpu:
        compute_capability = capability

    seen = []
    real = jax.nn.dot_product_attention

    def record(*args, implementation, **kwargs):
        seen.append(implementation)
        return real(*args, implementation="xla", **kwargs)

    monkeypatch.setattr(jax.nn, "dot_product_attention", record)
    x = jnp.ones(shape, dtype)
    mask = jnp.ones((1, 1, 1, shape[1]), bool) if biased else None
    attention(x, x, x, mask)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [Gpu()])
    attention(x, x, x, mask)
    assert seen == ["xla", used]
