"""Recipe: images without labels by SimCLR, MoCo, SimSiam or Barlow Twins, plain and with adaptive multi-head losses."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from data.images import image_dataset
from data.stream import evaluation_stream, training_stream
from trainers import recipe as base
from trainers.phases import Evaluate, Fit, FitResult, Train
from trainers.probes import linear_probe
from trainers.recipe import Benchmark, Data, Export, Optimizer, Run, UserError
from zoo import hosts
from zoo.base import LossTransformation, Objective, suggest
from zoo.metrics.neighbours import knn_classify
from zoo.nn.heads import Pick
from zoo.nn.mlp import MLP
from zoo.nn.pair_temperature import AdaptiveHeads, bounded_temperature, pair_scores
from zoo.nn.resnet import ResNet, ResNetConfig
from zoo.ops.prototypes import l2_normalize
from zoo.ops.views import augmentation_stack, two_of
from zoo.representation.amcl import HeadRows, Temperatures, amcl, amcl_contrastive, amcl_rows

KINDS = {"simclr": "contrastive", "moco": "queue", "simsiam": "negcos", "barlow_twins": "cross_correlation"}
"""The kind of loss of each host."""


@dataclass(frozen=True)
class Recipe(base.Recipe):
    """Trains an encoder without labels, judged by nearest neighbours and a linear probe on its frozen features.

    The defaults are the bundled digits under four types of augmentation. The paper's CIFAR-10 setting is --data.name
    cifar10 --augmentations abcde --smallest-crop 0.08 --encoder resnet18 --hidden 512 --features 128 --batch-size 512
    --steps 78000 --optimizer.name momentum --optimizer.learning-rate 0.06 --optimizer.schedule cosine
    --optimizer.weight-decay 5e-4 (learning rates: MoCo 0.08, SimSiam 0.05, Barlow Twins 0.11).
    """

    data: Data = Data("digits")
    """digits (bundled), any TFDS image set, or --data.path with an .npz file or a folder of class folders"""
    optimizer: Optimizer = Optimizer(learning_rate=1e-3)
    """optimiser of everything"""
    host: Literal["simclr", "moco", "simsiam", "barlow_twins"] = "simclr"
    """what the heads' losses replace"""
    steps: int = 400
    """training steps, of the plain host as of the method"""
    batch_size: int = 128
    """images per step"""
    compare: bool = True
    """--no-compare does not train the plain host first, whose similarities are drawn beside"""
    heads: int = 3
    """C, projection heads"""
    hidden: int = 64
    """size of each head's hidden layer"""
    features: int = 32
    """d', size of each head"""
    beta: float = 0.1
    """weight of the temperatures' regulariser"""
    lower: float = 0.01
    """least temperature (the released code: 1e-5)"""
    upper: float = 2.0
    """greatest temperature"""
    negatives: Literal["max", "logsumexp"] = "logsumexp"
    """whether all negatives count or, as in the paper's Table 2, each head's hardest (SimCLR, MoCo)"""
    temperature_net: Literal["dot", "concat"] = "dot"
    """one network for all heads (the paper) or one per head on concatenated pairs (the released code)"""
    fixed_temperature: float = 0.0
    """above 0: several heads at this one temperature, and no temperature network"""
    temperature: float = 0.2
    """of the plain SimCLR and MoCo"""
    queue: int = 1024
    """MoCo: keys kept"""
    momentum: float = 0.99
    """MoCo: of the key encoder"""
    off_diagonal: float = 5e-3
    """Barlow Twins: weight of the redundancy"""
    augmentations: str = "abde"
    """letters: a crop, b blur, c grayscale, d colour jitter, e flip (on images of one channel c does nothing)"""
    smallest_crop: float = 0.2
    """least share of the area in a crop (0.08 at usual sizes; two pixels of a digit)"""
    strength: float = 0.5
    """of the colour jitter"""
    encoder: Literal["mlp", "resnet18", "resnet50"] = "mlp"
    """encoder of the images; residual networks have the small stem"""
    width: int = 128
    """size of the mlp's features"""
    neighbours: int = 20
    """k of the nearest-neighbour vote (the paper's sets: 200)"""

    def build(self) -> Run:
        """The plain host (for comparison), the method, and the evaluation of both."""
        data = image_dataset(self.data.name, self.data.path)
        train, test = data["train"], data["test"]
        if "label" not in train:
            raise UserError(f"{data.name!r} has no field 'label'; the evaluation of features needs classes")
        if train["x"].ndim != 4:
            raise UserError(f"{data.name!r} holds points of shape {train['x'].shape[1:]}; this recipe augments images")
        if len(train["x"]) < self.batch_size:
            raise UserError(f"--batch-size {self.batch_size} exceeds the {len(train['x'])} images of {data.name!r}")
        module, stack = self.module(), self.stack()
        host, transform = self.objective(module, stack), self.loss_transform()
        stream = training_stream(train, self.batch_size, self.seed)
        judged = functools.partial(judge, module.body, train, test, stack, self.batch_size, self.neighbours)
        make = jax.jit(lambda rng: host.init(rng, jax.tree.map(jnp.asarray, stream.batch(0))))
        phases: list[Any] = []

        def keep(variables, artefacts, rng):
            seen = view_features(module.body, encoder_variables(variables), test["x"], stack)
            return FitResult(dict(make(jax.random.key(self.seed))), {"plain_views": np.stack(seen)})

        if self.compare:
            tx = self.optimizer.build(self.steps)
            phases += [Train("plain_training", self.steps, host, tx, stream), judged("plain"), Fit("restart", keep)]
        tx = self.optimizer.build(self.steps)
        phases += [Train("training", self.steps, host, tx, stream, transform), judged("amcl")]

        def export(variables: Mapping, artefacts: Mapping) -> Export:
            facts = {"input": "float32 [B, H, W, C]: images in [-1, 1]", "data": data.name}
            return Export(module.body, encoder_variables(variables), facts)

        def summary(metrics: Mapping[str, float]) -> str:
            rows = [("plain " + self.host, "plain/"), (f"{self.host} with {self.heads} heads", "amcl/")]
            return "; ".join(
                f"{name}: kNN {metrics[at + 'knn_accuracy']:.3f}, probe {metrics[at + 'probe_accuracy']:.3f}, "
                f"positives above negatives {metrics[at + 'pair_auc']:.3f}"
                for name, at in rows
                if at + "knn_accuracy" in metrics
            )

        return Run(
            phases, export, init=make, figures=_figures(self, module, test["x"], stack), summary=summary,
            data_fingerprint=data.fingerprint, steps_per_call=10,
            from_export=lambda v: {c: {"encoder": x} for c, x in v.items()},
        )  # fmt: skip

    def module(self) -> AdaptiveHeads:
        """The encoder under its heads."""
        for name in ("heads", "hidden", "features", "width", "steps", "neighbours"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} must be at least 1, got {getattr(self, name)}")
        if self.batch_size < 2:
            raise UserError(f"--batch-size {self.batch_size}: an image alone has no negatives; take 2 or more")
        dtype = jnp.dtype(self.dtype)
        body: nn.Module = MLP((2 * self.width,), self.width, True, dtype)
        if self.encoder != "mlp":
            body = Pick(ResNet(ResNetConfig.of_depth(int(self.encoder[6:]), "cifar"), dtype))
        kind = "table" if self.host == "barlow_twins" else self.temperature_net
        return AdaptiveHeads(
            body, self.heads, self.hidden, self.features, self.host in ("simsiam", "barlow_twins"),
            "none" if self.fixed_temperature else kind, predictor=self.hidden // 2 if self.host == "simsiam" else 0,
            dtype=dtype,
        )  # fmt: skip

    def stack(self) -> Callable:
        """One random view of an image."""
        for name in ("smallest_crop", "strength"):
            if not 0 < getattr(self, name) <= 1:
                raise UserError(f"--{name.replace('_', '-')} must lie in (0, 1], got {getattr(self, name)}")
        try:
            return augmentation_stack(self.augmentations, self.smallest_crop, self.strength)
        except ValueError as error:
            raise UserError(f"--augmentations: {error}") from None

    def objective(self, module: AdaptiveHeads, stack: Callable) -> Objective:
        """The plain host, on the first head."""
        views = two_of(stack)
        if not self.temperature > 0:
            raise UserError(f"--temperature must be positive, got {self.temperature}")
        if self.host == "simclr":
            return hosts.simclr(module, views, self.temperature)
        if self.host == "moco":
            if self.queue < self.batch_size:
                raise UserError(f"--queue {self.queue} holds less than one batch of {self.batch_size}")
            if not 0 <= self.momentum < 1:
                raise UserError(f"--momentum must lie in [0, 1), got {self.momentum}")
            return hosts.moco(module, views, self.temperature, self.queue, self.momentum)
        if self.host == "simsiam":
            return hosts.simsiam(module, views)
        return hosts.barlow_twins(module, views, self.off_diagonal)

    def loss_transform(self) -> LossTransformation:
        """The method.

        Raises:
          UserError: settings that it refuses.
        """
        fixed = self.fixed_temperature or None
        try:
            return amcl(
                KINDS[self.host], self.beta, self.lower, self.upper, self.negatives, fixed=fixed,
                off_diagonal=self.off_diagonal,
            )  # fmt: skip
        except ValueError as error:
            raise UserError(f"--{str(error).replace('fixed ', 'fixed-temperature ', 1)}") from None


