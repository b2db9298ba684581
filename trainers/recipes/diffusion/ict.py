"""Recipe: improved consistency training of a one-step generator, judged by its samples' distance to held-out data."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from data.dataset import Dataset
from data.images import digits, gaussian_mixture_2d, image_dataset
from data.stream import evaluation_stream, training_stream
from trainers import recipe as base
from trainers.bare_update import bare_update, carry
from trainers.phases import Average, Evaluate, Train
from trainers.recipe import Benchmark, Data, Export, Optimizer, Run, UserError
from zoo.base import Context, Objective, suggest
from zoo.diffusion.ict import (
    ConsistencyModel,
    check_curriculum,
    consistency_sample,
    consistency_training,
    original_consistency_training,
)
from zoo.losses.robust import l2
from zoo.metrics.distribution import median_bandwidth, mmd_rbf, precision_recall, sliced_wasserstein
from zoo.nn.denoisers import Mixer, ResidualMLP, UNet
from zoo.ops.noise_levels import Levels, check_images, check_latents


@dataclass(frozen=True)
class Recipe(base.Recipe):
    """Trains a generator that makes an image from noise in one evaluation, without labels and without a teacher.

    The defaults make 8 x 8 handwritten digits. The paper's CIFAR-10 setting is --data.name cifar10 --model unet --width
    128 --batch-size 1024 --steps 400000 --s1 1280 --dropout 0.3 --optimizer.learning-rate 1e-4 --average 0.99993.
    """

    data: Data = Data("digits")
    """digits (bundled), mixture (generated points), any TFDS image set, or --data.path with an .npz file or a folder"""
    optimizer: Optimizer = Optimizer(name="radam", learning_rate=1e-3)
    """optimiser of the network"""
    steps: int = 5000
    """training steps"""
    batch_size: int = 128
    """examples per step"""
    average: float = 0.999
    """decay of the averaged weights that are evaluated and exported; training never sees them"""
    model: Literal["auto", "mlp", "mixer", "unet"] = "auto"
    """network; auto takes the mlp up to 16 x 16 pixels and the unet above"""
    width: int = 256
    """features of the mlp or mixer; channels of the unet at full size are a quarter of it"""
    depth: int = 4
    """residual blocks of the mlp or mixer"""
    dropout: float = 0.0
    """dropout rate; both branches drop the same units"""
    conditional: bool = False
    """--conditional gives the network the label (the sheet then has one row of each class)"""
    s0: int = 10
    """noise intervals at the start"""
    s1: int = 80
    """noise intervals at the end; their number doubles in stages (the paper: 1280)"""
    sigma_max: float = 80.0
    """standard deviation of the noise that samples are made from"""
    sigma_data: float = 0.0
    """standard deviation of the data; 0 measures it on the training split (the paper: 0.5)"""
    sigma_mid: float = 0.821
    """noise added for the second evaluation of two-step samples"""
    reduction: Literal["vector", "elementwise"] = "vector"
    """pseudo-Huber distance over the whole example (the paper) or entry by entry (re-implementations)"""
    original: bool = False
    """--original trains by the parent paper's consistency training, the baseline"""

    def build(self) -> Run:
        """Data, the training phase and the evaluation of one-step samples."""
        dataset = self.load()
        train, test = dataset["train"], dataset["test"]
        model = self.module(dataset)
        objective = self.objective(model)
        phase = Train(
            "train",
            self.steps,
            objective,
            self.optimizer.build(self.steps),
            training_stream(train, min(self.batch_size, len(train["x"])), self.seed),
            average=Average(self.average),
            evaluate=(samples_evaluation(model, test, min(self.batch_size, len(test["x"])), self.conditional),),
        )

        def export(variables: Mapping, artefacts: Mapping) -> Export:
            facts = {
                "input": f"float32 [B, {', '.join(map(str, train['x'].shape[1:]))}] and sigma float32 [B]",
                "range": "[-1, 1]",
                "data": dataset.name,
                "sigma_max": self.sigma_max,
                "one_step": "model(sigma_max * z, sigma_max) with z standard normal",
            }
            return Export(model, {c: variables[c] for c in ("params", "constants") if c in variables}, facts)

        return Run(
            phases=[phase],
            export=export,
            figures=functools.partial(draw_samples, recipe=self, model=model, test=test),
            data_fingerprint=dataset.fingerprint,
            summary=lambda m: (
                f"one-step samples of {dataset.name} are {m['samples/sliced_w1']:.4f} (sliced W1) from held-out data; "
                "see samples.png"
            ),
            steps_per_call=10,
        )

    def load(self) -> Dataset:
        """The data, checked.

        Raises:
          UserError: settings outside their range, images of another range or with values that are not finite.
        """
        for flag, value in (("steps", self.steps), ("batch-size", self.batch_size), ("width", self.width)):
            if value < 1:
                raise UserError(f"--{flag} must be at least 1, got {value}")
        if self.sigma_data < 0:
            raise UserError(f"--sigma-data must be positive, or 0 to measure it, got {self.sigma_data:g}")
        if not 0 <= self.average < 1:
            raise UserError(f"--average must lie in [0, 1), got {self.average:g}")
        if not 0.002 < self.sigma_mid <= self.sigma_max:
            raise UserError(f"--sigma-mid must lie in (0.002, {self.sigma_max:g}], got {self.sigma_mid:g}")
        try:
            check_curriculum(self.steps, self.s0, self.s1)
        except ValueError as error:
            raise UserError(f"--steps, --s0, --s1: {error}") from None
        if self.data.path is None and self.data.name in ("digits", "mixture"):
            dataset = digits() if self.data.name == "digits" else gaussian_mixture_2d(self.seed)
        else:
            dataset = image_dataset(self.data.name, self.data.path)
        if self.conditional and "num_classes" not in dataset.info:
            raise UserError(f"--conditional needs labels, but {dataset.name} has none")
        for split, arrays in dataset.splits.items():
            check = check_images if arrays["x"].ndim == 4 else check_latents
            try:
                check(arrays["x"], f"{dataset.name}/{split}: x")
            except ValueError as error:
                raise UserError(str(error)) from None
        return dataset

    def module(self, dataset: Dataset) -> ConsistencyModel:
        """The network in its preconditioning."""
        shape = dataset["train"]["x"].shape[1:]
        kind = self.model
        if kind == "auto":
            kind = "unet" if len(shape) == 3 and max(shape[:2]) > 16 else "mlp"
        if len(shape) != 3 and kind != "mlp":
            raise UserError(
                f"--model {kind} needs images; {dataset.name} holds examples of shape {shape}: use --model mlp"
            )
        if not 0 <= self.dropout < 1:
            raise UserError(f"--dropout must lie in [0, 1), got {self.dropout:g}")
        shared = {
            "rate": self.dropout,
            "classes": dataset.info["num_classes"] if self.conditional else 0,
            "dtype": self.dtype,
        }
        denoiser: nn.Module
        if kind == "mlp":
            denoiser = ResidualMLP(self.width, self.depth, **shared)
        elif kind == "mixer":
            denoiser = Mixer(width=self.width // 2, channel_width=self.width, depth=self.depth, **shared)
        else:
            denoiser = UNet(self.width // 4, (1, 2, 2), attention=(shape[0] // 4,), **shared)
        std = self.sigma_data or round(float(dataset["train"]["x"].std()), 3)
        try:
            levels = Levels(sigma_max=self.sigma_max, sigma_data=std)
        except ValueError as error:
            raise UserError(f"--sigma-max, --sigma-data: {error}") from None
        return ConsistencyModel(denoiser, levels)

    def objective(self, model: ConsistencyModel) -> Objective:
        """Improved (or the original) consistency training of that model."""
        label = "label" if self.conditional else None
        if self.original:
            return original_consistency_training(model.denoiser, model.levels, label=label)
        return consistency_training(
            model.denoiser, model.levels, s0=self.s0, s1=self.s1, reduction=self.reduction, label=label
        )


def fields() -> dict[str, str]:
    """The data fields the recipe needs."""
    return {
        "x": "float32 [H, W, C] or [D]  an image in [-1, 1] (files: uint8 or floats, field x or image) or a point",
        "label": "int32 []  class, read with --conditional only",
    }


def latents(index: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Standard normal noise that depends on the example's number alone: evaluations at different steps compare."""
    draw = lambda i: jax.random.normal(jax.random.fold_in(jax.random.key(0), i), shape)  # noqa: E731
    return jax.vmap(draw)(index)


def one_step(model: ConsistencyModel, variables: Mapping, z: jax.Array, cond: jax.Array | None = None) -> jax.Array:
    """One-step samples from the latents ``z``."""
    levels = model.levels
    sigmas = (levels.sigma_max,)
    return consistency_sample(
        model.apply, _weights(variables), None, z.shape, sigmas, sigma_min=levels.sigma_min, cond=cond, noise=z[None]
    )


def samples_evaluation(model: ConsistencyModel, test: Mapping, batch_size: int, conditional: bool = False) -> Evaluate:
    """Compares as many one-step samples with the held-out split: sliced W1, MMD, precision and recall."""
    real = jnp.asarray(test["x"].reshape(len(test["x"]), -1))
    shape = test["x"].shape[1:]

    def update(seen, variables, batch, context):
        # conditional models are asked for the held-out labels, so that both sets have the same classes
        cond = batch["label"] if conditional else None
        made = one_step(model, variables, latents(batch["index"], shape), cond)
        return seen.at[batch["index"]].set(made.reshape(len(made), -1), mode="drop"), {}

    return Evaluate(
        "samples",
        evaluation_stream(test, batch_size),
        init=lambda: jnp.zeros(real.shape, jnp.float32),
        update=update,
        compute=lambda made: {k: float(v) for k, v in _distances(jnp.asarray(made), real).items()},
    )


@jax.jit
def _distances(made: jax.Array, real: jax.Array) -> dict[str, jax.Array]:
    few, some = made[:1024], real[:1024]  # what costs all pairs sees a part of a large split
    precision, recall = precision_recall(few, some)
    return {
        "sliced_w1": sliced_wasserstein(made, real, jax.random.key(0)),
        "mmd": mmd_rbf(few, some, median_bandwidth(some)),
        "precision": precision,
        "recall": recall,
    }


def _weights(variables: Mapping) -> dict:
    return {c: variables[c] for c in ("params", "constants") if c in variables}


def draw_samples(result: Any, workdir: Path, recipe: Recipe, model: ConsistencyModel, test: Mapping) -> None:
    """Writes ``samples.png``: a sheet of one-step samples above two-step samples and real examples, or a scatter."""
    weights = _weights(result.chosen)
    shape = test["x"].shape[1:]
    z = latents(jnp.arange(100 if len(shape) == 3 else len(test["x"])), shape)
    label = None
    if recipe.conditional:
        classes = int(test["label"].max()) + 1
        # the sheet's row r shows class r
        label = jnp.repeat(jnp.arange(10), 10) % classes if len(shape) == 3 else jnp.arange(len(z)) % classes
    sample = jax.jit(lambda v, z: one_step(model, v, z, label))
    one = np.asarray(sample(weights, z))
    sigmas = (recipe.sigma_max, recipe.sigma_mid)
    both = jnp.stack([z, latents(jnp.arange(len(z)) + 10**6, shape)])
    two = np.asarray(consistency_sample(model.apply, weights, None, z.shape, sigmas, cond=label, noise=both))
    (_draw_sheet if len(shape) == 3 else _draw_points)(one, two, test["x"], Path(workdir) / "samples.png", recipe)


def _draw_sheet(one: np.ndarray, two: np.ndarray, real: np.ndarray, path: Path, recipe: Recipe) -> None:
    import matplotlib.pyplot as plt

    blocks = (
        ("One-step samples" + (", row = class" if recipe.conditional else ""), one[:100], 10),
        ("The last row again, in two steps", two[90:100], 1),
        ("Real examples, held out", real[:10], 1),
    )
    figure, axes = plt.subplots(3, 1, figsize=(7, 9.4), layout="constrained", height_ratios=[10, 1, 1])
    for axis, (title, images, rows) in zip(axes, blocks, strict=True):
        axis.imshow(tile(images, rows), cmap="gray_r", vmin=-1, vmax=1, interpolation="nearest")
        axis.set_title(title, loc="left", fontsize=10)
        axis.axis("off")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def tile(images: np.ndarray, rows: int, pad: int = 1) -> np.ndarray:
    """Images ``[N, h, w, c]`` side by side in ``rows`` rows, ``pad`` pixels apart: ``[H, W]`` or ``[H, W, 3]``.

    Colour images are mapped to [0, 1], grey ones stay in [-1, 1].
    """
    colour = images.shape[-1] == 3
    x = np.clip(images, -1, 1)
    x = (x + 1) / 2 if colour else x[..., :1]
    x = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)), constant_values=1 if colour else -1)
    n, h, w, c = x.shape
    sheet = x.reshape(rows, n // rows, h, w, c).transpose(0, 2, 1, 3, 4).reshape(rows * h, -1, c)
    return sheet if colour else sheet[..., 0]


def _draw_points(one: np.ndarray, two: np.ndarray, real: np.ndarray, path: Path, recipe: Recipe) -> None:
    import matplotlib.pyplot as plt

    panels = (("held-out data", real), ("one-step samples", one), ("two-step samples", two))
    figure, axes = plt.subplots(1, 3, figsize=(10, 3.6), layout="constrained", sharex=True, sharey=True)
    for axis, (title, points) in zip(axes, panels, strict=True):
        axis.scatter(points[:2000, 0], points[:2000, 1], s=2, color="#2a78d6", linewidths=0)
        axis.set_title(title, loc="left")
        axis.set_aspect("equal")
    figure.savefig(path, dpi=130)
    plt.close(figure)


# --- the claim --------------------------------------------------------------------------------------------------------

ARMS = ("ict", "ct", "gaussian")
CLAIM_STEPS, CLAIM_BATCH = 3000, 256


def arm(arm: str, seed: int) -> dict[str, float]:
    """Trains one arm of the claim on the mixture: the same points, first weights and order for the same seed.

    Args:
      arm: ``ict``, ``ct`` (the original consistency training), ``gaussian`` (a Gaussian fitted to the training split);
        also the ablations ``ict_ema`` (a target of averaged weights), ``ict_plain`` (l2, uniform intervals and weight)
        and ``ict_fixed`` (11 levels throughout).
      seed: of everything.

    Returns:
      ``sliced_w1`` and ``mmd`` of one-step samples to held-out points.
    """
    known = (*ARMS, *(a for a in _OBJECTIVES if a not in ARMS))
    if arm not in known:
        raise UserError(suggest(arm, known, "arm"))
    dataset = gaussian_mixture_2d(seed)
    train, test = dataset["train"]["x"], dataset["test"]["x"]
    if arm == "gaussian":
        rng = np.random.default_rng(seed)
        made = rng.multivariate_normal(train.mean(0), np.cov(train.T), len(test)).astype(np.float32)
        made = jnp.asarray(made)
    else:
        made = _train_arm(arm, jnp.asarray(train), seed, len(test))
    found = _distances(made, jnp.asarray(test))
    return {k: float(found[k]) for k in ("sliced_w1", "mmd")}


def _claim_model() -> ConsistencyModel:
    return ConsistencyModel(ResidualMLP(64, 3, condition=32), Levels())


_OBJECTIVES = {
    "ict": lambda net: consistency_training(net, s0=10, s1=160),
    "ct": lambda net: original_consistency_training(net),
    "ict_plain": lambda net: consistency_training(
        net, s0=10, s1=160, intervals="uniform", weighting="uniform", metric=l2
    ),
    "ict_ema": lambda net: consistency_training(net, s0=10, s1=160, ema_decay=0.95),
    "ict_fixed": lambda net: consistency_training(net, s0=10, s1=10),
}


def _train_arm(arm: str, train: jax.Array, seed: int, count: int) -> jax.Array:
    return _arm_program(arm, count)(train, jax.random.key(seed))


@functools.cache
def _arm_program(arm: str, count: int):
    # one program per arm: all steps in one scan, the seed an argument, so that further seeds compile nothing
    model = _claim_model()
    objective = _OBJECTIVES[arm](model.denoiser)
    tx = optax.radam(1e-3)

    @jax.jit
    def run(train, key):
        batch = {"x": train[:CLAIM_BATCH], "index": jnp.arange(CLAIM_BATCH), "mask": jnp.ones(CLAIM_BATCH, bool)}
        variables = dict(objective.init(jax.random.fold_in(key, 0), batch))

        update = bare_update(objective, tx)

        def body(state, step):
            trained, average = state
            now = jax.random.fold_in(jax.random.fold_in(key, 1), step)
            index = jax.random.randint(jax.random.fold_in(now, 0), (CLAIM_BATCH,), 0, len(train))
            rows = {**batch, "x": train[index], "index": index}
            trained = update(trained, rows, Context(now, step, CLAIM_STEPS))
            average = jax.tree.map(lambda a, p: 0.999 * a + 0.001 * p, average, trained.variables["params"])
            return (trained, average), None

        start = (carry(variables, tx), variables["params"])
        (trained, average), _ = jax.lax.scan(body, start, jnp.arange(CLAIM_STEPS))
        return one_step(model, {**trained.variables, "params": average}, latents(jnp.arange(count), train.shape[1:]))

    return run


# --- benchmarks and the conformance row ----------------------------------------------------------------------------


def benchmarks() -> list[Benchmark]:
    """One training step of the default recipe at the first and at the last stage: one program serves both."""
    recipe = Recipe()
    dataset = digits()
    objective = recipe.objective(recipe.module(dataset))
    tx = recipe.optimizer.build(recipe.steps)
    size = recipe.batch_size
    batch = {k: jnp.asarray(v) for k, v in training_stream(dataset["train"], size).batch(0).items()}
    variables = dict(objective.init(jax.random.key(0), batch))
    update = bare_update(objective, tx)

    def step(now, batch, number):
        return update(now, batch, Context(jax.random.fold_in(jax.random.key(0), number), number, recipe.steps))

    weights = sum(x.size for x in jax.tree.leaves(variables["params"]) if x.ndim > 1)
    # two forward passes and one backward pass, which costs two more; every weight is read and its moments written
    flops = 8.0 * size * weights
    moved = 4.0 * weights * (2 + 1 + 6)
    return [
        Benchmark(f"step_{name}", step, (carry(variables, tx), batch, jnp.int32(at)), flops, moved, note=note)
        for name, at, note in (
            ("first_stage", 0, f"{recipe.s0} intervals"),
            ("last_stage", recipe.steps - 1, f"{recipe.s1} intervals, the same program"),
        )
    ]


def example() -> dict:
    """A row for the conformance table: a tiny network on tiny images."""
    rng = np.random.default_rng(0)
    batch = {
        "x": rng.uniform(-1, 1, (16, 4, 4, 1)).astype(np.float32),
        "index": np.arange(16, dtype=np.int32),
        "mask": np.ones(16, bool),
    }
    return {
        "objective": consistency_training(ResidualMLP(8, 1, condition=8, rate=0.1), s0=2, s1=8),
        "batch": batch,
        "optimizer": optax.radam(1e-3),
        "transform": None,
        "num_examples": 16,
    }
