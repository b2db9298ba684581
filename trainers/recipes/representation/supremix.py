"""Recipe: contrastive pretraining for regression, with and without mixed pairs, judged by a linear probe."""

from __future__ import annotations

import dataclasses
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
from data.ordered import check_ties, diabetes, ordered_manifold, read_regression
from data.stream import ArrayStream, training_stream
from trainers import plots
from trainers import recipe as base
from trainers.bare_update import bare_update, carry, rows_of, scan_updates
from trainers.embeddings import embedding_evaluation, encoder_params
from trainers.phases import Fit, FitResult, Train
from trainers.probes import ridge_probe
from trainers.recipe import Benchmark, Data, Export, Optimizer, Run, UserError
from zoo import hosts
from zoo.base import Context, LossTransformation, Objective, suggest
from zoo.losses.contrastive import unit_rows
from zoo.losses.pairs import pair_masks, supervised_contrastive
from zoo.metrics.regression import by_shot, spearman
from zoo.nn.mlp import MLP
from zoo.objectives import supervised
from zoo.representation import supremix as method
from zoo.representation.supremix import Regressor, supcr, supremix, supremix_loss

Method = Literal["supremix", "mix_neg", "mix_pos", "supcon", "rank_n_contrast", "supcr", "l1"]
MIXED = ("supremix", "mix_neg", "mix_pos")


