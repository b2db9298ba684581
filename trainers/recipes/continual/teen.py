"""Recipe: a base session on most classes, then few-shot sessions by calibrated prototypes, nothing trained in them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from data.dataset import Dataset
from data.fewshot import prototype_mixtures
from data.images import image_dataset
from data.stream import evaluation_stream, training_stream
from trainers import recipe as base
from trainers.phases import FitResult, Train
from trainers.protocols import confusion_evaluation, encoder, few_shot_sessions
from trainers.recipe import Benchmark, Data, Export, Optimizer, Run, UserError
from zoo.continual import teen
from zoo.continual.teen import CosineNetwork, PrototypeBank
from zoo.metrics.continual import confusion_matrix, session_metrics
from zoo.nn.heads import Pick
from zoo.nn.mlp import MLP
from zoo.nn.resnet import ResNet, ResNetConfig


@dataclass(frozen=True)
class Recipe(base.Recipe):
    """Trains an encoder on the base classes, then adds classes a few shots at a time without training.

    The defaults use the bundled digits: 6 base classes, then 2 sessions of 2 classes with 5 shots. The paper's
    CIFAR-100 setting is --data.name cifar100 --base 60 --way 5 --encoder resnet20 --epochs 600 --shift-weight 0.1
    --optimizer.name nesterov --optimizer.learning-rate 0.1 --optimizer.schedule cosine --optimizer.weight-decay 5e-4.
    """

    data: Data = Data("digits")
    """digits (bundled), any TFDS image set, or --data.path with an .npz file or a folder of class folders"""
    optimizer: Optimizer = Optimizer(name="nesterov", learning_rate=0.1, schedule="cosine", weight_decay=5e-4)
    """optimiser of the base session"""
    base: int = 6
    """base classes: labels 0 .. base - 1"""
    way: int = 2
    """new classes in each session"""
    shot: int = 5
    """examples of each new class: the first of each in the training split"""
    epochs: int = 40
    """passes over the base classes' training examples"""
    batch_size: int = 64
    """examples per step"""
    encoder: Literal["mlp", "resnet20", "resnet18"] = "mlp"
    """encoder of the images"""
    features: int = 64
    """feature dimension of the mlp"""
    temperature: float = 16.0
    """t of the cosine softmax in the base session"""
    shift_weight: float = 0.5
    """how far a new prototype moves towards its calibration direction; 0 is the decoupled-cosine baseline"""
    tau: float = 16.0
    """softmax temperature of the similarities to the base classes"""

    def build(self) -> Run:
        """The base session, the base prototypes, and a fit and an evaluation for each session."""
        data = image_dataset(self.data.name, self.data.path)
        sessions = self._check(data)
        stem, dtype = self.encoder, jnp.dtype(self.dtype)
        body = MLP((128,), self.features, dtype=dtype) if stem == "mlp" else _resnet(int(stem[6:]), dtype)
        capacity = self.base + sessions * self.way
        network = CosineNetwork(body, capacity, self.temperature)
        objective = teen.base_session(network, self.base)
        train, test = data["train"], data["test"]
        chosen = _rows(train, np.flatnonzero(train["label"] < self.base))
        stream = training_stream(chosen, self.batch_size, self.seed)
        steps = self.epochs * stream.steps_per_epoch
        wide = min(256, max(64, self.batch_size))

        def embed(variables, batch, context):
            own = {c: v for c, v in variables.items() if c not in ("bank", "raw_bank")}
            return objective.forward(own, batch, context)[0]["embedding"]

        encode = encoder(embed)

        def fit_base(variables, artefacts, rng):
            seen = encode(variables, evaluation_stream(chosen, wide))
            bank = teen.base_bank(jnp.asarray(seen["features"]), jnp.asarray(seen["label"]), self.base, capacity)
            return FitResult({"bank": _plain(bank), "raw_bank": _plain(bank)}, {}, {"examples": len(seen["label"])})

        def fit_session(s):
            classes = range(self.base + (s - 1) * self.way, self.base + s * self.way)
            shots = _rows(train, np.concatenate([np.flatnonzero(train["label"] == c)[: self.shot] for c in classes]))

            def fit(variables, artefacts, rng):
                seen = encode(variables, evaluation_stream(shots, wide))
                teen.check_session(PrototypeBank(**variables["bank"]), seen["features"], seen["label"], classes)
                add = lambda bank, weight: _plain(  # noqa: E731
                    teen.add_session(
                        PrototypeBank(**bank),
                        jnp.asarray(seen["features"]),
                        jnp.asarray(seen["label"]),
                        weight,
                        self.tau,
                    )
                )
                banks = {"bank": add(variables["bank"], self.shift_weight), "raw_bank": add(variables["raw_bank"], 0.0)}
                return FitResult(banks, {}, {"shots": len(seen["label"])})

            return fit

        held = evaluation_stream(_rows(test, np.flatnonzero(test["label"] < capacity)), wide)

        def evaluate(s):
            seen_classes = self.base + s * self.way

            def predict(variables, batch, context):
                features = embed(variables, batch, context)
                banks = {"calibrated": variables["bank"], "raw": variables["raw_bank"]}
                return {k: teen.classify(PrototypeBank(**bank), features) for k, bank in banks.items()}

            def compute(confusions):
                found = session_metrics(confusions["calibrated"], self.base, seen_classes)
                plain = session_metrics(confusions["raw"], self.base, seen_classes)
                edges = [0, *range(self.base, seen_classes + 1, self.way)]
                hits, counts = np.diag(confusions["calibrated"]), confusions["calibrated"].sum(1)
                pairs = enumerate(zip(edges[:-1], edges[1:], strict=True))
                tasks = {f"task{j}": float(hits[a:b].sum() / max(counts[a:b].sum(), 1)) for j, (a, b) in pairs}
                return {**found, **{f"raw_{k}": plain[k] for k in ("accuracy", "unseen", "harmonic")}, **tasks}

            return confusion_evaluation(f"after{s}", held, predict, ("calibrated", "raw"), capacity, compute)

        objective_phase = Train("base", steps, objective, self.optimizer.build(steps), stream)
        phases = few_shot_sessions([objective_phase], fit_base, fit_session, evaluate, sessions)

        def export(variables, artefacts):
            return Export(network, variables, {"classes": capacity, "inputs": "images scaled to [-1, 1]"})

        def summary(metrics):
            last = f"after{sessions}/"
            return (
                f"last session: accuracy {metrics[last + 'accuracy']:.3f}, base {metrics[last + 'seen']:.3f}, novel "
                f"{metrics[last + 'unseen']:.3f}, harmonic {metrics[last + 'harmonic']:.3f} (raw prototypes "
                f"{metrics[last + 'raw_harmonic']:.3f}); performance drop "
                f"{metrics['after0/accuracy'] - metrics[last + 'accuracy']:.3f}"
            )

        return Run(
            phases, export, figures=_figures(sessions), data_fingerprint=data.fingerprint, summary=summary,
            steps_per_call=10,
        )  # fmt: skip

    def _check(self, data: Dataset) -> int:
        if "label" not in data["train"]:
            raise UserError(f"{data.name!r} has no field 'label'; teen needs the class of every image")
        classes = int(data.info["num_classes"]) if "num_classes" in data.info else int(data["train"]["label"].max()) + 1
        if self.way < 1 or self.shot < 1 or self.epochs < 1:
            raise UserError(f"--way {self.way}, --shot {self.shot} and --epochs {self.epochs} must be at least 1")
        if not 1 <= self.base <= classes - self.way:
            raise UserError(
                f"--base {self.base} leaves no session of --way {self.way} among the {classes} classes; "
                f"choose at most {classes - self.way}"
            )
        try:
            teen.check_shift_weight(self.shift_weight)
        except ValueError as error:
            raise UserError(f"--shift-weight: {error}") from None
        if self.tau < 0:
            raise UserError(f"--tau must not be negative, got {self.tau}")
        sessions = (classes - self.base) // self.way
        labels = data["train"]["label"]
        for c in range(self.base + sessions * self.way):
            if not (labels == c).any():
                raise UserError(f"class {c} of {data.name!r} has no training example; its prototype would be undefined")
        return sessions


