"""Recipe: a pool of pre-trained encoders is ranked by transferability scores, with and without PED."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from checkpoints import CheckpointError, ModelError, load_model
from data.features import ModelFeatures, feature_pool, given_accuracies, pool_fingerprint
from data.images import digits, image_dataset
from trainers import recipe as base
from trainers.model_ranking import Table, draw, planar_means, write_ranking
from trainers.phases import Fit, FitResult
from trainers.recipe import Benchmark, Export, Run, UserError
from trainers.transfer_pool import digit_pool
from zoo.base import suggest
from zoo.metrics.transferability import METRICS, spearman, weighted_kendall_tau
from zoo.representation import ped
from zoo.representation.ped import PotentialEnergyDescent

MetricName = Literal["logme", "sfda", "nleep", "h_score", "parc", "gbc", "leep", "nce"]
OUTPUTS = ("embedding", "features", "pooled", "projection")
"""Entries of a model's outputs that are taken for its features, the first that is there."""


@dataclass(frozen=True)
class PoolData(base.Data):
    """Whose models: a folder of features, a folder of models and a data set of images, or the generated pool."""

    features: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None
    """A folder with one NAME.npz (features, labels; general; source_probabilities; accuracy) or NAME.csv a model."""
    models: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None
    """A folder of exported models, one a sub-folder; their features of --data.name or --data.path are scored."""
    general: Annotated[str | None, tyro.conf.arg(metavar="PATH")] = None
    """With --data.models: images of a general set, an .npz file or a folder."""


