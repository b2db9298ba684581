"""Recipe: dynamic subspace learners, and what they are compared with: one learner, a fixed number, a classifier."""

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

from data.cluster_stream import ClusterStream, cluster_stream
from data.dataset import Dataset
from data.factors import factor_images, listed_images
from trainers import recipe as base
from trainers import segmentation
from trainers.bare_update import Carry, bare_update, carry
from trainers.embeddings import encoder_params
from trainers.phases import Fit, FitResult, Train
from trainers.recipe import Benchmark, Data, Export, Optimizer, Run, UserError
from trainers.subspaces import (
    activation_mapper,
    best_clusters,
    clustering_metrics,
    draw_attention,
    draw_history,
    image_embedder,
    proxy_dice,
)
from trainers.trees import edit_optimizer
from zoo import hosts
from zoo.base import Context, Objective, suggest
from zoo.nn.resnet import ResNet, ResNetConfig
from zoo.nn.unet import UNet
from zoo.representation import dynamic_subspace as method


@dataclass(frozen=True)
class Recipe(base.Recipe):
    """Trains subspace learners epoch by epoch: clusters, splits and the last whole-embedding epochs come between.

    The defaults are generated images of independent colour, shape and texture. Your own: --data.path with a folder that
    holds NAME_train.txt and NAME_test.txt, lines "id class path" after a header (the lists of the paper's repository).

    A split waits until validation NMI stalls. On the generated images one learner stalls after some 600 steps, so the
    default schedule has 22 epochs of 72 batches (1584 steps) for learners to be added in and 4 more for the whole: a
    split follows in the first half of the run, and the added learner still has the second half.
    """

    data: Data = Data("factors")
    """factors (generated), or --data.path with a folder of listed images"""
    optimizer: Optimizer = Optimizer(learning_rate=1e-3)
    """optimiser of everything (published: Adam 1e-5 on a pretrained ResNet-50)"""
    learners: Literal["dynamic", "single", "fixed", "classifier"] = "dynamic"
    """how many learners: added dynamically, one, --fixed-learners, or a cross-entropy classifier on pooled features"""
    fixed_learners: int = 4
    """K of --learners fixed, in equal slices"""
    attention: bool = True
    """whether a spatial attention map multiplies the features"""
    backbone: Literal["small", "resnet50"] = "small"
    """small convolutions, or ResNet-50 to its third stage with frozen statistics (weights: --init)"""
    image_size: int = 64
    """side of listed images after scaling and cropping (published: 224)"""
    features: int = 32
    """E, the size of the embedding (published: 128)"""
    epochs: int = 26
    """epochs in all (published: 300)"""
    finetune_epoch: int = 22
    """from this epoch on the whole embedding is trained as one (published: 250)"""
    batches: int = 72
    """batches per epoch, the same whatever the clusters are (72: the generated images twice); 0: as many as the largest
    cluster fills, times K"""
    recluster_every: int = 2
    """epochs between clusterings of the training images, once there are two learners"""
    patience: int = 3
    """epochs without a better validation NMI before a split is tried (published: 10)"""
    threshold: float = 0.5
    """importance above which a neuron is kept when the last learner is split"""
    min_size: int = 5
    """the fewest neurons that make a learner"""
    min_pool: int = 10
    """a learner of at most this many neurons is not split"""
    in_place: bool = False
    """copy neurons one after the other over each other, as the released code does"""
    keep_moments: bool = False
    """leave the optimiser's moments as they are at a split, as the released code does"""
    classes_per_batch: int = 4
    """P of a batch"""
    per_class: int = 8
    """K of a batch, at least 2"""
    beta: float = 1.2
    """distance that separates positives from negatives"""
    alpha: float = 0.2
    """half of the band around it"""
    cutoff: float = 0.5
    """negatives nearer than this are not chosen"""
    fill: bool = True
    """take nearer negatives where too few lie beyond the cutoff"""
    restarts: int = 5
    """of every k-means; the one of least inertia is kept"""
    cluster_iterations: int = 100
    """of every k-means"""
    segment_steps: int | None = None
    """steps of a U-Net that learns the proxy masks of the training images; 0 for none; by default 160 where there are
    maps: attention, or with --learners classifier class activation maps"""
    segment_widths: tuple[int, ...] = (8, 16, 32)
    """its channels at each size, from the full one to the smallest (published U-Net: 64 128 256 512 1024)"""

    def build(self) -> Run:
        """Data, one training phase an epoch with what happens after it, and the test."""
        self._check()
        data = self.load()
        self._check_classes(data)
        if self.learners == "classifier":
            return self._classifier(data)
        host, embed = self.objective(), self.embedder()
        phases: list[Any] = [Fit("clusters", functools.partial(self._first_clusters, data, embed=embed))]
        tx = self.optimizer.build(self.epochs * max(1, self.batches))
        for e in range(self.epochs):
            stream = self.stream(data, e)
            name, keep = f"epoch{e}", "keep" if e else "fresh"
            kept = {"optimizer_state": keep, "series": "epochs"}
            phases.append(Train(name, stream.steps_per_epoch, host, tx, stream, **kept))
            phases.append(Fit(f"after{e}", functools.partial(self.event, data, e, embed=embed)))
        phases.append(Fit("test", functools.partial(self._test, data, embed)))
        phases += self._segmentation(data, lambda v, x: embed(v, x)["map"])
        example = jax.tree.map(jnp.asarray, self.stream(data, 0).batch(0))

        def export(variables: Mapping, artefacts: Mapping) -> Export:
            owner = tuple(int(o) for o in np.asarray(variables["subspace"]["owner"]))
            kept = {k: v for k, v in variables.items() if k not in ("subspace", segmentation.ASIDE)}
            return Export(self.module(owner=owner), kept, self._facts(data))

        return Run(
            phases=phases,
            export=export,
            init=lambda rng: host.init(jax.random.key(self.seed), example),
            figures=functools.partial(self._draw, data=data, embed=embed),
            data_fingerprint=data.fingerprint,
            summary=self._summary,
            steps_per_call=1,
            from_export=lambda v: v,
        )

    def load(self) -> Dataset:
        """The data with its validation split.

        Raises:
          UserError: a name that is not known.
        """
        if self.data.path is not None:
            return listed_images(self.data.path, self.image_size)
        if self.data.name != "factors":
            raise UserError(f"--data.name {self.data.name}: {suggest(self.data.name, ('factors',), 'data')}")
        return factor_images(self.seed)

    def module(self, owner: tuple[int, ...] | None = None, only: str | None = None) -> method.SubspaceEncoder:
        """The encoder; with owners it returns the normalised embedding."""
        dtype = jnp.dtype(self.dtype)
        if self.backbone == "resnet50":
            trunk = ResNet(
                ResNetConfig((3, 4, 6), (64, 128, 256), "bottleneck", "imagenet", stem_width=64), dtype=dtype
            )
        else:
            trunk = method.ConvTrunk(dtype=dtype)
        return method.SubspaceEncoder(trunk, self.features, self.attention, owner=owner, only=only, dtype=dtype)

    def objective(self) -> Objective:
        """The margin loss on the batch's learner."""
        count = self.fixed_learners if self.learners == "fixed" else 1
        return method.subspace_learning(
            self.module(), count, self.per_class, self.beta, self.alpha, self.cutoff, self.fill
        )

    def stream(self, data: Dataset, epoch: int) -> ClusterStream:
        """The batches of an epoch, bound to the clusters of the phases before it."""
        whole = epoch >= self.finetune_epoch
        seed = self.seed * 10_000 + epoch
        return cluster_stream(data["train"], self.classes_per_batch, self.per_class, seed, self.batches or None, whole)

    def embedder(self):
        """``(variables, images [N, ...]) -> embedding, pooled and map`` as NumPy arrays, 256 images at a time."""
        return image_embedder(self.objective())

    def event(
        self, data: Dataset, epoch: int, variables: Mapping, artefacts: Mapping, rng: Any, embed: Any
    ) -> FitResult:
        """What happens after an epoch: validation, perhaps a split, perhaps new clusters.

        The clusters it leaves are the artefacts ``clusters`` i32 [N] and ``learners``; ``history`` has a row an epoch:
        validation NMI, recall@1, K and whether the last learner was split.
        """
        held = data["validation"]
        z = embed(variables, held["x"])["embedding"]
        measured = self.measure(z, held["label"], data.info["num_classes"], jax.random.fold_in(rng, 0))
        params, before = variables["params"], variables["subspace"]
        state = method.after_epoch(before, measured["nmi"])
        split = None
        if self.learners == "dynamic" and bool(method.should_split(state, self.patience, self.finetune_epoch)):
            split = method.split_last_learner(
                params["embedding"], state["owner"], method.importance_scores(state), jax.random.fold_in(rng, 1),
                self.threshold, self.min_size, self.min_pool, self.in_place,
            )  # fmt: skip
        happened = split is not None and bool(split.happened)
        edit = None
        if happened:
            moments = lambda tree: {  # noqa: E731
                **tree,
                "embedding": jax.tree.map(lambda m: method.split_moments(m, split), tree["embedding"]),
            }
            edit = None if self.keep_moments else lambda o: edit_optimizer(o, params, moments)
            params = {**params, "embedding": split.params}
        state = method.next_epoch(state, split)
        row = [measured["nmi"], measured["recall@1"], float(state["learners"]), float(happened)]
        history = np.array(artefacts["history"])
        history[epoch] = row
        left = {"history": history}
        if self.learners != "single" and int(state["learners"]) > 1 and (epoch + 1) % self.recluster_every == 0:
            found = self.cluster(data, {**variables, "params": params}, int(state["learners"]), rng, artefacts, embed)
            left |= {"clusters": found, "learners": np.int32(state["learners"])}
        metrics = {**measured, "learners": row[2], "split": row[3]}
        return FitResult({"params": params, "subspace": state}, left, metrics, edit)

    def cluster(
        self, data: Dataset, variables: Mapping, count: int, rng: Any, artefacts: Mapping, embed: Any
    ) -> np.ndarray:
        """Clusters of the training images by their pooled features, named like those before."""
        pooled = embed(variables, data["train"]["x"])["pooled"]
        key = jax.random.fold_in(rng, 2)
        found = best_clusters(key, pooled, count, self.cluster_iterations, self.restarts).assignment
        if count > 1 and "clusters" in artefacts:
            found = method.match_clusters(jnp.asarray(artefacts["clusters"]), found, count)
        labels = jnp.asarray(data["train"]["label"])
        return np.asarray(method.drop_singletons(found, labels, count, data.info["num_classes"]))

    def measure(self, z: np.ndarray, labels: np.ndarray, classes: int, key: Any) -> dict[str, float]:
        """NMI and recall of embeddings with this recipe's k-means."""
        return clustering_metrics(z, labels, classes, key, self.cluster_iterations, self.restarts)

    def _first_clusters(self, data: Dataset, variables: Mapping, artefacts: Mapping, rng: Any, embed: Any) -> FitResult:
        count = self.fixed_learners if self.learners == "fixed" else 1
        ids = np.zeros(len(data["train"]["label"]), np.int32)
        if count > 1:
            ids = self.cluster(data, variables, count, rng, {}, embed)
        empty = np.full((self.epochs, 4), np.nan, np.float32)
        return FitResult(artefacts={"clusters": ids, "learners": np.int32(count), "history": empty})

    def _test(self, data: Dataset, embed: Any, variables: Mapping, artefacts: Mapping, rng: Any) -> FitResult:
        held = data["test"]
        out = embed(variables, held["x"])
        found = self.measure(out["embedding"], held["label"], data.info["num_classes"], rng)
        found["learners"] = float(variables["subspace"]["learners"])
        found["batches_without_negatives"] = float(variables["subspace"]["without_negatives"])
        if self.attention and "mask" in held:
            found["proxy_dice"] = proxy_dice(out["map"], held["mask"])
        return FitResult(metrics=found)

    def _classifier(self, data: Dataset) -> Run:
        classes = data.info["num_classes"]
        host = hosts.softmax_classifier(self.module(only="pooled"), classes, "linear")
        stream = self.stream(data, 0)
        steps = self.epochs * stream.steps_per_epoch
        embed, maps = image_embedder(host), activation_mapper(self.module(only="features"))

        def test(variables, artefacts, rng):
            z = embed(variables, data["test"]["x"])["embedding"]
            z = z / np.maximum(np.linalg.norm(z, axis=1, keepdims=True), 1e-12)
            found = self.measure(z, data["test"]["label"], classes, rng)
            if "mask" in data["test"]:
                found["cam_dice"] = proxy_dice(maps(variables, data["test"]["x"]), data["test"]["mask"])
            return FitResult(metrics=found)

        def export(variables: Mapping, artefacts: Mapping) -> Export:
            kept = {k: v for k, v in variables.items() if k not in ("params", segmentation.ASIDE)}
            weights = {**kept, "params": encoder_params(variables["params"])}
            return Export(self.module(only="pooled"), weights, self._facts(data))

        return Run(
            phases=[
                Train("classifier", steps, host, self.optimizer.build(steps), stream),
                Fit("test", test),
                *self._segmentation(data, maps),
            ],
            export=export,
            figures=functools.partial(self._draw_maps, data=data, maps=maps, name="class activation"),
            data_fingerprint=data.fingerprint,
            summary=self._summary,
            steps_per_call=1,
        )

    def _segmentation(self, data: Dataset, maps: segmentation.Maps) -> list[Any]:
        steps = (160 if self._has_maps() else 0) if self.segment_steps is None else self.segment_steps
        return segmentation.segmentation_phases(data, maps, self._unet(), steps, seed=self.seed) if steps else []

    def _has_maps(self) -> bool:
        return self.attention or self.learners == "classifier"

    def _unet(self) -> UNet:
        return UNet(1, self.segment_widths, norm="instance", dtype=jnp.dtype(self.dtype))

    def _facts(self, data: Dataset) -> dict[str, Any]:
        return {
            "input": f"float32 {list(data['train']['x'].shape[1:])} in [-1, 1]",
            "compare by": "Euclidean distance",
            "data": data.name,
        }

    def _summary(self, m: Mapping[str, float]) -> str:
        if "test/learners" not in m:
            text = f"classifier: test NMI {m['test/nmi']:.3f}, recall@1 {m['test/recall@1']:.3f}"
            if "test/cam_dice" in m and "segmentation/dice" not in m:
                text += f", Dice of class activation masks {m['test/cam_dice']:.2f}"
            return text + segmentation.segmentation_summary(m, "class activation")
        text = (
            f"{self.learners}, {m['test/learners']:.0f} learners: test NMI {m['test/nmi']:.3f}, recall@1 "
            f"{m['test/recall@1']:.3f}"
        )
        if "test/proxy_dice" in m and "segmentation/dice" not in m:
            text += f", Dice of attention masks {m['test/proxy_dice']:.2f}"
        text += segmentation.segmentation_summary(m, "attention")
        if m.get("test/batches_without_negatives", 0):
            text += f" ({m['test/batches_without_negatives']:.0f} batches held one class only and taught nothing)"
        return text + "; see learners.png"

    def _draw(self, result: Any, workdir: Path, data: Dataset, embed: Any) -> None:
        draw_history(np.asarray(result.artefacts["history"]), self.finetune_epoch, Path(workdir) / "learners.png")
        if self.attention:
            self._draw_maps(result, workdir, data, lambda v, x: embed(v, x)["map"], "attention")

    def _draw_maps(self, result: Any, workdir: Path, data: Dataset, maps: segmentation.Maps, name: str) -> None:
        x, predicted = data["test"]["x"][:8], None
        if segmentation.ASIDE in result.variables:
            predicted = segmentation.predicted_masks(self._unet(), result.variables[segmentation.ASIDE], x)
        draw_attention(x, maps(result.variables, x), Path(workdir) / "attention.png", predicted, name)

    def _check(self) -> None:
        least = {
            "epochs": 1, "finetune_epoch": 1, "recluster_every": 1, "patience": 1, "min_size": 1, "features": 1,
            "fixed_learners": 1, "restarts": 1, "cluster_iterations": 1, "image_size": 16, "classes_per_batch": 2,
            "batches": 0, "min_pool": 0,
        }  # fmt: skip
        for name, low in least.items():
            if getattr(self, name) < low:
                raise UserError(f"--{name.replace('_', '-')} must be at least {low}, got {getattr(self, name)}")
        if self.per_class < 2:
            raise UserError(f"--per-class must be at least 2, got {self.per_class}: an anchor needs a positive")
        segmentation.check_segmentation(self.segment_steps, self.segment_widths, self._has_maps())
        if not 0 < self.threshold < 1:
            raise UserError(f"--threshold must lie within (0, 1), got {self.threshold}: importances are scaled to that")
        if not (self.alpha >= 0 and self.beta > 0 and 0 <= self.cutoff < 2):
            raise UserError(
                f"--alpha, --beta and --cutoff: expected alpha >= 0, beta > 0 and a cutoff in [0, 2), got "
                f"{self.alpha}, {self.beta} and {self.cutoff}"
            )
        if self.learners == "fixed":
            try:
                method.equal_slices(self.features, self.fixed_learners)
            except ValueError as error:
                raise UserError(f"--fixed-learners {self.fixed_learners}: {error}") from None

    def _check_classes(self, data: Dataset) -> None:
        labels = data["train"]["label"]
        if (np.bincount(labels) == 1).any():
            alone = int(np.flatnonzero(np.bincount(labels) == 1)[0])
            raise UserError(
                f"{data.name}: class {alone} has a single training image; metric learning needs two or more"
            )


