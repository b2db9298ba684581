"""Recipe: a classifier whose augmentation is learnt as a constraint, judged on transformed test images."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from data.dataset import Dataset
from data.images import image_dataset
from data.stream import evaluation_stream, training_stream
from data.symmetries import moved_digits, six_nine
from trainers import recipe as base
from trainers.evaluation import accuracy
from trainers.phases import Train
from trainers.recipe import Benchmark, Data, Export, Optimizer, Run, UserError
from trainers.run import train_in_memory
from zoo.base import Context, Objective, suggest
from zoo.nn.heads import Pick
from zoo.nn.mlp import MLP
from zoo.nn.wide_resnet import WideResNet, WideResNetConfig
from zoo.objectives import supervised
from zoo.ops.augmentation import (
    OPS,
    AugmentationSpace,
    Transform,
    augment,
    check_images,
    fixed_standard,
    sample_transform,
    sample_transforms,
    wide_standard,
)
from zoo.ops.images import compose, cutout, random_flip
from zoo.representation.invariance_augment import (
    Views,
    invariance_constrained,
    operation_shares,
    rising_warning,
)


@dataclass(frozen=True)
class Recipe(base.Recipe):
    """Trains a classifier whose loss under transformations of the images is held below epsilon.

    The defaults use sixes against sixes upside down, where displacement changes nothing and half-turns swap the
    classes. The paper's CIFAR-10 setting is --data.name cifar10 --encoder wrn40-2 --space fixed --epsilon 0.6
    --dual-rate 1e-4 --epochs 200 --batch-size 128 --crop 4 --flip --cutout 16 --optimizer.learning-rate 0.1.
    """

    data: Data = Data("six_nine")
    """six_nine, moved_digits (generated), digits (bundled), any TFDS image set, or --data.path with a file or folder"""
    optimizer: Optimizer = Optimizer(
        name="nesterov", learning_rate=0.05, schedule="cosine", weight_decay=5e-4, clip_norm=5.0
    )
    """optimiser of the classifier"""
    epochs: int = 100
    """passes over the training images"""
    batch_size: int = 32
    """images per step"""
    encoder: Literal["mlp", "wrn10-1", "wrn40-2", "wrn28-10"] = "mlp"
    """classifier; wrn are wide residual networks, depth and width"""
    hidden: int = 128
    """hidden units of the mlp"""
    epsilon: float = 0.3
    """the loss under transformations must fall to this; the paper: 0.6 to 2.1, by data and network"""
    dual_rate: float = 0.02
    """step size of the dual variable; 0 keeps it at --dual-start, a penalty method. The paper: 1e-4, of many steps"""
    dual_start: float | None = None
    """first value of the dual variable; by default 0, or 1 with several chains"""
    proposals: int = 2
    """transformations proposed per chain and step; 1 is uniform augmentation"""
    chains: int = 1
    """augmented views per image"""
    sampler: Literal["metropolis_hastings", "adversarial", "adversarial_identity"] = "metropolis_hastings"
    """how one of the proposals is chosen"""
    sample: bool = False
    """one pass over a mixture of clean and augmented images instead of one over each"""
    space: Literal["planted", "fixed", "wide"] = "planted"
    """the 14 operations' strengths: planted reaches 3 pixels and half-turns, fixed and wide are the published ones"""
    crop: int = 0
    """pixels of zero padding for a random crop of every view; 0 for none"""
    flip: bool = False
    """whether every view is mirrored with probability one half"""
    cutout: int = 0
    """side of the square erased from every view; 0 for none"""
    variant: Literal["paper", "official"] = "paper"
    """official: proposals update the batch statistics, and a zero loss is not left for another"""

    def build(self) -> Run:
        """Data, the constrained training and the test."""
        dataset = self.load()
        network = self.network(dataset)
        objective = self.objective(network)
        return self._run(dataset, network, objective, functools.partial(draw, recipe=self))

    def load(self) -> Dataset:
        """The data with images in [0, 1].

        Raises:
          UserError: no labels, or no images of one or three channels.
        """
        makers = {"six_nine": six_nine, "moved_digits": moved_digits}
        if self.data.path is None and self.data.name in makers:
            dataset = makers[self.data.name](self.seed)
        else:
            dataset = image_dataset(self.data.name, self.data.path)
        if "label" not in dataset["train"]:
            raise UserError(f"{dataset.name!r} has no field 'label'; invariance_augment trains a classifier")
        splits = {s: {"x": (a["x"] + 1) / 2, "label": a["label"]} for s, a in dataset.splits.items()}
        try:
            check_images(splits["train"]["x"], dataset.name)
        except ValueError as error:
            raise UserError(str(error)) from None
        return dataclasses.replace(dataset, splits=splits)

    def network(self, dataset: Dataset) -> nn.Module:
        """The classifier: ``(x) -> logits``."""
        classes = int(dataset.info["num_classes"])
        if self.encoder == "mlp":
            return MLP((self.hidden, self.hidden), classes, dtype=jnp.dtype(self.dtype))
        depth, width = map(int, self.encoder[3:].split("-"))
        return Pick(WideResNet(WideResNetConfig(depth, width, classes=classes), jnp.dtype(self.dtype)), "logits")

    def views(self) -> Views:
        """How the network's inputs are made.

        Raises:
          UserError: a negative size.
        """
        for flag, value in (("crop", self.crop), ("cutout", self.cutout)):
            if value < 0:
                raise UserError(f"--{flag} must not be negative, got {value}")
        spaces = {
            "planted": AugmentationSpace(OPS, translate=3, rotate=180),
            "fixed": fixed_standard(),
            "wide": wide_standard(),
        }
        before = [functools.partial(crop_padded, padding=self.crop)] if self.crop else []
        before += [random_flip] if self.flip else []
        erase = functools.partial(cutout, size=self.cutout) if self.cutout else None
        return Views(spaces[self.space], compose(*before) if before else None, lambda x: 2 * x - 1, erase)

    def objective(self, network: nn.Module) -> Objective:
        """Cross-entropy subject to the constraint.

        Raises:
          UserError: settings that the method refuses.
        """
        views = self.views()
        for flag, value in (("epochs", self.epochs), ("proposals", self.proposals), ("chains", self.chains)):
            if value < 1:
                note = " (1 is uniform augmentation)" if flag == "proposals" else ""
                raise UserError(f"--{flag} must be at least 1{note}, got {value}")
        if self.dual_start is not None and self.dual_start < 0:
            raise UserError(f"--dual-start must not be negative, got {self.dual_start}")
        try:
            return invariance_constrained(
                supervised(network),
                views.space,
                self.epsilon,
                self.dual_rate,
                self.proposals,
                self.chains,
                sampler=self.sampler,
                sample=self.sample,
                dual_start=self.dual_start,
                base=views.base,
                normalise=views.normalise,
                erase=views.erase,
                epochs=self.epochs,
                variant=self.variant,
            )
        except ValueError as error:
            said = str(error).replace("dual_rate=0", "--dual-rate 0").replace("dual_rate must", "dual-rate must")
            raise UserError(f"--{said.replace('sample=True', 'sample')}") from None

    def _run(self, dataset: Dataset, network: nn.Module, objective: Objective, figures: Callable | None) -> Run:
        stream = training_stream({k: dataset["train"][k] for k in ("x", "label")}, self.batch_size, self.seed)
        steps = self.epochs * stream.steps_per_epoch
        wide = min(256, max(64, self.batch_size))
        tests = [
            accuracy(name, evaluation_stream(dataset[name], wide), objective.forward)
            for name in dataset.splits
            if name != "train"
        ]

        def export(variables, artefacts):
            weights = {c: variables[c] for c in ("params", "batch_stats") if c in variables}
            return Export(network, weights, {"inputs": "images scaled to [-1, 1]", "data": dataset.name})

        def summary(metrics):
            found = ", ".join(f"{t.name} {metrics[f'{t.name}/accuracy']:.3f}" for t in tests)
            line = f"accuracy: {found}"
            if "train/gamma" not in metrics:
                return line
            line += f"; gamma {metrics['train/gamma']:.3g}, constrained loss {metrics['train/constraint']:.3g}"
            line += f" (epsilon {self.epsilon:g})"
            # gamma before the last step has risen in one step less than after it
            rising = round(metrics["train/epochs_rising"] * stream.steps_per_epoch)
            note = rising_warning(rising, stream.steps_per_epoch, self.epsilon, metrics["train/gamma"])
            return f"{line}; {note}" if note and self.dual_rate else line

        return Run(
            [Train("train", steps, objective, self.optimizer.build(steps), stream), *tests],
            export,
            figures=figures,
            data_fingerprint=dataset.fingerprint,
            summary=summary,
            steps_per_call=20 if self.encoder == "mlp" else 1,
        )