@dataclass(frozen=True)
class Recipe(base.Recipe):
    """Ranks pre-trained models for a target data set without fine-tuning them.

    The default pool is made here: ten small encoders pre-trained on different tasks over digits, and their fine-tuned
    accuracies. Your own: --data.features DIR, or --data.models DIR with --data.name or --data.path for images.
    """

    data: PoolData = PoolData()
    """Whose models are ranked."""
    metric: MetricName = "logme"
    """the score that models are ordered by in the table and figures"""
    metrics: tuple[MetricName, ...] = tuple(METRICS)
    """scores computed; leep and nce where models have source outputs"""
    dt: float = 0.1
    """time of a step"""
    ns: float = 0.6
    """how many radii a class reaches out; the paper uses 0.6 or 0.3"""
    k: float = 1.0
    """acceleration per overlap"""
    exit_ratio: float = 0.5
    """stop before a step that is at most this share of the first"""
    max_steps: int = 6
    """steps at most"""
    rescale: Literal["general", "self"] = "general"
    """rescale by a general set's features (the paper's), or by the target's own where there are none"""
    nleep_ratio: int = 5
    """mixture components per class in nleep; 1 where classes are many"""
    variant: Literal["default", "official"] = "default"
    """official follows the released code in logme, leep, nleep and parc"""

    def build(self) -> Run:
        """The pool, then its scores."""
        descent = self._check()
        made = self._pool()
        pool = functools.cache(lambda: digit_pool(self.seed)) if made is None else lambda: made
        shown: dict[str, str] = {}

        def collect(variables, artefacts, rng):
            known = [m.accuracy for m in pool() if m.accuracy is not None]
            first = pool()[0]
            facts = {"models": len(pool()), "samples": len(first.labels), "classes": int(first.labels.max()) + 1}
            return FitResult({}, {}, {**facts, **({"best_accuracy": max(known)} if known else {})})

        def rank(variables, artefacts, rng):
            table = self.scores(pool(), descent)
            return FitResult({}, {"ranking": table.arrays()}, table.metrics())

        def export(variables: Mapping, artefacts: Mapping) -> Export:
            kept = {"scores": artefacts["ranking"]["scores"], "steps": artefacts["ranking"]["steps"]}
            table = Table.of(artefacts["ranking"])
            facts = {
                "models": list(table.names),
                "metrics": list(table.metrics_of),
                "ranking": table.order(self.metric),
            }
            return Export(descent, {"ranking": kept}, facts)

        def figures(result: Any, workdir: Path) -> None:
            table = Table.of(result.artefacts["ranking"])
            shown["text"] = table.text(self.metric)
            write_ranking(table, self.metric, Path(workdir))
            draw(table, self.metric, Path(workdir) / "ranking.png")

        def summary(m: Mapping[str, float]) -> str:
            return shown.get("text", f"{m['pool/models']:.0f} models ranked; see ranking.csv")

        seen = digits().fingerprint if made is None else pool_fingerprint(made)
        phases = [Fit("pool", collect), Fit("rank", rank)]
        return Run(phases, export, lambda rng: {"params": {}}, figures, seen, summary)

    def descent(self) -> PotentialEnergyDescent:
        """The simulated fine-tuning with this recipe's settings.

        Raises:
          ValueError: settings that cannot work.
        """
        return PotentialEnergyDescent(self.dt, self.ns, self.k, self.exit_ratio, self.max_steps, self.rescale)

    def scores(self, pool: Sequence[ModelFeatures], descent: PotentialEnergyDescent) -> Table:
        """Every score of every model, as it is and moved.

        Raises:
          UserError: a score that a model's features do not allow.
        """
        sources = all(m.source is not None for m in pool)
        names = [n for n in self.metrics if METRICS[n].moves or sources]
        scores = np.full((2, len(names), len(pool)), np.nan)
        steps = np.zeros(len(pool), np.int32)
        energies, means = np.zeros((len(pool), 2)), []
        for j, model in enumerate(pool):
            moved, motion = self._refuse(model, lambda m=model: descent.motion(m.features, m.labels, m.general))
            steps[j] = motion.steps
            energies[j] = motion.energies[[0, -1]]
            means.append(planar_means(np.asarray(model.features, np.float64), moved, model.labels))
            for i, name in enumerate(names):
                seen = (model.features, moved) if METRICS[name].moves else (model.source,)
                for which, x in enumerate(seen):
                    scores[which, i, j] = self._refuse(model, lambda x=x, m=model, n=name: self._score(n, x, m.labels))
        accuracy = np.array([np.nan if m.accuracy is None else m.accuracy for m in pool])
        return Table(tuple(m.name for m in pool), tuple(names), accuracy, scores, steps, energies, np.stack(means))

    def _score(self, name: str, x: np.ndarray, labels: np.ndarray) -> float:
        settings: dict[str, Any] = {"ratio": self.nleep_ratio, "seed": self.seed} if name == "nleep" else {}
        settings |= {"seed": self.seed} if name == "parc" else {}
        if self.variant == "official" and name in ("logme", "leep", "nleep", "parc"):
            settings["variant"] = "official"
        try:
            return METRICS[name].function(x, labels, **settings)
        except ValueError as error:
            text = str(error).replace("lower ratio", "lower --nleep-ratio")
            raise ValueError(f"{name}: {text} (--metrics chooses which scores are computed)") from None

    def _refuse(self, model: ModelFeatures, run: Callable[[], Any]) -> Any:
        try:
            return run()
        except ValueError as error:
            text = str(error).replace("rescale='self'", "--rescale self")
            raise UserError(f"{model.name}: {text}") from None

    def _check(self) -> PotentialEnergyDescent:
        if not self.metrics or len(set(self.metrics)) < len(self.metrics):
            raise UserError(f"--metrics must name one score or more, each once; got {' '.join(self.metrics) or 'none'}")
        if self.metric not in self.metrics:
            raise UserError(f"--metric {self.metric} is not among --metrics {' '.join(self.metrics)}")
        if self.nleep_ratio < 1:
            raise UserError(f"--nleep-ratio must be at least 1, got {self.nleep_ratio}")
        if self.data.features and self.data.models:
            raise UserError("--data.features and --data.models are two pools; give one of them")
        if self.data.general and not self.data.models:
            raise UserError("--data.general goes with --data.models; features bring their own general set")
        try:
            return self.descent()
        except ValueError as error:
            raise UserError(f"--{str(error).replace('_', '-')}") from None

    def _pool(self) -> list[ModelFeatures] | None:
        # None for the generated pool, which is made when it is needed
        if self.data.features is not None:
            pool = feature_pool(self.data.features)
        elif self.data.models is not None:
            pool = self._encoded(Path(self.data.models))
        elif self.data.path is not None:
            raise UserError("--data.path holds images for --data.models; features of your models: --data.features DIR")
        elif self.data.name == "digits":
            return None
        else:
            raise UserError(
                f"--data.name {self.data.name!r} needs --data.models DIR, the encoders; the generated pool is digits"
            )
        lacking = next((m.name for m in pool if m.general is None), None)
        if self.rescale == "general" and lacking is not None:
            raise UserError(
                f"{lacking} has no general features, which the official method rescales by (field 'general'; with "
                "--data.models: --data.general PATH); give them, or --rescale self to use the target's own"
            )
        if self.metric in ("leep", "nce") and any(m.source is None for m in pool):
            raise UserError(f"--metric {self.metric} reads source probabilities, which some models do not have")
        return pool

    def _encoded(self, folder: Path) -> list[ModelFeatures]:
        places = sorted(p for p in folder.iterdir() if (p / "model.json").is_file()) if folder.is_dir() else []
        if len(places) < 2:
            raise UserError(
                f"--data.models {folder}: holds {len(places)} exported model(s); a ranking needs two sub-folders or "
                "more with model.json (zoo train writes one to WORKDIR/model)"
            )
        images = image_dataset(self.data.name, self.data.path)["train"]
        if "label" not in images:
            raise UserError(f"--data.models {folder}: the images have no labels; scores need them")
        general = None if self.data.general is None else image_dataset("", self.data.general)["train"]["x"]
        pool = []
        for place in places:
            part = functools.partial(features_of, place)
            there = None if general is None else part(general)
            pool.append(ModelFeatures(place.name, part(images["x"]), images["label"], there))
        return given_accuracies(folder, pool)