def _resnet(depth: int, dtype: Any) -> Pick:
    return Pick(ResNet(ResNetConfig.of_depth(depth), dtype))


def _rows(arrays: Mapping[str, np.ndarray], rows: np.ndarray) -> dict[str, np.ndarray]:
    return {k: np.asarray(v)[rows] for k, v in arrays.items()}


def _plain(bank: PrototypeBank) -> dict[str, jax.Array]:
    return {"weights": bank.weights, "is_base": bank.is_base, "is_seen": bank.is_seen}


def _figures(sessions: int):
    def draw(result, workdir: Path) -> None:
        from trainers import plots

        rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        after = [next(r for r in rows if r["phase"] == f"after{s}") for s in range(sessions + 1)]
        fig, axes = plots.figure(2, 1, (4.2, 3.2))
        left, right = axes[0]
        x = range(sessions + 1)
        left.plot(x, [r["accuracy"] for r in after], "o-", color="#3060a0", label="calibrated, all seen classes")
        left.plot(x, [r["raw_accuracy"] for r in after], "o--", color="#a0a0a0", label="raw prototypes")
        left.plot(x, [r["unseen"] for r in after], "s-", color="#b04030", label="calibrated, novel classes")
        left.plot(x, [r["raw_unseen"] for r in after], "s--", color="#d0a090", label="raw, novel classes")
        left.set_xticks(list(x))
        left.set_xlabel("session")
        left.set_ylabel("accuracy")
        left.set_ylim(0, 1.02)
        left.legend(fontsize=6)
        left.grid(alpha=0.25)
        matrix = np.full((sessions + 1, sessions + 1), np.nan)
        for s, row in enumerate(after):
            for j in range(s + 1):
                matrix[s, j] = row[f"task{j}"]
                right.text(j, s, f"{matrix[s, j]:.2f}", ha="center", va="center", fontsize=8)
        right.imshow(matrix, vmin=0, vmax=1, cmap="Blues", alpha=0.7)
        right.set_xticks(range(sessions + 1))
        right.set_yticks(range(sessions + 1))
        right.set_xlabel("accuracy on the classes of session j")
        right.set_ylabel("after session s")
        plots.save(fig, workdir / "sessions.png")

    return draw