def fields() -> dict[str, str]:
    """The data fields this recipe needs."""
    return {
        "x": "float32 [height, width, channels] in [-1, 1]: the image",
        "label": "int32 []: its class; every class needs two training images or more",
    }


ARMS = ("dynamic learners", "single learner", "untrained encoder", "fixed 2", "fixed 4")
REGISTERED = {"epochs": 16, "finetune_epoch": 14, "batches": 36, "patience": 2}
"""The schedule with which the claim was registered and run; the recipe's own became longer since."""


def arm(arm: str, seed: int) -> dict[str, float]:
    """One arm of the claim on one draw of the factor images, everything paired by ``seed``.

    Returns:
      ``nmi`` and ``recall@k`` of the test split, ``learners``; the dynamic arm adds ``nmi_fixed_2`` and
      ``nmi_fixed_4``, those of the fixed arms with the same seed.
    """
    if arm not in ARMS:
        raise UserError(suggest(arm, ARMS, "arm"))
    kinds = {"dynamic learners": "dynamic", "single learner": "single", "untrained encoder": "single"}
    fixed = int(arm.split()[1]) if arm.startswith("fixed") else 1
    recipe = Recipe(seed=seed, learners=kinds.get(arm, "fixed"), fixed_learners=fixed, **REGISTERED)
    data = recipe.load()
    variables = _train(recipe, data, 0 if arm == "untrained encoder" else recipe.epochs)
    test = recipe._test(data, recipe.embedder(), variables, {}, jax.random.key(seed))
    found = dict(test.metrics)
    if arm == "dynamic learners":
        for k in (2, 4):
            found[f"nmi_fixed_{k}"] = _arm_nmi(f"fixed {k}", seed)
    return found