def fields() -> dict[str, str]:
    """The data fields the recipe needs."""
    return {
        "x": "float32 [N, H, W, C] in [-1, 1]: images (uint8 images of TFDS sets and files are scaled)",
        "label": "int32 [N]: classes, read by the evaluation only",
    }


# --- evaluation -------------------------------------------------------------------------------------------------------


def encoder_variables(variables: Mapping) -> dict[str, Any]:
    """The encoder's own variables among a host's."""
    return {c: variables[c]["encoder"] for c in ("params", "batch_stats") if "encoder" in variables.get(c, {})}


def two_views(stack: Callable, x: jax.Array, number: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two views of each test image, the same for every model: they depend on the image's number only."""
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(7), i))(number)
    return jax.vmap(two_of(stack))(keys, x)


def view_features(encoder: nn.Module, variables: Mapping, x: np.ndarray, stack: Callable) -> list[np.ndarray]:
    """Features of two views of each test image."""

    def both(variables, x):
        return [encoder.apply(variables, v).astype(jnp.float32) for v in two_views(stack, x, jnp.arange(len(x)))]

    return [np.asarray(f) for f in jax.jit(both)(variables, jnp.asarray(x))]


def pair_similarities(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cosines of the views of one image, and of views of different images."""
    a, b = (z / np.maximum(np.linalg.norm(z, axis=1, keepdims=True), 1e-12) for z in (first, second))
    cosine = a @ b.T
    own = np.eye(len(a), dtype=bool)
    return cosine[own], cosine[~own]


def pair_auc(first: np.ndarray, second: np.ndarray) -> float:
    """How often a positive pair is more similar than a negative one: 1 if their histograms do not overlap."""
    from sklearn.metrics import roc_auc_score

    near, far = pair_similarities(first, second)
    return float(roc_auc_score(np.r_[np.ones(len(near)), np.zeros(len(far))], np.r_[near, far]))


def judge(
    encoder: nn.Module, train: Mapping, test: Mapping, stack: Callable, batch_size: int, neighbours: int, name: str
) -> Evaluate:
    """Accuracy of nearest neighbours and of a linear probe on features, and how well pairs are told apart."""
    labels = np.concatenate([train["label"], test["label"]])
    fitted, classes = len(train["x"]), int(labels.max()) + 1
    width = jax.eval_shape(
        lambda x: encoder.init_with_output(jax.random.key(0), x)[0], jax.ShapeDtypeStruct((1, *train["x"].shape[1:]),
                                                                                          jnp.float32)
    ).shape[-1]  # fmt: skip

    def update(seen, variables, batch, context):
        own = encoder_variables(variables)
        views = two_views(stack, batch["x"], batch["index"] - fitted)
        rows = jnp.stack([encoder.apply(own, x).astype(jnp.float32) for x in (batch["x"], *views)], 1)
        return seen.at[batch["index"]].set(rows, mode="drop"), {}

    def compute(seen):
        clean = seen[:, 0]
        found = knn_classify(*(jnp.asarray(v) for v in (clean[:fitted], labels[:fitted], clean[fitted:])), classes,
                             neighbours)  # fmt: skip
        return {
            "knn_accuracy": float(np.mean(np.asarray(found) == labels[fitted:])),
            "probe_accuracy": linear_probe(clean[:fitted], labels[:fitted], clean[fitted:], labels[fitted:]),
            "pair_auc": pair_auc(seen[fitted:, 1], seen[fitted:, 2]),
        }

    stream = evaluation_stream({"x": np.concatenate([train["x"], test["x"]])}, max(64, batch_size // 64 * 64))
    return Evaluate(name, stream, lambda: jnp.zeros((len(labels), 3, width), jnp.float32), update, compute)


def pair_temperatures(
    module: AdaptiveHeads, variables: Mapping, recipe: Recipe, x: np.ndarray, stack: Callable
) -> tuple[np.ndarray, np.ndarray] | None:
    """Cosines and temperatures ``[C, n, n]`` of views of test images by head; ``None`` where they are not predicted."""
    if module.temperature not in ("dot", "concat"):
        return None
    own = {c: variables[c] for c in ("params", "batch_stats") if c in variables}

    def tell(x):
        first, second = (module.apply(own, v) for v in two_views(stack, x, jnp.arange(len(x))))
        prefix = "predicted_" if module.predictor else ""
        a, b = l2_normalize(first[f"{prefix}heads"]), l2_normalize(second["heads"])
        last = first["temperature_last"].value if "temperature_last" in first else None
        scores = pair_scores(first[f"{prefix}temperature"], second["temperature"], last)
        return jnp.einsum("icd,jcd->cij", a, b), bounded_temperature(scores, recipe.lower, recipe.upper)

    sim, tau = jax.jit(tell)(jnp.asarray(x))
    return np.asarray(sim), np.asarray(tau)


def _figures(recipe: Recipe, module: AdaptiveHeads, x: np.ndarray, stack: Callable):
    def draw(result: Any, workdir: Path) -> None:
        draw_pairs(recipe, module, x, stack, result.chosen, result.artefacts, workdir / "pairs.png")

    return draw


def draw_pairs(
    recipe: Recipe, module: AdaptiveHeads, x: np.ndarray, stack: Callable, variables: Mapping, artefacts: Mapping,
    file: Path,
) -> None:  # fmt: skip
    """Draws similarities of positive and negative pairs, plain and with the method, and each pair's temperature."""
    from trainers import plots

    shown = [(f"{recipe.host} with {recipe.heads} heads", view_features(module.body, encoder_variables(variables), x,
                                                                         stack))]  # fmt: skip
    if "plain_views" in artefacts:
        shown.insert(0, (f"plain {recipe.host}", np.asarray(artefacts["plain_views"])))
    told = pair_temperatures(module, variables, recipe, x[:128], stack)
    fig, axes = plots.figure(len(shown) + (told is not None), 1, (3.9, 3.1))
    for axis, (name, (first, second)) in zip(axes[0], shown, strict=False):
        near, far = pair_similarities(first, second)
        bins = np.linspace(min(near.min(), far.min()), 1, 50)
        for values, colour, label in ((far, "#a0a0a0", "different images"), (near, "#3060a0", "views of one image")):
            axis.hist(values, bins, density=True, alpha=0.7, color=colour, label=label)
        axis.set_title(f"{name}: AUC {pair_auc(first, second):.3f}", fontsize=9)
        axis.set_xlabel("cosine of the encoder's features")
        axis.set_yticks([])
        axis.legend(fontsize=7, frameon=False)
    if told is not None:
        axis, (sim, tau) = axes[0][-1], told
        own = np.eye(sim.shape[1], dtype=bool)
        rng = np.random.default_rng(0)
        for c, colour in zip(range(sim.shape[0]), ["#3060a0", "#b04030", "#309060", "#806090"] * 8, strict=False):
            some = rng.choice(int((~own).sum()), min(400, int((~own).sum())), replace=False)
            axis.plot(sim[c][~own][some], tau[c][~own][some], ".", color=colour, markersize=2, alpha=0.4)
            axis.plot(sim[c][own], tau[c][own], "+", color=colour, markersize=5, label=f"head {c + 1}")
        axis.set_yscale("log")
        axis.set_ylim(0.9 * recipe.lower, 1.1 * recipe.upper)
        axis.set_title("temperature of a pair: + one image, . different", fontsize=9)
        axis.set_xlabel("cosine in the head")
        axis.set_ylabel("temperature")
        axis.legend(fontsize=7, frameon=False)
    plots.save(fig, file)


# --- the claim --------------------------------------------------------------------------------------------------------

ARMS = ("simclr_amcl", "simclr", "untrained_encoder")


def arm(arm: str, seed: int, recipe: Recipe | None = None) -> dict[str, float]:
    """One arm of the claim; initialisation, order and views are paired by seed.

    Args:
      arm: one of ``ARMS``.
      seed: of everything.
      recipe: other settings than the defaults.
    """
    from trainers.run import train_in_memory

    if arm not in ARMS:
        raise UserError(suggest(arm, ARMS, "arm"))
    recipe = dataclasses.replace(recipe or Recipe(), seed=seed, compare=True)
    run = recipe.build()
    phases = {p.name: p for p in run.phases}
    chosen = {"simclr_amcl": ("training", "amcl"), "simclr": ("plain_training", "plain")}.get(arm, ("plain",))
    found = train_in_memory(dataclasses.replace(run, phases=[phases[n] for n in chosen]), 10, seed)
    return {k.split("/")[1]: v for k, v in found.metrics.items() if k.startswith(f"{chosen[-1]}/")}


def benchmarks() -> list[Benchmark]:
    """The loss of a batch of views from rows, beside the matrices of pairs that a direct reading would build."""
    number, heads, dim, h = 1024, 3, 128, 32
    rng = np.random.default_rng(0)
    z = l2_normalize(jnp.asarray(rng.normal(size=(number, heads, dim)), jnp.float32))
    codes = jnp.asarray(rng.normal(size=(number, heads, h)), jnp.float32) / h
    at = jnp.arange(number)
    own = jnp.stack([at, (at + number // 2) % number], 1)

    def by_rows(z, codes):
        rows = HeadRows(z, codes)
        partner = jax.tree.map(lambda v: jnp.roll(v, number // 2, 0), rows)
        return amcl_rows(rows, partner, rows, jnp.ones(number, bool), own, Temperatures())

    def by_matrices(z, codes):
        sim = jnp.einsum("icd,jcd->cij", z, z, precision="highest")
        tau = bounded_temperature(pair_scores(codes, codes))
        eye = jnp.eye(number, dtype=bool)
        pos = jnp.roll(eye, number // 2, 1)
        return amcl_contrastive(sim, tau, pos, ~eye & ~pos, dim)

    def concatenated(z, codes):  # every pair's features side by side, one anchor at a time so that they fit
        z, codes, out = np.asarray(z), np.asarray(codes), np.empty(number, np.float32)
        for i in range(number):
            pairs = np.concatenate([np.broadcast_to(codes[i], codes.shape), codes], -1)
            tau = 0.01 + 1.99 / (1 + np.exp(-(pairs[..., :h] * pairs[..., h:]).sum(-1)))
            sim = (z[i] * z).sum(-1)
            p = (i + number // 2) % number
            hard = sim.copy()
            hard[[i, p]] = -np.inf
            n = hard.argmax(0), np.arange(heads)
            omega = dim / 2 * np.log(tau) + 1 / tau
            out[i] = (-sim[p] / tau[p] + 0.1 * omega[p] + sim[n] / tau[n] - 0.1 * omega[n]).sum()
        return out

    gradient = lambda f: lambda z, codes: jax.grad(lambda *a: jnp.sum(f(*a)), (0, 1))(z, codes)  # noqa: E731
    matrices = jax.jit(by_matrices)
    slow = jax.jit(gradient(by_matrices))
    flops, moved = 2.0 * heads * number**2 * dim, 4.0 * number * heads * (dim + h)
    note = f"{number} views, C={heads}, d'={dim}"
    return [
        Benchmark("amcl_rows", by_rows, (z, codes), flops, moved,
                  {"all pairs' matrices": lambda *a: jax.block_until_ready(matrices(*a)),
                   "NumPy, pairs side by side": concatenated}, note),
        Benchmark("amcl_rows and its gradient", gradient(by_rows), (z, codes), flops, 2 * moved,
                  {"all pairs' matrices": lambda *a: jax.block_until_ready(slow(*a))}, note),
    ]  # fmt: skip


def example() -> dict[str, Any]:
    """The conformance rows: the method on SimCLR, and on each other host."""
    import optax

    rng = np.random.default_rng(0)
    batch = {
        "x": rng.normal(size=(16, 2, 3)).astype(np.float32),
        "label": rng.integers(0, 3, 16).astype(np.int32),
        "index": rng.permutation(32)[:16].astype(np.int32),
        "mask": np.ones(16, bool),
    }

    def views(key, x):
        first, second = jax.random.normal(key, (2, *x.shape)) * 0.1 + x[None]
        return first, second

    def row(host: str, **fields: Any) -> dict[str, Any]:
        body = MLP((8,), 8)
        module = AdaptiveHeads(body, 2, 8, 4, temperature_hidden=8, **fields)
        make = {"simclr": hosts.simclr, "moco": functools.partial(hosts.moco, queue=32), "simsiam": hosts.simsiam,
                "barlow_twins": hosts.barlow_twins}  # fmt: skip
        return {
            "objective": make[host](module, views),
            "batch": batch,
            # a bias before batch statistics has no gradient but rounding, which adam would make as large as any other
            "optimizer": optax.sgd(1e-2) if fields.get("normalise") else optax.adam(1e-3),
            "transform": amcl(KINDS[host], lower=0.1),
            "num_examples": 32,
        }

    others = {
        "moco": row("moco", temperature="concat"),
        "simsiam": row("simsiam", normalise=True, predictor=4),
        "barlow_twins": row("barlow_twins", normalise=True, temperature="table"),
    }
    return {**row("simclr"), "also": others}