def features_of(place: Path, images: np.ndarray, block: int = 256) -> np.ndarray:
    """An exported model's features ``[N, D]`` of images in [-1, 1], ``block`` at a time.

    Raises:
      UserError: no model, one that cannot read these images, or outputs that are no features.
    """
    try:
        model = load_model(place)
        facts = model.info.get("preprocessing") or {}
        if "mean" in facts or "size" in facts:
            images = model.preprocess(np.clip(np.rint((images + 1) * 127.5), 0, 255).astype(np.uint8))
        run = jax.jit(model.apply)
        parts = [_features(run(jnp.asarray(images[i : i + block]))) for i in range(0, len(images), block)]
    except (CheckpointError, ModelError) as error:
        raise UserError(f"{place}: {error}") from None
    except Exception as error:  # a module handed shapes it was not made for raises anything
        line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{place}: cannot encode images of shape {list(images.shape[1:])} ({line})") from None
    return np.concatenate(parts)


def _features(outputs: Any) -> np.ndarray:
    if isinstance(outputs, Mapping):
        name = next((n for n in OUTPUTS if n in outputs), None)
        if name is None:
            raise ValueError(f"outputs are {', '.join(outputs)}; expected one of {', '.join(OUTPUTS)}")
        outputs = outputs[name]
    if getattr(outputs, "ndim", 0) != 2:
        raise ValueError(f"outputs have shape {list(getattr(outputs, 'shape', []))}; expected features [N, D]")
    return np.asarray(outputs, np.float32)


def fields() -> dict[str, str]:
    """The data fields this recipe needs."""
    return {
        "features": "float32 [N, D] of each model (NAME.npz, or the columns of NAME.csv)",
        "labels": "int32 [N]: classes 0..C-1 of the target, the same for every model (in .csv: label)",
        "general": "optional float32 [G, D]: the model's features of a general set (NAME.general.csv)",
        "source_probabilities": "optional float32 [N, Z], or source_logits: the model's own classifier (for leep, nce)",
        "accuracy": "optional float: after fine-tuning (or accuracies.json, accuracies.csv for all)",
    }


# --- the claim --------------------------------------------------------------------------------------------------------

ARMS = ("LogME + PED", "LogME", "random ranking")


