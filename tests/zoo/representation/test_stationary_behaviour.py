"""What the paper says of fixed prototypes, on the digits."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from data.images import digits
from zoo.base import Context, reduce_mean
from zoo.metrics.compatibility import compatibility_matrix
from zoo.nn.mlp import MLP
from zoo.representation import stationary as st


def test_models_trained_apart_meet_in_the_simplex():
    """Check (c): five pairs of networks that never met, on the digits, by cross-entropy alone."""
    data = digits()
    x, y = jnp.asarray(data["train"]["x"][:700]), jnp.asarray(data["train"]["label"][:700])
    batch = {"x": x, "label": y, "index": jnp.arange(len(x)), "mask": jnp.ones(len(x), bool)}
    context = Context(rng=jax.random.key(0))
    tx = optax.sgd(0.1, 0.9)

    def features(kind):
        network = st.StationaryNetwork(MLP((48,), 24), 16, kind)
        objective = st.classification(network)

        def one(key):
            variables = objective.init(key, batch)

            def value(params):
                outputs, _ = objective.forward({**variables, "params": params}, batch, context)
                return reduce_mean(objective.loss(outputs, batch, context).elements)

            def step(carry, _):
                params, state = carry
                update, state = tx.update(jax.grad(value)(params), state, params)
                return (optax.apply_updates(params, update), state), None

            params = jax.lax.scan(step, (variables["params"], tx.init(variables["params"])), None, 60)[0][0]
            embed = lambda images: network.apply({"params": params}, images, classify=False)  # noqa: E731
            return embed(x), embed(jnp.asarray(data["test"]["x"]))

        return jax.jit(lambda keys: jax.lax.map(one, keys))(jax.random.split(jax.random.key(0), 10))

    cross = {}
    for kind in ("simplex", "linear"):
        gallery, queries = features(kind)
        cross[kind] = []
        for a, b in ((0, 1), (2, 3), (4, 5), (6, 7), (8, 9)):
            m = compatibility_matrix([queries[a], queries[b]], [gallery[a], gallery[b]], data["test"]["label"], y, 10)
            assert m[1, 1] > 0.8
            cross[kind].append(m[1, 0] / m[0, 0])
    assert min(cross["simplex"]) > 0.8 and np.mean(cross["simplex"]) > 0.9 and max(cross["linear"]) < 0.4