def fields() -> dict[str, str]:
    """The data fields this recipe needs."""
    return {
        "x": "float32 [N, H, W, C] in [-1, 1]: images (uint8 images of TFDS sets and files are scaled)",
        "label": "int32 [N]: classes; 0 .. base - 1 are the base session, the rest follow in order",
    }


def arm(arm: str, seed: int) -> dict[str, float]:
    """One arm of the claim: the generator of the brief's check (c), shots and test points paired by seed."""
    data = prototype_mixtures(seed)
    base_classes, capacity = data.info["num_base"], data.info["num_classes"]
    true = jnp.asarray(data.info["prototypes"])
    test, shots = data["test"], data["shots"]
    if arm == "always a base class":
        bank = teen.base_bank(true[:base_classes], jnp.arange(base_classes), base_classes, capacity)
    elif arm in ("calibrated", "raw means"):
        bank = teen.base_bank(true[:base_classes], jnp.arange(base_classes), base_classes, capacity)
        weight = 0.5 if arm == "calibrated" else 0.0
        bank = teen.add_session(bank, jnp.asarray(shots["x"]), jnp.asarray(shots["label"]), weight, 16.0)
    else:
        raise UserError(f"unknown arm {arm!r} of teen's claim")
    predicted = np.asarray(teen.classify(bank, jnp.asarray(test["x"])))
    found = session_metrics(confusion_matrix(predicted, test["label"], capacity), base_classes, capacity)
    learned = np.asarray(bank.weights)[base_classes:]
    cosine = np.sum(learned * np.asarray(true)[base_classes:], 1) / np.maximum(np.linalg.norm(learned, axis=1), 1e-12)
    return {**found, "prototype_error": float(1 - cosine.mean())}


def benchmarks() -> list[Benchmark]:
    """Calibration of a session at the size of CUB-200 with ResNet-18 features."""
    b, n, d = 100, 100, 512
    base_rows, new = jax.random.normal(jax.random.key(0), (b, d)), jax.random.normal(jax.random.key(1), (n, d))

    def loop(base_rows, new):
        base_rows, new, out = np.asarray(base_rows), np.asarray(new), []
        for row in new:
            c = row / np.linalg.norm(row)
            unit = base_rows / np.linalg.norm(base_rows, axis=1, keepdims=True)
            s = 16 * unit @ c
            w = np.exp(s - s.max())
            direction = (w / w.sum()) @ unit
            out.append(0.5 * c + 0.5 * direction / np.linalg.norm(direction))
        return np.stack(out)

    flops, moved = 4.0 * n * b * d, 4.0 * (b * d + 2 * n * d)
    return [Benchmark("calibrate_prototypes 100 x 100 x 512", teen.calibrate_prototypes, (base_rows, new), flops, moved,
                      {"numpy_loop": loop})]  # fmt: skip


def example() -> dict:
    """The conformance row: the base session on a tiny network."""
    import optax

    rng = np.random.default_rng(0)
    batch = {
        "x": rng.normal(size=(16, 4, 4, 1)).astype(np.float32),
        "label": rng.integers(0, 3, 16).astype(np.int32),
        "index": np.arange(16, dtype=np.int32),
        "mask": np.ones(16, bool),
    }
    network = CosineNetwork(MLP((16,), 8, normalise=True), 5)
    return {
        "objective": teen.base_session(network, 3),
        "batch": batch,
        "optimizer": optax.sgd(0.1, 0.9, nesterov=True),
        "transform": None,
        "num_examples": 16,
    }
