"""The recommenders' objectives: what is minimised over LightGCN, NeuMF and Mult-VAE.

Batches hold users and items by id; the tables that never change (edges, each user's known items) live in ``constants``.
Negatives are drawn inside ``forward`` from per-example keys, so every way of sharding draws the same ones.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from zoo.base import Loss, Objective, batch_mask, example_elements
from zoo.losses.ranking import bpr_loss, gaussian_kl, linear_anneal, multinomial_nll, pointwise_bce
from zoo.nn.recommenders import LightGCN, MultVAE, NeuMF, bipartite_graph, multi_hot, sample_unseen


def bpr(
    module: LightGCN,
    users: Int[Array, "e"],
    items: Int[Array, "e"],
    seen: Int[Array, "u p"],
    *,
    regulariser: float = 1e-4,
    name: str = "lightgcn",
) -> Objective:
    """BPR over LightGCN (matrix factorisation with ``layers=0``), one sampled negative per interaction.

    Loss: the mean of ``softplus(s_neg - s_pos)``, and ``regulariser`` times the mean half squared length of the three
    ego embeddings as a batch term.  Batch fields: ``user``, ``item`` i32 ``[B]``.

    Args:
      module: the backbone.
      users, items: the training interactions (the graph's edges).
      seen: each user's training items, ascending, padded with -1.
      regulariser: weight of the squared embeddings.
      name: for messages.
    """

    def init(rng, batch):
        constants = {"seen": jnp.asarray(seen, jnp.int32)}
        if module.layers:
            graph = bipartite_graph(jnp.asarray(users), jnp.asarray(items), module.num_users, module.num_items)
            constants.update(graph)
        row = jnp.zeros(1, jnp.int32)
        return {"params": module.init(rng, row, row, row)["params"], "constants": constants}

    def forward(variables, batch, context):
        known = variables["constants"]["seen"][batch["user"]]
        keys = context.example_keys(batch, "negative")
        negative = jax.vmap(lambda k, s: sample_unseen(k, s, module.num_items))(keys, known)
        return module.apply(_own(variables), batch["user"], batch["item"], negative), {}

    def loss(outputs, batch, context):
        ranked = bpr_loss(outputs["positive"], outputs["negative"])
        norm = regulariser * _masked_mean(outputs["norm"], batch)
        correct = (outputs["positive"] > outputs["negative"]).astype(jnp.float32)
        return Loss(
            example_elements(ranked, batch), {"regulariser": norm}, {"pair_accuracy": _masked_mean(correct, batch)}
        )

    return Objective(init, forward, loss, provides=("embedding", "index"), gathers=("mask", "index"), name=name)


def neumf(module: NeuMF, seen: Int[Array, "u p"], *, negatives: int | Int[Array, "u n"] = 100) -> Objective:
    """Cross-entropy over NeuMF: each positive against the mean over its user's negatives.

    Args:
      module: the backbone.
      seen: each user's training items, ascending, padded with -1.
      negatives: a fixed table of negative items per user ``[u, n]`` (the DSL code's), or how many to draw afresh per
        interaction.  Batch fields: ``user``, ``item`` i32 ``[B]``.
    """
    fixed = not isinstance(negatives, int)

    def init(rng, batch):
        constants = {"seen": jnp.asarray(seen, jnp.int32)}
        if fixed:
            constants["negatives"] = jnp.asarray(negatives, jnp.int32)
        params = module.init(rng, jnp.zeros(1, jnp.int32), jnp.zeros((1, 1), jnp.int32))["params"]
        return {"params": params, "constants": constants}

    def forward(variables, batch, context):
        constants = variables["constants"]
        if fixed:
            others = constants["negatives"][batch["user"]]
        else:
            keys = jax.vmap(lambda k: jax.random.split(k, negatives))(context.example_keys(batch, "negative"))
            known = constants["seen"][batch["user"]]
            draw = jax.vmap(jax.vmap(lambda k, s: sample_unseen(k, s, module.num_items), (0, None)))
            others = draw(keys, known)
        items = jnp.concatenate([batch["item"][:, None], others], axis=1)
        drop = context.example_keys(batch, "dropout") if context.train else None
        logits = module.apply({"params": variables["params"]}, batch["user"], items, drop)
        return {"positive": logits[:, 0], "negatives": logits[:, 1:], "logits": logits}, {}

    def loss(outputs, batch, context):
        values = pointwise_bce(outputs["positive"], outputs["negatives"])
        best = jnp.max(outputs["negatives"], axis=-1)
        first = _masked_mean((outputs["positive"] > best).astype(jnp.float32), batch)
        return Loss(example_elements(values, batch), {}, {"first_of_all": first})

    return Objective(init, forward, loss, provides=("logits", "index"), gathers=("mask", "index"), name="neumf")


def multvae(module: MultVAE, *, kl_cap: float = 0.2, kl_steps: int = 200_000) -> Objective:
    """The multinomial evidence bound over Mult-VAE: likelihood per user, ``beta`` times the mean KL as a batch term.

    ``beta = min(kl_cap, step / kl_steps)``.  Batch field: ``items`` i32 ``[B, P]``, a user's items padded with -1.
    """

    def init(rng, batch):
        return {"params": module.init(rng, jnp.zeros((1, module.num_items)))["params"]}

    def forward(variables, batch, context):
        x = multi_hot(batch["items"], module.num_items)
        keys = context.example_keys(batch, "latent") if context.train else None
        outputs = module.apply({"params": variables["params"]}, x, keys)
        # both parts of the loss belong to one user: computed here, the wide logits need not be gathered
        nll = multinomial_nll(outputs["logits"], x)
        kl = gaussian_kl(outputs["mean"], outputs["log_variance"])
        return {"nll": nll, "kl": kl, "embedding": outputs["mean"]}, {}

    def loss(outputs, batch, context):
        beta = linear_anneal(context.step, kl_steps, kl_cap)
        kl = _masked_mean(outputs["kl"], batch)
        return Loss(example_elements(outputs["nll"], batch), {"kl": beta * kl}, {"beta": beta})

    return Objective(init, forward, loss, provides=("embedding", "index"), gathers=("mask", "index"), name="multvae")


def _own(variables):
    # what the module itself reads: its parameters and its edges
    graph = {k: v for k, v in variables.get("constants", {}).items() if k in ("source", "target", "weight")}
    return {"params": variables["params"], **({"constants": graph} if graph else {})}


def _masked_mean(values: Float[Array, "b"], batch) -> Float[Array, ""]:
    mask = batch_mask(batch)
    return jnp.sum(jnp.where(mask, values, 0.0)) / jnp.maximum(jnp.sum(mask), 1)
