"""The averaging encoder, from its definition: padding does not count, weights of words do."""

import jax
import jax.numpy as jnp
import numpy as np

from zoo.nn.bag_of_words import BagOfWords
from zoo.nn.partitioning import unbox


def test_the_mean_of_real_words_through_one_hidden_layer():
    module = BagOfWords(vocab_size=7, features=3, width=4, pad_id=2)
    ids = jnp.array([[1, 5, 2, 2], [3, 3, 6, 1], [2, 2, 2, 2]])
    variables = module.init(jax.random.key(0), ids)
    p = jax.tree.map(np.asarray, unbox(variables["params"]))
    p["words"]["weight"] = np.linspace(0.5, 2, 7, dtype=np.float32)
    p["body"]["hidden1"]["bias"] = np.arange(4, dtype=np.float32) / 3
    found = module.apply({"params": p}, ids)
    for row, words in zip(found, ([1, 5], [3, 3, 6, 1], []), strict=True):
        mean = np.zeros(4)
        for w in words:
            mean += p["words"]["weight"][w] * p["words"]["word"]["embedding"][w] / len(words)
        hidden = np.tanh(mean @ p["body"]["hidden1"]["kernel"] + p["body"]["hidden1"]["bias"])
        np.testing.assert_allclose(row, hidden @ p["body"]["out"]["kernel"] + p["body"]["out"]["bias"], rtol=1e-5,
                                   atol=1e-6)  # fmt: skip
    assert found.shape == (3, 3) and found.dtype == jnp.float32
    assert set(module.init(jax.random.key(0), **{k: jnp.zeros(v.shape, v.dtype) for k, v in
                                                 module.example_inputs().items()})) == {"params"}  # fmt: skip