def crop_padded(key: jax.Array, image: jax.Array, padding: int) -> jax.Array:
    """Pads every side with zeros and cuts a window of the old size at a random place."""
    wide = jnp.pad(image, ((padding, padding), (padding, padding), (0, 0)))
    at = jax.random.randint(key, (2,), 0, 2 * padding + 1)
    return jax.lax.dynamic_slice(wide, (at[0], at[1], 0), image.shape)


def augmented_only(host: Objective, views: Views, inputs: str = "x") -> Objective:
    """The usual training on uniformly drawn transformations (TrivialAugment): every view is augmented, none chosen."""

    def forward(variables, batch, context):
        if not context.train:
            return host.forward(variables, {**batch, inputs: jax.vmap(views.plain)(batch[inputs])}, context)
        draw = jax.vmap(functools.partial(sample_transform, space=views.space))
        transforms = draw(context.example_keys(batch, "transforms"))
        seen = jax.vmap(views.view)(context.example_keys(batch, "views"), batch[inputs], transforms)
        return host.forward(variables, {**batch, inputs: seen}, context)

    return dataclasses.replace(host, forward=forward, name=f"augmented({host.name})")


def fields() -> dict[str, str]:
    """The data fields this recipe needs."""
    return {
        "x": "float32 [N, H, W, 1 or 3] in [-1, 1]: images (uint8 images of TFDS sets and files are scaled)",
        "label": "int32 [N]: classes",
    }