def _arm_nmi(name: str, seed: int) -> float:
    return arm(name, seed)["nmi"]


def _train(recipe: Recipe, data: Dataset, epochs: int) -> Mapping[str, Any]:
    # the recipe's epochs without a loop around them: one compiled step serves every epoch, whatever K is
    host, embed = recipe.objective(), recipe.embedder()
    example = jax.tree.map(jnp.asarray, recipe.stream(data, 0).batch(0))
    variables = host.init(jax.random.key(recipe.seed), example)
    tx, step = _program()
    key = jax.random.key(recipe.seed)
    artefacts = dict(recipe._first_clusters(data, variables, {}, key, embed).artefacts)
    now = carry(variables, tx)
    for e in range(epochs):
        stream = recipe.stream(data, e).bind(artefacts)
        for i in range(stream.steps_per_epoch):
            batch = {k: v for k, v in stream.batch(i).items() if k in ("x", "label", "learner", "index")}
            number = e * stream.steps_per_epoch + i
            now = step(now, batch, Context(jax.random.fold_in(key, number)))
        found = recipe.event(data, e, now.variables, artefacts, jax.random.fold_in(key, 10_000 + e), embed)
        moments = found.edit(now.moments) if found.edit else now.moments
        now = Carry({**now.variables, **found.variables}, moments)
        artefacts |= found.artefacts
    return now.variables


