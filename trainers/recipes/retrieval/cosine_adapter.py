"""Recipe: an adapter is trained on retrieved candidates, a threshold is chosen, and the filter is measured."""

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
from data.scored_candidates import calibrated_queries, digit_candidates, scored_candidates
from data.stream import evaluation_stream, training_stream
from trainers import recipe as base
from trainers.bare_update import bare_update, carry
from trainers.phases import Evaluate, Fit, FitResult, Train
from trainers.recipe import Benchmark, Data, Export, Optimizer, Run, UserError
from zoo.base import Context, Objective, suggest
from zoo.metrics import binary
from zoo.retrieval import cosine_adapter
from zoo.retrieval.cosine_adapter import CosineAdapter, adapt, adapter_objective


@dataclass(frozen=True)
class Recipe(base.Recipe):
    """Trains the adapter on cached embeddings, cosines and labels of retrieved candidates.

    The defaults learn generated queries whose embedding decides how their cosines are to be read. Real data without
    download: --data.name digits. A BERT-size encoder's candidates: --data.path DIR --hidden 768 --batch-size 256
    --steps 5000 --optimizer.learning-rate 1e-3.
    """

    data: Data = Data("calibration")
    """calibration (generated), digits (bundled images, relevant if of one class), or --data.path with a folder of
    query_emb.npy, cand_ids.npy, cand_cos.npy and labels.npy (or qrels.npy)"""
    optimizer: Optimizer = Optimizer(learning_rate=1e-2)
    """optimiser of the adapter; encoders are never touched"""
    mapping: Literal["linear", "sqrt", "quadratic", "power"] = "power"
    """family of the score map; power learns its exponent for each query"""
    hidden: int = 64
    """width of the hidden layers (the paper's cost is that of the embedding's own)"""
    layers: int = 1
    """hidden layers"""
    positive_slope: bool = True
    """keep every map rising; --no-positive-slope leaves the slope's sign free"""
    positive_weight: float = 1.0
    """weight of relevant pairs in the loss; other than 1 shifts the calibration"""
    target_recall: float = 0.95
    """pooled recall, among the retrieved, that the threshold must keep (production: 0.99)"""
    steps: int = 400
    """training steps"""
    batch_size: int = 1000
    """queries in a step, each with all its candidates"""

    def build(self) -> Run:
        """Data, the training phase with its evaluation, the threshold and the figure."""
        data = self.load()
        module = self.module(data)
        train, valid, test = data["train"], data["valid"], data["test"]
        phase = Train(
            "train",
            self.steps,
            adapter_objective(module, self.positive_weight),
            self.optimizer.build(self.steps),
            training_stream(train, min(self.batch_size, len(train["cos"])), self.seed),
            evaluate=(pair_evaluation(module, test, self.target_recall),),
            eval_every=max(1, self.steps // 8),
        )

        def choose(variables, artefacts, rng):
            chosen, measured = ([jnp.asarray(s[k]) for k in ("query", "cos", "label", "real")] for s in (valid, test))

            @jax.jit
            def run(params, chosen, measured):
                fitted = cosine_adapter.fit_filter(module, params, *chosen, self.target_recall)
                raw = binary.select_threshold(*chosen[1:], self.target_recall)
                query, cos, label, real = measured
                found = filtered(adapt(module, params, query, cos, real), fitted.threshold, label, real)
                raw = {f"raw_{k}": v for k, v in filtered(cos, raw, label, real).items()}
                return cosine_adapter.to_arrays(fitted), {**found, **raw, "threshold": fitted.threshold}

            fitted, found = run(variables["params"], chosen, measured)
            return FitResult({}, {"filter": fitted}, {k: float(v) for k, v in found.items()})

        def export(variables: Mapping, artefacts: Mapping) -> Export:
            kept = {"params": variables["params"]}
            if "filter" in artefacts:
                kept["filter"] = artefacts["filter"]
            facts = {"input": f"query embeddings of {data.info['dimension']} dimensions and cosines", "data": data.name}
            return Export(module, kept, {**facts, "target_recall": self.target_recall})

        def summary(m: Mapping[str, float]) -> str:
            return (
                f"PR AUC {m['test/raw_pr_auc']:.3f} -> {m['test/pr_auc']:.3f} ({self.mapping}); at recall "
                f"{self.target_recall:g}: precision {m['filter/raw_precision']:.3f} -> {m['filter/precision']:.3f}, "
                f"removed {m['filter/raw_filter_rate']:.3f} -> {m['filter/filter_rate']:.3f}; see filter.png"
            )

        return Run(
            phases=[phase, Fit("filter", choose)],
            export=export,
            figures=functools.partial(draw_filter, module=module, test=test),
            data_fingerprint=data.fingerprint,
            summary=summary,
            steps_per_call=10,
        )

    def load(self) -> Dataset:
        """The candidates, checked.

        Raises:
          UserError: settings outside their range, or candidates that cannot be learned from.
        """
        for flag, value in (("hidden", self.hidden), ("steps", self.steps), ("batch-size", self.batch_size)):
            if value < 1:
                raise UserError(f"--{flag} must be at least 1, got {value}")
        if self.layers < 0:
            raise UserError(f"--layers must be 0 or more, got {self.layers}")
        if not 0 < self.target_recall <= 1:
            raise UserError(f"--target-recall must be in (0, 1], got {self.target_recall:g}")
        if not self.positive_weight > 0:
            raise UserError(f"--positive-weight must be positive, got {self.positive_weight:g}")
        if self.data.path is not None:
            data = scored_candidates(self.data.path, self.seed)
        elif self.data.name == "calibration":
            data = calibrated_queries(self.seed)
        elif self.data.name == "digits":
            data = digit_candidates(self.seed)
        else:
            raise UserError(
                suggest(self.data.name, ("calibration", "digits"), "data set") + "; your own comes by --data.path DIR"
            )
        for name, arrays in data.splits.items():
            try:
                cosine_adapter.check_candidates(arrays["query"], arrays["cos"], arrays["label"], arrays["real"])
                if name != "train":
                    binary.check_binary(
                        arrays["cos"], arrays["label"] >= 1, arrays["real"], f"{name} labels (1 or less)"
                    )
            except ValueError as error:
                raise UserError(f"{data.name}, {name}: {error}") from None
        return data

    def module(self, data: Dataset) -> CosineAdapter:
        """The adapter, started at the global map through the training pairs' mean cosine."""
        train = data["train"]
        mean = round(float(train["cos"][train["real"]].mean()), 4)
        return CosineAdapter(
            self.mapping, (self.hidden,) * self.layers, self.positive_slope, mean_cosine=mean, dtype=self.dtype
        )


def pair_evaluation(module: CosineAdapter, split: Mapping[str, np.ndarray], target_recall: float) -> Evaluate:
    """Pooled PR AUC, and precision, filter and null rate at the split's own threshold; of raw cosines too."""
    cos, label, real = (jnp.asarray(split[k]) for k in ("cos", "label", "real"))

    def update(seen, variables, batch, context):
        logits = adapt(module, variables["params"], batch["query"], batch["cos"], batch["real"])
        return seen.at[batch["index"]].set(logits, mode="drop"), {}

    def compute(scores):
        found = pooled(jnp.asarray(scores), label, real, target_recall)
        raw = pooled(cos, label, real, target_recall)
        return {k: float(v) for k, v in found.items()} | {f"raw_{k}": float(v) for k, v in raw.items()}

    stream = evaluation_stream(split, min(256, len(cos)))
    return Evaluate("test", stream, lambda: jnp.zeros(cos.shape, jnp.float32), update, compute)


@jax.jit
def pooled(scores: jax.Array, label: jax.Array, real: jax.Array, target_recall: float) -> dict[str, jax.Array]:
    """The paper's four numbers over all pairs of all queries."""
    threshold = binary.select_threshold(scores, label, real, target_recall)
    return {
        "pr_auc": binary.average_precision(scores, label, real),
        "precision_at_recall": binary.precision_at_recall(scores, label, target_recall, real),
        "filter_rate": binary.filter_rate(scores, threshold, real),
        "null_rate": binary.null_rate(scores, threshold, real),
    }


def filtered(scores: jax.Array, threshold: Any, label: jax.Array, real: jax.Array) -> dict[str, jax.Array]:
    """Recall, precision, filter and null rate of one threshold, wherever it was chosen."""
    kept, relevant = binary.filter_mask(scores, threshold, real), (label >= 1) & real
    hits = jnp.sum(kept & relevant)
    return {
        "recall": hits / jnp.maximum(jnp.sum(relevant), 1),
        "precision": hits / jnp.maximum(jnp.sum(kept), 1),
        "filter_rate": binary.filter_rate(scores, threshold, real),
        "null_rate": binary.null_rate(scores, threshold, real),
    }


def draw_filter(result: Any, workdir: Path, module: CosineAdapter, test: Mapping[str, np.ndarray]) -> None:
    """``filter.png``: precision against recall of raw cosines and of the adapter, and some queries' learned maps."""
    from trainers import plots

    params = result.chosen["params"]
    query, cos, label, real = (jnp.asarray(test[k]) for k in ("query", "cos", "label", "real"))
    logits = jax.jit(functools.partial(adapt, module))(params, query, cos, real)
    fig, axes = plots.figure(2, 1, (4.4, 3.5))
    left, right = axes.ravel()
    for name, scores, style in (
        ("raw cosine", cos, {"color": "0.35", "linestyle": "--"}),
        (f"adapter ({module.mapping})", logits, {"color": "#2a78d6"}),
    ):
        curve = binary.precision_recall_curve(scores, label, real)
        ends = np.flatnonzero(np.asarray(curve.last))
        auc = float(binary.average_precision(scores, label, real))
        left.plot(
            np.asarray(curve.recall)[ends], np.asarray(curve.precision)[ends], label=f"{name}: {auc:.3f}", **style
        )
    left.set_xlabel("recall (of relevant items retrieved)")
    left.set_ylabel("precision")
    left.set_ylim(0, 1.02)
    left.set_title("all pairs of all test queries, PR AUC", fontsize=9)
    left.legend(fontsize=7)
    left.grid(alpha=0.25)
    low, high = float(cos[real].min()), float(cos[real].max())
    grid = jnp.broadcast_to(jnp.linspace(low, high, 60), (min(25, len(query)), 60))
    maps = np.asarray(adapt(module, params, query[: len(grid)], grid))
    right.plot(np.asarray(grid).T, maps.T, color="#2a78d6", alpha=0.35, linewidth=0.9)
    if "filter" in result.artefacts:
        right.axhline(
            float(np.asarray(result.artefacts["filter"]["threshold"])), color="black", linewidth=1, label="threshold"
        )
        right.legend(fontsize=7)
    right.set_xlabel("cosine")
    right.set_ylabel("relevance logit")
    right.set_title(f"the maps of {len(grid)} test queries", fontsize=9)
    right.grid(alpha=0.25)
    plots.save(fig, workdir / "filter.png")


def fields() -> dict[str, str]:
    """The data fields this recipe needs."""
    return {
        "query": "float32 [N, d]  frozen query embeddings (query_emb.npy)",
        "cos": "float32 [N, K]  cosines of the retrieved candidates (cand_cos.npy)",
        "real": "bool [N, K]  which places hold a candidate (cand_ids.npy: -1 is none)",
        "label": "float32 [N, K] in [0, 1]  relevance; 1 is relevant (labels.npy, or pairs in qrels.npy)",
    }


# --- the claim --------------------------------------------------------------------------------------------------------

ARMS = ("cosine adapter (linear)", "raw cosine", "random scores")
FAMILIES = ("linear", "sqrt", "quadratic", "power")
CLAIM_STEPS = 400


def arm(arm: str, seed: int) -> dict[str, float]:
    """One arm of the claim on the generated queries, the same for the same seed.

    Args:
      arm: one of the claim's three, or ``cosine adapter (F)`` for another family F, or ``shuffled queries``: the linear
        adapter with the embeddings dealt out anew at every step and for the test, which must fall back to about raw
        (one fixed deal would be learnt by heart).
      seed: of the data and the first weights.

    Returns:
      ``pr_auc``, ``precision_at_recall``, ``filter_rate`` and ``null_rate`` of test pairs at recall 0.95.
    """
    named = {f"cosine adapter ({f})": f for f in FAMILIES} | {"shuffled queries": "linear"}
    if arm not in (*ARMS, *named):
        raise UserError(suggest(arm, (*ARMS, *named), "arm"))
    data = calibrated_queries(seed)
    test = {k: jnp.asarray(v) for k, v in data["test"].items()}
    if arm == "raw cosine":
        scores = test["cos"]
    elif arm == "random scores":
        scores = jax.random.uniform(jax.random.key(seed), test["cos"].shape)
    else:
        train = {k: jnp.asarray(v) for k, v in data["train"].items()}
        scores = _arm_program(named[arm], arm == "shuffled queries")(train, test, jax.random.key(seed))
    return {k: float(v) for k, v in pooled(scores, test["label"], test["real"], 0.95).items()}


@functools.cache
def _arm_program(mapping: str, shuffled: bool = False):
    # one program a family: all steps in one scan, the data an argument, so that further seeds compile nothing
    tx = optax.adam(1e-2)

    @jax.jit
    def run(train, test, key):
        module = CosineAdapter(mapping)
        objective = adapter_objective(module)
        params = _started(objective.init(key, train)["params"], train)
        context = Context(key, train=True)

        def deal(split, number):
            if not shuffled:
                return split
            key_now = jax.random.fold_in(key, number)
            return {**split, "query": jax.random.permutation(key_now, split["query"])}

        update = bare_update(objective, tx)
        step = lambda now, number: (update(now, deal(train, number), context), None)  # noqa: E731
        now, _ = jax.lax.scan(step, carry({"params": params}, tx), jnp.arange(CLAIM_STEPS))
        return adapt(module, now.variables["params"], deal(test, CLAIM_STEPS)["query"], test["cos"], test["real"])

    return run


def _started(params: Mapping, train: Mapping) -> dict:
    # what the recipe's module does with the mean cosine of the training pairs, with the mean an array
    bias = params["out"]["bias"].at[1].set(-10.0 * jnp.mean(train["cos"]))
    return {**params, "out": {**params["out"], "bias": bias}}


# --- benchmarks and the conformance row -------------------------------------------------------------------------------


def benchmarks() -> list[Benchmark]:
    """Filtering at MS MARCO's sizes (768 dimensions, 1000 candidates), a training step, and the pooled curve."""
    module = CosineAdapter("power", (768,))
    key = jax.random.key(0)
    q, k, d = 256, 1000, 768
    batch = {
        "query": jax.random.normal(key, (q, d)),
        "cos": jax.random.uniform(jax.random.fold_in(key, 1), (q, k)),
        "label": (jax.random.uniform(jax.random.fold_in(key, 2), (q, k)) < 0.1).astype(jnp.float32),
        "real": jnp.ones((q, k), bool),
        "index": jnp.arange(q),
    }
    objective: Objective = adapter_objective(module)
    params = objective.init(key, batch)["params"]
    tx = optax.adam(1e-3)

    update = bare_update(objective, tx)
    step = lambda now, batch: update(now, batch, Context(key))  # noqa: E731
    weights = sum(x.size for x in jax.tree.leaves(params))
    apply = lambda p, query, cos: adapt(module, p, query, cos)  # noqa: E731
    flops, moved = 2.0 * q * weights + 4.0 * q * k, 4.0 * (weights + q * d + 2 * q * k)
    return [
        Benchmark(f"filter {q} queries x {k} candidates, d {d}", apply, (params, batch["query"], batch["cos"]), flops,
                  moved),
        Benchmark(f"training step, {q} x {k}, d {d}", step, (carry({"params": params}, tx), batch), 3 * flops,
                  4.0 * (9 * weights + q * d + 3 * q * k)),
        Benchmark(f"pooled PR AUC of {q * k} pairs", binary.average_precision, (batch["cos"], batch["label"]),
                  1.0 * q * k, 8.0 * q * k, {"numpy_sort": _numpy_average_precision}),
    ]  # fmt: skip


def _numpy_average_precision(scores, labels) -> float:
    order = np.argsort(-np.asarray(scores).ravel(), kind="stable")
    hit = np.asarray(labels).ravel()[order] > 0
    return float((np.cumsum(hit) / np.arange(1, hit.size + 1))[hit].mean())


def example() -> dict:
    """A row for the conformance table: a tiny adapter on lists of different lengths."""
    rng = np.random.default_rng(0)
    real = np.arange(6) < rng.integers(1, 7, 16)[:, None]
    batch = {
        "query": rng.normal(size=(16, 5)).astype(np.float32),
        "cos": np.where(real, rng.uniform(-0.2, 1, (16, 6)), -1).astype(np.float32),
        "label": (rng.random((16, 6)) < 0.4).astype(np.float32),
        "real": real,
        "index": np.arange(16, dtype=np.int32),
        "mask": np.ones(16, bool),
    }
    return {
        "objective": adapter_objective(CosineAdapter("power", (8,), slope=3.0)),
        "batch": batch,
        "optimizer": optax.adam(1e-2),
        "transform": None,
        "num_examples": 16,
    }