def draw(result: Any, workdir: Path, recipe: Recipe) -> None:
    """Writes ``augmentation.png``: gamma, the constrained loss, acceptance, and which operations were chosen."""
    from trainers import plots

    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    rows = [r for r in rows if r["phase"] == "train" and "gamma" in r]
    counts = np.asarray(result.state.collections["invariance"]["counts"])
    shares, levels = operation_shares(counts)
    total = counts.sum(0, keepdims=True)
    space = recipe.views().space
    shown = [i for i, op in enumerate(space.ops) if total[0, i].sum()] or list(range(len(space.ops)))
    fig, axes = plots.figure(2, 2, (4.8, 3.2))
    (top, losses), (heat, bars) = axes
    steps = [r["step"] for r in rows]
    top.plot(steps, [r["gamma"] for r in rows], color="#3060a0")
    top.set_ylabel("gamma")
    top.set_title("dual variable", fontsize=9)
    losses.plot(steps, [r["constraint"] for r in rows], color="#b04030", label="loss under transformations")
    losses.axhline(recipe.epsilon, color="black", lw=0.8, ls="--", label="epsilon")
    if rows and "acceptance" in rows[0]:
        losses.plot(steps, [r["acceptance"] for r in rows], color="#a0a0a0", lw=0.8, label="acceptance rate")
    losses.legend(fontsize=6)
    losses.set_title("constraint", fontsize=9)
    for axis in (top, losses):
        axis.set_xlabel("step", fontsize=8)
        axis.grid(alpha=0.25)
    groups = np.array_split(np.arange(len(shares)), min(len(shares), 20))  # epochs in at most 20 columns
    picture = np.stack([shares[g].mean(0)[shown] for g in groups], 1)
    image = heat.imshow(picture, aspect="auto", cmap="Blues", vmin=0, extent=(0, len(shares), len(shown), 0))
    fig.colorbar(image, ax=heat, shrink=0.8)
    heat.set_yticks(np.arange(len(shown)) + 0.5, [space.ops[i] for i in shown], fontsize=6)
    heat.set_xlabel("epoch", fontsize=8)
    heat.set_title("share of the chosen operations", fontsize=9)
    share, level = operation_shares(total)
    bars.barh(range(len(shown)), share[0, shown], color="#3060a0")
    bars.axvline(1 / max(len([o for o in space.ops if o != "identity"]), 1), color="black", lw=0.8, ls="--")
    for row, i in enumerate(shown):
        bars.text(share[0, i], row, f" level {level[0, i]:.1f}", va="center", fontsize=6)
    bars.set_yticks(range(len(shown)), [space.ops[i] for i in shown], fontsize=6)
    bars.invert_yaxis()
    bars.set_xlim(0, 1.3 * max(share[0, shown].max(), 1e-6))
    bars.set_title("all epochs (dashed: uniform)", fontsize=9)
    plots.save(fig, workdir / "augmentation.png")


ARMS = ("constrained", "uniform", "no augmentation")


def arm(arm: str, seed: int) -> dict[str, float]:
    """Trains one arm of the claim on its own data, initialisation and order, all paired by ``seed``."""
    if arm not in ARMS:
        raise UserError(suggest(arm, ARMS, "arm"))
    recipe = Recipe(seed=seed)
    dataset = recipe.load()
    network, views = recipe.network(dataset), recipe.views()
    if arm == "constrained":
        objective = recipe.objective(network)
    elif arm == "uniform":
        objective = augmented_only(supervised(network), views)
    else:
        plain = supervised(network)
        scaled = lambda v, b, c: plain.forward(v, {**b, "x": jax.vmap(views.plain)(b["x"])}, c)  # noqa: E731
        objective = dataclasses.replace(plain, forward=scaled)
    found = train_in_memory(recipe._run(dataset, network, objective, None), seed=seed)
    metrics = {"accuracy": found.metrics["test/accuracy"], "turned_accuracy": found.metrics["turned/accuracy"]}
    if arm == "constrained":
        _, gamma = found.curve("gamma")
        shares, levels = operation_shares(np.asarray(found.state.collections["invariance"]["counts"]).sum(0)[None])
        rotate = views.space.ops.index("rotate")
        metrics |= {
            "gamma_highest": float(max(gamma)),
            "gamma_last": float(gamma[-1]),
            "rotate_share": float(shares[0, rotate]),
            "rotate_level": float(levels[0, rotate]),
        }
    return metrics


