"""Recipe: a recommender trained under a fixed sparse parameter budget, judged by full ranking."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from data.dataset import Dataset
from data.interactions import load_interactions, low_rank_interactions, popularity
from data.stream import evaluation_stream, training_stream
from trainers import recipe as base
from trainers.bare_update import bare_update, carry
from trainers.phases import Evaluate, Train
from trainers.recipe import Benchmark, Data, Export, Optimizer, Run, UserError
from zoo.base import Context, Objective, suggest
from zoo.metrics.ranking import ranking_compute, ranking_init, ranking_update
from zoo.nn.recommenders import LightGCN, MultVAE, NeuMF
from zoo.recommendation import dsl, hosts

KS = (20,)
ARMS = ("dynamic", "static", "popular")


@dataclass(frozen=True)
class Recipe(base.Recipe):
    """A sparse recommender: trains under a mask that explores, evaluates Recall, NDCG, precision and hit rate at 20.

    The defaults are BPR matrix factorisation on generated low-rank interactions.  The paper's LightGCN: --backbone
    lightgcn --dim 64 --batch-size 1024 --optimizer.learning-rate 0.01 --optimizer.schedule cosine
    --optimizer.final-fraction 0.01 --update-interval 3000; Mult-VAE: --backbone multvae --batch-size 16
    --optimizer.learning-rate 0.001; NeuMF: --backbone neumf --batch-size 512 --optimizer.learning-rate 0.0001
    --update-interval 2000.
    """

    data: Data = Data("low_rank")
    """low_rank (generated), or your own by --data.path: CSV/TSV with a header, LightGCN lines, or a folder of those;
    --data.split random (default) or leave_two_out"""
    optimizer: Optimizer = Optimizer(learning_rate=5e-3)
    """the optimiser that the sparse training wraps"""
    steps: int = 3000
    """training steps"""
    batch_size: int = 512
    """interactions (Mult-VAE: users) per step"""
    backbone: Literal["mf", "lightgcn", "neumf", "multvae"] = "mf"
    """what is made sparse: the embedding table (mf, lightgcn), the two MLP tables (neumf), every parameter (multvae)"""
    dim: int = 32
    """embedding size (neumf: of each table; multvae: of the latent)"""
    layers: int = 3
    """lightgcn: propagation layers"""
    hidden: int = 600
    """multvae: width of the hidden layers"""
    regulariser: float = 1e-4
    """mf, lightgcn: weight of the squared embeddings"""
    density: float = 0.5
    """share of weights that are active, from the first step to inference"""
    update_interval: int = 100
    """steps between explorations of the mask; 0 keeps the initial random mask (the baseline)"""
    update_ratio: float = 0.5
    """share of the active weights exchanged at the first exploration; falls along the decay"""
    decay: Literal["cosine", "linear"] = "cosine"
    """how that share falls"""
    prune: Literal["magnitude", "taylor", "set", "threshold"] = "magnitude"
    """which active weights go"""
    grow: Literal["gradient", "momentum", "random", "random_unfired"] = "gradient"
    """which inactive weights come"""
    mask_init: Literal["uniform", "exact", "lottery_ticket"] = "uniform"
    """the first mask"""
    scope: Literal["per_tensor", "global"] = "per_tensor"
    """whether the budget may move between tensors"""
    reset_moments_on_grow: bool = False
    """zero the optimiser's moments of a weight that becomes active"""
    variant: Literal["paper", "official"] = "paper"
    """official: the released code where its numbers differ"""

    def build(self) -> Run:
        """Data, the training phase with its evaluation, and the figure."""
        dataset = self.load()
        objective, module = self.objective(dataset)
        sparse = self.sparse()
        tx = self.transformation(self.optimizer.build(self.steps))
        evaluate = full_ranking(module, dataset)
        arrays = dataset["profiles"] if self.backbone == "multvae" else dataset["train"]
        stream = training_stream(arrays, self.batch_size, self.seed)
        first = stream.batch(0)

        def init(rng):
            variables = dict(objective.init(rng, first))
            return {**variables, "params": dsl.dynamic_sparse_init(variables["params"], **sparse)}

        def report(state):
            sparsity = state.optimizer["main"]
            counted = dsl.mask_stats(sparsity.mask, sparsity.fired)
            return {f"mask/{k}": counted[k] for k in ("density", "exploration")} | {"mask/refused": sparsity.refused}

        phase = Train(
            "train",
            self.steps,
            objective,
            tx,
            stream,
            evaluate=(evaluate,),
            eval_every=max(1, self.steps // 10),
            report=report,
        )

        def export(variables: Mapping, artefacts: Mapping) -> Export:
            weights = {"params": variables["params"], **_graph(variables)}
            size = {"users": dataset.info["num_users"], "items": dataset.info["num_items"]}
            return Export(module, weights, {"data": dataset.name, "density": self.density, **size})

        return Run(
            phases=[phase],
            init=init,
            export=export,
            figures=functools.partial(draw_sparsity, maskable=self.maskable()),
            data_fingerprint=dataset.fingerprint,
            summary=lambda m: (
                f"{self.backbone} at density {self.density}: recall@20 {m['ranking/recall@20']:.3f}, "
                f"ndcg@20 {m['ranking/ndcg@20']:.3f}, weights ever active {m['mask/exploration']:.3f}"
            ),
        )

    def load(self) -> Dataset:
        """The interactions.

        Raises:
          UserError: an unknown name or split.
          DataError: a file that cannot be read; names file and line.
        """
        if self.data.path is not None:
            splits = ("random", "leave_two_out")
            split = self.data.split or "random"
            if split not in splits:
                raise UserError(suggest(split, splits, "--data.split"))
            dataset = load_interactions(self.data.path, split, self.seed)
        elif self.data.name == "low_rank":
            dataset = low_rank_interactions(self.seed)
        else:
            raise UserError(suggest(self.data.name, ("low_rank",), "data set") + "; your own comes by --data.path FILE")
        if dataset.info["num_items"] < max(KS):
            raise UserError(f"{dataset.name} has {dataset.info['num_items']} items; ranking at {max(KS)} needs more")
        return dataset

    def objective(self, dataset: Dataset) -> tuple[Objective, nn.Module]:
        """What is minimised, and the backbone."""
        for flag, value in (("dim", self.dim), ("hidden", self.hidden), ("layers", self.layers)):
            if value < 1:
                raise UserError(f"--{flag} must be at least 1, got {value}")
        if self.regulariser < 0:
            raise UserError(f"--regulariser must be 0 or more, got {self.regulariser}")
        users, items, seen = (dataset.info[k] for k in ("num_users", "num_items", "seen"))
        if self.backbone == "multvae":
            module = MultVAE(items, self.hidden, self.dim, dtype=self.dtype)
            return hosts.multvae(module), module
        if self.backbone == "neumf":
            hidden = (2 * self.dim, self.dim, max(1, self.dim // 2))
            module = NeuMF(users, items, self.dim, hidden, dtype=self.dtype)
            return hosts.neumf(module, jnp.asarray(seen)), module
        module = LightGCN(users, items, self.dim, self.layers if self.backbone == "lightgcn" else 0, dtype=self.dtype)
        train = dataset["train"]
        edges = jnp.asarray(train["user"]), jnp.asarray(train["item"])
        objective = hosts.bpr(module, *edges, jnp.asarray(seen), regulariser=self.regulariser, name=self.backbone)
        return objective, module

    def maskable(self) -> dsl.Maskable:
        """The tensors the released code masks for this backbone."""
        return dsl.named("mlp_user", "mlp_item") if self.backbone == "neumf" else dsl.everything

    def sparse(self) -> dict[str, Any]:
        """The settings that the initial mask depends on."""
        if not 0 < self.density <= 1:
            raise UserError(f"--density must be in (0, 1], got {self.density}")
        key = jax.random.fold_in(jax.random.key(self.seed), 1)
        return {"density": self.density, "key": key, "mask_init": self.mask_init, "maskable": self.maskable()}

    def transformation(self, inner: optax.GradientTransformation) -> optax.GradientTransformation:
        """``inner`` under dynamic sparse training.

        Raises:
          UserError: a setting that the method refuses.
        """
        if self.update_interval < 0:
            raise UserError(f"--update-interval must be 0 (static mask) or more, got {self.update_interval}")
        try:
            return dsl.dynamic_sparse(
                inner,
                **self.sparse(),
                update_interval=self.update_interval or None,
                update_ratio=self.update_ratio,
                total_steps=self.steps,
                prune=self.prune,
                grow=self.grow,
                scope=self.scope,
                decay=self.decay,
                reset_moments_on_grow=self.reset_moments_on_grow,
                variant=self.variant,
            )
        except ValueError as error:
            name, rest = str(error).split(" ", 1)
            raise UserError(f"--{name.replace('_', '-')} {rest}") from None


def fields() -> dict[str, str]:
    """The data fields the recipe needs."""
    return {
        "user": "int32 []  the user's id, from 0",
        "item": "int32 []  an item the user interacted with, from 0 (mf, lightgcn, neumf)",
        "items": "int32 [P]  all training items of the user, padded with -1 (multvae, one row per user)",
        "seen": "int32 [P]  test rows: items left out of the ranking, padded with -1",
        "relevant": "int32 [R]  test rows: the held-out items, padded with -1",
    }


def full_ranking(module: nn.Module, dataset: Dataset) -> Evaluate:
    """Ranks all items but the known ones for every test user, exactly."""

    def update(seen, variables, batch, context):
        known = batch["seen"] if isinstance(module, MultVAE) else batch["user"]
        weights = {"params": variables["params"], **_graph(variables)}
        scores = module.apply(weights, known, method="scores")
        return ranking_update(seen, scores, batch["relevant"], batch["seen"], batch["mask"], ks=KS), {}

    stream = evaluation_stream(dataset["test"], 64)
    return Evaluate("ranking", stream, lambda: ranking_init(KS), update, ranking_compute, weights="params")


def _masked(tree: Mapping, maskable: dsl.Maskable) -> dict[str, Any]:
    # the maskable leaves by path
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}
    return {path: leaf for path, leaf in named.items() if maskable(path, leaf)}


def _graph(variables: Mapping) -> dict[str, Any]:
    edges = {k: v for k, v in variables.get("constants", {}).items() if k in ("source", "target", "weight")}
    return {"constants": edges} if edges else {}


def draw_sparsity(result: Any, workdir: Path, maskable: dsl.Maskable) -> None:
    """Writes ``sparsity.png``: the largest masked tensor, and recall and the weights in use over the run."""
    from trainers import plots

    weights = _masked(result.chosen["params"], maskable)
    name = max(weights, key=lambda path: weights[path].size)
    w = np.asarray(weights[name])
    w = w.reshape(len(w), -1)[:: max(1, len(w) // 200)]
    history: list[dict[str, float]] = []
    log = Path(workdir) / "metrics.jsonl"
    if log.exists():
        history = [json.loads(line) for line in log.read_text().splitlines() if "ranking/recall@20" in line]
    fig, axes = plots.figure(3)
    pattern, recall, explored = axes.ravel()
    limit = float(np.quantile(np.abs(w), 0.99)) or 1.0
    shown = np.where(w == 0, np.nan, w)
    pattern.set_facecolor("white")
    image = pattern.imshow(shown, aspect="auto", interpolation="nearest", cmap="coolwarm", vmin=-limit, vmax=limit)
    fig.colorbar(image, ax=pattern, label="weight")
    pattern.set_title(f"{name}: {np.mean(w != 0):.0%} not zero (white: zero)", fontsize=9)
    pattern.set(xlabel="dimension", ylabel="row (every n-th)")
    steps = [h["step"] for h in history]
    recall.plot(steps, [h["ranking/recall@20"] for h in history], marker=".", color="#3060a0")
    recall.set_title("Recall@20, full ranking", fontsize=9)
    for key, label, colour in (("density", "active now", "#1baf7a"), ("exploration", "ever active", "#eb6834")):
        explored.plot(steps, [h[f"mask/{key}"] for h in history], marker=".", color=colour, label=label)
    explored.set_ylim(0, 1.02)
    explored.set_title("Share of weights", fontsize=9)
    explored.legend(frameon=False, fontsize=8)
    for axis in (recall, explored):
        axis.set_xlabel("step")
        axis.grid(alpha=0.25)
    plots.save(fig, Path(workdir) / "sparsity.png")


# --- the claim --------------------------------------------------------------------------------------------------------


def arm(arm: str, seed: int, density: float = 0.2) -> dict[str, float]:
    """Trains one arm of the claim: the brief's BPR matrix factorisation at equal density, everything paired by seed.

    Args:
      arm: ``dynamic``, ``static`` (the same initial mask, kept) or ``popular`` (items by training frequency).
      seed: of data, initialisation, mask, batches and negatives.
      density: of both sparse arms.

    Returns:
      ``recall@20``, ``ndcg@20`` and, for trained arms, ``exploration`` (ever active weights) and ``density``.
    """
    if arm not in ARMS:
        raise UserError(suggest(arm, ARMS, "arm"))
    recipe = Recipe(seed=seed, density=density, update_interval=100 if arm == "dynamic" else 0)
    dataset = recipe.load()
    test = dataset["test"]
    if arm == "popular":
        count = popularity(dataset["train"]["item"], dataset.info["num_items"])
        scores, facts = jnp.tile(count, (len(test["user"]), 1)), {}
    else:
        train = dataset["train"]
        arrays = [jnp.asarray(x) for x in (train["user"], train["item"], dataset.info["seen"])]
        run = _trained(density, arm == "dynamic", dataset.info["num_users"], dataset.info["num_items"])
        scores, facts = run(jnp.int32(seed), *arrays)
        scores = scores[test["user"]]
    ranking = ranking_update(ranking_init(KS), scores, jnp.asarray(test["relevant"]), jnp.asarray(test["seen"]), ks=KS)
    return {k: float(v) for k, v in {**ranking_compute(ranking), **facts}.items()}


@functools.cache
def _trained(density: float, dynamic: bool, users: int, items: int):
    # one compiled program per arm: the seed and the data are its arguments
    recipe = Recipe(density=density)
    module = LightGCN(users, items, recipe.dim, 0)

    @jax.jit
    def run(seed, user, item, seen):
        key = jax.random.key(seed)
        objective = hosts.bpr(module, user, item, seen, regulariser=recipe.regulariser)
        settings = {"density": density, "key": jax.random.fold_in(key, 1)}
        tx = dsl.dynamic_sparse(
            recipe.optimizer.build(recipe.steps),
            **settings,
            update_interval=recipe.update_interval if dynamic else None,
            update_ratio=recipe.update_ratio,
            total_steps=recipe.steps,
        )
        start = objective.init(jax.random.fold_in(key, 2), {})
        params = dsl.dynamic_sparse_init(start["params"], **settings)
        update = bare_update(objective, tx)

        def step(trained, number):
            now = jax.random.fold_in(jax.random.fold_in(key, 3), number)
            index = jax.random.randint(now, (recipe.batch_size,), 0, user.shape[0])
            batch = {"user": user[index], "item": item[index], "index": index, "mask": jnp.ones(index.shape, bool)}
            return update(trained, batch, Context(now, number, recipe.steps)), None

        trained, _ = jax.lax.scan(step, carry({**start, "params": params}, tx), jnp.arange(recipe.steps))
        params, state = trained.variables["params"], trained.moments
        scores = module.apply({"params": params}, jnp.arange(users), method="scores")
        stats = dsl.mask_stats(state.mask, state.fired)
        return scores, {k: stats[k] for k in ("density", "exploration")}

    return run


# --- speed and conformance --------------------------------------------------------------------------------------------


def benchmarks() -> list[Benchmark]:
    """One update of a million weights, with and without exploring, beside the same exploration on the host."""
    rows, dim = 15_625, 64
    rng = np.random.default_rng(0)
    params = {"embedding": jnp.asarray(rng.standard_normal((rows, dim)), jnp.float32)}
    grads = {"embedding": jnp.asarray(rng.standard_normal((rows, dim)), jnp.float32)}
    n = rows * dim

    def host_exchange(grads, state, params):
        w, g, mask = (np.asarray(x["embedding"]).ravel() for x in (params, grads, state.mask))
        mask = mask.copy()
        active = np.flatnonzero(mask)
        r = int(np.ceil(0.5 * len(active)))
        mask[active[np.argsort(np.abs(w[active]))[:r]]] = False
        inactive = np.flatnonzero(~mask)
        mask[inactive[np.argsort(-np.abs(g[inactive]))[:r]]] = True
        return mask

    found = []
    for name, interval in (("explore", 1), ("between", 1_000_000)):
        settings = {"density": 0.5, "key": jax.random.key(0)}
        tx = dsl.dynamic_sparse(optax.adam(1e-3), **settings, update_interval=interval, total_steps=1000)
        sparse = dsl.dynamic_sparse_init(params, **settings)

        def update(grads, state, params, tx=tx):
            return tx.update(grads, state, params)

        # adam reads g, m, v, w and writes u, m, v: 28 bytes; masks are read and written twice, a byte each
        elementwise = 32.0 * n
        sorts = 2 * n * np.log2(n) if name == "explore" else 0.0
        baselines = {"numpy argsort, mask copied to the host": host_exchange} if name == "explore" else {}
        note = f"{n:,} weights, density 0.5" + (": one exploration" if name == "explore" else ": no exploration due")
        found.append(
            Benchmark(f"mask update, {name}", update, (grads, tx.init(sparse), sparse), 12.0 * n + sorts, elementwise,
                      baselines, note)
        )  # fmt: skip
    return found


def example() -> dict[str, Any]:
    """A row for the conformance table: LightGCN under a mask that explores every other step."""
    rng = np.random.default_rng(0)
    user, item = np.repeat(np.arange(6, dtype=np.int32), 3), np.empty(18, np.int32)
    for u in range(6):
        item[3 * u : 3 * u + 3] = np.sort(rng.permutation(9)[:3])
    seen = jnp.asarray(item.reshape(6, 3))
    objective = hosts.bpr(LightGCN(6, 9, 4, 2), jnp.asarray(user), jnp.asarray(item), seen)
    tx = dsl.dynamic_sparse(
        optax.adam(1e-2), density=0.5, update_interval=2, total_steps=20, key=jax.random.key(0), mask_init="exact"
    )
    batch = {"user": user[:16], "item": item[:16], "index": np.arange(16, dtype=np.int32), "mask": np.ones(16, bool)}
    return {"objective": objective, "batch": batch, "optimizer": tx, "transform": None, "num_examples": 18}
