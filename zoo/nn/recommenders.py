"""Three recommender backbones as Linen modules, read top to bottom: LightGCN, NeuMF, Mult-VAE.

All are float32 in parameters; ``dtype`` is that of the computation.  Users and items are integer ids from 0.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int, Key, UInt

from zoo.nn.dropout import dropout, layer_keys

AnyKeys = Key[Array, "b"] | UInt[Array, "b 2"]


# --- pieces -----------------------------------------------------------------------------------------------------------


def bipartite_graph(users: Int[Array, "e"], items: Int[Array, "e"], num_users: int, num_items: int) -> dict[str, Array]:
    """The fixed edge list of LightGCN: each interaction once in either direction, with its ``D^-1/2 A D^-1/2`` weight.

    Nodes are users ``0..num_users-1`` and then items.  A pair listed twice counts twice; a node without edges has
    degree 0 and simply receives nothing.

    Returns:
      ``source``, ``target`` i32 ``[2 e]`` and ``weight`` f32 ``[2 e]``, for the ``constants`` collection.
    """
    nodes = num_users + num_items
    source = jnp.concatenate([users, items + num_users]).astype(jnp.int32)
    target = jnp.concatenate([items + num_users, users]).astype(jnp.int32)
    degree = jax.ops.segment_sum(jnp.ones(target.shape, jnp.float32), target, nodes)
    scale = jnp.where(degree > 0, jax.lax.rsqrt(jnp.maximum(degree, 1.0)), 0.0)
    return {"source": source, "target": target, "weight": scale[source] * scale[target]}


def propagate(
    h: Float[Array, "n d"], source: Int[Array, "e"], target: Int[Array, "e"], weight: Float[Array, "e"]
) -> Float[Array, "n d"]:
    """One aggregation: every node becomes the weighted sum of its neighbours."""
    return jax.ops.segment_sum(h[source] * weight[:, None].astype(h.dtype), target, h.shape[0])


def sample_unseen(key: Key[Array, ""] | UInt[Array, "2"], seen: Int[Array, "p"], num_items: int) -> Int[Array, ""]:
    """An item drawn uniformly from those a user has not seen: exact, with one draw and no rejection.

    ``seen`` holds the user's items in ascending order, padded at the end with -1.  The ``r``-th unseen item lies
    ``#{j : seen_j - j <= r}`` places further than ``r``.  For a user who has seen everything it is any item.
    """
    valid = seen >= 0
    unseen = num_items - jnp.sum(valid)
    r = jax.random.randint(key, (), 0, jnp.maximum(unseen, 1))
    before = seen - jnp.arange(seen.shape[0]) <= r
    return jnp.minimum(r + jnp.sum(valid & before), num_items - 1).astype(jnp.int32)


def multi_hot(ids: Int[Array, "b p"], num_items: int) -> Float[Array, "b i"]:
    """Padded id lists (padding is -1) as rows of zeros and ones."""
    rows = jnp.arange(ids.shape[0])[:, None]
    columns = jnp.where(ids < 0, num_items, ids)
    return jnp.zeros((ids.shape[0], num_items), jnp.float32).at[rows, columns].set(1.0, mode="drop")


def _fan_in_uniform(key, shape, dtype=jnp.float32):
    # U(-1/sqrt(fan_in), 1/sqrt(fan_in)), what the released NeuMF's linear layers start from
    bound = shape[0] ** -0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)


# --- LightGCN ---------------------------------------------------------------------------------------------------------


class LightGCN(nn.Module):
    """LightGCN: embeddings smoothed over the interaction graph, scores by inner product.

    He, Deng, Wang, Li, Zhang and Wang, SIGIR 2020, arXiv 2002.02126.  One table holds all nodes (xavier uniform); the
    representation is the mean of its ``layers + 1`` propagated versions.  With ``layers=0`` it is matrix factorisation.
    The edge list lives in the ``constants`` collection (:func:`bipartite_graph`).

    Attributes:
      num_users, num_items, dim, layers: sizes; 64 and 3 in the DSL brief.
      dtype: of the computation.
    """

    num_users: int
    num_items: int
    dim: int = 64
    layers: int = 3
    dtype: Any = jnp.float32

    def setup(self):
        shape = (self.num_users + self.num_items, self.dim)
        self.embedding = self.param("embedding", nn.initializers.xavier_uniform(), shape, jnp.float32)
        if self.layers:
            empty = {"source": jnp.int32, "target": jnp.int32, "weight": jnp.float32}
            self.graph = {k: self.variable("constants", k, jnp.zeros, (0,), t) for k, t in empty.items()}

    def nodes(self) -> Float[Array, "n d"]:
        """Representations of all nodes, users first."""
        h = jnp.asarray(self.embedding, self.dtype)
        total = h
        for _ in range(self.layers):
            h = propagate(h, self.graph["source"].value, self.graph["target"].value, self.graph["weight"].value)
            total = total + h
        return total / (self.layers + 1)

    def scores(self, users: Int[Array, "b"]) -> Float[Array, "b i"]:
        """Scores of every item for each user."""
        nodes = self.nodes()
        return nodes[users] @ nodes[self.num_users :].T

    def __call__(
        self, users: Int[Array, "b"], positive: Int[Array, "b"], negative: Int[Array, "b"]
    ) -> dict[str, Array]:
        """Scores of a positive and a negative item per user.

        Returns:
          ``positive``, ``negative`` ``[b]``; ``norm`` ``[b]``, half the squared length of the three *ego* embeddings;
          ``embedding`` ``[b, dim]``, the users' representations.
        """
        nodes = self.nodes()
        rows = (users, positive + self.num_users, negative + self.num_users)
        u, i, j = (nodes[r] for r in rows)
        ego = [self.embedding[r] for r in rows]
        return {
            "positive": jnp.sum(u * i, axis=-1),
            "negative": jnp.sum(u * j, axis=-1),
            "norm": 0.5 * sum(jnp.sum(jnp.square(e), axis=-1) for e in ego),
            "embedding": u,
        }


# --- NeuMF ------------------------------------------------------------------------------------------------------------


class NeuMF(nn.Module):
    """NeuMF: a generalised matrix factorisation beside an MLP, fused by one last linear layer.

    He, Liao, Zhang, Nie, Hu and Chua, WWW 2017, arXiv 1708.05031.  Initialisation is the released DSL code's:
    embeddings N(0, ``embedding_std``), linear layers uniform within one over the root of the fan-in.

    Attributes:
      num_users, num_items: sizes.
      dim: width of each of the four embedding tables.
      hidden: widths of the MLP after its input of ``2 dim``.
      dropout: after each hidden layer, with one key per example.
      embedding_std: 1 in the DSL code, 0.01 in the NeuMF paper.
      dtype: of the computation.
    """

    num_users: int
    num_items: int
    dim: int = 16
    hidden: Sequence[int] = (32, 16, 8)
    dropout: float = 0.2
    embedding_std: float = 1.0
    dtype: Any = jnp.float32

    def setup(self):
        table = nn.initializers.normal(self.embedding_std)
        users, items = (self.num_users, self.dim), (self.num_items, self.dim)
        self.gmf_user, self.gmf_item = self.param("gmf_user", table, users), self.param("gmf_item", table, items)
        self.mlp_user, self.mlp_item = self.param("mlp_user", table, users), self.param("mlp_item", table, items)
        widths = [2 * self.dim, *self.hidden]
        linear = lambda n, fan_in: nn.Dense(  # noqa: E731
            n,
            dtype=self.dtype,
            kernel_init=_fan_in_uniform,
            bias_init=lambda key, shape, dtype=jnp.float32: jax.random.uniform(
                key, shape, dtype, -(fan_in**-0.5), fan_in**-0.5
            ),
        )
        self.linear = [linear(n, fan_in) for fan_in, n in zip(widths[:-1], widths[1:], strict=True)]
        self.predict = linear(1, self.dim + widths[-1])

    def __call__(
        self, users: Int[Array, "b"], items: Int[Array, "b n"], keys: AnyKeys | None = None
    ) -> Float[Array, "b n"]:
        """Logits of ``n`` items for each user; ``keys`` (one per example) switch dropout on."""
        gmf = self.gmf_user[users][:, None, :] * self.gmf_item[items]
        u = jnp.broadcast_to(self.mlp_user[users][:, None, :], (*items.shape, self.dim))
        x = jnp.concatenate([u, self.mlp_item[items]], axis=-1).astype(self.dtype)
        for n, layer in enumerate(self.linear):
            x = nn.relu(layer(x))
            x = dropout(x, self.dropout, layer_keys(keys, n))
        return self.predict(jnp.concatenate([gmf.astype(self.dtype), x], axis=-1))[..., 0]

    def scores(self, users: Int[Array, "b"]) -> Float[Array, "b i"]:
        """Logits of every item for each user, without dropout."""
        return self(users, jnp.broadcast_to(jnp.arange(self.num_items), (users.shape[0], self.num_items)))


# --- Mult-VAE ---------------------------------------------------------------------------------------------------------


class MultVAE(nn.Module):
    """Mult-VAE: a variational autoencoder of a user's items with a multinomial likelihood.

    Liang, Krishnan, Hoffman and Jebara, WWW 2018, arXiv 1802.05814.  Items - hidden - (mean, log variance) - latent -
    hidden - items, tanh between; weights xavier normal, biases N(0, 0.001).

    Attributes:
      num_items, hidden, latent: sizes.
      dropout: of the L2-normalised input.
      dtype: of the computation.
    """

    num_items: int
    hidden: int = 600
    latent: int = 200
    dropout: float = 0.5
    dtype: Any = jnp.float32

    def setup(self):
        dense = lambda n: nn.Dense(  # noqa: E731
            n,
            dtype=self.dtype,
            kernel_init=nn.initializers.variance_scaling(1.0, "fan_avg", "normal"),
            bias_init=nn.initializers.normal(0.001),
        )
        self.encoder, self.posterior = dense(self.hidden), dense(2 * self.latent)
        self.decoder, self.output = dense(self.hidden), dense(self.num_items)

    def encode(
        self, x: Float[Array, "b i"], keys: AnyKeys | None = None
    ) -> tuple[Float[Array, "b d"], Float[Array, "b d"]]:
        """Mean and log variance of the posterior."""
        x = x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
        h = nn.tanh(self.encoder(dropout(x, self.dropout, keys).astype(self.dtype)))
        mean, log_variance = jnp.split(self.posterior(h), 2, axis=-1)
        return mean, log_variance

    def decode(self, z: Float[Array, "b d"]) -> Float[Array, "b i"]:
        """Logits over the items."""
        return self.output(nn.tanh(self.decoder(z)))

    def __call__(self, x: Float[Array, "b i"], keys: AnyKeys | None = None) -> dict[str, Array]:
        """Reconstructs multi-hot rows; ``keys`` (one per example) switch dropout and sampling on.

        Returns:
          ``logits`` ``[b, i]``, ``mean``, ``log_variance`` ``[b, latent]``.
        """
        drop, noise = layer_keys(keys, 0), layer_keys(keys, 1)
        mean, log_variance = self.encode(x, drop)
        z = mean
        if noise is not None:
            eps = jax.vmap(lambda k: jax.random.normal(k, (self.latent,)))(noise)
            z = mean + (jnp.exp(0.5 * log_variance.astype(jnp.float32)) * eps).astype(mean.dtype)
        return {"logits": self.decode(z), "mean": mean, "log_variance": log_variance}

    def scores(self, items: Int[Array, "b p"]) -> Float[Array, "b i"]:
        """Logits over the items from padded lists of known ones (padding is -1); works for users never seen."""
        return self(multi_hot(items, self.num_items))["logits"]
