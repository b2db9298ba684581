"""Recipe: a metric-learning loss with and without TCM, judged on classes never trained on."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from data.dataset import Dataset
from data.images import image_dataset
from data.samplers import class_balanced
from data.spheres import vmf_clusters
from data.stream import ArrayStream
from trainers import plots
from trainers import recipe as base
from trainers.bare_update import bare_update, carry, rows_of, scan_updates
from trainers.embeddings import embedding_evaluation, encoder_params, metric_host, neighbour_metrics, open_world
from trainers.phases import Fit, FitResult, Train
from trainers.recipe import Benchmark, Data, Export, Optimizer, Run, UserError
from zoo.base import Context, LossTransformation, Objective, suggest
from zoo.metrics.verification import Consistency, threshold_consistency
from zoo.nn.mlp import MLP
from zoo.representation import tcm
from zoo.representation.tcm import threshold_consistent_margin

Loss = Literal[
    "contrastive", "triplet", "semi_hard", "multi_similarity", "margin", "supcon", "smooth_ap", "recall",
    "proxy_anchor", "proxy_nca", "softmax", "cosine", "cosface", "arcface",
]  # fmt: skip


@dataclass(frozen=True)
class Recipe(base.Recipe):
    """Trains a base loss alone and with TCM from the same start, then compares them on other classes.

    The defaults are clusters of tenfold different concentration. Real images: --data.name digits, any TFDS image set
    (stanford_online_products, cars196, caltech_birds2011) or --data.path; the first --train-classes are trained on.
    """

    data: Data = Data("vmf")
    """vmf (generated clusters), digits (bundled), any TFDS image set, or --data.path with an .npz or a folder"""
    optimizer: Optimizer = Optimizer(learning_rate=1e-3)
    """optimiser of the encoder and of class vectors"""
    loss: Loss = "contrastive"
    """the base loss"""
    regulariser: bool = True
    """--no-regulariser trains the base loss only"""
    compare: bool = True
    """train the base loss alone first, from the same start and on the same batches, and show both"""
    positive_margin: float = 0.9
    """m+: positives of a lower cosine are pulled"""
    negative_margin: float = 0.5
    """m-: negatives of a higher cosine are pushed; below m+"""
    positive_weight: float = 1.0
    """lambda+"""
    negative_weight: float = 1.0
    """lambda-"""
    class_rate: float = 1.0
    """factor on the learning rate of class vectors (ProxyAnchor's code: 100)"""
    train_classes: int = 6
    """of image sets: classes that are trained on; the others are evaluated on"""
    classes_per_batch: int = 8
    """P of the P x K sampler; at most the number of training classes is used"""
    per_class: int = 4
    """K of the P x K sampler, at least 2"""
    steps: int = 600
    """training steps of each of the two runs"""
    hidden: int = 128
    """width of the encoder's hidden layer"""
    features: int = 32
    """size of an embedding"""
    far_low: float = 1e-2
    """global false accept rate at the lower end of the thresholds that OPIS looks at"""
    far_high: float = 1e-1
    """and at the upper end"""

    def build(self) -> Run:
        """Data, the base run, the run with TCM, and their evaluation on the test classes."""
        data = self.load()
        host, stream, tx = self.objective(data), self.stream(data), self.transformed_optimizer()
        transform = self.transformation()
        test = data["test"]

        def embed(variables, batch, context):
            return host.forward(variables, batch, context)[0]["embedding"]

        def evaluation(name):
            return embedding_evaluation(name, test, 256, embed, self.features, self.measure)

        def report(state):
            seen = state.loss["main"]
            return {"batches_without_positives": seen["without_positives"]} if seen else {}

        def start(rng):
            return host.init(jax.random.key(self.seed), jax.tree.map(jnp.asarray, stream.batch(0)))

        compiled = jax.jit(lambda v, x: embed(v, x, Context(jax.random.key(0), train=False)))

        def keep(name, restart):
            def fit(variables, artefacts, rng):
                z = np.asarray(compiled(variables, {k: jnp.asarray(v) for k, v in test.items()}))
                again = {c: v for c, v in start(rng).items() if restart}
                return FitResult(again, {name: {"embedding": z}}, self.measure(z, test["label"]))

            return Fit(name, fit)

        every = max(1, self.steps // 4)
        train = functools.partial(
            Train, steps=self.steps, objective=host, optimizer=tx, stream=stream, eval_every=every
        )
        phases: list[Any] = []
        if self.compare and self.regulariser:
            phases += [train("base_training", evaluate=(evaluation("base_test"),)), keep("base", True)]
        name = "tcm" if self.regulariser else "base"
        phases += [
            train(f"{name}_training", loss_transform=transform, evaluate=(evaluation("test"),), report=report),
            keep(name, False),
        ]

        def export(variables: Mapping, artefacts: Mapping) -> Export:
            facts = {
                "input": f"float32 {list(data['train']['x'].shape[1:])}",
                "compare by": "cosine",
                "data": data.name,
            }
            kept = {k: v for k, v in variables.items() if k != "params"}
            return Export(self.module(), {**kept, "params": encoder_params(variables["params"])}, facts)

        def summary(m: Mapping[str, float]) -> str:
            if f"tcm/{'opis'}" in m and "base/opis" in m:
                return (
                    f"{self.loss} on {data.name}: OPIS {m['base/opis']:.2e} -> {m['tcm/opis']:.2e}, recall@1 "
                    f"{m['base/recall@1']:.3f} -> {m['tcm/recall@1']:.3f} with TCM; see thresholds.png"
                )
            return f"{self.loss} on {data.name}: OPIS {m[name + '/opis']:.2e}, recall@1 {m[name + '/recall@1']:.3f}"

        return Run(
            phases=phases,
            export=export,
            init=start,
            figures=functools.partial(self._draw, labels=test["label"]),
            data_fingerprint=data.fingerprint,
            summary=summary,
            steps_per_call=10,
        )

    def load(self) -> Dataset:
        """Training classes and other test classes.

        Raises:
          UserError: a setting or a data set that cannot work.
        """
        self._check()
        if self.data.path is None and self.data.name == "vmf":
            return vmf_clusters(self.seed)
        return open_world(image_dataset(self.data.name, self.data.path), self.train_classes)

    def module(self) -> MLP:
        """The encoder."""
        return MLP((self.hidden,), self.features, dtype=jnp.dtype(self.dtype))

    def objective(self, data: Dataset) -> Objective:
        """The base loss as a host."""
        return metric_host(self.loss, self.module(), data.info["num_classes"], self.per_class)

    def transformation(self) -> LossTransformation | None:
        """TCM, or nothing with --no-regulariser."""
        if not self.regulariser:
            return None
        return threshold_consistent_margin(
            self.positive_margin, self.negative_margin, self.positive_weight, self.negative_weight
        )

    def stream(self, data: Dataset) -> ArrayStream:
        """P x K batches of the training classes."""
        train = data["train"]
        p = min(self.classes_per_batch, data.info["num_classes"])
        order = class_balanced(train["label"], p, self.per_class, self.seed)
        return ArrayStream(train, p * self.per_class, order)

    def transformed_optimizer(self) -> optax.GradientTransformation:
        """The optimiser, class vectors at their own rate."""
        tx = self.optimizer.build(self.steps)
        if self.class_rate == 1.0:
            return tx

        def at_class_vectors(params):
            own = lambda path, _: path[0].key in ("head", "proxies")  # noqa: E731
            return jax.tree_util.tree_map_with_path(own, params)

        return optax.chain(tx, optax.masked(optax.scale(self.class_rate), at_class_vectors))

    def consistency(self, embeddings: np.ndarray, labels: np.ndarray) -> Consistency:
        """OPIS and the curves behind it.

        Raises:
          UserError: a test set that cannot show them.
        """
        try:
            return threshold_consistency(embeddings, labels, (self.far_low, self.far_high))
        except ValueError as error:
            raise UserError(f"--far-low {self.far_low:g} --far-high {self.far_high:g}: {error}") from None

    def measure(self, embeddings: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Recall, mAP, OPIS and how many classes it left out."""
        found = self.consistency(embeddings, labels)
        spread = {
            "opis": found.opis,
            "epsilon_opis": found.epsilon_opis,
            "classes_excluded": float(len(found.excluded)),
        }
        return {**neighbour_metrics(embeddings, labels), **spread}

    def _check(self) -> None:
        try:
            tcm.check_margins(self.positive_margin, self.negative_margin, self.positive_weight, self.negative_weight)
        except ValueError as error:
            raise UserError(f"--positive-margin and --negative-margin: {error}") from None
        for flag in ("steps", "hidden", "features"):
            if getattr(self, flag) < 1:
                raise UserError(f"--{flag} must be at least 1, got {getattr(self, flag)}")
        if self.per_class < 2:
            raise UserError(
                f"--per-class must be at least 2, got {self.per_class}: a batch without two examples of a class has no "
                "positive pair"
            )
        if self.classes_per_batch < 2:
            raise UserError(f"--classes-per-batch must be at least 2, got {self.classes_per_batch}")
        if not 0 < self.far_low < self.far_high < 1:
            raise UserError(
                f"--far-low and --far-high must rise within (0, 1), got {self.far_low:g} and {self.far_high:g}"
            )
        if not self.class_rate > 0:
            raise UserError(f"--class-rate must be positive, got {self.class_rate}")

    def _draw(self, result: Any, workdir: Path, labels: np.ndarray) -> None:
        kept = [(n, np.asarray(result.artefacts[n]["embedding"])) for n in ("base", "tcm") if n in result.artefacts]
        names = {"base": self.loss.replace("_", " "), "tcm": f"{self.loss.replace('_', ' ')} + TCM"}
        draw_thresholds({names[n]: self.consistency(z, labels) for n, z in kept}, Path(workdir) / "thresholds.png")


def draw_thresholds(found: Mapping[str, Consistency], file: Path) -> None:
    """Writes, for each model, its classes' utility over the thresholds and their error rates at the middle one."""
    fig, axes = plots.figure(len(found), 2, (4.4, 3.0))
    top = max(max(f.frr[:, f.frr.shape[1] // 2].max(), f.far[:, f.far.shape[1] // 2].max()) for f in found.values())
    for column, (name, f) in enumerate(found.items()):
        upper, lower = axes[0][column], axes[1][column]
        for curve in f.utilities:
            upper.plot(f.thresholds, curve, color="0.6", linewidth=0.8)
        upper.plot(f.thresholds, f.utilities.mean(0), color="#2a78d6", linewidth=2, label="mean over classes")
        upper.set(ylim=(min(g.utilities.min() for g in found.values()) - 0.02, 1.01), xlabel="distance threshold")
        upper.set_ylabel("utility of a class")
        upper.set_title(f"{name}: OPIS {f.opis:.1e}", fontsize=9)
        upper.legend(fontsize=7, loc="lower right")
        middle = f.thresholds.shape[0] // 2
        lower.scatter(f.far[:, middle], f.frr[:, middle], s=18, color="#2a78d6", alpha=0.8)
        lower.set(xlim=(-0.02 * top, 1.05 * top), ylim=(-0.02 * top, 1.05 * top))
        lower.set_xlabel("false accept rate of a class")
        lower.set_ylabel("false reject rate")
        lower.set_title(f"one threshold, {f.thresholds[middle]:.2f}, for all classes", fontsize=9)
        for axis in (upper, lower):
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
    plots.save(fig, file)


def fields() -> dict[str, str]:
    """The data fields this recipe needs."""
    return {
        "x": "float32 [height, width, channels] or [d]: what the encoder reads",
        "label": "int32 []: the class; test classes are others than training classes",
    }


ARMS = ("base + TCM", "base", "untrained encoder")
CLAIM_LOSSES = ("contrastive", "cosface")


def arm(arm: str, seed: int) -> dict[str, float]:
    """One arm of the claim: both base losses trained on one draw of the clusters, everything paired by ``seed``.

    Returns:
      ``log_opis``, the mean over the two losses of the logarithm of OPIS; and each loss's OPIS and recall@1.
    """
    if arm not in ARMS:
        raise UserError(suggest(arm, ARMS, "arm"))
    found: dict[str, float] = {}
    for loss in CLAIM_LOSSES:
        recipe = Recipe(loss=loss, seed=seed)
        data = recipe.load()
        z = _train(recipe, data, arm)
        got = recipe.measure(z, data["test"]["label"])
        found |= {f"{loss}_{k}": got[k] for k in ("opis", "epsilon_opis", "recall@1")}
    logs = [np.log(found[f"{loss}_opis"]) for loss in CLAIM_LOSSES]
    recall = float(np.mean([found[f"{loss}_recall@1"] for loss in CLAIM_LOSSES]))
    return {"log_opis": float(np.mean(logs)), "recall@1": recall, **found}


def _train(recipe: Recipe, data: Dataset, arm: str) -> np.ndarray:
    stream, host = recipe.stream(data), recipe.objective(data)
    variables = host.init(jax.random.key(recipe.seed), jax.tree.map(jnp.asarray, stream.batch(0)))
    if arm != "untrained encoder":
        arrays = {k: jnp.asarray(v) for k, v in data["train"].items()}
        run = _compiled(recipe.loss, data.info["num_classes"], arm == "base + TCM")
        variables = run(variables, arrays, *rows_of(stream, recipe.steps), jax.random.key(recipe.seed))
    forward = jax.jit(lambda v, x: host.forward(v, {"x": x}, Context(jax.random.key(0), train=False))[0]["embedding"])
    return np.asarray(forward(variables, jnp.asarray(data["test"]["x"])))


@functools.cache
def _compiled(loss: str, classes: int, regularised: bool):
    recipe = Recipe(loss=loss, regulariser=regularised)
    host = metric_host(loss, recipe.module(), classes, recipe.per_class)
    transform, tx = recipe.transformation(), recipe.optimizer.build(recipe.steps)
    update = bare_update(host, tx, transform)

    @jax.jit
    def run(variables, arrays, rows, real, key):
        start = carry(variables, tx, transform, len(arrays["label"]))
        return scan_updates(update, start, arrays, rows, real, key).variables

    return run


def benchmarks() -> list[Benchmark]:
    """TCM's gradient at B = 4096, d = 256, on the similarity matrix and streamed (others: ``zoo bench losses``)."""
    from trainers import bench_losses

    return [b for b in bench_losses.benchmarks() if b.name.startswith("tcm")]


def example() -> dict[str, Any]:
    """A tiny instance for the conformance table, on a host of pairs, of proxies and of two views."""
    rng = np.random.default_rng(0)
    batch = {
        "x": rng.normal(size=(16, 6)).astype(np.float32),
        "label": np.repeat(np.arange(4), 4).astype(np.int32),
        "index": np.arange(16, dtype=np.int32),
        "mask": np.ones(16, bool),
    }
    module = MLP((8,), 4)
    row = {
        "batch": batch,
        "optimizer": optax.adam(1e-3),
        "transform": threshold_consistent_margin(0.9, 0.3),
        "num_examples": 16,
    }
    return {
        "objective": metric_host("contrastive", module, 4),
        **row,
        "also": {"proxies": {"objective": metric_host("proxy_anchor", module, 4), **row}},
    }
