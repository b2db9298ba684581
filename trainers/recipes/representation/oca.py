"""Recipe: a model is replaced by one that knows more classes, and the galleries of its predecessors stay in use."""

from __future__ import annotations

import dataclasses
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
from data.open_set import shuffled_digits
from data.stream import evaluation_stream, training_stream
from data.tasks import rows
from trainers import recipe as base
from trainers.compatibility import matrices_figure
from trainers.phases import Phase
from trainers.protocols import (
    ModelUpdate,
    confusion_evaluation,
    model_replacement,
    prototype_pass,
    same_set_retrieval,
)
from trainers.recipe import Benchmark, Data, Export, Optimizer, Run, UserError
from zoo.nn.basis_transformation import BasisTransformation
from zoo.nn.heads import Pick
from zoo.nn.mlp import MLP
from zoo.nn.orthogonal import METHODS, rotation
from zoo.nn.resnet import ResNet, ResNetConfig
from zoo.ops.lineage import lineage_text
from zoo.ops.prototypes import l2_normalize
from zoo.representation import oca
from zoo.representation.oca import ExpandedEmbedding, PlainEmbedding

ENCODERS = ("mlp", "wide", "deep", "resnet20", "resnet18", "resnet50", "resnet101")
ARMS = {"independent": "independent", "bct": "BCT", "bt2": "BT2", "oca": "OCA"}