@dataclass(frozen=True)
class Recipe(base.Recipe):
    """Pretrains an encoder by SupCon and by SupReMix from the same start, then probes both for the target.

    The defaults are a generated one-dimensional manifold with three examples of each label. Real data: --data.name
    diabetes, or --data.path with a csv of (features..., label, split) or (path, label, split) for images.
    """

    data: Data = Data("manifold")
    """manifold (generated), diabetes (bundled), or --data.path with a csv"""
    optimizer: Optimizer = Optimizer(learning_rate=1e-3)
    """optimiser of the encoder (published: Adam 1e-3)"""
    method: Method = "supremix"
    """supremix, either half of it, or a baseline: supcon, rank_n_contrast (Euclidean), supcr (L1 distances), l1"""
    compare: bool = True
    """train SupCon first, from the same start and on the same batches (with noise of their own), and show both"""
    temperature: float = 0.3
    """of supremix and supcon (published: 0.3 for faces, 0.1 for sentences)"""
    window: float = 5.0
    """eps of mix-pos, in bins of the label (published: 5 years, 1.0 for sentences)"""
    beta: Literal["mostly_negative", "mostly_anchor", "even"] = "mostly_negative"
    """the anchor's share in mix-neg: Beta(2, 8), Beta(8, 2) or Beta(5, 5)"""
    weight: Literal["l1_inv", "l2_inv", "l1", "l2", "none"] = "l1_inv"
    """weights of candidates by label distance"""
    pool: int = 1
    """equal parts of a batch that mix within themselves"""
    chunk: int = 16
    """anchors at a time; memory is chunk times the square of the views in a batch"""
    variant: Literal["exact", "official"] = "exact"
    """official: real pairs and mixtures each shifted by their own maximum, as released"""
    views: int = 2
    """views of an example, 1 or 2; with one every label must occur twice"""
    noise: float = 0.1
    """standard deviation of the noise that makes the views; 0 gives the same input twice"""
    bin_size: float = 0.0
    """size of a label's bin in units of the target; 0: as it is (diabetes: 10)"""
    per_label: int = 3
    """of the manifold: training examples of each label"""
    imbalance: bool = False
    """of the manifold: counts fall from 40 times --per-label to 3, for the many, median and few-shot regions"""
    steps: int = 400
    """updates of each encoder"""
    batch_size: int = 64
    """examples a step"""
    hidden: int = 64
    """width of the two hidden layers"""
    features: int = 16
    """size of the embedding (published: 128)"""
    penalty: float = 1e-3
    """of the ridge probe, per training example"""
    many: int = 100
    """many-shot: labels that occur more often in training than this"""
    few: int = 20
    """few-shot: labels that occur less often than this"""

    def build(self) -> Run:
        """Data, SupCon, the method, and a probe of each."""
        data = self.load()
        stream, tx = self.stream(data), self.optimizer.build(self.steps)
        both = {k: np.concatenate([data["train"][k], data["test"][k]]) for k in ("x", "target")}
        names = (["supcon"] if self.compare and self.method != "supcon" else []) + [self.method]

        def start(rng, name=names[0]):
            batch = jax.tree.map(jnp.asarray, stream.batch(0))
            return self.objective(name, data).init(jax.random.key(self.seed), batch)

        def report(state):
            seen = state.loss["main"]
            return {"anchors_without_positives": seen["without_positives"]} if seen else {}

        def keep(name, following):
            embed = self.embed(name)
            compiled = jax.jit(lambda v, x: embed(v, {"x": x}, Context(jax.random.key(0), train=False)))

            def fit(variables, artefacts, rng):
                z = np.asarray(compiled(variables, jnp.asarray(both["x"])))
                again = dict(start(rng, following)) if following else {}
                return FitResult(again, {name: {"embedding": z}}, self.measure(z, data))

            return Fit(name, fit)

        phases: list[Any] = []
        for name, following in zip(names, [*names[1:], None], strict=True):
            compute = lambda z, _: self.measure(z, data)  # noqa: E731
            test = embedding_evaluation("probe", both, 256, self.embed(name), self.features, compute, "target")
            phases.append(
                Train(
                    f"{name}_training", self.steps, self.objective(name, data), tx, stream, self.transformation(name),
                    evaluate=(test,), eval_every=max(1, self.steps // 4), report=report,
                )
            )  # fmt: skip
            phases.append(keep(name, following))

        def export(variables: Mapping, artefacts: Mapping) -> Export:
            facts = {"input": f"float32 {list(both['x'].shape[1:])}", "data": data.name, "bin size": self.bin_size}
            return Export(self.module(), {"params": encoder_params(variables["params"])}, facts)

        def summary(m: Mapping[str, float]) -> str:
            told = ", ".join(
                f"{n} {m[n + '/mae']:.3f} (first component {m[n + '/pc1_spearman']:.2f})"
                for n in names
                if n + "/mae" in m
            )
            return f"probe MAE on {data.name}: {told}; see embeddings.png"

        return Run(
            phases=phases,
            export=export,
            init=start,
            figures=functools.partial(self._draw, data=data, names=names),
            data_fingerprint=data.fingerprint,
            summary=summary,
            steps_per_call=10,
        )

    def load(self) -> Dataset:
        """The data, its labels checked.

        Raises:
          UserError: a setting or a data set that cannot work.
        """
        self._check()
        if self.data.path is not None:
            data = read_regression(self.data.path, self.bin_size)
        elif self.data.name == "manifold":
            data = ordered_manifold(self.seed, self.per_label, imbalance=self.imbalance)
        elif self.data.name == "diabetes":
            data = diabetes(self.bin_size or 10.0)
        else:
            raise UserError(
                suggest(self.data.name, ("manifold", "diabetes"), "--data.name") + "; or give --data.path FILE.csv"
            )
        if self.method not in ("rank_n_contrast", "supcr", "l1"):
            check_ties(data["train"]["label"], self.views, f"{data.name}, --bin-size {self.bin_size:g}")
        return data

    def module(self) -> MLP:
        """The encoder."""
        return MLP((self.hidden, self.hidden), self.features, dtype=jnp.dtype(self.dtype))

    def objective(self, name: str, data: Dataset) -> Objective:
        """The host of a method."""
        views = functools.partial(_noisy_views, self.noise)
        if name == "l1":
            y = data["train"]["target"]
            return _noisy_inputs(_direct(self.module(), float(np.median(y)), float(y.std() or 1.0)), self.noise)
        if name == "supcr":
            return supcr(self.module(), views)
        if name == "rank_n_contrast":
            return hosts.ordinal_contrast(self.module(), views)
        if self.views == 1:
            return _noisy_inputs(hosts.supervised_contrast(self.module(), None, self.temperature), self.noise)
        return hosts.supervised_contrast(self.module(), views, self.temperature)

    def transformation(self, name: str) -> LossTransformation | None:
        """The mixtures of a method, if it has any."""
        if name not in MIXED:
            return None
        return supremix(
            self.temperature, self.window, method.BETA[self.beta], self.weight, name != "mix_pos", name != "mix_neg",
            self.pool, chunk=self.chunk, variant=self.variant,
        )  # fmt: skip

    def embed(self, name: str):
        """``(variables, batch, context) -> z [B, features]`` without noise: what is probed, perhaps unit rows."""

        def embed(variables, batch, context):
            z = self.module().apply({"params": encoder_params(variables["params"])}, batch["x"]).astype(jnp.float32)
            return z if name in ("l1", "rank_n_contrast") else unit_rows(z)

        return embed

    def stream(self, data: Dataset) -> ArrayStream:
        """Shuffled batches of the training split."""
        return training_stream(data["train"], self.batch_size, self.seed)

    def measure(self, z: np.ndarray, data: Dataset) -> dict[str, float]:
        """Errors of the ridge probe by shot region, and how well the first principal component follows the target.

        Args:
          z: embeddings of the training split, then of the test split.
          data: with both.
        """
        cut = len(data["train"]["target"])
        predicted = ridge_probe(z[:cut], data["train"]["target"], z[cut:], self.penalty)
        return {**self.errors(predicted, data), "pc1_spearman": first_component_order(z[cut:], data["test"]["target"])}

    def errors(self, predicted: np.ndarray, data: Dataset) -> dict[str, float]:
        """Errors of predictions of the test split: ``mae`` and so on, ``few_mae`` where there are several regions."""
        test = data["test"]
        scaled = test["label"], data["train"]["label"]
        found = by_shot(np.asarray(predicted), test["target"], *scaled, self.many, self.few)
        several = {r: v for r, v in found.items() if r != "all" and len(found) > 2}
        return {k: v for k, v in found["all"].items() if k != "rows"} | {
            f"{r}_{k}": v for r, values in several.items() for k, v in values.items() if k in ("mae", "gmean")
        }

    def _check(self) -> None:
        beta = method.BETA[self.beta]
        try:
            method.check_settings(self.temperature, self.window, beta, self.weight, self.chunk, self.variant)
        except ValueError as error:
            raise UserError(f"--temperature, --window and --chunk: {error}") from None
        for flag in ("steps", "hidden", "features", "batch_size", "pool", "per_label", "few"):
            if getattr(self, flag) < 1:
                raise UserError(f"--{flag.replace('_', '-')} must be at least 1, got {getattr(self, flag)}")
        if self.batch_size % self.pool:
            raise UserError(f"--pool {self.pool} must divide --batch-size {self.batch_size}")
        if self.views not in (1, 2):
            raise UserError(f"--views must be 1 or 2, got {self.views}")
        if self.views == 1 and self.method in ("rank_n_contrast", "supcr"):
            raise UserError(f"--views 1 goes with supremix, its halves and supcon; {self.method} has two")
        for flag in ("noise", "bin_size", "penalty"):
            if not getattr(self, flag) >= 0:
                raise UserError(f"--{flag.replace('_', '-')} must not be negative, got {getattr(self, flag)}")
        if self.many < self.few:
            raise UserError(f"--many must be at least --few, got {self.many} and {self.few}")

    def _draw(self, result: Any, workdir: Path, data: Dataset, names: list[str]) -> None:
        cut = len(data["train"]["target"])
        found = {n: np.asarray(result.artefacts[n]["embedding"])[cut:] for n in names if n in result.artefacts}
        draw_embeddings(found, data["test"]["target"], Path(workdir) / "embeddings.png")


def first_component_order(z: np.ndarray, target: np.ndarray) -> float:
    """Absolute Spearman correlation of the first principal component with the target; 0 for constant embeddings."""
    order = abs(float(spearman(jnp.asarray(components(z)[:, 0]), jnp.asarray(target, jnp.float32))))
    return order if np.isfinite(order) else 0.0


def components(z: np.ndarray) -> np.ndarray:
    """The first two principal components of embeddings, float32 ``[N, 2]``."""
    centred = z.astype(np.float64) - z.mean(0)
    u, s, _ = np.linalg.svd(centred, full_matrices=False)
    scores = np.zeros((len(z), 2))
    scores[:, : min(2, len(s))] = (u * s)[:, :2]
    # what is rounding of a constant embedding has no order
    return np.where(s[0] > 1e-6 * max(1.0, np.abs(z).max()), scores, 0.0).astype(np.float32)


def draw_embeddings(found: Mapping[str, np.ndarray], target: np.ndarray, file: Path) -> None:
    """Writes, for each model, its embeddings on two principal components and the first one against the target."""
    fig, axes = plots.figure(len(found), 2, (4.2, 3.2))
    for column, (name, z) in enumerate(found.items()):
        scores = components(z)
        upper, lower = axes[0][column], axes[1][column]
        shown = upper.scatter(*scores.T, c=target, s=9, cmap="viridis", linewidths=0)
        upper.set_title(name.replace("_", " "), fontsize=9)
        upper.set(xlabel="first principal component", ylabel="second")
        fig.colorbar(shown, ax=upper, label="target")
        sign = np.sign(np.corrcoef(scores[:, 0], target)[0, 1]) if scores[:, 0].std() else 1.0
        lower.scatter(target, sign * scores[:, 0], s=9, color="#2a78d6", alpha=0.6, linewidths=0)
        lower.set(xlabel="target", ylabel="first principal component")
        lower.set_title(f"rank correlation {first_component_order(z, target):.2f}", fontsize=9)
        for axis in (upper, lower):
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
    plots.save(fig, file)


def _noisy_views(noise, key, x):
    first, second = jax.random.split(key)
    return tuple(x + noise * jax.random.normal(k, x.shape) for k in (first, second))


def _noisy_inputs(objective: Objective, noise: float) -> Objective:
    # one noisy view per example, in training only
    def forward(variables, batch, context):
        if context.train and noise:
            add = lambda key, x: x + noise * jax.random.normal(key, x.shape)  # noqa: E731
            batch = {**batch, "x": jax.vmap(add)(context.example_keys(batch, "views"), batch["x"])}
        return objective.forward(variables, batch, context)

    return dataclasses.replace(objective, forward=forward)


def _direct(module: MLP, centre: float, scale: float) -> Objective:
    absolute = lambda prediction, y: jnp.abs(prediction - y)  # noqa: E731
    return supervised(Regressor(module, centre, scale), absolute, label="target", name="direct L1")


def fields() -> dict[str, str]:
    """The data fields this recipe needs."""
    return {
        "x": "float32 [d] or images: what the encoder reads",
        "target": "float32 []: the number to predict",
        "label": "float32 []: its bin; equal labels are positives",
    }


ARMS = ("SupReMix", "SupCon", "untrained encoder")


def arm(arm: str, seed: int) -> dict[str, float]:
    """One arm of the claim, everything paired by ``seed``.

    Returns:
      ``log_mae``, the logarithm of the probe's mean absolute error, with ``mae``, ``spearman`` and ``pc1_spearman``;
      the arm SupReMix also reports, on the same draw, its halves, Rank-N-Contrast and direct L1 training.
    """
    if arm not in ARMS:
        raise UserError(suggest(arm, ARMS, "arm"))
    recipe = Recipe(seed=seed)
    data = recipe.load()
    name = {"SupReMix": "supremix", "SupCon": "supcon"}.get(arm, "untrained")
    got = _trained(recipe, data, name)
    found = {"log_mae": float(np.log(got["mae"])), **{k: got[k] for k in ("mae", "spearman", "pc1_spearman")}}
    if arm == "SupReMix":
        for other in ("mix_neg", "mix_pos", "rank_n_contrast", "l1"):
            found |= {
                f"{other}_{k}": v for k, v in _trained(recipe, data, other).items() if k in ("mae", "pc1_spearman")
            }
    return found


def _trained(recipe: Recipe, data: Dataset, name: str) -> dict[str, float]:
    stream = recipe.stream(data)
    host = recipe.objective("supcon" if name == "untrained" else name, data)
    variables = host.init(jax.random.key(recipe.seed), jax.tree.map(jnp.asarray, stream.batch(0)))
    if name != "untrained":
        arrays = {k: jnp.asarray(v) for k, v in data["train"].items()}
        variables = _compiled(name)(variables, arrays, *rows_of(stream, recipe.steps), jax.random.key(recipe.seed))
    both = jnp.asarray(np.concatenate([data["train"]["x"], data["test"]["x"]]))
    context = Context(jax.random.key(0), train=False)
    found = recipe.measure(np.asarray(recipe.embed(name)(variables, {"x": both}, context)), data)
    if name == "l1":  # by its own head rather than a probe
        outputs, _ = host.forward(variables, {"x": jnp.asarray(data["test"]["x"])}, context)
        found |= recipe.errors(np.asarray(outputs["logits"]), data)
    return found


@functools.cache
def _compiled(name: str):
    # the manifold's targets are 0 .. 40 for every seed, so one compiled training serves all
    recipe = Recipe(method=name)
    host, transform, tx = recipe.objective(name, recipe.load()), recipe.transformation(name), recipe.optimizer.build(1)

    update = bare_update(host, tx, transform)

    @jax.jit
    def run(variables, arrays, rows, real, key):
        start = carry(variables, tx, transform, len(arrays["label"]))
        return scan_updates(update, start, arrays, rows, real, key).variables

    return run


def benchmarks() -> list[Benchmark]:
    """The loss with its gradient at several batch sizes, beside SupCon's and a construction of every mixture."""
    p, rows = 128, []
    for n in (32, 128, 256):
        rng = np.random.default_rng(0)
        f = np.asarray(unit_rows(jnp.asarray(rng.normal(size=(n, p)), jnp.float32)))
        y = np.tile(rng.integers(0, 41, n // 2), 2).astype(np.float32)
        fn = jax.grad(lambda f, y: jnp.mean(supremix_loss(f, y, jax.random.key(0))))
        plain = jax.jit(jax.grad(lambda f, y: jnp.mean(supervised_contrastive(f @ f.T, *pair_masks(y), 0.3))))
        temporary = jax.jit(fn).lower(f, y).compile().memory_analysis().temp_size_in_bytes / 2**20
        baselines = {"supcon": lambda f, y, plain=plain: jax.block_until_ready(plain(f, y))}
        if n == 32:
            baselines["every mixture built, forward only (NumPy)"] = _built
        rows.append(
            Benchmark(
                f"supremix loss and gradient, n={n}",
                fn,
                (f, y),
                6.0 * n * n * p + 20.0 * n**3,
                4.0 * (3 * f.size + n),
                baselines=baselines,
                note=f"p={p}; temporary {temporary:.1f} MiB; all mixtures would be {4 * n**3 * p / 2**20:.0f} MiB",
            )
        )
    return rows


def _built(f, y):
    gap = y[None, :] - y[:, None]
    low, high = (gap < 0) & (gap > -5), (gap > 0) & (gap < 5)
    exists = low[:, :, None] & high[:, None, :]
    span = np.where(exists, y[None, None, :] - y[None, :, None], 1.0)
    a = np.where(exists, gap[:, None, :] / span, 0.0).astype(np.float32)
    mixtures = a[..., None] * f[None, :, None, :] + (1 - a)[..., None] * f[None, None, :, :]
    return np.einsum("ijkp,ip->ijk", mixtures, f)


def example() -> dict[str, Any]:
    """A tiny instance for the conformance table: both mixtures on two views, one half on one view, the baseline."""
    rng = np.random.default_rng(0)
    batch = {
        "x": rng.normal(size=(16, 6)).astype(np.float32),
        "label": np.tile(np.arange(8), 2).astype(np.float32),
        "index": np.arange(16, dtype=np.int32),
        "mask": np.ones(16, bool),
    }
    module, views = MLP((8,), 4), functools.partial(_noisy_views, 0.1)
    row = {"batch": batch, "optimizer": optax.adam(1e-3), "num_examples": 16}
    return {
        "objective": hosts.supervised_contrast(module, views, 0.3),
        "transform": supremix(window=3, chunk=8),
        **row,
        "also": {"supcr": {"objective": supcr(module, views), "transform": None, **row}},
    }