def benchmarks() -> list[Benchmark]:
    """The operations on a mixed batch, and a training step beside one of training on augmented images."""
    space, n, side = fixed_standard(), 256, 32
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (n, side, side, 3)).astype(np.uint8)
    drawn = jax.tree.map(lambda v: v[0], sample_transforms(jax.random.split(jax.random.key(0), n), space, 1))

    def operations(images, op, level, positive):
        return jax.vmap(lambda i, t: augment(i, t, space))(images, Transform(op, level, positive))

    host = supervised(Pick(WideResNet(WideResNetConfig(10, 1, classes=10)), "logits"))
    batch = {"x": images[:64], "label": rng.integers(0, 10, 64).astype(np.int32), "index": np.arange(64)}
    steps = {
        "plain": augmented_only(host, Views(space)),
        "constrained": invariance_constrained(host, space, 0.5, dual_start=1.0),
    }
    variables = {k: o.init(jax.random.key(1), batch) for k, o in steps.items()}

    def gradient(objective):
        def run(variables, batch):
            def scalar(params):
                context = Context(jax.random.key(2), jnp.int32(0), 10, 5)
                outputs, _ = objective.forward({**variables, "params": params}, batch, context)
                loss = objective.loss(outputs, batch, context.replace(collections=variables))
                return jnp.mean(loss.elements.values) + sum(loss.terms.values())

            return jax.grad(scalar)(variables["params"])

        return run

    plain = jax.jit(gradient(steps["plain"]))

    def baseline(variables_, batch):
        return jax.block_until_ready(plain(variables["plain"], batch))

    # of the 3 x 3 convolutions: the stem's, and two in each of three stages
    work = (
        2.0
        * 64
        * side
        * side
        * (27 * 16 + 2 * 9 * 16 * 16 + 9 * 16 * 32 + 9 * 32 * 32 / 4 + 9 * 32 * 64 / 4 + 9 * 64 * 64 / 16)
    )
    return [
        Benchmark(
            "augment, 256 images of 32 x 32 x 3",
            operations,
            (images, drawn.op, drawn.level, drawn.positive),
            flops=30.0 * images.size,
            bytes=2.0 * images.size,
            note="bit for bit PIL's results, any mixture of the 14 operations",
        ),
        Benchmark(
            "step of WRN-10-1, B=64, n=2, m=1",
            gradient(steps["constrained"]),
            (variables["constrained"], batch),
            flops=8 * work,
            bytes=4.0 * images[:64].size * 8,
            baselines={"plain augmented training": baseline},
            note="2 forward passes without gradient and 2 with, against 1: the brief expects about 2.7 times",
        ),
    ]


def example() -> dict:
    """The conformance rows: a classifier with batch statistics, SimCLR, and the sampled Lagrangian."""
    from zoo.hosts import simclr

    rng = np.random.default_rng(0)
    batch = {
        "x": rng.uniform(size=(16, 8, 8, 1)).astype(np.float32),
        "label": rng.integers(0, 3, 16).astype(np.int32),
        "index": np.arange(16, dtype=np.int32),
        "mask": np.ones(16, bool),
    }
    space = AugmentationSpace(translate=2)
    scale = lambda x: 2 * x - 1  # noqa: E731
    classifier = supervised(MLP((16,), 3, normalise=True))
    views = lambda key, x: (x + 0.1 * jax.random.normal(key, x.shape), x)  # noqa: E731
    make = functools.partial(invariance_constrained, space=space, dual_rate=0.05, dual_start=0.5, normalise=scale)
    row = {"batch": batch, "optimizer": optax.sgd(0.05, 0.9), "transform": None, "num_examples": 16}

    def wrapper(host):
        # losses that are negative cosines begin at -1
        return invariance_constrained(host, space, 0.5, 0.05, dual_start=0.5, kappa=-float("negcos" in host.provides))

    return {
        **row,
        "wrapper": wrapper,
        "objective": make(classifier, epsilon=0.5, epochs=3),
        "also": {
            "simclr": {**row, "objective": make(simclr(MLP((16,), 8), views, 0.5), epsilon=1.0)},
            "sampled": {**row, "objective": make(classifier, epsilon=0.5, sample=True)},
        },
    }