@functools.cache
def _program():
    recipe = Recipe(**REGISTERED)
    tx = recipe.optimizer.build(recipe.epochs * recipe.batches)
    return tx, jax.jit(bare_update(recipe.objective(), tx))


def benchmarks() -> list[Benchmark]:
    """The margin loss with its sampler and its gradient at the paper's batch, E = 128 in seven learners; and large."""
    from zoo.losses.margin import distances, margin_loss

    found = []
    for rows in (32, 1024):
        rng = np.random.default_rng(0)
        x = jnp.asarray(rng.normal(size=(rows, 128)), jnp.float32)
        owner = method.equal_slices(128, 7)
        labels = jnp.asarray(np.repeat(np.arange(rows // 8), 8), jnp.int32)

        def value(x, owner, labels, learner):
            z = method.active_slice(method.grouped_l2_normalize(x, owner, 25), owner, learner)
            return margin_loss(distances(z), labels)

        found.append(
            Benchmark(
                f"margin_B{rows}",
                jax.grad(value),
                (x, owner, labels, jnp.int32(3)),
                6.0 * rows**2 * 128,
                8.0 * rows * 128 + 4.0 * rows**2,
                note=f"gradient of one learner, B={rows}, E=128, K=7",
            )  # fmt: skip
        )
    return found


def example() -> dict[str, Any]:
    """A tiny instance for the conformance table: two learners, the batch of the first."""
    rng = np.random.default_rng(0)
    batch = {
        "x": rng.normal(size=(16, 8, 8, 3)).astype(np.float32),
        "label": np.repeat(np.arange(4), 4).astype(np.int32),
        "learner": np.zeros(16, np.int32),
        "index": np.arange(16, dtype=np.int32),
        "mask": np.ones(16, bool),
    }
    module = method.SubspaceEncoder(method.ConvTrunk((4, 8)), 8)
    return {
        "objective": method.subspace_learning(module, 2, 4, cutoff=0.05, fill=True),
        "batch": batch,
        "optimizer": optax.adam(1e-3),
        "transform": None,
        "num_examples": 16,
        "also": {"segmentation": segmentation.example()},
    }