@dataclass(frozen=True)
class Recipe(base.Recipe):
    """Trains an old model on a part of the classes and its successor on all, and searches the old gallery with it.

    The defaults use the bundled digits: the old model learns classes 0-4 with 16 features, the new one 0-9 with 16 + 4;
    queries and gallery are the test images of all classes, each query without its own image. Three or more numbers
    under --known give a chain of updates. The paper's setting: --data.name cifar100 --known 50 100 --old-dim 128
    --extra 32 --encoders resnet50 --epochs 100 --batch-size 64 --optimizer.learning-rate 1e-3
    --optimizer.schedule cosine --optimizer.warmup-steps 3905 --optimizer.weight-decay 3.0517578125e-5 --seed 42.
    """

    data: Data = Data("digits")
    """digits (bundled), any TFDS image set, or --data.path with an .npz file or a folder of class folders"""
    optimizer: Optimizer = Optimizer(name="adam", learning_rate=2e-3, schedule="cosine", weight_decay=2.0**-15)
    """of each model, made anew for each; weight decay is added to the gradient"""
    method: Literal["oca", "bct", "bt2", "independent"] = "oca"
    """oca: appended coordinates behind an orthogonal layer; bct, bt2 and independent are what it is compared with"""
    baselines: tuple[str, ...] = ("independent", "bct")
    """also train these, with the same old model, for the picture: independent, bct, bt2, oca; bt2 needs independent"""
    known: tuple[int, ...] = (5, 10)
    """classes that the old model and each of its successors know, ascending; the last are all"""
    old: str | None = None
    """an exported oca model to start from; default: an old model is trained here"""
    old_dim: int = 16
    """size of the old model's embedding"""
    extra: int = 4
    """coordinates that each successor appends"""
    succeed: Literal["full", "first"] = "full"
    """what a third model aligns to: all of its predecessor's coordinates, or the first model's gallery alone"""
    encoders: tuple[str, ...] = ("mlp",)
    """backbone of each model (the last is repeated): mlp, wide, deep, resnet20, resnet18, resnet50, resnet101"""
    orthogonal: Literal["expm", "cayley", "householder", "qr"] = "expm"
    """how the orthogonal matrix is made of free parameters"""
    use_bias: bool = True
    """whether the orthogonal layer translates too, as the released one does"""
    epochs: int = 60
    """passes of each model over its data"""
    batch_size: int = 64
    """examples per step"""
    smoothing: float = 0.1
    """label smoothing; BT2 has none"""
    weights: tuple[float, float, float] = (5.0, 10.0, 5.0)
    """of OCA's cross-entropy, its cross-entropy against prototypes, and its cosine"""
    alpha: float = 10.0
    """weight of BCT's cross-entropy against prototypes"""
    bt2_weights: tuple[float, float, float] = (1.0, 10.0, 5.0)
    """of BT2's cosine to the independent model, cross-entropy against prototypes, and cosine to the old model"""

    def build(self) -> Run:
        """The old model, its successors by every method, and the last one's accuracy."""
        return self.on(image_dataset(self.data.name, self.data.path))

    def on(self, data: Dataset) -> Run:
        """The run on a data set of your own making."""
        classes = self._check(data)
        arms = [a for a in ("independent", "bct", "bt2", "oca") if a in (*self.baselines, self.method)]
        arms = [a for a in arms if a != self.method] + [self.method]
        test = rows({k: data["test"][k] for k in ("x", "label")}, np.flatnonzero(data["test"]["label"] < classes))
        # pairs of queries and gallery are the same images, so that a query's own image is known by its row
        stream = evaluation_stream(test, min(256, max(64, self.batch_size)))
        given = _given(self.old, self.old_dim) if self.old else None
        old = self._old(data, given)
        phases: list[Phase] = []
        sequences: dict[str, list[str]] = {}
        last = None
        for number, arm in enumerate(arms):
            updates = self._updates(data, arm, given)
            phases += model_replacement(
                updates if number else [old, *updates], stream, stream, classes, self._align,
                refuse=arm != "independent" and self.succeed == "full", name=f"{arm}_", before=last,
                earlier=[old] if number else [], measure=same_set_retrieval,
            )  # fmt: skip
            sequences[arm], last = ["old", *(u.name for u in updates)], updates[-1].optimizer
        network = self._network(self.method, len(self.known) - 1)
        phases.append(_accuracy(test, stream, network, classes))

        def export(variables, artefacts):
            record = variables["constants"]["lineage"]
            own, kept = _exported(network, variables)
            constants = {**kept.get("constants", {}), "lineage": record}
            facts = {"inputs": "images scaled to [-1, 1]", "lineage": lineage_text(record), "blocks": self._sizes()}
            return Export(own, {**kept, "constants": constants}, facts)

        between = [""] if len(self.known) == 2 else [f" {t}" for t in range(1, len(self.known))]
        names = ["old", *(f"new{number}" for number in between)]

        def summary(metrics):
            return _summary(metrics, {a: sequences[a] for a in reversed(arms)})

        return Run(
            phases, export, figures=matrices_figure(sequences, ARMS, names=names), data_fingerprint=data.fingerprint,
            summary=summary, steps_per_call=10, from_export=lambda variables: variables,
        )  # fmt: skip

    def _sizes(self) -> list[int]:
        # where the embeddings of the chain's models end
        return [self.old_dim + self.extra * t for t in range(len(self.known))]

    def _align(self, queries: Any, gallery: Any) -> tuple[Any, Any]:
        oca.check_gallery(gallery.shape[1], [s for s in self._sizes() if s <= queries.shape[1]])
        return oca.truncate_to_common_dim(queries, gallery)

    def _encoder(self, t: int) -> Any:
        name, dtype = self.encoders[min(t, len(self.encoders) - 1)], jnp.dtype(self.dtype)
        if name.startswith("resnet"):
            return Pick(ResNet(ResNetConfig.of_depth(int(name[6:])), dtype))
        hidden, features = {"mlp": ((128,), 64), "wide": ((256,), 96), "deep": ((128, 128), 64)}[name]
        return MLP(hidden, features, dtype=dtype)

    def _network(self, arm: str, t: int) -> Any:
        body, dtype, classes = self._encoder(t), jnp.dtype(self.dtype), self.known[t]
        sizes = self._sizes()
        if arm == "oca" and t:
            block = sizes[t - 1] if self.succeed == "full" else sizes[0]
            return ExpandedEmbedding(body, block, sizes[t] - block, classes, self.use_bias, self.orthogonal, dtype)
        if arm == "bt2" and t:
            block = sizes[t - 1] if self.succeed == "full" else sizes[0]
            return BasisTransformation(
                body, block, self.old_dim, sizes[t] - sizes[0], classes, method=self.orthogonal, dtype=dtype
            )
        return PlainEmbedding(body, self.old_dim, classes, dtype=dtype)

    def _training(self, data: Dataset, t: int) -> dict[str, np.ndarray]:
        train = data["train"]
        return rows({k: train[k] for k in ("x", "label")}, np.flatnonzero(train["label"] < self.known[t]))

    def _update(self, name, t, data, network, objective, start, aligned=True, prepare=()) -> ModelUpdate:
        stream = training_stream(self._training(data, t), self.batch_size, self.seed + t)
        steps = self.epochs * stream.steps_per_epoch
        return ModelUpdate(
            name, objective, stream, steps, _optimizer(self.optimizer, steps), start, _embed(network), oca.frame,
            aligned, prepare, oca.feature_variables,
        )  # fmt: skip

    def _old(self, data: Dataset, given: Any) -> ModelUpdate:
        network = given[0] if given else self._network("independent", 0)

        def start(variables, artefacts, rng):
            fresh = _plain(given[1] if given else network.init(rng, jnp.asarray(data["train"]["x"][:1])))
            return {"constants": {}, **fresh}

        objective = oca.classification(network, self.smoothing)
        made = self._update("old", 0, data, network, objective, start)
        return dataclasses.replace(made, steps=0) if given else made

    def _updates(self, data: Dataset, arm: str, given: Any) -> list[ModelUpdate]:
        made = []
        for t in range(1, len(self.known)):
            network, classes = self._network(arm, t), self.known[t]
            if arm == "independent":
                objective = oca.classification(network, self.smoothing)
                start = self._starter(data, arm, t, network, None)
                made.append(self._update(f"{arm}{t}", t, data, network, objective, start, aligned=False))
                continue
            before = t - 1 if self.succeed == "full" else 0
            parent = f"{arm}{before}" if before else "old"
            older = (given[0] if given else self._network(arm, 0)) if not before else self._network(arm, before)
            block = network.features if arm == "bct" else network.d_old
            blank = jnp.zeros((classes, block))
            if arm == "oca":
                objective = oca.oca(network, blank, self.weights, self.smoothing)
            elif arm == "bct":
                objective = oca.bct(network, blank, self.alpha, self.smoothing)
            else:
                newer = self._network("independent", t)
                objective = oca.bt2(network, blank, older, {}, newer, {}, self.bt2_weights)
            passed = prototype_pass(
                f"{arm}{t}_prototypes",
                lambda variables, artefacts, parent=parent: _weights(artefacts, parent),
                _embed(older),
                evaluation_stream(self._training(data, t), 256),
                classes,
            )
            start = self._starter(data, arm, t, network, parent)
            made.append(self._update(f"{arm}{t}", t, data, network, objective, start, prepare=(passed,)))
        return made

    def _starter(self, data, arm, t, network, parent):
        def start(variables, artefacts, rng):
            fresh = _plain(network.init(rng, jnp.asarray(data["train"]["x"][:1])))
            constants = dict(fresh.get("constants", {}))
            if parent is not None:
                constants["prototypes"] = artefacts[f"{arm}{t}_prototypes"]
                constants["lineage"] = artefacts[f"model_{parent}"]["lineage"]
            if arm == "bt2":
                constants["old"] = _weights(artefacts, parent)
                constants["new"] = _weights(artefacts, f"independent{t}")
            return {**fresh, "constants": constants}

        return start

    def _check(self, data: Dataset) -> int:
        if "label" not in data["train"]:
            raise UserError(f"{data.name!r} has no field 'label'; oca needs the class of every image")
        classes = int(data.info.get("num_classes", int(data["train"]["label"].max()) + 1))
        for name in ("epochs", "batch_size", "old_dim", "extra"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        for name in ("weights", "alpha", "bt2_weights"):
            if np.min(getattr(self, name)) < 0:
                raise UserError(f"--{name.replace('_', '-')} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.smoothing < 1:
            raise UserError(f"--smoothing must lie in [0, 1), got {self.smoothing}")
        known = self.known
        words = " ".join(map(str, known))
        if len(known) < 2 or known[0] < 2 or list(known) != sorted(set(known)) or known[-1] > classes:
            raise UserError(
                f"--known {words} must ascend from at least 2 to at most {classes}, the classes of {data.name!r}"
            )
        if any(b not in ARMS for b in self.baselines):
            raise UserError(f"--baselines {' '.join(self.baselines)}: choose from {', '.join(ARMS)}")
        if "bt2" in (*self.baselines, self.method):
            if "independent" not in (*self.baselines, self.method):
                raise UserError("bt2 learns from independently trained models; add independent to --baselines")
            if self.extra * (len(known) - 1) > self.old_dim:
                raise UserError(f"bt2 cannot append more than --old-dim {self.old_dim} coordinates; lower --extra")
        if not self.encoders or any(e not in ENCODERS for e in self.encoders):
            raise UserError(f"--encoders {' '.join(self.encoders)}: choose from {', '.join(ENCODERS)}")
        if self.optimizer.weight_decay < 0:
            raise UserError(f"--optimizer.weight-decay must not be negative, got {self.optimizer.weight_decay}")
        return known[-1]


def _plain(tree: Any) -> Any:
    return {k: _plain(v) for k, v in tree.items()} if isinstance(tree, Mapping) else tree


def _weights(artefacts: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {c: v for c, v in artefacts[f"model_{name}"].items() if c != "lineage"}


def _embed(network: Any):
    def embed(variables, batch, context):
        found = network.apply(oca.feature_variables(variables), batch["x"], False, classify=False)
        return l2_normalize(found.astype(jnp.float32))

    return embed


def _optimizer(setting: Optimizer, steps: int) -> optax.GradientTransformation:
    if not (setting.weight_decay and setting.name == "adam"):
        return setting.build(steps)
    plain = dataclasses.replace(setting, weight_decay=0.0).build(steps)
    return optax.chain(optax.add_decayed_weights(setting.weight_decay), plain)


def _exported(network: Any, variables: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    kept = {c: variables[c] for c in ("params", "batch_stats") if variables.get(c)}
    layers = {k: v for k, v in variables.get("constants", {}).items() if k.startswith("orthogonal")}
    if isinstance(network, ExpandedEmbedding):
        return oca.fold(network, {**kept, "constants": layers})
    return network, {**kept, **({"constants": layers} if layers else {})}


def _accuracy(test: Mapping[str, np.ndarray], stream: Any, network: Any, classes: int) -> Phase:
    folded = PlainEmbedding(network.encoder, network.features, classes, True, network.dtype)

    def predict(variables, batch, context):
        # an exported OCA model has no orthogonal layer any more
        plain = isinstance(network, ExpandedEmbedding) and "orthogonal" not in variables["params"]
        used = {c: v for c, v in variables.items() if c in ("params", "batch_stats") and v}
        layers = {k: v for k, v in variables.get("constants", {}).items() if k.startswith("orthogonal")}
        used |= {"constants": layers} if layers else {}
        found = (folded if plain else network).apply(used, batch["x"], False)
        return {"classifier": jnp.argmax(found["logits"], -1)}

    def compute(confusions):
        found = confusions["classifier"]
        return {"accuracy": float(np.diag(found).sum() / max(found.sum(), 1))}

    return confusion_evaluation("test", stream, predict, ("classifier",), classes, compute)


def _summary(metrics: Mapping[str, float], sequences: Mapping[str, list[str]]) -> str:
    parts, warned = [], []
    for arm, names in sequences.items():
        new = names[-1]
        crossed = ", ".join(f"{n} {100 * metrics[f'{new}_gallery/against_{n}']:.1f}" for n in names[:-1])
        own = 100 * metrics[f"{new}_gallery/against_{new}"]
        parts.append(f"{ARMS[arm]}: new queries in the gallery of {crossed}, in their own {own:.1f}")
        if metrics.get(f"{new}_gallery/incomparable", 0):
            warned.append(ARMS[arm])
    old = 100 * metrics["old_gallery/against_old"]
    warning = f"; {', '.join(warned)}: not trained to be comparable with every older gallery" if warned else ""
    return f"top-1: old in old {old:.1f}; " + "; ".join(parts) + warning


def _given(folder: str, d_old: int) -> tuple[Any, dict]:
    """A user's old model: its network and variables, its lineage among them."""
    from checkpoints.arrays import one_line
    from checkpoints.model import ModelError, load_model

    where = Path(folder)
    where = where / "model" if (where / "model" / "model.json").exists() else where
    try:
        model = load_model(where)
    except (ModelError, OSError) as error:
        raise UserError(f"--old {folder}: {one_line(error)}") from None
    net, variables = model.definition, model.variables
    if not isinstance(net, PlainEmbedding):
        raise UserError(f"--old {folder} is a {type(net).__name__}; a model exported by zoo train oca is needed")
    try:
        oca.check_old_features(net.features, d_old)
    except ValueError as error:
        raise UserError(f"--old {folder}: {error}; set --old-dim {net.features}") from None
    if "lineage" not in variables.get("constants", {}):
        raise UserError(f"--old {folder} has no lineage; it was exported by another version")
    kept = {c: _plain(v) for c, v in variables.items() if c in ("params", "batch_stats")}
    return net, {**kept, "constants": {"lineage": dict(variables["constants"]["lineage"])}}


def fields() -> dict[str, str]:
    """The data fields this recipe needs."""
    return {
        "x": "float32 [N, H, W, C] in [-1, 1]: images (uint8 images of TFDS sets and files are scaled)",
        "label": "int32 [N]: classes; the old model's first",
    }


def arm(arm: str, seed: int) -> dict[str, float]:
    """One arm of the claim; classes, split, the old model and the order of the data are paired by seed."""
    data = shuffled_digits(seed)
    if arm == "untrained":
        return _untrained(data, seed)
    if arm not in ("oca", "bct", "independent", "bt2"):
        raise UserError(f"unknown arm {arm!r} of oca's claim")
    from trainers.run import train_in_memory

    baselines = ("independent",) if arm == "bt2" else ()
    metrics = train_in_memory(Recipe(seed=seed, method=arm, baselines=baselines).on(data), seed=seed).metrics
    new = f"{arm}1"
    found = {
        "new_new": metrics[f"{new}_gallery/against_{new}"],
        "new_old": metrics[f"{new}_gallery/against_old"],
        "old_old": metrics["old_gallery/against_old"],
        "new_new_map": metrics[f"{new}_gallery/against_{new}_map"],
        "new_old_map": metrics[f"{new}_gallery/against_old_map"],
        "old_old_map": metrics["old_gallery/against_old_map"],
        "accuracy": metrics["test/accuracy"],
    }
    return {**found, "gain": found["new_old"] - found["old_old"]}


def _untrained(data: Dataset, seed: int) -> dict[str, float]:
    setting = Recipe(seed=seed)
    x, y = jnp.asarray(data["test"]["x"]), jnp.asarray(data["test"]["label"])
    old, new = (
        net.apply(net.init(jax.random.key(2 * seed + t), x[:1]), x, classify=False)
        for t, net in enumerate((setting._network("oca", 0), setting._network("oca", 1)))
    )
    found: dict[str, float] = {}
    for name, pair in (("new_new", (new, new)), ("new_old", (new, old)), ("old_old", (old, old))):
        q, g = oca.truncate_to_common_dim(*pair)
        values = same_set_retrieval(q, y, g, y, 10)
        found |= {name: values["top1"], f"{name}_map": values["map"]}
    return {**found, "accuracy": 0.1, "gain": found["new_old"] - found["old_old"]}


def benchmarks() -> list[Benchmark]:
    """The orthogonal matrix of the paper's size with its gradient, by each of its maps, and a cross-model retrieval."""
    d = 160
    a = 0.1 * jax.random.normal(jax.random.key(0), (d, d))

    def step(method):
        return lambda a: jax.value_and_grad(lambda a: jnp.sum(rotation(a, method)[0]))(a)

    made = [
        Benchmark(f"rotation {d} x {d} and gradient, {method}", step(method), (a,), 20.0 * d**3, 12.0 * d * d)
        for method in METHODS
    ]
    n = 2000
    q, g = jax.random.normal(jax.random.key(1), (n, d)), jax.random.normal(jax.random.key(2), (n, 128))
    y = jax.random.randint(jax.random.key(3), (n,), 0, 100)

    def retrieve(q, g, y):
        from zoo.metrics.neighbours import retrieval_metrics

        cut, kept = oca.truncate_to_common_dim(q, g)
        return retrieval_metrics(cut, y, kept, y, ks=(1, 5), same_items=True)

    def loop(q, g, y):
        q, g, y = (np.asarray(v) for v in (q, g, y))
        q, g = (v[:, :128] / np.linalg.norm(v[:, :128], axis=1, keepdims=True) for v in (q, g))
        s = q @ g.T
        np.fill_diagonal(s, -np.inf)
        order = np.argsort(-s, axis=1)
        hits = y[order] == y[:, None]
        hits[:, -1] = False
        precision = np.cumsum(hits, 1) / (np.arange(n) + 1)
        return hits[:, :5].any(1).mean(), ((precision * hits).sum(1) / hits.sum(1)).mean()

    made.append(Benchmark(f"retrieval {n} x {n}, 160-d in 128-d", retrieve, (q, g, y), 2.0 * n * n * 128,
                          4.0 * n * 288, {"numpy_argsort": loop}))  # fmt: skip
    return made


def example() -> dict:
    """The conformance rows: the method, its baselines, and the alignment alone on a plain host."""
    rng = np.random.default_rng(0)
    batch = {
        "x": rng.normal(size=(16, 4, 4, 1)).astype(np.float32),
        "label": rng.integers(0, 4, 16).astype(np.int32),
        "index": np.arange(16, dtype=np.int32),
        "mask": np.ones(16, bool),
    }
    body, x = MLP((16,), 8, normalise=True), jnp.asarray(batch["x"][:1])
    prototypes = jax.random.normal(jax.random.key(5), (4, 3))
    row = lambda objective, transform=None: {  # noqa: E731
        "objective": objective, "batch": batch, "optimizer": optax.sgd(1e-3, 0.9), "transform": transform,
        "num_examples": 16,
    }  # fmt: skip
    small, wide = PlainEmbedding(body, 3, 4), PlainEmbedding(body, 4, 4)
    old, new = (_plain(n.init(jax.random.key(9), x)) for n in (small, wide))
    mixed = BasisTransformation(body, 3, 4, 2, 4)
    teachers = small, oca.feature_variables(old), wide, oca.feature_variables(new)
    return {
        **row(oca.oca(ExpandedEmbedding(body, 3, 2, 4), prototypes)),
        "also": {
            "bct": row(oca.bct(small, prototypes)),
            "bt2": row(oca.bt2(mixed, prototypes, *teachers)),
            "plug-in": row(oca.classification(wide), oca.prototype_alignment(prototypes)),
        },
    }