def arm(arm: str, seed: int) -> dict[str, float]:
    """One arm of the claim on the pool of digits' encoders that the seed makes.

    Returns:
      ``weighted_tau`` and ``spearman`` of the arm's scores with fine-tuned accuracies; for the two scoring arms the
      same of SFDA and GBC too.
    """
    if arm not in ARMS:
        raise UserError(suggest(arm, ARMS, "arm"))
    pool = digit_pool(seed)
    accuracy = [m.accuracy for m in pool]
    if arm == "random ranking":
        scores = {"": np.random.default_rng([seed, 7]).random(len(pool))}
    else:
        seen = [(m.features, m.labels, m.general) for m in pool]
        descent = PotentialEnergyDescent() if arm == "LogME + PED" else None
        kinds = {"": "logme", "sfda_": "sfda", "gbc_": "gbc"}
        scores = {p: [ped.score(x, y, metric, g, descent) for x, y, g in seen] for p, metric in kinds.items()}
    found = {f"{p}weighted_tau": weighted_kendall_tau(s, accuracy) for p, s in scores.items()}
    return found | {f"{p}spearman": spearman(s, accuracy) for p, s in scores.items()}


# --- benchmarks and the conformance row -------------------------------------------------------------------------------


def benchmarks() -> list[Benchmark]:
    """One step at SUN397's size against the pairwise form, with its temporary memory; the moments of the classes."""
    c, d, n = 397, 2048, 16_384
    rng = np.random.default_rng(0)
    means = jnp.asarray(0.2 * rng.normal(size=(c, d)), jnp.float32)
    radii = jnp.asarray(np.sqrt(d) * rng.uniform(0.8, 1.2, c), jnp.float32)
    step = ped.potential_energy_step
    temporary = jax.jit(step).lower(means, radii).compile().memory_analysis().temp_size_in_bytes
    x, y = jnp.asarray(rng.normal(size=(n, 256)), jnp.float32), jnp.asarray(rng.integers(0, 100, n), jnp.int32)
    return [
        Benchmark(
            f"one step, C={c}, D={d}",
            step,
            (means, radii),
            4.0 * c * c * d,
            4.0 * (3 * means.size + c * c),
            {"pairwise loop": pairwise_step},
            note=f"temporary {temporary / 2**20:.0f} MiB; [C, C, D] is {4 * c * c * d / 2**20:.0f}",
        ),
        Benchmark(
            f"class moments, N={n}, D=256, C=100",
            lambda x, y: ped.class_stats(x, y, 100),
            (x, y),
            5.0 * x.size,
            8.0 * x.size,
        ),
    ]


def pairwise_step(means: Any, radii: Any, dt: float = 0.1, ns: float = 0.6, k: float = 1.0) -> np.ndarray:
    """A step as a NumPy loop over classes: what the benchmark compares with."""
    means, radii = np.asarray(means), np.asarray(radii)
    out = np.zeros_like(means)
    for a in range(len(means)):
        away = means[a] - means
        distance = np.sqrt(np.sum(away**2, 1))
        overlap = np.maximum(ns * (radii[a] + radii) - distance, 0)
        move = np.minimum(0.5 * dt**2 * k * overlap, overlap)
        out[a] = np.sum(away * np.divide(move, distance, out=np.zeros_like(move), where=distance > 0)[:, None], 0)
    return out


def example() -> dict[str, Any]:
    """The conformance row: the moments, a step, the energy and the descent as pure functions."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(12, 5)).astype(np.float32)
    labels = jnp.asarray(np.arange(12) % 3, jnp.int32)
    general = jnp.asarray(rng.normal(size=(9, 5)), jnp.float32)

    def function(x):
        stats = ped.class_stats(x, labels, 3)
        centres, radii, present = ped.balls(stats, *ped.scale_of(stats))
        moved, motion = ped.simulate(x, labels, general, 3)
        return {
            "step": ped.potential_energy_step(centres, radii, present=present),
            "energy": ped.potential_energy(centres, radii),
            "moved": moved,
            "changes": motion.changes,
        }

    return {"objective": None, "function": function, "args": (jnp.asarray(x),), "num_examples": 12}
