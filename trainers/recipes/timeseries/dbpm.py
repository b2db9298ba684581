"""Recipe: SimCLR on series with Dynamic Bad Pair Mining, judged by a linear probe."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from data.dataset import Dataset
from data.stream import evaluation_stream, training_stream
from data.timeseries import PAIR_TYPES, bad_pairs, digits_series, load_ucr
from trainers import recipe as base
from trainers.bare_update import bare_update, carry
from trainers.phases import Evaluate, Train
from trainers.probes import linear_probe
from trainers.recipe import Benchmark, Data, Export, Optimizer, Run, UserError
from zoo.base import Context, LossTransformation, Objective, suggest
from zoo.hosts import two_views
from zoo.losses.contrastive import nt_xent_per_example
from zoo.nn.heads import ProjectionHead, WithHead
from zoo.nn.resnet1d import ResNet1D
from zoo.ops.series import ts_jitter, ts_permute, ts_scale
from zoo.timeseries.dbpm import (
    MiningState,
    dynamic_bad_pair_mining,
    pair_means,
    pair_memory_init,
    pair_memory_stats,
    pair_memory_update,
    pair_thresholds,
)

DATA = ("bad_pairs", "digits", "ucr")
TYPE_COLOURS = {"normal": "#2a78d6", "noisy": "#eb6834", "faulty": "#1baf7a"}


@dataclass(frozen=True)
class Recipe(base.Recipe):
    """SimCLR on series with bad pairs weighed down, then a linear probe.

    The defaults are a small set of sinusoids with known bad pairs; the paper's own setting is --depth 34 --batch-size
    512 --optimizer.learning-rate 3e-4 --scale 1.1 --scale-axis time --jitter 0.8 --max-segments 8.
    """

    data: Data = Data("bad_pairs")
    """bad_pairs (generated), digits (their 64 pixels as a series) or ucr (--data.path DIR, --data.split PROBLEM)"""
    optimizer: Optimizer = Optimizer(learning_rate=1e-3)
    """optimiser of the encoder and its head"""
    steps: int = 300
    """training steps; the epochs are steps / steps per epoch, rounded up"""
    batch_size: int = 120
    """series per step; each meets all others of its batch as negatives"""
    warm_up: float = 0.625
    """share of the epochs before mining starts (the brief: 50 of 80)"""
    beta_np: float = 1.5
    """standard deviations below the mean at which a pair counts as noisy (the paper's ECG setting: 2)"""
    beta_fp: float = 1.5
    """standard deviations above the mean at which a pair counts as faulty (the paper's ECG setting: 3)"""
    transform: Literal["pdf", "pdf_clipped", "gaussian"] = "pdf_clipped"
    """how the present loss of a flagged pair becomes its weight"""
    recency: Literal["mean", "linear"] = "mean"
    """whether later epochs weigh more in an instance's mean loss"""
    variant: Literal["paper", "official"] = "paper"
    """official: the released code's density, recency and scale"""
    mining: bool = True
    """--no-mining trains plain SimCLR, the baseline"""
    temperature: float = 0.2
    """of NT-Xent"""
    depth: Literal["tiny", "18", "34", "50"] = "tiny"
    """1-D ResNet: tiny has three blocks of 16, 32 and 64 channels"""
    features: int = 64
    """size of the encoder's features"""
    scale: float = 0.3
    """first view: standard deviation of the random factor"""
    scale_axis: Literal["time", "channel"] = "channel"
    """first view: one factor per time step or one per channel"""
    jitter: float = 0.3
    """second view: standard deviation of the added noise"""
    max_segments: int = 4
    """second view: most segments that are shuffled"""

    def build(self) -> Run:
        """Data, the training phase and the probe."""
        dataset = self.load()
        train, test = dataset["train"], dataset["test"]
        stream = training_stream(train, self.batch_size, self.seed)
        epochs = math.ceil(self.steps / stream.steps_per_epoch)
        encoder, model = self.modules()
        host = self.objective(model)
        transform = self.loss_transform(epochs) if self.mining else None
        phases = [
            Train("pretrain", self.steps, host, self.optimizer.build(self.steps), stream, loss_transform=transform),
            probe(encoder, train, test, self.batch_size),
        ]

        def export(variables: Mapping, artefacts: Mapping) -> Export:
            weights = {c: variables[c]["encoder"] for c in ("params", "batch_stats")}
            shape = f"float32 [B, {train['x'].shape[1]}, {train['x'].shape[2]}]: series, time, channels"
            facts = {"input": shape, "data": dataset.name, "classes": dataset.info["num_classes"]}
            return Export(encoder, weights, facts)

        return Run(
            phases=phases,
            export=export,
            figures=functools.partial(draw_pairs, train=train, recipe=self) if self.mining else None,
            data_fingerprint=dataset.fingerprint,
            from_export=lambda weights: {c: {"encoder": w} for c, w in weights.items()},
            summary=lambda m: f"linear probe on {dataset.name}: test accuracy {m['probe/accuracy']:.3f}",
        )

    def load(self) -> Dataset:
        """The data set with its two views' sources: ``x`` and ``other`` (the same unless the generator says otherwise).

        Raises:
          UserError: an unknown name, a path that is missing or not used, or series too short for the augmentation.
        """
        name, path = self.data.name, self.data.path
        if name not in DATA:
            raise UserError(suggest(name, DATA, "data set"))
        if name == "ucr" and path is None:
            raise UserError("--data.name ucr needs --data.path DIR, a folder with NAME_TRAIN.ts and NAME_TEST.ts")
        if name != "ucr" and path is not None:
            raise UserError(f"--data.path is read with --data.name ucr only; the data set {name!r} needs no path")
        if name == "ucr":
            dataset = load_ucr(path, self.data.split)
        else:
            dataset = bad_pairs(self.seed) if name == "bad_pairs" else digits_series(self.seed)
        length = dataset["train"]["x"].shape[1]
        if not 2 <= self.max_segments <= length - 1:
            raise UserError(
                f"--max-segments must lie in 2..{length - 1} for series of {length} steps, got {self.max_segments}"
            )
        splits = {s: {**arrays, "other": arrays.get("other", arrays["x"])} for s, arrays in dataset.splits.items()}
        return dataclasses.replace(dataset, splits=splits)

    def modules(self) -> tuple[ResNet1D, WithHead]:
        """The encoder, and the encoder with the head it is trained under."""
        if self.depth == "tiny":
            encoder = ResNet1D((1, 1, 1), (16, 32, 64), self.features, dtype=self.dtype)
        else:
            encoder = ResNet1D(int(self.depth), features=self.features, dtype=self.dtype)
        head = ProjectionHead((2 * self.features,), self.features, dtype=self.dtype)
        return encoder, WithHead(encoder, head)

    def objective(self, model: WithHead) -> Objective:
        """SimCLR: NT-Xent between a scaled view of ``x`` and a permuted, jittered view of ``other``."""
        for flag, value in (("temperature", self.temperature), ("steps", self.steps)):
            if value <= 0:
                raise UserError(f"--{flag} must be positive, got {value}")
        for flag, value in (("scale", self.scale), ("jitter", self.jitter)):
            if value < 0:
                raise UserError(f"--{flag} must be 0 or more, got {value}")

        def augment(key, sources):
            first, second = sources
            scale_key, cut_key, noise_key = jax.random.split(key, 3)
            weak = ts_scale(scale_key, first, self.scale, self.scale_axis)
            strong = ts_jitter(noise_key, ts_permute(cut_key, second, self.max_segments), self.jitter)
            return weak, strong

        def loss(z1, z2, mask):
            return nt_xent_per_example(z1, z2, self.temperature, mask)

        host = two_views(model, augment, loss, name="simclr")

        def forward(variables, batch, context):
            return host.forward(variables, {**batch, "x": (batch["x"], batch["other"])}, context)

        return dataclasses.replace(host, forward=forward)

    def loss_transform(self, epochs: int) -> LossTransformation:
        """Bad pair mining over ``epochs`` epochs.

        Raises:
          UserError: settings that the method refuses.
        """
        if not 0 <= self.warm_up < 1:
            raise UserError(f"--warm-up is a share of the epochs, 0 or more and below 1; got {self.warm_up}")
        try:
            return dynamic_bad_pair_mining(
                warm_up=int(self.warm_up * epochs),
                epochs=epochs,
                beta_np=self.beta_np,
                beta_fp=self.beta_fp,
                transform=self.transform,
                recency=self.recency,
                variant=self.variant,
            )
        except ValueError as error:
            raise UserError(f"--{str(error).replace('_', '-', 1)}") from None


def fields() -> dict[str, str]:
    """The data fields the recipe needs."""
    return {
        "x": "float32 [T, C]  a series: time, channels (what the first view is made from)",
        "other": "float32 [T, C]  optional: what the second view is made from, if not x",
        "label": "int32 []  class, read by the linear probe only",
    }


def probe(encoder: ResNet1D, train: Mapping, test: Mapping, batch_size: int) -> Evaluate:
    """A linear probe: logistic regression on the frozen encoder's standardised features, fitted on train."""
    arrays = {"x": np.concatenate([train["x"], test["x"]])}
    labels = np.concatenate([train["label"], test["label"]])
    fitted = len(train["x"])

    def update(features, variables, batch, context):
        h = encode(encoder, variables, batch["x"])
        return features.at[batch["index"]].set(h.astype(jnp.float32), mode="drop"), {}

    def compute(features):
        return {"accuracy": linear_probe(features[:fitted], labels[:fitted], features[fitted:], labels[fitted:])}

    return Evaluate(
        "probe",
        evaluation_stream(arrays, batch_size),
        init=lambda: jnp.zeros((len(labels), encoder.features), jnp.float32),
        update=update,
        compute=compute,
    )


def encode(encoder: ResNet1D, variables: Mapping, x: jax.Array) -> jax.Array:
    """The trained encoder's features, without the head."""
    return encoder.apply({c: variables[c]["encoder"] for c in ("params", "batch_stats")}, x)


def draw_pairs(result: Any, workdir: Path, train: Mapping, recipe: Recipe) -> None:
    """Writes ``pairs.png``: the instances' mean historical losses by pair type, the thresholds and the flags."""
    import matplotlib.pyplot as plt

    mined = result.state.loss["main"]
    memory, stats = mined.memory, mined.stats
    low, high = pair_thresholds(stats.mu, stats.sigma, recipe.beta_np, recipe.beta_fp)
    means = np.asarray(pair_means(memory))
    kinds = train.get("pair")
    groups = {"all series": means} if kinds is None else {t: means[kinds == i] for i, t in enumerate(PAIR_TYPES)}
    groups = {name: values for name, values in groups.items() if len(values)}
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    bins = np.linspace(means.min(), max(means.max(), means.min() + 1e-6), 50)
    colours = [TYPE_COLOURS.get(name, TYPE_COLOURS["normal"]) for name in groups]
    axes.hist(list(groups.values()), bins, stacked=True, label=list(groups), color=colours, edgecolor="white", lw=0.3)
    lines = ((float(low), stats.noisy, "noisy"), (float(high), stats.faulty, "faulty"))
    left, right = bins[0], bins[-1]
    for at, flags, name in lines:
        if math.isfinite(at):
            left, right = min(left, at), max(right, at)
            axes.axvline(at, color="0.25", lw=1, ls="--")
            place = {"xycoords": axes.get_xaxis_transform(), "textcoords": "offset points", "rotation": 90}
            note = f"flagged {name}: {int(flags.sum())}"
            axes.annotate(note, (at, 0.98), (3, 0), va="top", fontsize=8, **place)
    pad = 0.05 * (right - left)
    axes.set(
        xlim=(left - pad, right + pad), xlabel="mean loss of an instance over the epochs (nats)", ylabel="instances"
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title("Which pairs does the mining see as bad?", loc="left")
    if len(groups) > 1:
        axes.legend(frameon=False, title="true type", loc="center right")
    figure.savefig(Path(workdir) / "pairs.png", dpi=150)
    plt.close(figure)


ARMS = ("simclr_dbpm", "simclr", "untrained_encoder")


def arm(arm: str, seed: int) -> dict[str, float]:
    """Trains one arm of the claim on its own data, initialisation and order, all paired by ``seed``.

    Args:
      arm: one of ``ARMS``.
      seed: of everything.

    Returns:
      ``probe_accuracy`` and, with mining, precision and recall of the flags and each pair type's mean loss.
    """
    if arm not in ARMS:
        raise UserError(suggest(arm, ARMS, "arm"))
    recipe = Recipe(seed=seed)
    dataset = recipe.load()
    train, test = dataset["train"], dataset["test"]
    variables, mining = _train(recipe, train, arm)
    encoder, _ = recipe.modules()
    features = jax.jit(functools.partial(encode, encoder))
    h = [np.asarray(features(variables, split["x"])) for split in (train, test)]
    metrics = {"probe_accuracy": linear_probe(h[0], train["label"], h[1], test["label"])}
    return {**metrics, **(flag_metrics(mining, train["pair"]) if mining is not None else {})}


def flag_metrics(mining: MiningState, pair: np.ndarray) -> dict[str, float]:
    """Precision and recall of the flags against the true pair types, and the types' mean historical losses."""
    bad, truth = np.asarray(mining.stats.bad), pair > 0
    hits = float(np.sum(bad & truth))
    means = np.asarray(pair_means(mining.memory))
    by_type = {f"loss_{t}": float(means[pair == i].mean()) for i, t in enumerate(PAIR_TYPES) if np.any(pair == i)}
    return {"flag_precision": hits / max(1, bad.sum()), "flag_recall": hits / max(1, truth.sum()), **by_type}


def _train(recipe: Recipe, train: Mapping, arm: str) -> tuple[Mapping, MiningState | None]:
    stream = training_stream(train, recipe.batch_size, recipe.seed)
    epochs = math.ceil(recipe.steps / stream.steps_per_epoch)
    _, model = recipe.modules()
    init = jax.jit(lambda key, batch: recipe.objective(model).init(key, batch))
    variables = init(jax.random.key(recipe.seed), stream.batch(0))
    if arm == "untrained_encoder":
        return variables, None
    mined = arm == "simclr_dbpm"
    # the seed only selects keys, so that the compiled step serves every seed
    start, step = _compiled_step(dataclasses.replace(recipe, seed=0), epochs, stream.steps_per_epoch, mined)
    now = start(variables, stream.num_examples)
    key = jax.random.key(recipe.seed)
    for number in range(recipe.steps):
        now = step(now, stream.batch(number), jax.random.fold_in(key, number), number)
    return now.variables, now.memory if mined else None


@functools.cache
def _compiled_step(recipe: Recipe, epochs: int, steps_per_epoch: int, mined: bool):
    _, model = recipe.modules()
    transform = recipe.loss_transform(epochs) if mined else None
    tx = recipe.optimizer.build(recipe.steps)
    update = bare_update(recipe.objective(model), tx, transform)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(now, batch, key, number):
        return update(now, batch, Context(key, number, recipe.steps, steps_per_epoch))

    return lambda variables, examples: carry(variables, tx, transform, examples), step


def benchmarks() -> list[Benchmark]:
    """NT-Xent per example, and one step of mining, each beside the way it is commonly written."""
    b, d, n = 512, 128, 20_000
    rng = np.random.default_rng(0)
    z1, z2 = (rng.normal(size=(b, d)).astype(np.float32) for _ in range(2))

    def broadcast_loss(z1, z2):
        z1, z2 = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in (z1, z2))
        z = np.concatenate([z1, z2])
        values = np.empty(len(z), np.float32)
        for start in range(0, len(z), 64):  # B x B x d, in slices so that it fits
            similarity = (z[start : start + 64, None] * z[None]).sum(-1) / 0.2
            rows = np.arange(start, start + len(similarity))
            similarity[np.arange(len(rows)), rows] = -np.inf
            positive = similarity[np.arange(len(rows)), (rows + b) % (2 * b)]
            values[rows] = np.log(np.exp(similarity).sum(1)) - positive
        return values.reshape(2, b).mean(0)

    transform = dynamic_bad_pair_mining(warm_up=0)
    losses = rng.gamma(2.0, size=n).astype(np.float32)
    memory = pair_memory_update(pair_memory_init(n), jnp.arange(n), jnp.asarray(losses))
    state = MiningState(memory, pair_memory_stats(memory, 1.5, 1.5))
    index = rng.choice(n, b, replace=False).astype(np.int32)
    flagged = np.flatnonzero(np.asarray(state.stats.bad)).tolist()

    def mining_step(loss, index, state):
        from zoo.base import example_elements

        batch = {"index": index}
        context = Context(None, jnp.int32(3), 10, 5, batch=batch)
        e, new = transform.update(example_elements(loss, batch), state, context)
        return e.values, new

    def dictionary_step(loss, index, state, kept={}):  # noqa: B006 - the dictionary lives between steps on purpose
        out = np.array(loss)
        for i, (row, value) in enumerate(zip(index.tolist(), loss.tolist(), strict=True)):
            kept.setdefault(row, []).append(value)
            if row in flagged:
                out[i] *= math.exp(-((value - 2.0) ** 2) / 4)
        return out

    return [
        Benchmark(
            name="nt_xent_per_example",
            fn=nt_xent_per_example,
            args=(z1, z2),
            flops=4 * 2 * b * b * d,
            bytes=4 * (2 * b * d + b),
            baselines={"NumPy, B x B x d": broadcast_loss},
            note=f"B={b}, d={d}; O(B^2 + B d) memory",
        ),
        Benchmark(
            name="mining_step",
            fn=mining_step,
            args=(losses[index], index, state),
            flops=20 * b,
            bytes=4 * b * 9,
            baselines={"dictionary and list of flags": dictionary_step},
            note=f"B={b}, N={n}; within an epoch (without donation the state is copied: 13 N bytes more)",
        ),
    ]


def example() -> dict[str, Any]:
    """A tiny instance for the conformance table."""
    import optax

    recipe = Recipe(features=8, batch_size=16, max_segments=3)
    rng = np.random.default_rng(0)
    n, steps, channels = 32, 12, 2
    batch = {k: rng.normal(size=(16, steps, channels)).astype(np.float32) for k in ("x", "other")}
    batch["label"] = rng.integers(0, 3, 16).astype(np.int32)
    batch["index"] = rng.permutation(n)[:16].astype(np.int32)
    batch["mask"] = np.ones(16, bool)
    encoder = ResNet1D((1, 1), (4, 8), features=8)
    return {
        "objective": recipe.objective(WithHead(encoder, ProjectionHead((8,), 8))),
        "batch": batch,
        "optimizer": optax.adam(1e-3),
        "transform": dynamic_bad_pair_mining(warm_up=1, beta_np=1.0, beta_fp=1.0),
        "num_examples": n,
    }
